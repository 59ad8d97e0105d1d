# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Classifiers of torchvision as backbones. torchvision is loaded when one is asked for."""

import re
from importlib import import_module
from typing import Any

import torch
from torch import nn


# Arguments of torchvision that fetch weights, and those that other fields of a configuration set.
REFUSED = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress", "num_classes"})
NAME = re.compile(r"[a-z0-9_]{1,100}")


def check_torchvision(name: str, arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` unless a configuration names a classifier of torchvision, and no weights."""
    if not NAME.fullmatch(name):
        raise ValueError(f"`backbone` is {name[:100]!r}; expected the name of a classifier of torchvision.")
    if refused := sorted(REFUSED.intersection(arguments)):
        raise ValueError(
            f"`backbone_kwargs` names {refused}, which would make torchvision fetch weights, or which other fields "
            "set; only arguments of the architecture are expected. Remove these keys."
        )


def names_of_torchvision() -> list[str]:
    """Return the names of torchvision's classifiers."""
    models = _models()
    names: list[str] = models.list_models(module=models)
    return names


def create_torchvision(name: str, num_labels: int, arguments: dict[str, Any]) -> nn.Module:
    """
    Create a classifier of torchvision with new weights.

    Raises:
        `ImportError`: if torchvision is not installed.
        `ValueError`: if torchvision has no such classifier.
    """
    if name not in names_of_torchvision():
        raise ValueError(
            f"`backbone` is {name[:100]!r}, which this version of torchvision does not know; "
            "`torchvision.models.list_models()` lists the names it knows."
        )
    if name in ("googlenet", "inception_v3"):  # which warn of it, and would take minutes
        arguments = {"init_weights": False, **arguments}
    model: nn.Module = _models().get_model(name, weights=None, num_classes=num_labels, **arguments)
    return model


def find_torchvision(module: nn.Module, num_labels: int) -> str | None:
    """Return the name of the torchvision classifier that a module is, made with default arguments, if it is one."""
    place = type(module).__module__
    if not place.startswith("torchvision.models."):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    models = _models()
    for name in names_of_torchvision():
        if models.get_model_builder(name).__module__ != place:
            continue
        with torch.device("meta"):
            made = create_torchvision(name, num_labels, {})
        if {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()} == shapes:
            return name
    return None


def _models() -> Any:
    try:
        return import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(f"The network is one of torchvision ({error}). `pip install torchvision`.") from error


__all__ = ["check_torchvision", "create_torchvision", "find_torchvision", "names_of_torchvision"]
