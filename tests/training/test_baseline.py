import pytest
import torch
from transformers import (
    AutoImageProcessor,
    TimmWrapperForImageClassification,
)

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.training.baseline import plain_copy


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_a_plain_copy_is_the_backbone(backbone):
    """As large as the network was made, where that is not what timm makes by itself."""
    model = ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=3, image_size=64, num_channels=1))
    images = torch.randn(2, 1, 64, 64)
    plain = plain_copy(model).eval()
    assert torch.equal(plain(images).logits, model.eval()(images).logits)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_plain_copy_keeps_the_preprocessing(tmp_path, num_channels):
    """Through a checkpoint, as both of timm's image processor and of a network made of it."""
    mean, std = [0.1, 0.2, 0.3][:num_channels], [0.4, 0.5, 0.6][:num_channels]
    given = {"mean": mean, "std": std, "crop_pct": 0.5, "interpolation": "bilinear"}
    config = ScanConfig(
        backbone="test_resnet", num_labels=3, image_size=96, num_channels=num_channels, preprocessing=given
    )
    plain_copy(ScanForImageClassification(config)).save_pretrained(tmp_path)
    plain = TimmWrapperForImageClassification.from_pretrained(tmp_path)
    assert {name: plain.config.pretrained_cfg[name] for name in given} == given
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert list(processor.data_config["input_size"]) == [num_channels, 96, 96]
    assert list(processor.data_config["mean"]) == given["mean"]
    assert processor.data_config["crop_pct"] == 0.5
    again = ScanForImageClassification.from_timm(plain.timm_model, num_channels=num_channels)
    assert {name: again.config.preprocessing[name] for name in given} == given
    # A network of another number of channels than its backbone's means, whose checkpoint timm reads nevertheless.
    odd = ScanForImageClassification(ScanConfig(backbone="test_resnet", num_channels=2))
    plain_copy(odd).save_pretrained(tmp_path)
    assert len(AutoImageProcessor.from_pretrained(tmp_path).data_config["mean"]) == 3
