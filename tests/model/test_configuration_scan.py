import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig

from hf_scan import ScanConfig


def test_round_trip(tmp_path):
    config = ScanConfig(
        backbone="resnet18", backbone_kwargs={"drop_rate": 0.1}, exit_points=["layer2", "layer3"], num_labels=7
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ScanConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18", "local-dir:weights", "./resnet18", "timm/resnet18", "C:\\resnet18"]
)
def test_backbone_that_names_a_source_is_refused(name):
    with pytest.raises(ValueError, match=r"names a source or a path; expected .*'resnet50'"):
        ScanConfig(backbone=name)


def test_unknown_tag_is_refused():
    with pytest.raises(ValueError, match=r"'resnet18\.nope', whose pretrained tag timm .* does not know"):
        ScanConfig(backbone="resnet18.nope")


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"'resnet_of_dreams', which timm .* does not know"):
        ScanConfig(backbone="resnet_of_dreams")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", {"file": "weights.bin"}),
        ("pretrained_cfg_overlay", {"url": "http://127.0.0.1/x.bin"}),
        ("checkpoint_path", "weights.bin"),
        ("cache_dir", "somewhere"),
        ("pretrained_filter_fn", "f"),
    ],
)
@pytest.mark.parametrize("place", ["top", "backbone_kwargs"])
def test_loaded_config_that_names_weights_is_refused(tmp_path, name, value, place):
    ScanConfig(backbone="resnet18").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    (values if place == "top" else values["backbone_kwargs"])[name] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"names \['{name}'\].* Remove these keys"):
        ScanConfig.from_pretrained(tmp_path)


def test_own_arguments_are_not_repeated():
    with pytest.raises(ValueError, match="'num_classes', which is not expected there: set `num_labels`"):
        ScanConfig(backbone="resnet18", backbone_kwargs={"num_classes": 3})


def test_config_of_another_model_type_is_refused(tmp_path):
    AutoConfig.for_model("resnet").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"configuration of a 'resnet' model.*AutoConfig"):
        ScanConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ["head_width", "head_feature_size", "num_channels", "image_size"])
def test_sizes_are_positive(field):
    with pytest.raises(ValueError, match=f"`{field}` is 0; expected a whole number of at least 1"):
        ScanConfig(**{field: 0})


def test_unknown_attention_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="attention_type"):
        ScanConfig(attention_type="hard")


def test_regression_is_refused():
    with pytest.raises(ValueError, match=r"`problem_type` is 'regression'; expected one of \(None, 'single_label_"):
        ScanConfig(backbone="cifar_resnet20", problem_type="regression")
    assert ScanConfig(backbone="cifar_resnet20", problem_type="multi_label_classification").problem_type
    assert ScanConfig(backbone="cifar_resnet20", problem_type="single_label_classification").problem_type


@pytest.mark.parametrize("points", [["layer1 "], ["a.b; import os"], ["a..b"], [""], ["x" * 5000], [0] * 300])
def test_exit_points_are_names_and_indices(points):
    with pytest.raises(ValueError, match=r"`exit_points` h.* expected (indices|at most 256)"):
        ScanConfig(exit_points=points)
