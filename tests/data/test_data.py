import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import Trainer

from hf_scan import ScanTrainer, ScanTrainingArguments
from hf_scan.data import (
    EpochCallback,
    ImagesInMemory,
    SeededImages,
    eval_transform,
    prepare_columns,
    split_off,
    train_transform,
)
from hf_scan.model.image_processing_scan import create_image_processor

from ..conftest import random_scan_model


def pictures(n: int = 40, classes: int = 4, label_feature=None, mode: str = "RGB") -> DatasetDict:
    rng = np.random.default_rng(0)
    shape = (12, 10) if mode == "L" else (12, 10, 3)
    images = [PILImage.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for _ in range(n)]
    feature = label_feature or ClassLabel(names=[f"c{i}" for i in range(classes)])
    labels = [i % classes for i in range(n)]
    if feature == Value("string"):
        labels = [f"c{label}" for label in labels]
    features = Features({"img": Image(), "fine_label": feature, "id": Value("int64")})
    rows = Dataset.from_dict({"img": images, "fine_label": labels, "id": list(range(n))}, features=features)
    return DatasetDict(train=rows)


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


@pytest.mark.parametrize(("share", "message"), [(1.5, "expected a number between 0 and 1"), (0.01, "cannot be split")])
def test_bad_shares(share, message):
    with pytest.raises(ValueError, match=message):
        split_off(pictures().pop("train").rename_column("fine_label", "labels"), share, seed=0)


@pytest.mark.parametrize("backbone", ["cifar_resnet20", "test_resnet", "convnext_atto"])
def test_preprocessing_is_the_backbones(backbone):
    """The same picture as timm's own evaluation transform makes."""
    model = random_scan_model(backbone=backbone, image_size=None)
    processor = create_image_processor(model)
    config = timm.data.resolve_model_data_config(model.backbone)
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    ours = processor(image, return_tensors="pt")["pixel_values"][0]
    theirs = timm.data.create_transform(**config, is_training=False)(image)
    assert ours.shape == theirs.shape
    # One grey level of 255, where two resizing back ends round differently.
    assert (ours - theirs).abs().max() < 2 / 255 / min(config["std"])
    assert processor.image_mean == pytest.approx(list(config["mean"]))


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transforms_make_what_the_network_takes(crop, mode):
    model = random_scan_model(image_size=16)
    processor = create_image_processor(model)
    rows = prepare_columns(pictures(mode=mode), "img", "fine_label")["train"]
    for transform in (train_transform(processor, crop), eval_transform(processor)):
        row = rows.with_transform(transform)[3]
        assert row["pixel_values"].shape == (3, 16, 16)
        assert row["pixel_values"].dtype == torch.float32
        assert row["labels"] == 3
        model.check_pixel_values(row["pixel_values"][None], values=True)


@pytest.mark.parametrize("size", [32, 384])  # from 384 on, the processor does not crop
def test_training_without_augmentation_is_evaluation(size):
    model = random_scan_model(backbone="test_resnet", image_size=32)
    model.config.image_size = size
    processor = create_image_processor(model)
    image = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (64, 44, 3), dtype=np.uint8))
    batch = {"image": [image], "labels": [0]}
    plain = train_transform(processor, "none", flip=False)(batch)["pixel_values"][0]
    difference = plain - eval_transform(processor)(batch)["pixel_values"][0]
    assert difference.abs().max() < 2 / 255 / min(processor.image_std)  # one grey level, which one side rounds to


def test_unknown_crop():
    with pytest.raises(ValueError, match=r"`crop` is 'round'; expected one of \['none', 'pad', 'resized'\]"):
        train_transform(create_image_processor(random_scan_model()), "round")


def test_no_image_processor_for_other_channels():
    with pytest.raises(ValueError, match="takes 1 channels; an image processor is only made for 3"):
        create_image_processor(random_scan_model_with_one_channel())


def random_scan_model_with_one_channel():
    from hf_scan import ScanConfig, ScanForImageClassification

    return ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=3, num_channels=1))


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


def colours(n: int = 12, size: int = 16) -> tuple:
    """Rows as `prepare_columns` makes them, and the processor of a network for them."""
    processor = create_image_processor(random_scan_model(image_size=size))
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]
    features = Features({"image": Image(), "labels": ClassLabel(num_classes=3)})
    return Dataset.from_dict({"image": images, "labels": [i % 3 for i in range(n)]}, features=features), processor


