import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from PIL import Image as PILImage

from hf_scan.data import (
    ImagesInMemory,
    eval_transform,
    prepare_columns,
    train_transform,
)
from hf_scan.model.image_processing_scan import create_image_processor

from ..conftest import random_scan_model
from .samples import colours, pictures


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
