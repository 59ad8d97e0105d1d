"""The timm model of a configuration."""

import pytest
import torch

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.model.backbone import backbone_arguments, create_backbone, timm_preprocessing
from hf_scan.model.configuration_scan import PREPROCESSING_KEYS


def test_unknown_backbone_arguments():
    with pytest.raises(ValueError, match=r"timm cannot make 'resnet18' with {.*'depth': 3}: .* Correct"):
        ScanForImageClassification(ScanConfig(backbone="resnet18", backbone_kwargs={"depth": 3}))


def test_a_backbone_of_fixed_size_is_made_for_the_image_size():
    config = ScanConfig(backbone="swin_tiny_patch4_window7_224", num_labels=3, image_size=112)
    model = ScanForImageClassification(config).eval()
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model.backbone(images))


def test_arguments_are_those_of_the_configuration():
    config = ScanConfig(backbone="test_resnet", num_channels=1, backbone_kwargs={"drop_rate": 0.5})
    assert backbone_arguments(config) == {"in_chans": 1, "drop_rate": 0.5}
    fixed = ScanConfig(backbone="test_vit", image_size=96)
    assert backbone_arguments(fixed) == {"in_chans": 3, "img_size": 96}


def test_a_table_of_a_size_that_takes_all_memory_is_refused():
    config = ScanConfig(backbone="swin_tiny_patch4_window7_224", num_labels=3, image_size=8192)
    with pytest.raises(ValueError, match=r"for images of 8192 pixels; expected at most 4096"):
        create_backbone(config)


def test_preprocessing_is_what_timm_says():
    found = timm_preprocessing({"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "input_size": (3, 64, 64)})
    assert set(found) == PREPROCESSING_KEYS
    assert found["mean"] == [0.1, 0.2, 0.3]  # a list, as JSON gives it back
    assert (found["crop_pct"], found["interpolation"]) == (0.875, "bicubic")  # timm's defaults
