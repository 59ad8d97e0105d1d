# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ScanTrainingArguments`]: Transformers' training arguments and what self-distillation adds."""

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments


# What the authors published, twice: in the code of SCAN itself, with a weight for the hint that is rescaled from its
# sum over a batch of 128 to a mean, and in their later code for self-distillation, which has no hint and no T^2. And
# what measured best here (docs/benchmarks.md, "Training").
DISTILLATION_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "label_weight": [0.5],
        "soft_label_weight": [0.5],
        "hint_weight": [6.4e-5],
        "distillation_temperature": 3.0,
        "scale_by_temperature": True,
        "distillation_teacher": "deepest",
        "distillation_warmup_steps": 0.0,
    },
    "successor": {
        "label_weight": [0.7],
        "soft_label_weight": [0.3],
        "hint_weight": [0.0],
        "distillation_temperature": 3.0,
        "scale_by_temperature": False,
        "distillation_teacher": "deepest",
        "distillation_warmup_steps": 0.0,
    },
    "best": {
        "label_weight": [0.7],
        "soft_label_weight": [0.3],
        "hint_weight": [0.0],
        "distillation_temperature": 3.0,
        "scale_by_temperature": False,
        "distillation_teacher": "ensemble",
        "distillation_warmup_steps": 0.3,
    },
}


