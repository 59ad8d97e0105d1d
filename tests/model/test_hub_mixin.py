"""Saving and loading: which thresholds belong to which weights, whatever is interrupted or changed meanwhile."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_scan import ExitConfig, ScanForImageClassification

from ..conftest import random_scan_model
from .samples import THRESHOLDS, change_weights, load, saved


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
