import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_scan.workflows.data_arguments import DataArguments, check_search_split, load_splits


def sorted_folder(folder: Path, classes: dict[str, int]) -> Path:
    """Parquet files of images sorted by class, so many of each in every split."""
    names = list(classes)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for split in ("train", "test", "validation"):
        labels = [index for index, name in enumerate(names) for _ in range(classes[name])]
        if split == "train":
            labels = [label for label in labels if names[label] != "unseen"]
        images = [PILImage.new("RGB", (8, 8), (label, number % 256, 0)) for number, label in enumerate(labels)]
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        folder.mkdir(exist_ok=True)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def splits_of(folder: Path, **settings):
    return load_splits(DataArguments(str(folder), **settings), seed=0, validate=True)


def test_a_part_of_a_sorted_split_has_all_its_classes(tmp_path):
    folder = sorted_folder(tmp_path / "images", {"a": 40, "b": 40, "c": 40})
    splits = splits_of(folder, max_test_samples=30, max_train_samples=30)
    for split in ("train", "test"):
        assert len(splits[split]) == 30
        assert min(np.bincount(splits[split]["labels"], minlength=3)) >= 4
    again = splits_of(folder, max_test_samples=30)
    assert list(again["test"]["labels"]) == list(splits["test"]["labels"])


def test_a_search_split_of_its_own(tmp_path):
    """All of it is searched on, none of the train split; and it is neither of the others."""
    folder = sorted_folder(tmp_path / "images", {"a": 40, "b": 40})
    splits = splits_of(folder, search_split="validation")
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 72,
        "test": 80,
        "search": 80,
        "validation": 8,
    }
    for name in ("train", "test"):
        with pytest.raises(ValueError, match=rf"`--{name}_split` and `--search_split` are both '{name}'"):
            splits_of(folder, search_split=name)
    with pytest.raises(ValueError, match=r"no split 'none'; it has .* Set `--search_split`"):
        splits_of(folder, search_split="none")


def test_an_image_that_cannot_be_read_is_named_before_training(tmp_path):
    folder = tmp_path / "images"
    for label in ("a", "b"):
        (folder / "validation" / label).mkdir(parents=True)
        for number in range(5):
            PILImage.new("RGB", (8, 8)).save(folder / "validation" / label / f"{number}.png")
    shutil.copytree(folder / "validation", folder / "train")
    (folder / "train/b/1.png").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"The 'train' split has 1 of 10 images .* row 6 \(.*train/b/1.png\)"):
        splits_of(folder)
    splits_of(folder, check_images=False, holdout=0.3)


def test_a_class_without_a_train_image_is_named(tmp_path, capsys):
    splits_of(sorted_folder(tmp_path / "images", {"a": 40, "unseen": 40, "b": 40}))
    assert "The 'test' split has 1 classes without a train image, which cannot be learned, such as 'unseen'" in (
        capsys.readouterr().err
    )


def test_a_search_split_that_is_too_small_is_refused_before_training(tmp_path):
    folder = sorted_folder(tmp_path / "images", {"a": 40, "b": 40})
    with pytest.raises(ValueError, match=r"has 8 images of 2 classes; thresholds need at least 10 .*`--search_split`"):
        check_search_split(splits_of(folder))
    for settings in ({"holdout": 0.0}, {"holdout": 0.2}, {"search_split": "validation"}):
        check_search_split(splits_of(folder, **settings))
