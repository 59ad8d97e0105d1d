# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Which images a run takes, how they are split, and how they are prepared."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from ..calibration.splits import LEAST_SAMPLES
from ..data.checks import check_images
from ..data.columns import prepare_columns, split_off
from ..data.datasets import DecodedRows, ImagesInMemory, SeededImages
from ..data.folders import holds_images, read_image_folder
from ..data.transforms import eval_transform, train_transform
from ..extras import require_extra
from ..training.training_args import ScanTrainingArguments


try:
    from accelerate import PartialState
    from datasets import DatasetDict, load_dataset
except ImportError:
    require_extra("train", "`hf_scan.workflows.data_arguments`")
    raise


@dataclass
class DataArguments:
    """Where the images come from, and how they are split and augmented."""

    dataset_name: str = field(metadata={"help": "A dataset on the Hub, a folder of images, or one of parquet files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split for the final figures. Defaults to 'test', else 'validation', else a tenth of train."
        },
    )
    search_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to search thresholds on, in place of a part of the train split. Needed where the backbone "
            "was trained on that split before, or on images that are not known."
        },
    )
    holdout: float = field(
        default=0.1,
        metadata={"help": "Share of the train split that is kept for the threshold search, or for validation."},
    )
    crop: str = field(
        default="pad", metadata={"help": "Augmentation: 'pad' for small images, 'resized' for large ones, or 'none'."}
    )
    flip: str = field(
        default="true",
        metadata={"help": "Mirror half of the train images: 'true', 'false', or 'alternating' with `--in_memory`."},
    )
    pixels: list[int] | None = field(
        default=None,
        metadata={"help": "With `--in_memory`: train images' sizes, each for an equal part of the epochs."},
    )
    auto_augment: str = field(
        default="none", metadata={"help": "Policy of torchvision's AutoAugment: 'cifar10', 'imagenet' or 'none'."}
    )
    erase: float = field(
        default=0.0, metadata={"help": "Share of each train image that a square blanks out (Cutout)."}
    )
    check_images: bool = field(
        default=True, metadata={"help": "Decode every image once before training, to name those that cannot be read."}
    )
    in_memory: bool = field(
        default=False,
        metadata={
            "help": "Decode all images once. For small images of one size; on a GPU, they stay there, unless workers "
            "augment them."
        },
    )
    store_features: bool = field(
        default=True,
        metadata={"help": "Store what a frozen backbone makes of the train images, where they are not augmented."},
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, for the card: 'mit', say."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many images, chosen at random."}
    )
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on so many images, chosen at random."})


def _check_split_names(dataset: str, named: dict[str, str], found: list[str]) -> None:
    for name, split in named.items():
        if split not in found:
            raise ValueError(
                f"{dataset} has no split {split!r}; it has {found}. Set `--{name}_split`. (Where files or folders are "
                "called as splits, `datasets` takes their names for splits; a folder `train` with a folder for each "
                "class is read as it stands.)"
            )
        for other, same in named.items():
            if other != name and split == same:
                raise ValueError(
                    f"`--{name}_split` and `--{other}_split` are both {split!r}; expected splits that share no images."
                )


def _name_unseen_classes(splits: DatasetDict) -> None:
    trained = set(splits["train"].unique("labels"))
    names = splits["train"].features["labels"].names
    for split, rows in splits.items():
        labels = set(rows.unique("labels"))
        if unseen := sorted(labels - trained):
            print(
                f"The {split!r} split has {len(unseen)} classes without a train image, which cannot be learned, such "
                f"as {names[unseen[0]]!r}.",
                file=sys.stderr,
            )


def check_search_split(splits: DatasetDict) -> None:
    """Refuse a split that thresholds cannot be searched on, before the training that would come first."""
    if "search" not in splits:
        return
    count, classes = len(splits["search"]), len(splits["search"].unique("labels"))
    if count < LEAST_SAMPLES or classes < 2:
        raise ValueError(
            f"The 'search' split has {count} images of {classes} classes; thresholds need at least {LEAST_SAMPLES} "
            "images and two classes. Set a larger `--holdout`, name a `--search_split`, or set `--holdout 0` to search"
            " none."
        )


def read_dataset(name: str, config: str | None = None) -> DatasetDict:
    """Return the splits of a folder of images, of one of parquet files, or of a dataset on the Hub."""
    if config is None and Path(name).is_dir() and holds_images(name):
        return read_image_folder(name)
    return load_dataset(name, config)


def some_images(folder: str, processor: BaseImageProcessor, count: int = 256, seed: int = 0) -> Any:
    """Return some train images of a dataset, chosen at random and prepared as the network takes them."""
    loaded = read_dataset(folder)
    rows = prepare_columns(DatasetDict(train=loaded.get("train") or next(iter(loaded.values()))), "image", "label")
    chosen = rows["train"].shuffle(seed=seed).select(range(min(count, len(rows["train"]))))
    return chosen.with_transform(eval_transform(processor))


