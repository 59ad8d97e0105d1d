# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The two kinds of networks that an engine runs stage by stage: of PyTorch, and exported."""

from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np


class Row(NamedTuple):
    """
    The answer to one sample.

    Args:
        number (`int`): Which sample.
        logits (`torch.Tensor` or `np.ndarray` of shape `(num_labels,)`): Its logits, on the host.
        exit_index (`int`): The exit that answered; -1 if the logits are not finite.
        confidence (`float`): The confidence of the answer.
    """

    number: int
    logits: Any
    exit_index: int
    confidence: float


class ServedNetwork(Protocol):
    """What an engine needs of a network."""

    num_stages: int
    id2label: dict[int, str]

    def prepare(self, image: Any) -> Any:
        """Return an image as a checked batch of one, on the host."""

    def group(self, number: int, image: Any) -> Any:
        """Return a group of one image in front of the first stage."""

    def advance(self, index: int, group: Any) -> tuple[list[Row], Any | None]:
        """Run a stage; return the answers to the samples that leave, and the group of the others."""


def served_network(model: Any, exit_config: Any, max_exit: int | None, changes: dict[str, Any]) -> ServedNetwork:
    """
    Return what an engine needs of a model.

    Args:
        model ([`ScanForImageClassification`] or [`~hf_scan.runtime.ORTScanForImageClassification`]): The model.
        exit_config ([`~hf_scan.ExitConfig`], *optional*): Defaults to the model's.
        max_exit (`int`, *optional*): The deepest exit that may answer.
        changes (`dict`): Fields of the exit configuration to override.

    Raises:
        `TypeError`: if the model is neither.
        `ValueError`: if it is in training mode, or thresholds are missing or of the wrong number.
    """
    if hasattr(model, "run_stage") and hasattr(model, "run_exit"):
        return import_module("hf_scan.serving.torch_network").TorchNetwork(model, exit_config, max_exit, changes)
    if hasattr(model, "manifest") and hasattr(model, "run"):
        return ExportedNetwork(model, exit_config, max_exit, changes)
    raise TypeError(
        f"`model` is a {type(model).__name__}; expected a `ScanForImageClassification` or an engine of an export, "
        "such as `ORTScanForImageClassification`."
    )


def one_image(image: Any, shape: tuple[int, ...]) -> Any:
    """
    Return an image with a batch dimension.

    Args:
        image (`torch.Tensor` or `np.ndarray`): The image, with a batch dimension of 1 or none.
        shape (`tuple[int, ...]`): The shape that it must have without one.

    Raises:
        `TypeError`: if it is no array.
        `ValueError`: if it is of another shape.
    """
    if not hasattr(image, "dtype") or not hasattr(image, "shape"):
        raise TypeError(
            f"The image is a {type(image).__name__}; expected an array or tensor of shape {shape}. Prepare it with "
            "the model's image processor."
        )
    found = tuple(image.shape)
    if found == shape:
        return image[None]
    if found == (1, *shape):
        return image
    raise ValueError(f"The image has shape {found}; expected {shape}. Prepare it with the model's image processor.")


class ExportedNetwork:
    """A [`ServedNetwork`] of an exported network."""

    def __init__(self, model: Any, exit_config: Any, max_exit: int | None, changes: dict[str, Any]) -> None:
        routing, rule = import_module("hf_scan.runtime.routing"), import_module("hf_scan.runtime.numpy_rule")
        problem = import_module("hf_scan.model.problem_type")
        settings = rule.ExitSettings.of(model.exit_config if exit_config is None else exit_config)
        settings = settings.replace(**changes) if changes else settings
        self.settings = problem.for_problem(settings, model.config.problem_type)
        self.plan = rule.plan_steps(self.settings, model.num_exits, max_exit)
        self.model, self.num_stages, self.id2label = model, len(self.plan), model.config.id2label
        self._group, self._advance = routing.Group, routing.advance
        self._shape, self._dtype = tuple(model.manifest.image["shape"]), model.manifest.image["dtype"]

    def prepare(self, image: Any) -> np.ndarray:
        """Return an image as a checked batch of one."""
        images = np.asarray(one_image(image, self._shape))
        if images.dtype != self._dtype:
            raise ValueError(f"The image holds {images.dtype}; the exported network takes {self._dtype}.")
        if self._dtype != "uint8" and not np.isfinite(images.sum(dtype=np.float32)):
            raise ValueError("The image holds NaN or infinite values; expected finite ones. Check the image.")
        return images

    def group(self, number: int, image: np.ndarray) -> Any:
        """Return a group of one image in front of the first stage."""
        return self._group(np.array([number]), [image])

    def advance(self, index: int, group: Any) -> tuple[list[Row], Any | None]:
        """Run a stage and route its samples."""
        answers, stay = self._advance(self.model, self.settings, self.plan, index, group)
        rows = []
        for some in answers:
            columns = zip(some.ids.tolist(), some.logits, some.exit_index.tolist(), some.confidence.tolist())
            # A copy, or a caller who keeps one answer would keep its whole batch's.
            rows += [Row(number, logits.copy(), exit_index, sure) for number, logits, exit_index, sure in columns]
        return rows, stay


__all__ = ["ExportedNetwork", "Row", "ServedNetwork", "one_image", "served_network"]
