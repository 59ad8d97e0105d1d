# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""From images to `pixel_values`: columns checked, splits kept apart, one preprocessing for training and for use."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import InterpolationMode, v2
from tqdm.auto import tqdm
from transformers import (
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.image_processing_utils import BaseImageProcessor


def prepare_columns(dataset: DatasetDict, image_column: str, label_column: str) -> DatasetDict:
    """
    Renames the two columns to `image` and `labels`, drops the others, and makes labels class indices.

    Args:
        dataset (`datasets.DatasetDict`): Any image classification dataset.
        image_column (`str`): Name of the column of images.
        label_column (`str`): Name of the column of classes: a `ClassLabel`, numbers or strings.

    Raises:
        `ValueError`: if a column is missing or of another kind, rows have no label, the first split holds fewer than
            two classes, or splits differ in their classes.
    """
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
    dataset = dataset.select_columns([image_column, label_column])
    dataset = dataset.rename_columns({image_column: "image", label_column: "labels"})
    first = next(iter(dataset.values()))
    values = {split: rows.unique("labels") for split, rows in dataset.items()}
    for split, found in values.items():
        named = isinstance(dataset[split].features["labels"], ClassLabel)
        if None in found or (named and -1 in found):
            raise ValueError(
                f"Column {label_column!r} of the {split!r} split has rows without a label (None, or -1 where classes "
                "have names). Remove them."
            )
        if (named or isinstance(first.features["labels"], ClassLabel)) and (
            dataset[split].features["labels"] != first.features["labels"]
        ):
            raise ValueError(
                f"Column {label_column!r} holds {first.features['labels']} in one split and "
                f"{dataset[split].features['labels']} in {split!r}; expected the same classes, in the same order."
            )
    seen = next(iter(values.values()))
    if len(seen) < 2:
        raise ValueError(
            f"Column {label_column!r} holds {len(seen)} class, {seen}; a classifier needs at least two. Name the "
            "right column with `--label_column`."
        )
    if not isinstance(first.features["labels"], ClassLabel):
        classes = sorted({label for found in values.values() for label in found})  # numbers as numbers
        index = {label: position for position, label in enumerate(classes)}
        dataset = dataset.map(lambda row: {"labels": index[row["labels"]]}).cast_column(
            "labels", ClassLabel(names=[str(label) for label in classes])
        )
    return dataset


def split_off(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """
    Takes a share of a split away, with the same mix of classes, so that thresholds are searched on images that
    training never sees.

    Args:
        dataset (`datasets.Dataset`): With a column `labels`, as [`prepare_columns`] makes it.
        share (`float`): Between 0 and 1.
        seed (`int`): The same seed takes the same images.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: what is left, and what was taken.

    Raises:
        `ValueError`: if the share is not between 0 and 1, or too small or large for the classes there are.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share of images to split off is {share}; expected a number between 0 and 1.")
    try:
        parts = dataset.train_test_split(share, seed=seed, stratify_by_column="labels")
    except ValueError as error:
        raise ValueError(
            f"A share of {share} of {len(dataset)} images cannot be split off with the same mix of classes: {error} "
            "Use more images or another share."
        ) from error
    return parts["train"], parts["test"]


def train_transform(
    processor: BaseImageProcessor, crop: str = "pad", flip: bool = True, auto_augment: str = "none", erase: float = 0.0
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """
    A transform for `Dataset.with_transform` that augments.

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


class ImagesInMemory(TorchDataset):
    """
    A split to train on, decoded once and held in memory as bytes, augmented by the batch: what [`train_transform`]
    does, without its time for each image. On a `device`, images stay and are augmented there.

    It is for images that are all as large once the shorter edge is resized, as those of CIFAR are, and that fit.
    Leave `dataloader_num_workers` at 0, where there is nothing to wait for, unless `auto_augment` is used, which goes
    from image to image; and `dataloader_pin_memory` off where images are on a device.

    Args:
        rows (`datasets.Dataset`): With columns `image` and `labels`, as [`prepare_columns`] makes them.
        processor, crop, flip, auto_augment, erase: As for [`train_transform`]; `crop` is `"pad"` or `"none"`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the images are.

    Raises:
        `ValueError`: if the images are not of one size, or `crop` is `"resized"`, which needs them as they were.
    """

    def __init__(
        self,
        rows: Dataset,
        processor: BaseImageProcessor,
        crop: str = "pad",
        flip: bool = True,
        auto_augment: str = "none",
        erase: float = 0.0,
        device: str | torch.device = "cpu",
    ) -> None:
        if crop not in ("pad", "none"):
            raise ValueError(f"`crop` is {crop!r}; images in memory are cropped as 'pad' or 'none'.")
        size = _size(processor)
        decode = v2.Compose([v2.RGB(), *_resize(processor, crop), v2.PILToTensor()])
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
        self.padding = size // 8 if crop == "pad" else 0
        self.further = v2.Compose(steps) if (steps := _further(auto_augment)) else None
        self.erase = v2.Compose(steps) if (steps := _erase(erase)) else None
        self.normalize = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(processor.image_mean, processor.image_std)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch of rows, as PyTorch's loaders ask for it."""
        images = self.images[torch.tensor(indices, device=self.images.device)]
        # torchvision's own would move all images of a batch by the same random amount.
        if self.padding:
            images = _random_crop(images, self.padding)
        if self.flip:
            mirrored = torch.rand(len(images), device=images.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.further is not None:
            images = torch.stack([self.further(image) for image in images])
        images = self.normalize(images)
        if self.erase is not None:
            images = torch.stack([self.erase(image) for image in images])
        return [{"pixel_values": image, "labels": self.labels[index]} for image, index in zip(images, indices)]


class DecodedRows(list[dict[str, Any]]):
    """
    All rows of a dataset, transformed once and kept.

    Args:
        rows (`datasets.Dataset`): With a transform that draws nothing at random.
        split (`str`): What the progress bar calls it.
    """

    def __init__(self, rows: Dataset, split: str) -> None:
        super().__init__(tqdm(rows, desc=f"decoding the {split} split", leave=False))
        self.rows = rows


class SeededImages(TorchDataset):
    """
    A dataset that augments, with the randomness of each batch drawn from a seed, the epoch and the rows in it. So a
    run that was interrupted goes on with the images that it would have seen, which the loaders' reading ahead prevents
    otherwise, whatever the number of workers and processes. [`EpochCallback`] tells it the epoch; [`ScanTrainer`] adds
    it by itself.

    Args:
        rows (`datasets.Dataset` or [`ImagesInMemory`]): With a transform that draws from PyTorch's generators.
        seed (`int`): The run's.
    """

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """A batch of rows, as PyTorch's loaders ask for it."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(hash((self.seed, self.epoch, *indices)) % 2**63)
            return self.rows.__getitems__(indices)


def sample_digests(dataset: Any, rows: Sequence[int] | None = None) -> np.ndarray | None:
    """
    Tells which images a dataset holds, so that two datasets can be seen to share some.

    An image of a `datasets.Dataset` is known by its bytes as they are stored, whatever the transform and the other
    columns; a row without an image, by all that it holds. So is one of the classes here, which know their dataset. One
    of a list is known by its `pixel_values` and label.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): The images.
        rows (`Sequence[int]`, *optional*): Which of them. Defaults to all.

    Returns:
        `np.ndarray` of shape `(n,)` and type uint64: 8 bytes of a hash of each; `None` where the dataset is of another
        kind, whose images may be others the next time.
    """
    while isinstance(dataset, (SeededImages, ImagesInMemory, DecodedRows)):
        dataset = dataset.rows
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


class EpochCallback(TrainerCallback):
    """
    Tells a dataset the epoch, for a `Trainer`. Accelerate's loaders do so only in one process that was not resumed.

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


def _random_crop(images: torch.Tensor, padding: int) -> torch.Tensor:
    """A part of each padded image that is as large as the image was, each at its own random place."""
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
    """What is done to an image before anything random is."""
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
    """Cutout (DeVries and Taylor, 2017), with squares that lie within the image."""
    if not 0 <= share < 1:
        raise ValueError(f"`erase` is {share}; expected a share of the image's area of at least 0 and below 1.")
    return [v2.RandomErasing(p=1.0, scale=(share, share), ratio=(1.0, 1.0))] if share else []


def eval_transform(processor: BaseImageProcessor) -> Callable[[dict[str, list[Any]]], dict[str, Any]]:
    """A transform for `Dataset.with_transform` that does what the image processor does, and nothing else."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pixel_values = processor(batch["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixel_values), "labels": batch["labels"]}

    return transform
