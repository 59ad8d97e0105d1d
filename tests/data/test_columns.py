import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Value

from hf_scan.data import (
    prepare_columns,
    split_off,
)

from .samples import pictures


def test_columns_are_renamed():
    rows = prepare_columns(pictures(), "img", "fine_label")["train"]
    assert rows.column_names == ["image", "labels"]
    assert rows.features["labels"].names == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize("feature", [Value("string"), Value("int64")])
def test_labels_of_any_kind_become_class_indices(feature):
    rows = prepare_columns(pictures(label_feature=feature), "img", "fine_label")["train"]
    assert list(rows["labels"]) == [i % 4 for i in range(40)]
    assert rows.features["labels"].num_classes == 4


@pytest.mark.parametrize(
    ("image_column", "label_column", "message"),
    [
        ("image", "fine_label", r"no column 'image'; it has \['img', 'fine_label', 'id'\].*--image_column"),
        ("img", "label", "no column 'label'.*--label_column"),
        ("img", "img", "are both 'img'; expected two columns"),
        ("id", "fine_label", "Column 'id' of the 'train' split holds .* expected images"),
    ],
)
def test_wrong_columns(image_column, label_column, message):
    with pytest.raises(ValueError, match=message):
        prepare_columns(pictures(), image_column, label_column)


def test_one_class():
    for feature in (None, ClassLabel(names=["c0", "c1"])):  # one that is there, whatever was declared
        with pytest.raises(ValueError, match=r"holds 1 class, \[0\]; a classifier needs at least two"):
            prepare_columns(pictures(classes=1, label_feature=feature), "img", "fine_label")


def test_numbers_are_sorted_as_numbers():
    rows = prepare_columns(pictures(classes=12, label_feature=Value("int64")), "img", "fine_label")["train"]
    assert list(rows["labels"]) == [i % 12 for i in range(40)]


def test_rows_without_a_label_and_splits_that_differ():
    rows = pictures()["train"]
    missing = DatasetDict(train=rows.map(lambda row: {"fine_label": None if row["id"] == 3 else row["fine_label"]}))
    with pytest.raises(ValueError, match=r"of the 'train' split has rows without a label"):
        prepare_columns(missing, "img", "fine_label")
    turned = rows.cast_column("fine_label", ClassLabel(names=["c3", "c2", "c1", "c0"]))
    with pytest.raises(ValueError, match="expected the same classes, in the same order"):
        prepare_columns(DatasetDict(train=rows, test=turned), "img", "fine_label")


def test_splits_are_disjoint_stratified_and_seeded():
    rows = pictures().pop("train").rename_column("fine_label", "labels")
    left, taken = split_off(rows, 0.2, seed=1)
    assert sorted([*left["id"], *taken["id"]]) == list(range(40))
    assert np.bincount(taken["labels"]).tolist() == [2, 2, 2, 2]
    assert list(split_off(rows, 0.2, seed=1)[1]["id"]) == list(taken["id"])
    assert list(split_off(rows, 0.2, seed=2)[1]["id"]) != list(taken["id"])


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1.5, "expected a number between 0 and 1"),
        (0.01, "leaves 39 and 1, and there are 4 classes"),
        (0.95, "leaves 2 and 38"),
    ],
)
def test_bad_shares(share, message):
    with pytest.raises(ValueError, match=message):
        split_off(pictures().pop("train").rename_column("fine_label", "labels"), share, seed=0)


@pytest.mark.parametrize("values", [[0.5] * 40, [float("nan")] * 40, [[1]] * 40])
def test_labels_that_are_no_classes(values):
    rows = pictures()["train"].remove_columns("fine_label").add_column("fine_label", values)
    with pytest.raises(ValueError, match="expected classes, as whole numbers or strings"):
        prepare_columns(DatasetDict(train=rows), "img", "fine_label")


def test_minus_1_is_a_class_where_classes_are_numbers_and_their_width_does_not_matter():
    rows = pictures(label_feature=Value("int64"))["train"].map(
        lambda row: {"fine_label": row["fine_label"] % 2 * 2 - 1}
    )
    test = rows.cast_column("fine_label", Value("int32"))
    prepared = prepare_columns(DatasetDict(train=rows, test=test), "img", "fine_label")
    assert list(prepared["test"]["labels"]) == [i % 2 for i in range(40)]
    assert prepared["train"].features["labels"].names == ["-1", "1"]


def test_an_empty_split():
    rows = pictures()["train"]
    with pytest.raises(ValueError, match="The 'test' split is empty"):
        prepare_columns(DatasetDict(train=rows, test=rows.select([])), "img", "fine_label")


def test_classes_of_one_image_are_named():
    rows = pictures().pop("train").rename_column("fine_label", "labels")
    single = rows.select([*range(0, 40, 4), 1, 3, *range(2, 40, 4)])  # of "c1" and "c3"
    with pytest.raises(ValueError, match=r"2 of 4 classes have one image, which cannot be divided: 'c1', 'c3'\. Add"):
        split_off(single, 0.2, seed=0)
