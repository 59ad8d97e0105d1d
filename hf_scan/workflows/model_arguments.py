# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What network a run trains, and which weights it starts from."""

import dataclasses
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from ..calibration.certify import RiskBound
from ..model.backbone import create_timm_model, size_argument
from ..model.configuration_scan import ScanConfig
from ..model.modeling_scan import ScanForImageClassification
from ..model.provenance import unknown_images
from ..training.checkpoints import read_trained_on
from .json_files import parse_json
from .state_dicts import read_weights


DEFAULT_BACKBONE = "cifar_resnet18"


@dataclass
class ModelArguments:
    """What the network is, and how its thresholds are found."""

    backbone: str | None = field(
        default=None,
        metadata={"help": "A model of timm. Defaults to the one in `--backbone_weights`, or to 'cifar_resnet18'."},
    )
    backbone_kwargs: str = field(default="{}", metadata={"help": "More arguments for timm, as JSON."})
    exit_points: list[str] | None = field(
        default=None, metadata={"help": "Modules to exit after: names, or indices of taps."}
    )
    attention_type: str = field(default="nearest", metadata={"help": "'nearest', 'separable', 'conv' or 'none'."})
    classifier_type: str = field(default="separable", metadata={"help": "'separable', 'chain' or 'conv'."})
    batch_norm_momentum: float | None = field(
        default=None,
        metadata={"help": "Share of a batch in batch norm's running means. Defaults to the network's."},
    )
    head_width: int | None = field(
        default=None, metadata={"help": "Channels at which heads work that are not 'conv'. Defaults to a rule."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels. Defaults to the backbone's."})
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Trained weights to start from: 'timm' for timm's own of that name, a folder with a checkpoint of "
            "the plain backbone, such as `--plain` writes, or a file of its weights."
        },
    )
    import_module: str | None = field(
        default=None,
        metadata={
            "help": "A Python module to import first, such as one that registers a network with timm.",
            "aliases": ["--import"],
        },
    )
    plain: bool = field(default=False, metadata={"help": "Train the backbone without exits, to compare with."})
    plain_metrics: str | None = field(
        default=None, metadata={"help": "The `metrics.json` of a run with `--plain`, to show its accuracy."}
    )
    beta: float = field(
        default=0.5,
        metadata={"help": "Acceleration that a point of accuracy is worth, in a search without a target."},
    )
    max_accuracy_drop: float | None = field(
        default=None, metadata={"help": "Points that thresholds may lose against the deepest exit."}
    )
    guarantee: float | None = field(
        default=None, metadata={"help": "Points that are certified not to be exceeded, on half of the search split."}
    )
    delta: float = field(default=0.05, metadata={"help": "Probability with which the guarantee may be wrong."})
    fallback: str | None = field(
        default=None,
        metadata={
            "help": "'ensemble', 'deepest' or 'most_confident': the answer to what no exit is sure about. Defaults to "
            "'deepest' where the backbone is frozen, else to 'ensemble'."
        },
    )

    @property
    def name(self) -> str:
        """The model's name: the one that was given, or the default."""
        return self.backbone or DEFAULT_BACKBONE

    def target(self, seed: int) -> dict[str, Any]:
        """Return what thresholds are searched for, as arguments of [`~hf_scan.calibrate`]."""
        target: dict[str, Any] = {}
        if self.max_accuracy_drop is not None:
            target["max_accuracy_drop"] = self.max_accuracy_drop
        if self.guarantee is not None:
            target["guarantee"] = RiskBound(self.guarantee, self.delta)
        return target or {"beta": self.beta, "seed": seed}


# Arguments of timm that a run sets by itself, without a flag of their own.
SET_BY_THE_RUN = {
    "num_classes": "a run has the classes of its images",
    "in_chans": "a run turns all images into three channels, and only `ScanConfig(num_channels=...)` takes others",
}


def _backbone_kwargs(text: str) -> dict[str, Any]:
    found = parse_json(text, "`--backbone_kwargs`", """expected arguments for timm such as '{"depth": 6}'""")
    for name, reason in SET_BY_THE_RUN.items():
        if name in found:
            raise ValueError(f"`--backbone_kwargs` names {name!r}, which is not expected: {reason}. Leave it out.")
    return found


