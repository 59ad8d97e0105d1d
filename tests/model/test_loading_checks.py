"""Which weights are whole, and which thresholds belong to them."""

import pytest
import torch

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
from hf_scan.model.backbone import create_backbone

from .samples import THRESHOLDS, change_weights, load, saved


def test_thresholds_beside_other_weights_are_not_used(tmp_path, warnings_of_transformers):
    saved(tmp_path / "one")
    saved(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    assert load(tmp_path / "one").exit_config.thresholds is None
    assert "are not those that the thresholds of exit_config.json were found for" in warnings_of_transformers.text
    given = ExitConfig.from_pretrained(tmp_path / "one")
    assert load(tmp_path / "one", exit_config=given).exit_config.thresholds is None
    assert load(tmp_path / "one", exit_config=ExitConfig(thresholds=[0.5, 0.5])).exit_config.thresholds == [0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_weights_in_another_type_keep_their_thresholds(tmp_path, dtype):
    saved(tmp_path / "one")
    load(tmp_path / "one", dtype=dtype).save_pretrained(tmp_path / "two")
    assert load(tmp_path / "two").dtype == dtype
    assert load(tmp_path / "two").exit_config == THRESHOLDS
    model = load(tmp_path / "one", dtype=dtype)
    change_weights(model)
    model.save_pretrained(tmp_path / "two")
    assert load(tmp_path / "two").exit_config.thresholds is None


@pytest.mark.parametrize(
    ("name", "size"), [("vit_tiny_patch16_224", 64), ("test_vit", 96), ("swin_tiny_patch4_window7_224", 112)]
)
def test_another_image_size_is_initialised_as_timm_does(tmp_path, name, size):
    small = ScanForImageClassification(ScanConfig(backbone=name, num_labels=3, image_size=size))
    small.save_pretrained(tmp_path)
    model, info = load(tmp_path, image_size=2 * size, ignore_mismatched_sizes=True, output_loading_info=True)
    changed = [key for key, *_ in info["mismatched_keys"]]
    fresh = create_backbone(model.config).state_dict()
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        own = key.removeprefix("backbone.")
        if key in changed and own in fresh:  # the same distribution, or the same value where it is constant
            torch.testing.assert_close(value.std(), fresh[own].std(), rtol=0.2, atol=1e-6)
    assert changed
    assert model(torch.rand(1, 3, 2 * size, 2 * size)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_a_new_classifier_is_initialised_as_timm_does(tmp_path, name):
    ScanForImageClassification(ScanConfig(backbone=name, num_labels=3)).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load(tmp_path, num_labels=50, ignore_mismatched_sizes=True)
    torch.manual_seed(0)
    fresh = create_backbone(model.config).get_classifier()
    own = model.backbone.get_classifier()
    torch.testing.assert_close(own.weight.std(), fresh.weight.std(), rtol=0.2, atol=1e-6)
    assert torch.equal(own.bias == 0, fresh.bias == 0)
