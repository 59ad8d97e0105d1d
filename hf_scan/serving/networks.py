# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The two kinds of networks that an engine runs stage by stage: of PyTorch, and exported."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np


class Row(NamedTuple):
    """
    The answer to one sample.

    Args:
        number (`int`): Which sample.
        logits (`torch.Tensor` or `np.ndarray` of shape `(num_labels,)`): Its logits, on the host.
        label (`int`): The label with the largest logit.
        exit_index (`int`): The exit that answered; -1 if the logits are not finite.
        confidence (`float`): The confidence of the answer.
    """

    number: int
    logits: Any
    label: int
    exit_index: int
    confidence: float


Result = Row | tuple[int, Exception]  # or which sample has no answer, and why


class Arrivals:
    """
    Images in front of the first stage. They become one array when the stage takes them, and not one by one.

    Args:
        ids (`list[int]`): Their numbers.
        images (`list`): The images, on the host and without a batch dimension.
    """

    __slots__ = ("ids", "images")

    def __init__(self, ids: list[int], images: list[Any]) -> None:
        self.ids, self.images = ids, images

    def __len__(self) -> int:
        return len(self.ids)

    def numbers(self) -> list[int]:
        """Return the numbers of the images."""
        return self.ids

    def select(self, rows: slice | list[int]) -> "Arrivals":
        """Return some of the images."""
        if isinstance(rows, slice):
            return Arrivals(self.ids[rows], self.images[rows])
        return Arrivals([self.ids[row] for row in rows], [self.images[row] for row in rows])

    @staticmethod
    def join(groups: "Sequence[Arrivals]") -> "Arrivals":
        """Return one group of the images of several."""
        ids = [number for group in groups for number in group.ids]
        return Arrivals(ids, [image for group in groups for image in group.images])


class ServedNetwork(Protocol):
    """What an engine needs of a network."""

    num_stages: int
    id2label: dict[int, str]

    def prepare(self, image: Any) -> Any:
        """Return an image of the right shape and type, on the host and without a batch dimension."""

    def advance(self, index: int, group: Any) -> tuple[list[Result], Any | None]:
        """
        Run a stage. Return the answers to the samples that leave, or why there is none, and the group of the others.
        The first stage takes [`Arrivals`].
        """


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
    Return an image without a batch dimension.

    Args:
        image (`torch.Tensor` or `np.ndarray`): The image, with a batch dimension of 1 or none.
        shape (`tuple[int, ...]`): The shape that it must have.

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
        return image
    if found == (1, *shape):
        return image[0]
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
        """Return an image of the right shape and type."""
        prepared = np.asarray(one_image(image, self._shape))
        if prepared.dtype != self._dtype:
            raise ValueError(f"The image holds {prepared.dtype}; the exported network takes {self._dtype}.")
        return prepared

    def advance(self, index: int, group: Any) -> tuple[list[Result], Any | None]:
        """Run a stage and route its samples."""
        results: list[Result] = []
        if index == 0:
            images = np.stack(group.images)
            if self._dtype != "uint8" and not np.isfinite(images.sum(dtype=np.float32)):
                finite = np.isfinite(images.reshape(len(images), -1)).all(axis=1)
                results = without_answer(group, finite)
                group, images = group.select(finite.nonzero()[0].tolist()), images[finite]
            if len(group) == 0:
                return results, None
            group = self._group(np.array(group.ids), [images])
        answers, stay = self._advance(self.model, self.settings, self.plan, index, group)
        for some in answers:
            columns = (some.logits.argmax(-1), some.exit_index, some.confidence)
            # A copy, or a caller who keeps one answer would keep its whole batch's.
            rows = zip(some.ids.tolist(), map(np.copy, some.logits), *(column.tolist() for column in columns))
            results += map(Row._make, rows)
        return results, stay


def without_answer(group: Arrivals, finite: Sequence[bool]) -> list[Result]:
    """Return the results of the images that hold NaN or infinite values."""
    text = "The image holds NaN or infinite values; expected finite ones. Check the image."
    return [(number, ValueError(text)) for number, good in zip(group.ids, finite) if not good]


__all__ = [
    "Arrivals",
    "ExportedNetwork",
    "Result",
    "Row",
    "ServedNetwork",
    "one_image",
    "served_network",
    "without_answer",
]