@dataclass
class ScanTrainingArguments(TrainingArguments):
    """
    A [`~transformers.TrainingArguments`] with the settings of [`~hf_scan.training.losses.SelfDistillationLoss`].

    Two inherited defaults differ: `remove_unused_columns` is `False`, because images are transformed when they are
    read, and `ddp_find_unused_parameters` is `False`, because every parameter is used in every step, but
    with `backbone_steps`.

    Args:
        distillation_preset (`str`, *optional*, defaults to `"paper"`):
            The values that the following seven arguments have unless they are given: `"paper"` (0.5, 0.5, 6.4e-5,
            T = 3, with T^2), `"successor"` (0.7, 0.3, no hint, T = 3, without T^2), or `"best"`, which measured best
            here: the successor's, with the ensemble as a teacher that comes in over the first 0.3 of the steps.
        label_weight (`float` or `list[float]`, *optional*):
            Weight of the labels at the early exits: one for all of them, or one each. A last one more is the deepest
            exit's, which is 1 otherwise.
        soft_label_weight (`float` or `list[float]`, *optional*):
            Weight of the teacher's softened probabilities, likewise; 0 at the deepest exit unless given. 0 for all of
            them trains without distillation.
        hint_weight (`float` or `list[float]`, *optional*):
            Weight of the distance to the deepest exit's feature, likewise.
        distillation_temperature (`float`, *optional*): Temperature that softens the probabilities.
        scale_by_temperature (`bool`, *optional*):
            Whether the soft-label term is multiplied by the temperature squared.
        distillation_teacher (`str`, *optional*):
            The teacher: the `"deepest"` exit, unless the preset has another; the `"ensemble"` of all exits; or the
            name of another trained classifier for `AutoModelForImageClassification.from_pretrained`, which gets the
            same `pixel_values`.
        distillation_warmup_steps (`float`, *optional*):
            Steps over which the soft-label and hint weights grow from 0, as the teacher is inaccurate at first: a
            number of steps, or a share of all of them if below 1. 0 unless the preset has another.
        mixup_alpha, cutmix_alpha (`float`, *optional*, defaults to 0.0):
            Parameters of the Beta distribution for mixing the images and labels of a training batch in pairs, as timm
            does. 0 disables it.
        backbone_steps (`float`, *optional*, defaults to 0.0):
            Steps at the beginning in which the backbone trains alone, on the labels, and the early exits stay as they
            are: a number of steps, or a share of all of them if below 1. Training the backbone first and all of it
            then is the mixed regime of Kubaty et al., "How to Train Your Multi-Exit Model?", ICML 2025.
        gradient_equilibrium (`bool`, *optional*, defaults to `False`):
            Whether a stage gets the mean, rather than the sum, of the gradients of the exits after it; see
            [`~hf_scan.training.methods.gradient_equilibrium`].
        survivor_weighting (`bool`, *optional*, defaults to `False`):
            Whether a sample counts less at an exit the more confident the exits before it are; see
            [`~hf_scan.training.methods.survivor_weights`].
        head_learning_rate (`float`, *optional*):
            Learning rate of the early exits, from which the same schedule starts. Defaults to `learning_rate`. Fresh
            heads on a trained backbone learn at ten times its rate.
        freeze_backbone (`bool`, *optional*, defaults to `False`):
            Whether to train the early exits only, which leaves the deepest exit's logits as they are.

    Raises:
        `ValueError`: if the preset is unknown, a weight is negative, the temperature or the warm-up are out of range,
            or a setting would be ignored.
    """

    distillation_preset: str = field(
        default="paper",
        metadata={"help": "'paper', 'successor' or 'best': what weights, temperature and teacher are unless given."},
    )
    label_weight: list[float] | None = field(
        default=None, metadata={"help": "Weight of the labels at the early exits: one, or one each."}
    )
    soft_label_weight: list[float] | None = field(
        default=None, metadata={"help": "Weight of the teacher's softened probabilities at the early exits."}
    )
    hint_weight: list[float] | None = field(
        default=None, metadata={"help": "Weight of the squared distance to the deepest exit's feature; 0 for none."}
    )
    distillation_temperature: float | None = field(
        default=None, metadata={"help": "Temperature that softens probabilities before they are compared."}
    )
    scale_by_temperature: bool | None = field(
        default=None, metadata={"help": "Multiply the soft-label term by the temperature squared."}
    )
    distillation_teacher: str | None = field(
        default=None, metadata={"help": "'deepest', 'ensemble', or the name of another trained classifier."}
    )
    distillation_warmup_steps: float | None = field(
        default=None, metadata={"help": "Steps, or share of them, over which the distillation weights grow from 0."}
    )
    mixup_alpha: float = field(default=0.0, metadata={"help": "Blend pairs of images; Beta parameter of the share."})
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Paste a part of one image into another; Beta parameter of the share."}
    )
    backbone_steps: float = field(
        default=0.0, metadata={"help": "Steps, or share of them, in which the backbone trains alone at first."}
    )
    gradient_equilibrium: bool = field(
        default=False, metadata={"help": "Give a stage the mean of the gradients of the exits after it."}
    )
    survivor_weighting: bool = field(
        default=False, metadata={"help": "Count a sample less where earlier exits are confident about it."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the early exits. Defaults to that of the backbone."}
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "Train the early exits only; the deepest exit's logits stay as they are."}
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Drop the columns that the model does not take, before images are transformed."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP search for unused parameters in each step. There are none."}
    )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the token, as Trainer writes and pushes it as the pickle `training_args.bin`."""
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("neftune_noise_alpha", "use_liger_kernel"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is for language models and would change nothing here. Leave it out.")
        if self.distillation_preset not in DISTILLATION_PRESETS:
            raise ValueError(
                f"`distillation_preset` is {self.distillation_preset!r}; expected one of "
                f"{sorted(DISTILLATION_PRESETS)}."
            )
        for name, value in DISTILLATION_PRESETS[self.distillation_preset].items():
            given = getattr(self, name)
            if given is None:
                setattr(self, name, value)
            elif name.endswith("_weight"):
                weights = list(given) if isinstance(given, (list, tuple)) else [given]
                if not weights or not all(0 <= weight < math.inf for weight in weights):
                    raise ValueError(f"`{name}` is {given}; expected numbers of at least 0.")
                setattr(self, name, weights)
        assert self.distillation_temperature is not None
        if not 0 < self.distillation_temperature < math.inf:
            raise ValueError(
                f"`distillation_temperature` is {self.distillation_temperature}; expected a number above 0."
            )
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number of at least 0.")
        if not 0 <= self.label_smoothing_factor <= 1:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor}; expected a number from 0 to 1."
            )
        if self.head_learning_rate is not None and not 0 < self.head_learning_rate < math.inf:
            raise ValueError(f"`head_learning_rate` is {self.head_learning_rate}; expected a number above 0.")
        assert self.distillation_warmup_steps is not None
        for name in ("distillation_warmup_steps", "backbone_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; expected a number of steps, or a share of them below 1."
                )
        for name in ("backbone_steps", "gradient_equilibrium"):
            if self.freeze_backbone and getattr(self, name):
                raise ValueError(f"`{name}` is about training the backbone, and `freeze_backbone` keeps it as it is.")
        if self.backbone_steps:  # in which the heads get no gradient, which DDP would wait for
            self.ddp_find_unused_parameters = True
