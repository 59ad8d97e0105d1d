# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ScanTrainingArguments`]: Transformers' training arguments and what self-distillation adds."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class ScanTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the weights of [`~hf_scan.losses.SelfDistillationLoss`].

    Two inherited defaults differ: `remove_unused_columns` is `False`, since images are transformed when they are
    read, and `ddp_find_unused_parameters` is `False`, since every parameter is used in every step.

    Args:
        label_weight (`float`, *optional*, defaults to 0.5): Weight of the labels at the early exits.
        soft_label_weight (`float`, *optional*, defaults to 0.5): Weight of the deepest exit's softened answer.
        hint_weight (`float`, *optional*, defaults to 6.4e-5): Weight of the distance to the deepest exit's feature.
        distillation_temperature (`float`, *optional*, defaults to 3.0): Temperature that softens the answers.

    Raises:
        `ValueError`: if a weight is negative or the temperature is not positive.
    """

    label_weight: float = field(default=0.5, metadata={"help": "Weight of the labels at the early exits."})
    soft_label_weight: float = field(
        default=0.5, metadata={"help": "Weight of the deepest exit's softened answer at the early exits."}
    )
    hint_weight: float = field(
        default=6.4e-5, metadata={"help": "Weight of the squared distance to the deepest exit's feature."}
    )
    distillation_temperature: float = field(
        default=3.0, metadata={"help": "Temperature that softens the answers before they are compared."}
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Drop the columns that the model does not take, before images are transformed."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for unused parameters in each step. There are none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_weight", "soft_label_weight", "hint_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number of at least 0.")
        if not self.distillation_temperature > 0:
            raise ValueError(
                f"`distillation_temperature` is {self.distillation_temperature}; expected a number above 0."
            )
