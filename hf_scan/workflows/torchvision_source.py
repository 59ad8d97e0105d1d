# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Trained classifiers of torchvision, which a run names `torchvision/resnet18`."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..model.modeling_scan import ScanForImageClassification
from ..model.provenance import unknown_images
from ..model.torchvision_backbones import create_torchvision, names_of_torchvision
from .state_dicts import read_weights


PREFIX = "torchvision/"


def torchvision_name(model: str) -> str | None:
    """
    Return the name of a classifier that torchvision knows, from the name with its prefix; `None` for other names.

    Raises:
        `ImportError`: if torchvision is not installed.
        `ValueError`: if torchvision has no such classifier.
    """
    if not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    if name not in names_of_torchvision():
        raise ValueError(
            f"The model is {model!r}, and this version of torchvision has no classifier {name!r}; expected "
            f"'{PREFIX}' and one of `torchvision.models.list_models(module=torchvision.models)`. Correct the name."
        )
    return name


def load_torchvision(name: str, weights: str, image_size: int | None = None) -> ScanForImageClassification:
    """
    Return a trained classifier of torchvision, prepared as torchvision's own weights of it are.

    Args:
        name (`str`): Its name there, such as `"resnet18"`.
        weights (`str`): A file of a state dictionary, from which the number of classes is read; `"timm"`, the default
            of a run, or `"torchvision"` downloads torchvision's own.
        image_size (`int`, *optional*): Pixels. Defaults to the size at which torchvision's own weights are used.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it holds no weights, or not those of the model.
    """
    models = import_module("torchvision.models")
    own = models.get_model_weights(name).DEFAULT
    prepared = own.transforms()
    if weights in ("timm", "torchvision"):
        plain = models.get_model(name, weights=own)
        labels: dict[str, Any] = {"id2label": dict(enumerate(own.meta["categories"]))}
        labels["label2id"] = {label: index for index, label in labels["id2label"].items()}
        if len(labels["label2id"]) < len(labels["id2label"]):  # ImageNet has two cranes
            labels = {}
        trained_on = unknown_images(f"torchvision's weights of {name}")
    else:
        plain, labels = _with_weights(name, weights), {}
        trained_on = unknown_images(f"weights of {Path(weights).name}")
    size = image_size or prepared.crop_size[0]
    return ScanForImageClassification.from_module(
        plain, image_size=size, preprocessing=prepared, trained_on=trained_on, backbone=name, **labels
    )


def for_other_classes(source: ScanForImageClassification, names: list[str]) -> ScanForImageClassification:
    """Return a network of torchvision with a new classifier for other classes, and its other weights."""
    config = source.config
    plain = create_torchvision(config.backbone, len(names), dict(config.backbone_kwargs))
    wanted = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    values = source.backbone.state_dict()
    plain.load_state_dict({k: v for k, v in values.items() if v.shape == wanted[k]}, strict=False)
    return ScanForImageClassification.from_module(
        plain,
        image_size=config.image_size,
        preprocessing=dict(config.preprocessing or {}),
        trained_on=source.exit_config.trained_on,
        backbone=config.backbone,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )


def _with_weights(name: str, weights: str) -> nn.Module:
    values = read_weights(weights, f"{PREFIX}{name}")
    with torch.device("meta"):
        known = {key: tensor.shape for key, tensor in create_torchvision(name, 1000, {}).state_dict().items()}
    # The classifier is the last tensor, and has a row for each class.
    last = values.get(list(known)[-1])
    if last is None or last.ndim == 0:
        raise ValueError(
            f"{weights} holds no {list(known)[-1]}, of the classifier of '{PREFIX}{name}'; expected the weights of a "
            "trained classifier. Correct the name of the model or of the file."
        )
    plain = create_torchvision(name, len(last), {})
    try:
        plain.load_state_dict(values)
    except RuntimeError as error:
        raise ValueError(
            f"{weights} does not hold the weights of '{PREFIX}{name}': {' '.join(str(error).split())[:300]}. Correct "
            "the name of the model or of the file."
        ) from error
    return plain


__all__ = ["PREFIX", "for_other_classes", "load_torchvision", "torchvision_name"]
