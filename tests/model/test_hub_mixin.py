"""Saving and loading: which thresholds belong to which weights, whatever is interrupted or changed meanwhile."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.utils import logging

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
from hf_scan.model.backbone import create_backbone

from ..conftest import random_scan_model
from .samples import THRESHOLDS, change_weights, load, saved


@pytest.fixture
def warnings_of_transformers(caplog):
    """What Transformers' logger says, which does not reach the root logger by itself."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_a_plain_trainer_does_not_save_thresholds_of_other_weights(tmp_path, warnings_of_transformers):
    saved(tmp_path / "before")
    model = load(tmp_path / "before")
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": index % 5} for index in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, learning_rate=0.1, save_strategy="steps", save_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "after"):
        found = load(folder).exit_config
        assert (found.thresholds, found.search, found.weights) == (None, None, None)
        assert found.costs == {"machine": "x"}
    assert "The weights have changed since the thresholds" in warnings_of_transformers.text


@pytest.mark.parametrize("change", ["weights", "buffers", "merged"])
def test_changed_weights_lose_thresholds_unless_the_user_says_otherwise(tmp_path, change):
    saved(tmp_path / "before")
    model = load(tmp_path / "before")
    with torch.no_grad():
        if change == "buffers":
            model.backbone.bn1.running_mean.add_(1)
        elif change == "merged":  # as `peft` does, into the weights
            model.exit_heads[0].classifier.fc.weight.addmm_(torch.ones(5, 1), torch.ones(1, 64))
        else:
            change_weights(model)
    model.save_pretrained(tmp_path / "after")
    assert load(tmp_path / "after").exit_config.thresholds is None
    model.exit_config.weights = None
    model.save_pretrained(tmp_path / "after")
    assert load(tmp_path / "after").exit_config == THRESHOLDS


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


@pytest.mark.parametrize("code", [True, False])
def test_a_checkpoint_of_the_flat_package_loads(tmp_path, images, code):
    """It names modules of a flat package, and its thresholds no weights."""
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5, None, 0.6], search={"method": "genetic"})
    model.save_pretrained(tmp_path, include_code=code)
    config = json.loads((tmp_path / "config.json").read_text())
    named = {
        "AutoConfig": "configuration_scan.ScanConfig",
        "AutoModelForImageClassification": "modeling_scan.ScanForImageClassification",
    }
    assert config.get("auto_map") == (named if code else None)  # as written then, so these files keep their names
    old = json.loads((tmp_path / "exit_config.json").read_text())
    del old["weights"]
    (tmp_path / "exit_config.json").write_text(json.dumps(old))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=code)
    assert type(loaded) is ScanForImageClassification
    assert loaded.exit_config == model.exit_config
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_from_a_state_dict(model, images):
    """As any model of Transformers: without a folder."""
    loaded, info = ScanForImageClassification.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), output_loading_info=True
    )
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert not info["missing_keys"]
    assert loaded.exit_config == ExitConfig()
    state = {name: value for name, value in model.state_dict().items() if name != "backbone.fc.bias"}
    with pytest.raises(ValueError, match="The weights of `state_dict` lack 1 of the backbone's"):
        ScanForImageClassification.from_pretrained(None, config=model.config, state_dict=state)


def test_there_are_no_input_embeddings(model):
    assert model.get_input_embeddings() is None


def test_a_dictionary_as_exit_configuration(tmp_path):
    model = saved(tmp_path)
    model.exit_config = {"thresholds": [0.2, 0.3]}
    assert model.exit_config == ExitConfig(thresholds=[0.2, 0.3])
    assert load(tmp_path, exit_config={"thresholds": (0.2, 0.3)}).exit_config == model.exit_config
    for wrong in ([0.2, 0.3], None):
        with pytest.raises(TypeError, match=f"`exit_config` is a {type(wrong).__name__}; expected an `ExitConfig`"):
            model.exit_config = wrong