def load_splits(data: DataArguments, seed: int, validate: bool, num_proc: int | None = None) -> DatasetDict:
    """
    Return the splits to train, search and test on, which are disjoint.

    Args:
        data ([`DataArguments`]): What is asked for.
        seed (`int`): The same seed divides the images in the same way.
        validate (`bool`): Whether to keep a `validation` split, to watch training by.
        num_proc (`int`, *optional*): Processes that decode every image once, unless `data.check_images` is off.

    Raises:
        `OSError`: if an image cannot be read.
        `ValueError`: if a split is missing or named twice, or as [`~hf_scan.data.prepare_columns`].
    """
    loaded = read_dataset(data.dataset_name, data.dataset_config_name)
    test_split = data.test_split or next((name for name in ("test", "validation") if name in loaded), None)
    asked = {"train": data.train_split, "test": test_split, "search": data.search_split}
    named = {name: split for name, split in asked.items() if split is not None}
    _check_split_names(data.dataset_name, named, list(loaded))
    chosen = {name: loaded[split] for name, split in named.items()}
    splits = prepare_columns(DatasetDict(chosen), data.image_column, data.label_column)
    if data.check_images and PartialState().is_main_process:
        for name, rows in splits.items():  # before they are shuffled, so that rows are those of the dataset
            check_images(rows, named[name], num_proc)
    if test_split is None:
        splits["train"], splits["test"] = split_off(splits["train"], 0.1, seed)
    if data.holdout and data.search_split is None:
        splits["train"], splits["search"] = split_off(splits["train"], data.holdout, seed)
    if data.holdout and validate:
        splits["train"], splits["validation"] = split_off(splits["train"], data.holdout, seed)
    for split, most in (("train", data.max_train_samples), ("test", data.max_test_samples)):
        if most is not None:
            # Not the first: folders of images are sorted by class.
            splits[split] = splits[split].shuffle(seed=seed).select(range(min(most, len(splits[split]))))
    _name_unseen_classes(splits)
    return splits


def prepare_images(
    splits: DatasetDict, data: DataArguments, args: ScanTrainingArguments, processor: BaseImageProcessor
) -> dict[str, Any]:
    """Return each split as a dataset of `pixel_values` and `labels`, the train split augmented."""
    held_out = {name: splits[name].with_transform(eval_transform(processor)) for name in splits if name != "train"}
    settings: dict[str, Any] = {
        "crop": data.crop,
        "flip": data.flip if data.flip == "alternating" else flips(data),
        "auto_augment": data.auto_augment,
        "erase": data.erase,
    }
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
    if not data.in_memory and (data.pixels or data.flip == "alternating"):
        raise ValueError("`--pixels` and `--flip alternating` are for images in memory; set `--in_memory true`.")
    if not data.in_memory:
        train = splits["train"].with_transform(train_transform(processor, **settings))
        return {**held_out, "train": SeededImages(train, args.seed)}
    if args.dataloader_num_workers == 0 and args.device.type != "cpu":
        settings["device"] = args.device
        args.dataloader_pin_memory = False
    settings |= {"pixels": data.pixels, "num_epochs": max(1, round(args.num_train_epochs))}
    in_memory = {name: DecodedRows(rows, name) for name, rows in held_out.items()}
    return {**in_memory, "train": SeededImages(ImagesInMemory(splits["train"], processor, **settings), args.seed)}


def flips(data: DataArguments) -> bool:
    """Return whether train images are mirrored."""
    if data.flip.lower() not in ("true", "false", "alternating"):
        raise ValueError(f"`--flip` is {data.flip!r}; expected 'true', 'false' or 'alternating'.")
    return data.flip.lower() != "false"


def augments(data: DataArguments) -> bool:
    """Return whether a train image is another one in each epoch."""
    return (
        data.crop != "none" or flips(data) or data.pixels is not None or data.auto_augment != "none" or data.erase > 0
    )


def title(name: str) -> str:
    """Return what others call a dataset or a model: a folder of this machine by its own name only."""
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name


def metadata(data: DataArguments) -> dict[str, Any]:
    """Return metadata for a card: the dataset, if others find it by that name, and the licence."""
    known = {} if Path(data.dataset_name).exists() else {"datasets": [data.dataset_name]}
    return known if data.license is None else {**known, "license": data.license}


__all__ = [
    "DataArguments",
    "augments",
    "check_search_split",
    "load_splits",
    "metadata",
    "prepare_images",
    "some_images",
    "title",
]
