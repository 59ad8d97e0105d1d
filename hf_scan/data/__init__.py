# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Datasets of images: columns, splits, transforms, checks and digests."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checks import check_images
    from .columns import prepare_columns, split_off
    from .datasets import DecodedRows, EpochCallback, ImagesInMemory, SeededImages
    from .digests import digests_as_text, sample_digests, shared_with, some_digests, tensor_digests
    from .folders import image_splits, read_image_folder
    from .transforms import eval_transform, train_transform

# Imported lazily: transforms and digests do not need `datasets`, folders and columns do.
_IMPORTED_WHEN_USED = {
    "DecodedRows": ".datasets",
    "EpochCallback": ".datasets",
    "ImagesInMemory": ".datasets",
    "SeededImages": ".datasets",
    "check_images": ".checks",
    "digests_as_text": ".digests",
    "eval_transform": ".transforms",
    "image_splits": ".folders",
    "prepare_columns": ".columns",
    "read_image_folder": ".folders",
    "sample_digests": ".digests",
    "shared_with": ".digests",
    "some_digests": ".digests",
    "split_off": ".columns",
    "tensor_digests": ".digests",
    "train_transform": ".transforms",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        return getattr(import_module(_IMPORTED_WHEN_USED[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DecodedRows",
    "EpochCallback",
    "ImagesInMemory",
    "SeededImages",
    "check_images",
    "digests_as_text",
    "eval_transform",
    "image_splits",
    "prepare_columns",
    "read_image_folder",
    "sample_digests",
    "shared_with",
    "some_digests",
    "split_off",
    "tensor_digests",
    "train_transform",
]
