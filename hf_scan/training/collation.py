# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Collate rows of datasets into batches."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator


def collate_rows(rows: list[Any], label2id: Mapping[str, int] | None = None) -> dict[str, Any]:
    """
    Collate rows as Transformers' default collator does, and further pairs of an image and its label, labels that are
    names, and rows of [`~hf_scan.training.stage_features.StageFeatures`].

    Args:
        rows (`list`): Dictionaries of `pixel_values` and `labels` (or `label`), or pairs of both.
        label2id (`Mapping[str, int]`, *optional*): The index of each name, as in a network's configuration.

    Returns:
        `dict[str, Any]`: `pixel_values` of shape `(batch_size, num_channels, height, width)`, or `stage_features`; and
            `labels` as they were given, names as indices.

    Raises:
        `TypeError`: if a row is neither a dictionary nor a pair, or an image in a pair is no tensor or array.
        `ValueError`: if a row holds no `pixel_values`, or a label is None or an unknown name.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan.training.collation import collate_rows

    >>> batch = collate_rows([(torch.rand(3, 8, 8), "cat"), (torch.rand(3, 8, 8), "dog")], {"cat": 0, "dog": 1})
    >>> batch["pixel_values"].shape, batch["labels"]
    (torch.Size([2, 3, 8, 8]), tensor([0, 1]))
    ```
    """
    dictionaries = [_as_dictionary(row, label2id or {}) for row in rows]
    if "stage_features" not in dictionaries[0]:
        batch: dict[str, Any] = default_data_collator(dictionaries)
        return batch
    features = tuple(torch.stack(stage) for stage in zip(*(row["stage_features"] for row in dictionaries)))
    return {"stage_features": features, "labels": torch.tensor([row["labels"] for row in dictionaries])}


def check_distributions(labels: torch.Tensor) -> None:
    """
    Raise a `ValueError` unless labels are a distribution over the classes for each image.

    Args:
        labels (`torch.Tensor` of shape `(batch_size, num_labels)`): Probabilities.
    """
    sums = labels.float().sum(dim=1)
    if not (labels >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, and its rows are no distributions: they sum to "
            f"{sums.min():.3g} up to {sums.max():.3g}, with values from {labels.min():.3g}. Expected class indices, "
            "or for each image probabilities that sum to 1. (For several labels an image, set `problem_type` to "
            "'multi_label_classification'.)"
        )


def check_first_row(dataset: Any, collate: Callable[[list[Any]], dict[str, Any]]) -> torch.Tensor:
    """
    Return the label of a dataset's first row, as a batch has it, without a change to random numbers.

    Args:
        dataset: A dataset with one row or more.
        collate (`Callable`): Collates rows.

    Raises:
        `TypeError`: if the row has no label that a tensor can hold. For other rows, as `collate` does.
    """
    with torch.random.fork_rng(devices=[]):  # a transform may draw, and a check changes no run
        row = dataset[0]
    labels = collate([row]).get("labels")
    if not isinstance(labels, torch.Tensor):
        found = row.get("labels", row.get("label"))
        raise TypeError(
            f"The dataset's first row has a label of type {type(found).__name__}; expected a class index under "
            "`labels` or `label`."
        )
    return labels


def rows_with_indices(rows: list[Any], label2id: Mapping[str, int]) -> list[Any]:
    """Return rows whose labels are names as dictionaries with class indices, and others as they are."""
    label: Any = None
    for row in rows[:1]:
        if isinstance(row, Mapping):
            label = row.get("labels", row.get("label"))
        elif isinstance(row, (tuple, list)) and len(row) == 2:
            label = row[1]
    return [_as_dictionary(row, label2id) for row in rows] if isinstance(label, str) else rows


def _as_dictionary(row: Any, label2id: Mapping[str, int]) -> dict[str, Any]:
    if isinstance(row, (tuple, list)) and len(row) == 2:
        image, label = row
        if not isinstance(image, (torch.Tensor, np.ndarray)):
            raise TypeError(
                f"The dataset has pairs of a {type(image).__name__} and a label; expected the image as a tensor. "
                "Transform the images with the image processor first."
            )
        row = {"pixel_values": image, "labels": label}
    if not isinstance(row, Mapping):
        raise TypeError(
            f"The dataset has rows of type {type(row).__name__}; expected dictionaries of `pixel_values` and "
            "`labels`, or pairs of an image and its label."
        )
    if not {"pixel_values", "stage_features"} & set(row):
        raise ValueError(
            f"The dataset has rows of {sorted(row)}; expected `pixel_values` and `labels`. Transform the images with "
            "the image processor first, as `hf_scan.data.train_transform` does."
        )
    label = row.get("labels", row.get("label"))
    others = {name: value for name, value in row.items() if name not in ("labels", "label")}
    return {**others, "labels": _as_index(label, label2id)} if {"labels", "label"} & set(row) else others


def _as_index(label: Any, label2id: Mapping[str, int]) -> Any:
    if label is None:
        raise ValueError("The dataset has a row whose label is None; expected a class index. Remove such rows.")
    if isinstance(label, (list, tuple)) and any(isinstance(name, str) for name in label):
        raise ValueError(
            f"The dataset has the labels {list(label)!r} for an image; expected one label, or where an image has "
            "several, 1 for each of the network's labels that it has and 0 for the others."
        )
    if not isinstance(label, str):
        return label
    if label not in label2id:
        known = sorted(label2id)
        shown = f"{known[:5]} and {len(known) - 5} more" if len(known) > 5 else str(known)
        raise ValueError(
            f"The dataset has the label {label!r}, which is not among the network's, {shown}. Set `id2label` and "
            "`label2id` of its configuration, or give class indices."
        )
    return label2id[label]


__all__ = ["check_distributions", "check_first_row", "collate_rows", "rows_with_indices"]
