import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from hf_scan import ExitConfig, measure_costs
from hf_scan.model.exit_config import PROVENANCE, RULE


RULE_VALUES = {
    "thresholds": [0.5, None],
    "criterion": "margin",
    "temperatures": [1.0, 2.0, 1.5],
    "fallback": "deepest",
}


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_replace_takes_any_sequence_of_numbers(kind):
    config = ExitConfig().replace(thresholds=kind([0.5, 0.25]), temperatures=kind([1.0, 2.0, 0.5]))
    assert config == ExitConfig(thresholds=[0.5, 0.25], temperatures=[1.0, 2.0, 0.5])


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_a_field_takes_any_sequence_of_numbers(kind):
    expected = ExitConfig(thresholds=[0.5, 0.25], temperatures=[1.0, 2.0, 0.5])
    config = ExitConfig(thresholds=kind([0.5, 0.25]), temperatures=kind([1.0, 2.0, 0.5]))
    assert config == expected
    assert config.to_json() == expected.to_json()
    config.thresholds, config.temperatures = kind([0.5, 0.25]), kind([1.0, 2.0, 0.5])
    assert config == expected
    with pytest.raises(ValueError, match="`temperatures` is"):
        config.temperatures = kind([0.0, 1.0])


@pytest.mark.parametrize("name", ["thresholds", "temperatures"])
@pytest.mark.parametrize("value", [0.5, "high", [[0.5, 0.5]], ["high"]])
def test_replace_names_what_is_no_sequence_of_numbers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*expected"):
        ExitConfig().replace(**{name: value})


def test_replace_takes_measured_costs_as_they_are(model, tmp_path):
    costs = measure_costs(model, batch_size=1)
    config = ExitConfig().replace(costs=costs)
    assert config == ExitConfig().replace(costs=costs.to_dict())
    config.save_pretrained(tmp_path)
    assert type(costs).from_dict(ExitConfig.from_pretrained(tmp_path).costs) == costs


def test_replace_returns_a_copy_and_refuses_unknown_fields():
    config = ExitConfig(thresholds=[0.5])
    assert config.replace(thresholds=[0.6]).thresholds == [0.6]
    assert config.thresholds == [0.5]
    with pytest.raises(TypeError, match=r"has no \['threshold'\]"):
        config.replace(threshold=[0.6])


def test_update_still_works_and_warns():
    with pytest.warns(FutureWarning, match="call `replace` instead"):
        config = ExitConfig(thresholds=[0.5]).update(thresholds=(0.6,))
    assert config == ExitConfig(thresholds=[0.6])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("thresholds", [1.5, 0.5], ValueError),
        ("thresholds", [float("nan"), 0.5], ValueError),
        ("thresholds", "0.5", StrictDataclassFieldValidationError),
        ("criterion", "confident", ValueError),
        ("temperatures", [0.0, 1.0, 1.0], ValueError),
        ("temperatures", [1e-320, 1.0, 1.0], ValueError),
        ("temperatures", [1.0, 1e300, 1.0], ValueError),
        ("fallback", "shallowest", StrictDataclassFieldValidationError),
        ("reference", {}, ValueError),
        ("reference", {"counts": [[1, 2], [3]]}, ValueError),
        ("reference", {"counts": [["a"]]}, ValueError),
        ("guarantee", {"rule": {}}, ValueError),
        ("weights", 3, StrictDataclassFieldValidationError),
    ],
)
def test_an_invalid_value_is_refused_when_it_is_assigned(field, value, error):
    config = ExitConfig(**RULE_VALUES)
    before = ExitConfig(**RULE_VALUES)
    with pytest.raises(error, match=field):
        setattr(config, field, value)
    assert config == before
    with pytest.raises(error):
        ExitConfig(**{**RULE_VALUES, field: value})


@pytest.mark.parametrize("field", RULE)
def test_a_rule_with_a_guarantee_is_not_assigned_to(field):
    config = ExitConfig(**RULE_VALUES)
    config.guarantee = {"rule": config.rule}
    other = {"thresholds": [0.4, None], "criterion": "entropy", "temperatures": None, "fallback": "ensemble"}[field]
    with pytest.raises(ValueError, match="`replace`, which drops the guarantee"):
        setattr(config, field, other)
    setattr(config, field, RULE_VALUES[field])
    assert config.replace(**{field: other}).guarantee is None


def test_every_field_is_of_the_rule_or_provenance():
    config = ExitConfig(**RULE_VALUES, weights="ab", costs={"machine": "x"})
    assert {**config.rule, **config.provenance} == json.loads(config.to_json())
    assert not set(RULE) & set(PROVENANCE)
    assert config.replace(fallback="ensemble").provenance == {**dict.fromkeys(PROVENANCE), "costs": {"machine": "x"}}


def test_a_file_of_an_earlier_release_loads(tmp_path):
    """As it was written before the weights' fingerprint was a part of it."""
    values = {**RULE_VALUES, "search": {"accuracy": 0.9}, "guarantee": {"rule": RULE_VALUES}, "reference": None}
    values |= {"trained_on": "3:ab", "searched_on": None, "costs": {"machine": "x"}}
    (tmp_path / "exit_config.json").write_text(json.dumps(values))
    config = ExitConfig.from_pretrained(tmp_path)
    assert json.loads(config.to_json()) == {**values, "weights": None}
    assert (config.search, config.costs) == ({"accuracy": 0.9}, {"machine": "x"})


def test_exit_config_round_trip(tmp_path):
    config = ExitConfig(thresholds=[0.25, None, 1], fallback="deepest", search={"method": "genetic", "n": 3})
    config.save_pretrained(tmp_path, "exit_config_fast.json")
    assert ExitConfig.from_pretrained(tmp_path, "exit_config_fast.json") == config
    assert ExitConfig.from_pretrained(tmp_path) == ExitConfig()


@pytest.mark.parametrize(
    "text",
    ["{", "[0.5]", '{"thresholds": [NaN]}', '{"thresholds": [2]}', '{"thresholds": "all"}', '{"fallback": "x"}'],
)
def test_bad_exit_config_file(tmp_path, text):
    (tmp_path / "exit_config.json").write_text(text)
    with pytest.raises(ValueError, match="not a valid exit configuration"):
        ExitConfig.from_pretrained(tmp_path)


def test_keys_of_a_newer_version_are_left_out(tmp_path):
    (tmp_path / "exit_config.json").write_text(json.dumps({"thresholds": [0.5], "budget": "oracle"}))
    assert ExitConfig.from_pretrained(tmp_path) == ExitConfig(thresholds=[0.5])
