# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What [`~hf_scan.equip`] takes and returns."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EquipArguments:
    """
    What to equip, with what, and for which target.

    Args:
        model (`str`): A model in timm's registry, or one of torchvision as `"torchvision/resnet18"`.
        data (`str`): A folder of images, with a folder for each class, in `train` and `test` or in none of these; or
            a dataset on the Hub.
        output (`str`): Folder to write to.
        weights (`str`, *optional*, defaults to `"timm"`): A file of the model's weights, a folder that a run with
            `--plain` wrote, or `"timm"` for the library's own.
        max_accuracy_drop (`float`, *optional*, defaults to 0.5): Points that may be lost against the plain network.
        guarantee (`float`, *optional*): Points that are certified not to be exceeded, on images kept for that.
        delta (`float`, *optional*, defaults to 0.05): Probability with which the guarantee may be wrong.
        max_exits (`int`, *optional*, defaults to 4): The most early exits.
        exit_points (`list[str]`, *optional*): Where exits may stand. Defaults to every block.
        finetune (`bool`, *optional*, defaults to `False`): Train the backbone too, jointly with the heads.
        search_epochs (`float`, *optional*, defaults to 4): Epochs that the heads of all candidates are trained.
        epochs (`float`, *optional*, defaults to 4): Epochs that the chosen heads are trained further; with `finetune`,
            the whole network.
        batch_size (`int`, *optional*, defaults to 64): Images of a training step.
        learning_rate (`float`, *optional*): Of the last training. Defaults to the recipe's, and to a tenth of it with
            `finetune`.
        holdout (`float`, *optional*, defaults to 0.25): Share of the train images to search exits and thresholds on.
        image_size (`int`, *optional*): Pixels. Defaults to the model's.
        runtime (`str`, *optional*): `"onnx"` or `"pytorch"`, which will serve and is measured. Defaults to ONNX
            Runtime where the extra `hf_scan[onnx]` is installed.
        serve_batch_size (`int`, *optional*, defaults to 1): Images at a time that it will serve.
        workers (`int`, *optional*, defaults to 0): Processes that read images.
        seed (`int`, *optional*, defaults to 0): Of everything random.
    """

    model: str = field(metadata={"help": "A model of timm, or of torchvision as 'torchvision/resnet18'."})
    data: str = field(metadata={"help": "A folder of images, a folder for each class; or a dataset on the Hub."})
    output: str = field(metadata={"help": "Folder to write to."})
    weights: str = field(
        default="timm", metadata={"help": "A file or a plain run's folder, or 'timm' for the library's own."}
    )
    max_accuracy_drop: float = field(
        default=0.5, metadata={"help": "Points that may be lost against the plain network."}
    )
    guarantee: float | None = field(default=None, metadata={"help": "Points that are certified not to be exceeded."})
    delta: float = field(default=0.05, metadata={"help": "Probability with which the guarantee may be wrong."})
    max_exits: int = field(default=4, metadata={"help": "The most early exits."})
    exit_points: list[str] | None = field(default=None, metadata={"help": "Where exits may stand; else every block."})
    finetune: bool = field(default=False, metadata={"help": "Train the backbone too, jointly with the heads."})
    search_epochs: float = field(default=4, metadata={"help": "Epochs that the heads of all candidates are trained."})
    epochs: float = field(default=4, metadata={"help": "Epochs that the chosen exits are trained further."})
    batch_size: int = field(default=64, metadata={"help": "Images of a training step."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of the last training; else the recipe's."})
    holdout: float = field(default=0.25, metadata={"help": "Share of the train images to search on."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels; else the model's."})
    runtime: str | None = field(default=None, metadata={"help": "'onnx' or 'pytorch': what will serve."})
    serve_batch_size: int = field(default=1, metadata={"help": "Images at a time that it will serve."})
    workers: int = field(default=0, metadata={"help": "Processes that read images."})
    seed: int = field(default=0, metadata={"help": "Of everything random."})


@dataclass(frozen=True)
class Equipped:
    """
    What [`equip`] made.

    Args:
        plain_accuracy (`float`): The plain network's accuracy on the test images: of the same weights without exits.
        accuracy (`float`): That of the adaptive answers.
        speedup (`float`): Measured on test images in the runtime that will serve, over the plain network there; 1.0
            where no exit pays.
        runtime (`str`): That runtime, in words.
        output (`str`): The folder.
        next_step (`str`): What to do now.
    """

    plain_accuracy: float
    accuracy: float
    speedup: float
    runtime: str
    output: str
    next_step: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        drop = 100 * (self.plain_accuracy - self.accuracy)
        accuracies = f"{self.plain_accuracy:.2%} plain, {self.accuracy:.2%} adaptive"
        return "\n".join(
            [
                f"Accuracy: {accuracies} ({drop:+.2f} points of drop)",
                f"Speed-up: {self.speedup:.2f}x, measured in {self.runtime} against the plain network there",
                f"Written to: {self.output}",
                f"Next: {self.next_step}",
            ]
        )


__all__ = ["EquipArguments", "Equipped"]
