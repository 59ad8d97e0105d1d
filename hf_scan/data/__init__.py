# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Datasets of images: columns, splits, transforms, checks and digests."""

from .checks import check_images
from .columns import prepare_columns, split_off
from .datasets import DecodedRows, EpochCallback, ImagesInMemory, SeededImages
from .digests import digests_as_text, sample_digests, shared_with, some_digests, tensor_digests
from .folders import image_splits, read_image_folder
from .transforms import eval_transform, train_transform


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
