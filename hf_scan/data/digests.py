# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Digests of images, by which two splits are seen to share some."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    default_data_collator,
)

from .datasets import DecodedRows, ImagesInMemory, SeededImages


def sample_digests(dataset: Any, rows: Sequence[int] | None = None) -> np.ndarray | None:
    """
    Tells which images a dataset holds, so that two datasets can be seen to share some.

    An image of a `datasets.Dataset` is known by its bytes as they are stored, whatever the transform and the other
    columns; a row without an image, by all that it holds. So is one of the classes here, which know their dataset, and
    one of PyTorch's `Subset` and `ConcatDataset`. One of a list is known by its `pixel_values` and label. Stored
    features are known by the images that they were computed from.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): The images.
        rows (`Sequence[int]`, *optional*): Which of them. Defaults to all.

    Returns:
        `np.ndarray` of shape `(n,)` and type uint64: 8 bytes of a hash of each; `None` where the dataset is of another
        kind, whose images may be others the next time.
    """
    while isinstance(dataset, (SeededImages, ImagesInMemory, DecodedRows)):
        dataset = dataset.rows
    chosen = None if rows is None else np.asarray(rows, dtype=int)
    if isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, dtype=int)
        return sample_digests(dataset.dataset, (indices if chosen is None else indices[chosen]).tolist())
    if isinstance(dataset, ConcatDataset):
        parts = [sample_digests(part) for part in dataset.datasets]
        if any(part is None for part in parts):
            return None
        joined = np.concatenate([part for part in parts if part is not None])
        return joined if chosen is None else joined[chosen]
    if isinstance(samples := getattr(dataset, "samples", None), np.ndarray) and samples.dtype == np.uint64:
        return samples if chosen is None else samples[chosen]
    if isinstance(dataset, Dataset):
        images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
        stored = (dataset.select_columns(images) if images else dataset).with_format("arrow")
        stored = stored if rows is None else stored.select(rows)
        batches = (table.to_pylist() for table in stored.iter(batch_size=64))
        return np.array([_digest(*_content(row)) for batch in batches for row in batch], dtype=np.uint64)
    if isinstance(dataset, list) and all(isinstance(row, dict) and "pixel_values" in row for row in dataset[:1]):
        singles = (default_data_collator([dataset[row]]) for row in (range(len(dataset)) if rows is None else rows))
        digests = [tensor_digests(item["pixel_values"], item["labels"]) for item in singles]
        return np.concatenate(digests) if digests else np.array([], dtype=np.uint64)
    return None


DIGESTS_KEPT = 512
DIGEST_DIGITS = 12  # hexadecimal; of a million images, two are taken for each other once in 500 times


def some_digests(dataset: Any) -> str | None:
    """
    How many images a dataset holds, and the digests of some, spread evenly over it, as text to be saved. A split that
    holds a tenth of the dataset holds about a tenth of these.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    digests = sample_digests(dataset, _evenly(len(dataset)).tolist())
    return None if digests is None else _as_text(digests, len(dataset))


def digests_as_text(digests: np.ndarray) -> str:
    """[`some_digests`] of a dataset whose digests are all known."""
    return _as_text(digests[_evenly(len(digests))], len(digests))


def shared_with(digests: np.ndarray, text: str) -> tuple[int, float]:
    """
    Args:
        digests (`np.ndarray` of shape `(n,)`): Of a split's images.
        text (`str`): What [`some_digests`] gave for a dataset.

    Returns:
        `tuple[int, float]`: how many of the remembered images are in the split, and how many would be if the whole
        split were a part of the dataset.
    """
    size, _, remembered = text.rpartition(": ")
    words = remembered.split()
    known = {f"{digest:016x}"[:DIGEST_DIGITS] for digest in digests}
    share = len(words) / int(size) if size.isdigit() and int(size) else 1.0
    return sum(word[:DIGEST_DIGITS] in known for word in words), share * len(known)


def _evenly(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(DIGESTS_KEPT, count), dtype=int)


def _as_text(digests: np.ndarray, size: int) -> str:
    return f"{size}: " + " ".join(f"{digest:016x}"[:DIGEST_DIGITS] for digest in digests)


def tensor_digests(pixel_values: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """The digests of images as they go into the network."""
    pixels = pixel_values.float().cpu().contiguous().numpy()
    pairs = zip(pixels, labels.cpu().numpy().astype(np.int64))
    return np.array([_digest(image.tobytes(), label.tobytes()) for image, label in pairs], dtype=np.uint64)


def _content(row: dict[str, Any]) -> Iterator[bytes]:
    for _, value in sorted(row.items()):
        if isinstance(value, dict) and value.get("bytes") is not None:  # an image, whose path tells nothing more
            value = value["bytes"]
        yield value if isinstance(value, bytes) else repr(value).encode()


def _digest(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


__all__ = [
    "DIGESTS_KEPT",
    "DIGEST_DIGITS",
    "digests_as_text",
    "sample_digests",
    "shared_with",
    "some_digests",
    "tensor_digests",
]
