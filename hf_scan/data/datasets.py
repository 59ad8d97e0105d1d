# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Datasets that hold decoded images or augment them reproducibly."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import (
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.image_processing_utils import BaseImageProcessor

from ..model.image_files import eight_bits
from .transforms import _erase, _further, _random_crop, _resize, _size


if TYPE_CHECKING:
    from datasets import Dataset


class ImagesInMemory(TorchDataset):
    """
    A train split that is decoded once, held in memory as bytes and augmented a batch at a time, as [`train_transform`]
    augments single images. On a `device`, images are held and augmented there.

    It is for images that are of one size once the shorter edge is resized, such as those of CIFAR, and that fit into
    memory. Leave `dataloader_num_workers` at 0, as workers save no time, unless `auto_augment` is used, which handles
    images one by one; and `dataloader_pin_memory` off where images are on a device.

    Args:
        rows (`datasets.Dataset`): With columns `image` and `labels`, as [`prepare_columns`] makes them.
        processor, crop, flip, auto_augment, erase: As for [`train_transform`]; `crop` is `"pad"` or `"none"`, and
            `flip` can be `"alternating"`: each image is mirrored in every second epoch, half of them in the first
            (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024, section 3.6).
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the images are.
        pixels (`Sequence[int]`, *optional*): Heights and widths of the images, each for an equal part of the
            epochs, in this order: `[16, 24, 32]` trains the first third on 16 pixels. Defaults to the processor's
            size throughout. Source: Tan and Le, "EfficientNetV2", 2021, section 4 (progressive learning).
        num_epochs (`int`, *optional*, defaults to 1): Epochs that `pixels` divides.

    Raises:
        `ValueError`: if the images are not of one size, `crop` is `"resized"`, which needs them as they were, or
            `flip` or `pixels` are out of range.
    """

    def __init__(
        self,
        rows: "Dataset",
        processor: BaseImageProcessor,
        crop: str = "pad",
        flip: bool | str = True,
        auto_augment: str = "none",
        erase: float = 0.0,
        device: str | torch.device = "cpu",
        pixels: Sequence[int] | None = None,
        num_epochs: int = 1,
    ) -> None:
        size = _size(processor)
        _check_augmentation(crop, flip, pixels, size)
        decode = v2.Compose([v2.Lambda(eight_bits), v2.RGB(), *_resize(processor, crop), v2.PILToTensor()])
        images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        for index, row in enumerate(tqdm(rows, desc="decoding images", leave=False)):
            image = decode(row["image"])
            if image.shape[1:] != (size, size):
                raise ValueError(
                    f"Image {index} is {tuple(image.shape[1:])} pixels once resized; images in memory are squares of "
                    f"{size}. Use `train_transform`."
                )
            images[index] = image
        self.rows = rows
        self.images = images.to(device)
        self.labels = list(rows["labels"])
        self.flip = flip
        self.mirrored_first = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) < 0.5
        self.pixels = list(pixels or [size])
        self.num_epochs = num_epochs
        self.epoch = 0
        self.padding = size // 8 if crop == "pad" else 0
        self.further = v2.Compose(steps) if (steps := _further(auto_augment)) else None
        self.erase = v2.Compose(steps) if (steps := _erase(erase)) else None
        self.normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose how images are mirrored, and how large they are, in an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a batch of rows, as PyTorch's loaders request it."""
        images = self.images[torch.tensor(indices, device=self.images.device)]
        # torchvision's own would shift all images of a batch by the same random amount.
        if self.padding:
            images = _random_crop(images, self.padding)
        if self.flip:
            mirrored = torch.rand(len(images), device=images.device) < 0.5
            if self.flip == "alternating":
                mirrored = (self.mirrored_first[indices] ^ (self.epoch % 2 == 1)).to(images.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.further is not None:
            images = torch.stack([self.further(image) for image in images])
        part = min(self.epoch * len(self.pixels) // self.num_epochs, len(self.pixels) - 1)
        if self.pixels[part] != images.shape[-1]:
            images = v2.functional.resize(images, [self.pixels[part]] * 2, antialias=True)
        images = self.normalize(images)
        if self.erase is not None:
            images = torch.stack([self.erase(image) for image in images])
        return [{"pixel_values": image, "labels": self.labels[index]} for image, index in zip(images, indices)]


def _check_augmentation(crop: str, flip: bool | str, pixels: Sequence[int] | None, size: int) -> None:
    """Check arguments of [`ImagesInMemory`], before images are decoded."""
    if crop not in ("pad", "none"):
        raise ValueError(f"`crop` is {crop!r}; images in memory are cropped as 'pad' or 'none'.")
    if isinstance(flip, str) and flip != "alternating":
        raise ValueError(f"`flip` is {flip!r}; expected true, false or 'alternating'.")
    if any(not 0 < number <= size for number in pixels or []):
        raise ValueError(f"`pixels` is {list(pixels or [])}; expected numbers of 1 to the images' own {size}.")


class DecodedRows(list[dict[str, Any]]):
    """
    A list of all rows of a dataset, transformed once.

    Args:
        rows (`datasets.Dataset`): With a deterministic transform.
        split (`str`): Its name in the progress bar.
    """

    def __init__(self, rows: "Dataset", split: str) -> None:
        super().__init__(tqdm(rows, desc=f"decoding the {split} split", leave=False))
        self.rows = rows


class SeededImages(TorchDataset):
    """
    A dataset that augments each batch with random numbers from the run's seed, the epoch and the rows in the batch. So
    a resumed run gets the images that the uninterrupted one would, with any number of workers and processes.
    [`EpochCallback`] sets the epoch; [`ScanTrainer`] adds it by itself.

    Args:
        rows (`datasets.Dataset` or [`ImagesInMemory`]): With a transform that draws from PyTorch's generators.
        seed (`int`): The run's.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        self.epoch = epoch
        if isinstance(self.rows, ImagesInMemory):
            self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a batch of rows, as PyTorch's loaders request it."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            entropy = [self.seed % 2**64, self.epoch, *indices]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
            return self.rows.__getitems__(indices)


class EpochCallback(TrainerCallback):
    """
    A callback that sets the epoch of a dataset. Accelerate's loaders do so only in a single process that was not
    resumed.

    Args:
        dataset ([`SeededImages`]): The train split.
    """

    def __init__(self, dataset: SeededImages) -> None:
        self.dataset = dataset

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        if args.dataloader_persistent_workers and args.dataloader_num_workers:
            raise ValueError(
                "`dataloader_persistent_workers` is set: such workers keep the first epoch's copy of the dataset, and "
                "would augment every epoch alike. Leave it out."
            )

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


__all__ = ["DecodedRows", "EpochCallback", "ImagesInMemory", "SeededImages"]
