import re

import numpy as np
import pytest
from PIL import Image

from hf_scan import image_splits
from hf_scan.data import read_image_folder, sample_digests
from hf_scan.model.image_processing_scan import create_image_processor


def write_images(*paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(path, format="PNG")


def test_folders_of_splits_and_names_as_of_imagenet(tmp_path):
    """Only folders say what a split is: `datasets` would take these files for three splits."""
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            write_images(*(tmp_path / split / wnid / f"ILSVRC2012_{name}_1.JPEG" for name in ("val", "test", "train")))
    write_images(tmp_path / "val" / "n01440764" / "more" / "deep.png")
    (tmp_path / "val" / "n01440764" / "notes.txt").write_text("")
    (tmp_path / "val" / "n01440764" / "._hidden.png").write_text("")
    (tmp_path / "README.md").write_text("")
    splits = read_image_folder(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "validation": 7}
    assert splits["train"].features == splits["validation"].features
    assert splits["train"].features["label"].names == ["n01440764", "n01443537"]
    assert splits["validation"]["label"][:4] == [0] * 4
    assert splits["train"][0]["image"].size == (8, 8)


def test_images_are_not_copied(tmp_path):
    write_images(*(tmp_path / name / f"{number}.png" for name in ("a", "b") for number in range(3)))
    rows = read_image_folder(tmp_path)["train"]
    stored = rows.with_format("arrow")[:].column("image").to_pylist()
    assert [row["bytes"] for row in stored] == [None] * 6
    assert [row["path"] for row in stored] == [str(path) for path in sorted(tmp_path.rglob("*.png"))]


def test_a_class_may_be_called_as_a_split(tmp_path):
    write_images(tmp_path / "train" / "1.png", tmp_path / "car" / "1.png")
    assert read_image_folder(tmp_path)["train"].features["label"].names == ["car", "train"]


def test_classes_are_those_of_all_splits(tmp_path):
    write_images(tmp_path / "train" / "a" / "1.png", tmp_path / "test" / "b" / "1.png")
    (tmp_path / "train" / "empty").mkdir()
    splits = read_image_folder(tmp_path)
    assert splits["train"].features["label"].names == ["a", "b"]
    assert splits["test"]["label"][:] == [1]


def test_folders_without_classes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        read_image_folder(tmp_path / "none")
    write_images(tmp_path / "loose" / "1.png")
    with pytest.raises(ValueError, match="holds no folders of classes"):
        read_image_folder(tmp_path / "loose")
    write_images(tmp_path / "mixed" / "a" / "1.png", tmp_path / "mixed" / "2.png")
    with pytest.raises(ValueError, match=re.escape("such as '2.png', whose class is not known")):
        read_image_folder(tmp_path / "mixed")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images in folders of classes"):
        read_image_folder(tmp_path / "empty")
    for name in ("val", "validation"):
        write_images(tmp_path / "twice" / name / "a" / "1.png")
    with pytest.raises(ValueError, match="'val' and 'validation', which both name the 'validation' split"):
        read_image_folder(tmp_path / "twice")


def test_splits_for_a_model_share_no_images(tmp_path, model):
    write_images(*(tmp_path / "train" / str(number % 2) / f"{number}.png" for number in range(40)))
    write_images(*(tmp_path / "test" / str(number % 2) / f"{number}.png" for number in range(6)))
    splits = image_splits(tmp_path, create_image_processor(model), holdout=0.25)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "search": 10, "test": 6}
    digests = np.concatenate([sample_digests(rows) for rows in splits.values()])
    assert len(np.unique(digests)) == 46
    assert splits["train"][0]["pixel_values"].shape == (3, 16, 16)


@pytest.mark.parametrize("place", ["dog/1.png", "1.png", "test/1.png"])
def test_images_beside_the_folders_of_splits_are_not_left_out(tmp_path, place):
    write_images(tmp_path / "train" / "cat" / "1.png", tmp_path / place)
    name = place.split("/")[0]
    with pytest.raises(ValueError, match=rf"holds images in '{name}' beside the folders of splits \['train'\]"):
        read_image_folder(tmp_path)
    (tmp_path / place).unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.txt").write_text("")
    assert list(read_image_folder(tmp_path)) == ["train"]