def create_model(network: ModelArguments, names: list[str]) -> ScanForImageClassification:
    """Return the network, with new weights or with those that are asked for."""
    settings: dict[str, Any] = {
        "backbone_kwargs": _backbone_kwargs(network.backbone_kwargs),
        "exit_points": [int(point) if point.isdigit() else point for point in network.exit_points or []] or None,
        "attention_type": network.attention_type,
        "classifier_type": network.classifier_type,
        "head_width": network.head_width,
        "image_size": network.image_size,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    weights = network.backbone_weights
    if weights is None:
        return ScanForImageClassification(ScanConfig(backbone=network.name, **settings))
    if weights == "timm":
        return ScanForImageClassification.from_timm(network.name, pretrained=True, num_labels=len(names), **settings)
    if Path(weights).is_file():
        arguments = {"backbone_kwargs": settings["backbone_kwargs"], "image_size": network.image_size}
        plain = load_plain_network(network.name, weights, **arguments)
        trained_on: str | None = unknown_images(f"weights of {Path(weights).name}")
    else:
        plain, trained_on = load_plain_run(weights, network.backbone)
    return ScanForImageClassification.from_timm(plain, num_labels=len(names), trained_on=trained_on, **settings)


def check_network(network: ModelArguments) -> None:
    """
    Build the network without weights, so that a name or an exit point that does not exist is refused at once.

    Args:
        network ([`ModelArguments`]): Its `import_module` is imported.

    Raises:
        `ModuleNotFoundError`: if there is no such module.
        `ValueError`: if the network cannot be made.
    """
    if network.import_module is not None:
        import_module(network.import_module)
    name, weights = network.name, network.backbone_weights
    if weights is not None and Path(weights).is_dir():
        name = TimmWrapperConfig.from_pretrained(weights).architecture
    if ":" not in name:  # what timm has to fetch first, to know what it is
        with torch.device("meta"):
            create_model(dataclasses.replace(network, backbone=name, backbone_weights=None), ["one", "another"])


def load_plain_run(folder: str | Path, name: str | None) -> tuple[nn.Module, str | None]:
    """
    Return the network of a run without exits, such as `--plain` writes, and the images that it was trained on.

    Args:
        folder (`str` or `Path`): A checkpoint of `TimmWrapperForImageClassification`, or its repository on the Hub.
        name (`str`, *optional*): The model in timm's registry that it is said to be.

    Raises:
        `FileNotFoundError`: if a folder holds no checkpoint.
        `ValueError`: if it is another model.
    """
    if Path(folder).is_dir() and not Path(folder, "config.json").is_file():
        raise FileNotFoundError(
            f"There is no file config.json in {folder}; expected a folder that a run with `--plain` wrote, or a file "
            "of weights."
        )
    wrapper = TimmWrapperForImageClassification.from_pretrained(folder)
    found = wrapper.config.architecture.split(".")[0]
    if name is not None and name.split(".")[0] != found:
        raise ValueError(
            f"The backbone is said to be {name!r}, and the weights in {folder} are of {found!r}. Correct the name, or "
            "name other weights."
        )
    return wrapper.timm_model, read_trained_on(folder)


def load_plain_network(
    name: str,
    weights: str | Path,
    backbone_kwargs: dict[str, Any] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """
    Return a model of timm with the weights of a file, which is read without running code in it.

    Args:
        name (`str`): The model in timm's registry.
        weights (`str` or `Path`): A `.safetensors` or `.pth` file of a state dictionary, as PyTorch and timm write it.
            How many classes there are is read from it.
        backbone_kwargs (`dict[str, Any]`, *optional*): More arguments for timm.
        image_size (`int`, *optional*): Pixels, for a network that is made for one size.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it holds no weights, or not those of the model.
    """
    path, values = Path(weights), read_weights(weights, name)
    arguments = {**size_argument(name, image_size), **(backbone_kwargs or {})}
    with torch.device("meta"):
        classifier = create_timm_model(name, **arguments).pretrained_cfg["classifier"]
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    if f"{classifier}.weight" not in values:
        raise ValueError(
            f"{path} holds no {classifier}.weight, the classifier of {name!r}; expected the weights of a trained "
            "classifier. Correct the name of the model or of the file."
        )
    plain: nn.Module = create_timm_model(name, num_classes=len(values[f"{classifier}.weight"]), **arguments)
    try:
        plain.load_state_dict(values)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not hold the weights of {name!r}: {' '.join(str(error).split())[:300]}. Correct the name of "
            "the model or of the file."
        ) from error
    return plain


def source_on_the_hub(name: str) -> str | None:
    """Return the repository that timm has the weights of a name from, if it is one."""
    if ":" in name:
        source, _, repository = name.partition(":")
        return repository.partition("@")[0] if source == "hf-hub" else None
    cfg = timm.get_pretrained_cfg(name)
    return None if cfg is None else cfg.hf_hub_id


__all__ = [
    "ModelArguments",
    "check_network",
    "create_model",
    "load_plain_network",
    "load_plain_run",
    "source_on_the_hub",
]
