# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Digests of images, to find images that two splits share."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from .datasets import DecodedRows, ImagesInMemory, SeededImages


def sample_digests(dataset: Any, rows: Sequence[int] | None = None) -> np.ndarray | None:
    """
    Return a digest of each image of a dataset, to find images that two datasets share.

    The digest of an image of a `datasets.Dataset` is that of its stored bytes, whatever the transform and the other
    columns; that of a row without an image is of all its values. The classes of this package and PyTorch's `Subset`
    and `ConcatDataset` give the digests of the datasets they hold. For a list or a `TensorDataset`, `pixel_values` and
    label are digested; for stored features, the images that they were computed from.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): The images.
        rows (`Sequence[int]`, *optional*): Which of them. Defaults to all.

    Returns:
        `np.ndarray` of shape `(n,)` and type uint64: 8 bytes of a hash of each; `None` for a dataset of another kind,
        whose images may differ between reads.
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
    datasets = sys.modules.get("datasets")  # whose datasets there are only once somebody has imported it
    if datasets is not None and isinstance(dataset, datasets.Dataset):
        images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        stored = (dataset.select_columns(images) if images else dataset).with_format("arrow")
        stored = stored if rows is None else stored.select(rows)
        batches = (table.to_pylist() for table in stored.iter(batch_size=64))
        return np.array([_digest(*_content(row)) for batch in batches for row in batch], dtype=np.uint64)
    if isinstance(dataset, (list, TensorDataset)) and (len(dataset) == 0 or _as_tensors(dataset[0]) is not None):
        pairs = (_as_tensors(dataset[row]) for row in (range(len(dataset)) if rows is None else rows))
        digests = [tensor_digests(*pair) for pair in pairs if pair is not None]
        return np.concatenate(digests) if digests else np.array([], dtype=np.uint64)
    return None


def _as_tensors(row: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the pixels and the label of a row of tensors or arrays, each as a batch of one."""
    if isinstance(row, (tuple, list)) and len(row) == 2:
        row = {"pixel_values": row[0], "labels": row[1]}
    if not isinstance(row, dict) or not isinstance(row.get("pixel_values"), (torch.Tensor, np.ndarray)):
        return None
    label = row.get("labels", row.get("label"))
    if label is None or isinstance(label, str):
        return None
    return torch.as_tensor(row["pixel_values"])[None], torch.as_tensor(label)[None]


DIGESTS_KEPT = 512
DIGEST_DIGITS = 12  # hexadecimal; with a million images, the probability of any collision is 1 in 500


def some_digests(dataset: Any) -> str | None:
    """
    Return the number of images of a dataset and the digests of some, spread evenly over it, as text to be saved. A
    split that holds a tenth of the dataset holds about a tenth of these.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    digests = sample_digests(dataset, _evenly(len(dataset)).tolist())
    return None if digests is None else _as_text(digests, len(dataset))


def digests_as_text(digests: np.ndarray) -> str:
    """Return [`some_digests`] of a dataset whose digests are all known."""
    return _as_text(digests[_evenly(len(digests))], len(digests))


def shared_with(digests: np.ndarray, text: str) -> tuple[int, float]:
    """
    Return how many of a dataset's remembered images a split shares.

    Args:
        digests (`np.ndarray` of shape `(n,)`): Of the split's images.
        text (`str`): [`some_digests`] of the dataset.

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
    """Return the digests of images as they go into the network."""
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