def test_images_in_memory_without_augmentation_are_those_of_evaluation():
    rows, processor = colours()
    rows_in_memory = ImagesInMemory(rows, processor, crop="none", flip=False)
    expected = rows.with_transform(eval_transform(processor))
    assert len(rows_in_memory) == 12
    for index in range(12):
        row = rows_in_memory[index]
        assert row["labels"] == index % 3
        assert (row["pixel_values"] - expected[index]["pixel_values"]).abs().max() < 2 / 255 / min(processor.image_std)


def test_images_in_memory_are_cropped_and_mirrored_each_on_its_own():
    """Each is a part of its padded image, which one can find; all places and both directions occur."""
    rows, processor = colours()
    plain = torch.stack([row["pixel_values"] for row in ImagesInMemory(rows, processor, crop="none", flip=False)])
    black = -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)
    padded = black[None, :, None, None].repeat(12, 1, 20, 20)
    padded[..., 2:18, 2:18] = plain
    torch.manual_seed(0)
    dataset = ImagesInMemory(rows, processor, crop="pad", flip=True)
    seen = set()
    for _ in range(20):
        for index, row in enumerate(dataset.__getitems__(list(range(12)))):
            places = [
                (top, left, mirrored)
                for top in range(5)
                for left in range(5)
                for mirrored in (False, True)
                if torch.allclose(
                    row["pixel_values"].flip(-1) if mirrored else row["pixel_values"],
                    padded[index, :, top : top + 16, left : left + 16],
                    atol=1e-5,
                )
            ]
            assert len(places) == 1
            seen.update(places)
    assert len(seen) == 50
    batch = dataset.__getitems__([3] * 12)
    assert len({tuple(row["pixel_values"].flatten().tolist()) for row in batch}) > 6


def test_alternating_flips_mirror_each_image_every_second_epoch():
    rows, processor = colours()
    plain = ImagesInMemory(rows, processor, crop="none", flip=False).__getitems__(list(range(12)))
    dataset = SeededImages(ImagesInMemory(rows, processor, crop="none", flip="alternating"), seed=0)
    mirrored = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for row, before in zip(dataset.__getitems__(list(range(12))), plain):
            flipped = torch.equal(row["pixel_values"], before["pixel_values"].flip(-1))
            assert flipped or torch.equal(row["pixel_values"], before["pixel_values"])
            mirrored.append(flipped)
    first, second, third, fourth = (mirrored[start : start + 12] for start in range(0, 48, 12))
    assert 0 < sum(first) < 12
    assert second == fourth == [not flipped for flipped in first]
    assert third == first


def test_images_grow_with_the_epochs():
    """Each size for an equal part of the epochs, and the last one for those after."""
    rows, processor = colours()
    dataset = SeededImages(ImagesInMemory(rows, processor, pixels=[8, 12, 16], num_epochs=6), seed=0)
    sizes = []
    for epoch in range(7):
        dataset.set_epoch(epoch)
        sizes.append(dataset[0]["pixel_values"].shape[-1])
    assert sizes == [8, 8, 12, 12, 16, 16, 16]


def test_further_augmentation_is_the_same_in_memory_and_by_the_image():
    rows, processor = colours()
    settings = {"crop": "none", "flip": False, "auto_augment": "cifar10", "erase": 0.25}
    torch.manual_seed(0)
    expected = rows.with_transform(train_transform(processor, **settings))[0]["pixel_values"]
    torch.manual_seed(0)
    found = ImagesInMemory(rows, processor, **settings)[0]["pixel_values"]
    assert (found - expected).abs().max() < 2 / 255 / min(processor.image_std)
    blank = (found == 0).all(dim=0)
    assert blank.sum() == 64  # a quarter of 16 x 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "resized"}, "`crop` is 'resized'; images in memory are cropped as 'pad' or 'none'"),
        ({"auto_augment": "svhn"}, r"`auto_augment` is 'svhn'; expected 'none' or one of \['cifar10', 'imagenet'\]"),
        ({"erase": 1.0}, "`erase` is 1.0; expected a share of the image's area"),
        ({"flip": "always"}, "`flip` is 'always'; expected true, false or 'alternating'"),
        ({"pixels": [8, 32]}, r"`pixels` is \[8, 32\]; expected numbers of 1 to the images' own 16"),
    ],
)
def test_augmentation_that_does_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        ImagesInMemory(*colours(), **settings)


def test_images_of_other_shapes_are_not_for_memory():
    rows, processor = colours()
    wide = rows.map(lambda row: {"image": row["image"].resize((24, 16))})
    with pytest.raises(ValueError, match=r"Image 0 is \(16, 24\) pixels once resized; .* squares of 16"):
        ImagesInMemory(wide, processor)


