import pytest
import torch
from transformers.utils import logging

from hf_scan import ScanConfig, ScanForImageClassification


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 16, 16), r"has shape \(2, 16, 16\); expected \(batch_size, 3, height, width\)"),
        ((2, 1, 16, 16), r"has shape \(2, 1, 16, 16\); expected \(batch_size, 3"),
        ((0, 3, 16, 16), r"is empty, of shape \(0, 3, 16, 16\)"),
        ((2, 3, 0, 16), "is empty"),
    ],
)
def test_bad_shapes(model, shape, message):
    for call in (model, lambda pixels: model.predict_adaptive(pixels, thresholds=[0.5, 0.5])):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))


def test_pixels_that_are_no_floats(model):
    with pytest.raises(ValueError, match=r"holds torch\.uint8; expected floating-point numbers"):
        model(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


def test_non_finite_pixels(model, images):
    with pytest.raises(ValueError, match="NaN or infinite values"):
        model(images * float("nan"))


@pytest.mark.parametrize("label", [5, -1])
def test_labels_out_of_range(model, images, label):
    with pytest.raises(ValueError, match=r"`labels` holds values .* expected class indices from 0 to 4"):
        model(images[:2], labels=torch.tensor([0, label]))


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 5, dtype=torch.long), torch.zeros(2), torch.zeros(2, dtype=torch.bool)]
)
def test_labels_of_another_shape_or_type(model, images, labels):
    with pytest.raises(
        ValueError, match=r"`labels` has shape .* expected \(batch_size,\) class indices of torch.int64"
    ):
        model(images[:2], labels=labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_labels_whose_meaning_is_clear(model, images, shape, dtype):
    labels = torch.tensor([3, 1])
    found = model(images[:2], labels=labels.reshape(shape).to(dtype)).loss
    assert torch.equal(found, model(images[:2], labels=labels).loss)


def test_images_smaller_than_the_deepest_reduction():
    model = ScanForImageClassification(ScanConfig(backbone="test_resnet")).eval()
    with pytest.raises(ValueError, match=r"32 times smaller than the image; expected a height and width of at least"):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("kwargs", "size", "expected"),
    [
        ({"img_size": 64, "dynamic_img_size": False}, (32, 32), r"\(64, 64\)"),
        ({"img_size": 64, "dynamic_img_size": True}, (72, 64), "whole patches of"),
    ],
)
def test_a_vit_names_the_size_of_image_that_it_takes(kwargs, size, expected):
    model = ScanForImageClassification(ScanConfig(backbone="test_vit", num_labels=3, backbone_kwargs=kwargs)).eval()
    images = torch.randn(1, 3, *size)
    for call in (model, model.extract_features, lambda given: model.predict_adaptive(given, thresholds=[0.5])):
        with pytest.raises(ValueError, match=rf"height and width of .*; expected {expected}"):
            call(images)


def test_white_images_are_warned_of(model, caplog):
    """As a stock image processor makes them of 16 bits."""
    mean, std = (torch.tensor(model.config.preprocessing[name])[:, None, None] for name in ("mean", "std"))
    logging.enable_propagation()
    logging.warning_once.cache_clear()
    try:
        model.check_pixel_values(((0.98 - mean) / std).expand(2, 3, 16, 16), values=True)
        assert "plain white" not in caplog.text
        model.check_pixel_values(((1 - mean) / std).expand(2, 3, 16, 16), values=True)
        assert "The images of a batch are plain white" in caplog.text
    finally:
        logging.disable_propagation()
