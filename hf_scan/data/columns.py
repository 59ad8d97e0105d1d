# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Check and rename columns, and split datasets."""

import math
from collections import Counter
from typing import Any

from ..extras import require_extra


try:
    from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
except ImportError:
    require_extra("train", "`hf_scan.data.columns`")
    raise


NAMED = 5  # classes in an error


def prepare_columns(dataset: DatasetDict, image_column: str, label_column: str) -> DatasetDict:
    """
    Rename the two columns to `image` and `labels`, drop the others, and convert labels to class indices.

    Args:
        dataset (`datasets.DatasetDict`): Any image classification dataset.
        image_column (`str`): Name of the column of images.
        label_column (`str`): Name of the column of classes: a `ClassLabel`, numbers or strings.

    Raises:
        `ValueError`: if a column is missing or of another kind, rows have no label, the first split holds fewer than
            two classes, or splits differ in their classes.
    """
    _check_columns(dataset, image_column, label_column)
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.rename_columns({image_column: "image", label_column: "labels"})
    labels = {split: rows.unique("labels") for split, rows in dataset.items()}
    _check_labels(dataset, labels, label_column)
    if isinstance(next(iter(dataset.values())).features["labels"], ClassLabel):
        return dataset
    classes = sorted({label for found in labels.values() for label in found})  # numbers as numbers
    index = {label: position for position, label in enumerate(classes)}
    return dataset.map(lambda row: {"labels": index[row["labels"]]}).cast_column(
        "labels", ClassLabel(names=[str(label) for label in classes])
    )


def _check_columns(dataset: DatasetDict, image_column: str, label_column: str) -> None:
    """Check that every split has images and labels in two columns of these names."""
    if image_column == label_column:
        raise ValueError(f"`image_column` and `label_column` are both {image_column!r}; expected two columns.")
    for split, rows in dataset.items():
        if len(rows) == 0:
            raise ValueError(f"The {split!r} split is empty; expected images. Choose another split.")
        for name, kind in ((image_column, "image"), (label_column, "label")):
            if name not in rows.column_names:
                raise ValueError(
                    f"The {split!r} split has no column {name!r}; it has {rows.column_names}. Name the right one with "
                    f"`--{kind}_column`."
                )
        if not isinstance(rows.features[image_column], Image):
            raise ValueError(
                f"Column {image_column!r} of the {split!r} split holds {rows.features[image_column]}; expected "
                "images. Name the right one with `--image_column`, or cast it to `datasets.Image`."
            )
        feature = rows.features[label_column]
        if not isinstance(feature, (ClassLabel, Value)) or feature.dtype.startswith(("float", "double")):
            raise ValueError(
                f"Column {label_column!r} of the {split!r} split holds {feature}; expected classes, as whole numbers "
                "or strings. Name the right one with `--label_column`."
            )


def _check_labels(dataset: DatasetDict, labels: dict[str, list[Any]], label_column: str) -> None:
    """
    Check that every row has a label, that all splits name the same classes, and that there are two or more.

    Args:
        dataset (`datasets.DatasetDict`): With the column `labels`.
        labels (`dict[str, list[Any]]`): The labels that occur in each split, each once.
        label_column (`str`): The name that the column had, for messages.
    """
    first = next(iter(dataset.values())).features["labels"]
    for split, found in labels.items():
        feature = dataset[split].features["labels"]
        named = isinstance(feature, ClassLabel)
        if None in found or (named and -1 in found):
            raise ValueError(
                f"Column {label_column!r} of the {split!r} split has rows without a label (None, or -1 where classes "
                "have names). Remove them."
            )
        if (named or isinstance(first, ClassLabel)) and feature != first:
            raise ValueError(
                f"Column {label_column!r} holds {first} in one split and {feature} in {split!r}; expected the same "
                "classes, in the same order."
            )
    seen = next(iter(labels.values()))
    if len(seen) < 2:
        raise ValueError(
            f"Column {label_column!r} holds {len(seen)} class, {seen}; a classifier needs at least two. Name the "
            "right column with `--label_column`."
        )


def _check_divisible(dataset: Dataset, share: float) -> None:
    """Check that both parts of a split can hold an image of each class."""
    counts = Counter(dataset["labels"])
    feature = dataset.features["labels"]
    single = [
        repr(feature.int2str(label) if isinstance(feature, ClassLabel) else label)
        for label, count in sorted(counts.items())
        if count == 1
    ]
    if single:
        named = ", ".join(single[:NAMED]) + (f" and {len(single) - NAMED} more" if len(single) > NAMED else "")
        raise ValueError(
            f"{len(single)} of {len(counts)} classes have one image, which cannot be divided: {named}. Add images of "
            "them, remove them, or put test and search images into splits of their own."
        )
    taken = math.ceil(share * len(dataset))
    if min(taken, len(dataset) - taken) < len(counts):
        raise ValueError(
            f"A share of {share} cannot be split off: of {len(dataset)} images it leaves {len(dataset) - taken} and "
            f"{taken}, and there are {len(counts)} classes; expected at least one image of each class in both parts. "
            "Use more images or another share."
        )


def split_off(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """
    Split a stratified share off, such as held-out images to search thresholds on.

    Args:
        dataset (`datasets.Dataset`): With a column `labels`, as [`prepare_columns`] makes it.
        share (`float`): Share to split off, between 0 and 1.
        seed (`int`): The same seed gives the same split.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: the remaining images, and those split off.

    Raises:
        `ValueError`: if the share is not between 0 and 1, or too small or large for the classes there are; if a class
            has one image, which no share divides.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share of images to split off is {share}; expected a number between 0 and 1.")
    _check_divisible(dataset, share)
    try:
        parts = dataset.train_test_split(share, seed=seed, stratify_by_column="labels")
    except ValueError as error:
        raise ValueError(
            f"A share of {share} of {len(dataset)} images cannot be split off with the same mix of classes: {error} "
            "Use more images or another share."
        ) from error
    return parts["train"], parts["test"]
