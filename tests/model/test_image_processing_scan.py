import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ConvNextImageProcessor

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.model.image_processing_scan import ScanImageProcessor, create_image_processor


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 20, 24), dtype=np.uint8)


def test_no_image_processor_for_other_channels():
    config = ScanConfig(backbone="cifar_resnet20", num_labels=3, num_channels=1)
    with pytest.raises(ValueError, match="takes 1 channels; an image processor is only made for 3"):
        create_image_processor(ScanForImageClassification(config))


def test_it_is_saved_as_a_stock_one(tmp_path, model):
    """So that whoever has Transformers only can load it."""
    ours = create_image_processor(model)
    ours.save_pretrained(tmp_path)
    stock = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(stock) is ConvNextImageProcessor
    assert type(ScanImageProcessor.from_pretrained(tmp_path)) is ScanImageProcessor
    expected = ours(PIXELS, return_tensors="pt")["pixel_values"]
    for processor in (stock, ScanImageProcessor.from_pretrained(tmp_path)):
        assert torch.equal(processor(PIXELS, return_tensors="pt")["pixel_values"], expected)


def test_deep_images_are_scaled(model):
    processor = create_image_processor(model)
    expected = processor(PIXELS, return_tensors="pt")["pixel_values"]
    deep = PIXELS.astype(np.uint16) * 257
    same = [deep, torch.from_numpy(deep), PIXELS.astype(np.int32), PIXELS / np.float32(255)]
    found = processor(same, return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 2 / 255 / min(processor.image_std)  # rounding between two resizes
    grey = [Image.fromarray(deep[0]), Image.fromarray(PIXELS[0])]
    one, other = processor(grey, return_tensors="pt")["pixel_values"]
    assert torch.equal(one, other)
    given = PIXELS / np.float32(255)
    found = processor(given, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 2 / 255 / min(processor.image_std)
    with pytest.raises(ValueError, match="An image of int32 holds values from 0 to 65535"):
        processor(deep.astype(np.int32))
