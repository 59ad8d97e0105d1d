# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Preprocessing of images for training and evaluation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from transformers.image_processing_utils import BaseImageProcessor

from ..model.image_files import eight_bits


def train_transform(
    processor: BaseImageProcessor, crop: str = "pad", flip: bool = True, auto_augment: str = "none", erase: float = 0.0
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """
    Return a transform for `Dataset.with_transform` that augments images.

    Args:
        processor: The image processor, whose size, interpolation, mean and standard deviation are used.
        crop (`str`, *optional*, defaults to `"pad"`): `"pad"` resizes the shorter edge, pads by an eighth and crops at
            random, as is usual for small images; `"resized"` crops a random part and resizes it, as is usual for
            ImageNet; `"none"` takes the same part as the processor.
        flip (`bool`, *optional*, defaults to `True`): Whether to mirror half of the images.
        auto_augment (`str`, *optional*, defaults to `"none"`): One of torchvision's AutoAugment policies, `"cifar10"`
            or `"imagenet"`, or `"none"`.
        erase (`float`, *optional*, defaults to 0.0): Share of each image's area that a square blanks out (Cutout).
    """
    crops: dict[str, list[torch.nn.Module]] = {
        "pad": [*_resize(processor, "pad"), v2.RandomCrop(_size(processor), padding=_size(processor) // 8)],
        "resized": [v2.RandomResizedCrop(_size(processor), interpolation=_interpolation(processor))],
        "none": _resize(processor, "none"),
    }
    if crop not in crops:
        raise ValueError(f"`crop` is {crop!r}; expected one of {sorted(crops)}.")
    augment = v2.Compose(
        [
            v2.Lambda(eight_bits),
            v2.RGB(),
            *crops[crop],
            *([v2.RandomHorizontalFlip()] if flip else []),
            *_further(auto_augment),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
            *_erase(erase),
        ]
    )

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [augment(image) for image in batch["image"]], "labels": batch["labels"]}

    return transform


def _random_crop(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Return a random crop of each padded image, of the image's own size."""
    size = images.shape[-1]
    padded = F.pad(images, [padding] * 4)
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # views: (n, channels, places, places, size, size)
    rows, top, left = (
        torch.arange(len(images), device=images.device),
        *torch.randint(2 * padding + 1, (2, len(images)), device=images.device),
    )
    return windows[rows, :, top, left]


def _size(processor: BaseImageProcessor) -> int:
    return processor.size["shortest_edge"]


def _interpolation(processor: BaseImageProcessor) -> InterpolationMode:
    known = {0: InterpolationMode.NEAREST, 1: InterpolationMode.LANCZOS, 2: InterpolationMode.BILINEAR}
    return known.get(int(processor.resample), InterpolationMode.BICUBIC)


def _resize(processor: BaseImageProcessor, crop: str) -> list[torch.nn.Module]:
    """Return the deterministic steps that come before random ones."""
    size, interpolation = _size(processor), _interpolation(processor)
    if crop == "pad":
        return [v2.Resize(size, interpolation)]
    if size < 384:
        return [v2.Resize(int(size / processor.crop_pct), interpolation), v2.CenterCrop(size)]
    return [v2.Resize((size, size), interpolation)]


def _further(auto_augment: str) -> list[torch.nn.Module]:
    policies = {"cifar10": v2.AutoAugmentPolicy.CIFAR10, "imagenet": v2.AutoAugmentPolicy.IMAGENET}
    if auto_augment == "none":
        return []
    if auto_augment not in policies:
        raise ValueError(f"`auto_augment` is {auto_augment!r}; expected 'none' or one of {sorted(policies)}.")
    return [v2.AutoAugment(policies[auto_augment])]


def _erase(share: float) -> list[torch.nn.Module]:
    """Return Cutout (DeVries and Taylor, 2017), with squares that lie within the image."""
    if not 0 <= share < 1:
        raise ValueError(f"`erase` is {share}; expected a share of the image's area of at least 0 and below 1.")
    return [v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0))] if share else []


def eval_transform(processor: BaseImageProcessor) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """Return a transform for `Dataset.with_transform` that applies the image processor, and nothing else."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixel_values = processor([eight_bits(image) for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixel_values), "labels": batch["labels"]}

    return transform


__all__ = ["eval_transform", "train_transform"]