def test_seeded_images_depend_on_seed_epoch_and_batch_only():
    """Not on what was drawn before, nor do they draw from what others use."""
    rows, processor = colours()

    def batch(seed, epoch, indices, in_memory=True):
        images = ImagesInMemory(rows, processor) if in_memory else rows.with_transform(train_transform(processor))
        dataset = SeededImages(images, seed)
        dataset.set_epoch(epoch)
        assert len(dataset) == 12
        return torch.stack([row["pixel_values"] for row in dataset.__getitems__(indices)])

    for in_memory in (True, False):
        torch.manual_seed(0)
        first = batch(1, 2, [3, 4, 5], in_memory)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        assert torch.equal(first, batch(1, 2, [3, 4, 5], in_memory))
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state)
        for other in ((2, 2, [3, 4, 5]), (1, 3, [3, 4, 5])):
            assert not torch.equal(first, batch(*other, in_memory))


@pytest.mark.parametrize("trainer_class", [ScanTrainer, Trainer])
def test_a_trainer_tells_seeded_images_the_epoch(tmp_path, trainer_class):
    """Also one that was resumed in the middle of an epoch, and one that is no `ScanTrainer`."""
    dataset = SeededImages(ImagesInMemory(*colours()), seed=0)
    drawn = []
    getitems = dataset.__getitems__
    dataset.__getitems__ = lambda indices: drawn.append((dataset.epoch, *indices)) or getitems(indices)
    settings = {"max_steps": 7, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 5}
    args = ScanTrainingArguments(tmp_path, **settings, use_cpu=True, disable_tqdm=True)
    callbacks = [EpochCallback(dataset)] if trainer_class is Trainer else None
    trainer = trainer_class(random_scan_model(), args, train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    assert [epoch for epoch, *_ in drawn][:7] == [0, 0, 0, 1, 1, 1, 2]
    whole, drawn[:] = drawn[:], []
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert drawn[:2] == whole[5:7]


def test_workers_that_outlive_an_epoch_are_refused(tmp_path):
    settings = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "max_steps": 1}
    args = ScanTrainingArguments(tmp_path, **settings, use_cpu=True, disable_tqdm=True)
    dataset = SeededImages(ImagesInMemory(*colours()), seed=0)
    with pytest.raises(ValueError, match="`dataloader_persistent_workers` is set"):
        ScanTrainer(random_scan_model(), args, train_dataset=dataset).train()


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_images_of_16_bits_are_scaled(tmp_path, mode):
    """They look as the same image of 8 bits does, in training and in evaluation."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    plain = PILImage.fromarray(pixels)
    deep = PILImage.fromarray((pixels.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2"))
    assert deep.mode == mode
    processor = create_image_processor(random_scan_model())
    for transform in (eval_transform(processor), train_transform(processor, "none", flip=False)):
        found, expected = (transform({"image": [image], "labels": [0]})["pixel_values"][0] for image in (deep, plain))
        assert torch.equal(found, expected)
    stored = Dataset.from_dict({"image": [deep, plain], "labels": [0, 1]}, features=colours()[0].features)
    found = ImagesInMemory(stored, processor, crop="none", flip=False)
    assert torch.equal(found[0]["pixel_values"], found[1]["pixel_values"])
    assert len(found.images.unique()) > 100


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_of_32_bits_are_taken_in_the_range_of_8_and_refused_beyond(dtype):
    processor = create_image_processor(random_scan_model())
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16))
    plain, deep = PILImage.fromarray(pixels.astype(np.uint8)), PILImage.fromarray(pixels.astype(dtype))
    for transform in (eval_transform(processor), train_transform(processor, "none", flip=False)):
        found, expected = (transform({"image": [image], "labels": [0]})["pixel_values"][0] for image in (deep, plain))
        assert torch.equal(found, expected)
        for wrong in (pixels * 200, -pixels):
            with pytest.raises(
                ValueError, match=r"An image of mode '[IF]' holds values from .*; expected values from 0"
            ):
                transform({"image": [PILImage.fromarray(wrong.astype(dtype))], "labels": [0]})


def test_augmentation_does_not_rest_on_how_python_hashes():
    """The same numbers with every version: this is what the run of another machine or release draws."""
    dataset = SeededImages([], seed=1)
    dataset.set_epoch(2)
    drawn = []
    dataset.rows = type("Rows", (), {"__getitems__": lambda _, indices: drawn.append(torch.initial_seed())})()
    dataset.__getitems__([3, 4, 5])
    assert drawn == [int(np.random.SeedSequence([1, 2, 3, 4, 5]).generate_state(1, np.uint64)[0])]
