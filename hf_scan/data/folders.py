# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Read folders of images: a folder for each class, in a folder for each split or in none."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..extras import require_extra
from .transforms import eval_transform, train_transform


try:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    from .columns import prepare_columns, split_off
except ImportError:
    require_extra("train", "Reading folders of images")
    raise

# How folders of splits are named, and what the splits are called then.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def read_image_folder(folder: str | Path) -> DatasetDict:
    """
    Read a folder of images without copying them: `folder/train/cat/1.jpg` with one folder for each split, or
    `folder/cat/1.jpg` with none. Only folders say what a split or a class is, whatever files are called, so that
    ImageNet's names do no harm. A class may have folders of its own; files that are no images are left out.

    Args:
        folder (`str` or `Path`): The folder.

    Returns:
        `datasets.DatasetDict`: splits such as `train`, `validation` and `test`, or `train` alone, each with the
        columns `image` and `label`. All know the same classes, sorted by name.

    Raises:
        `FileNotFoundError`: if there is no such folder.
        `ValueError`: if it holds no folders of classes, images beside them or beside the folders of splits, or no
            images at all.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from hf_scan.data import read_image_folder

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cat", "dog"):
    ...         Path(folder, name).mkdir()
    ...         Image.new("RGB", (8, 8)).save(Path(folder, name, "1.png"))
    ...     splits = read_image_folder(folder)
    >>> splits["train"].features["label"].names, len(splits["train"])
    (['cat', 'dog'], 2)
    ```
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}; expected one of images, with a folder for each class.")
    found = {split: _files_by_class(path) for split, path in _split_folders(root).items()}
    classes = sorted({name for files in found.values() for name, paths in files.items() if paths})
    if not classes:
        raise ValueError(f"{root} holds no images in folders of classes; expected files such as {root}/cat/1.jpg.")
    index = {name: position for position, name in enumerate(classes)}
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    splits = {}
    for split, files in found.items():
        paths = [path for name in classes for path in files.get(name, [])]
        labels = np.repeat(range(len(classes)), [len(files.get(name, [])) for name in index])
        plain = Features({"image": Value("string"), "label": Value("int64")})
        splits[split] = Dataset.from_dict({"image": paths, "label": labels}, features=plain).cast(features)
    return DatasetDict(splits)


def image_splits(
    folder: str | Path,
    processor: BaseImageProcessor,
    holdout: float = 0.2,
    crop: str = "resized",
    seed: int = 0,
) -> dict[str, Any]:
    """
    Make datasets for training, for the search of thresholds and for the final test from a folder of images. Without a
    folder `test` or `val`, a tenth of the images is the test split.

    Args:
        folder (`str` or `Path`): As for [`read_image_folder`].
        processor (`BaseImageProcessor`): The model's image processor, such as `AutoImageProcessor` loads.
        holdout (`float`, *optional*, defaults to 0.2): Share of the train images that is kept for the search.
        crop (`str`, *optional*, defaults to `"resized"`): Augmentation of the train split; see
            [`~hf_scan.data.train_transform`].
        seed (`int`, *optional*, defaults to 0): The same seed makes the same splits.

    Returns:
        `dict[str, datasets.Dataset]`: `train`, `search` and `test`, whose rows hold `pixel_values` and `labels`.

    Raises:
        `ValueError`: as [`read_image_folder`], and if a class has too few images to be divided.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from hf_scan import ScanConfig, ScanForImageClassification, image_splits
    >>> from hf_scan.model.image_processing_scan import create_image_processor

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for number in range(40):
    ...         path = Path(folder, "cat" if number % 2 else "dog", f"{number}.png")
    ...         path.parent.mkdir(exist_ok=True)
    ...         Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    ...     splits = image_splits(folder, create_image_processor(model))
    ...     splits["search"][0]["pixel_values"].shape
    torch.Size([3, 32, 32])
    >>> {name: len(rows) for name, rows in splits.items()}
    {'train': 28, 'search': 8, 'test': 4}
    ```
    """
    found = prepare_columns(read_image_folder(folder), "image", "label")
    tested = next((name for name in ("test", "validation") if name in found), None)
    train = found["train"] if "train" in found else next(iter(found.values()))
    if tested is None:
        train, test = split_off(train, 0.1, seed)
    else:
        test = found[tested]
    train, search = split_off(train, holdout, seed)
    return {
        "train": train.with_transform(train_transform(processor, crop=crop)),
        "search": search.with_transform(eval_transform(processor)),
        "test": test.with_transform(eval_transform(processor)),
    }


def holds_images(folder: str | Path) -> bool:
    """Return whether a folder is one of class folders of images, rather than of parquet files or the like."""
    endings = _endings()
    for _, _, files in os.walk(folder):
        for name in files:
            if not name.startswith("."):
                if name.lower().endswith(endings):
                    return True
                if name.lower().endswith((".parquet", ".arrow", ".zip", ".tar", ".csv", ".jsonl")):
                    return False
    return False


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of splits by the splits' names; a class may be called `train` and holds no folders then."""
    found: dict[str, Path] = {}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        split = SPLIT_FOLDERS.get(entry.name.lower())
        if split is None or not entry.is_dir() or not any(inner.is_dir() for inner in os.scandir(entry.path)):
            continue
        if split in found:
            raise ValueError(
                f"{root} holds {found[split].name!r} and {entry.name!r}, which both name the {split!r} split; "
                "expected one of them. Rename or move the other."
            )
        found[split] = Path(entry.path)
    if found:
        _check_all_in_splits(root, [path.name for path in found.values()])
    return found or {"train": root}


def _check_all_in_splits(root: Path, splits: list[str]) -> None:
    """Refuse images beside the folders of splits, which would be left out."""
    endings = _endings()
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name in splits or entry.name.startswith("."):
            continue
        loose = entry.is_file() and _is_image(entry.name, endings)
        if loose or (entry.is_dir() and _holds_any_image(entry.path, endings)):
            raise ValueError(
                f"{root} holds images in {entry.name!r} beside the folders of splits {splits}, and they would be left "
                f"out; expected files such as {root}/{splits[0]}/cat/1.jpg only. Move {entry.name!r} into a split or "
                "elsewhere."
            )


def _holds_any_image(folder: str, endings: tuple[str, ...]) -> bool:
    return any(_is_image(name, endings) for _, _, names in os.walk(folder, followlinks=True) for name in names)


def _files_by_class(folder: Path) -> dict[str, list[str]]:
    """Return the images of each class folder, in the order of their names."""
    endings = _endings()
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name, endings)]
    if not classes:
        raise ValueError(f"{folder} holds no folders of classes; expected images such as {folder}/cat/1.jpg.")
    if loose:
        raise ValueError(
            f"{folder} holds images beside the folders of classes, such as {loose[0]!r}, whose class is not known. "
            "Move them into a folder of their class."
        )
    found: dict[str, list[str]] = {}
    with tqdm(classes, desc=f"files of {folder.name}", unit=" classes", leave=False) as bar:
        for entry in bar:
            files = [
                os.path.join(place, name)
                for place, _, names in os.walk(entry.path, followlinks=True)
                for name in names
                if _is_image(name, endings)
            ]
            found[entry.name] = sorted(files)
    return found


def _endings() -> tuple[str, ...]:
    return tuple(PILImage.registered_extensions())


def _is_image(name: str, endings: tuple[str, ...]) -> bool:
    return not name.startswith(".") and name.lower().endswith(endings)


__all__ = ["holds_images", "image_splits", "read_image_folder"]
