"""Files of weights: found as Transformers finds them, and fingerprints of what they hold."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_scan.model.weight_files import (
    CheckpointWeights,
    DamagedWeightsError,
    find_weight_files,
    fingerprint_of,
    folder_state,
    limited_tensors,
)

from .samples import THRESHOLDS, load, saved


@pytest.mark.parametrize("shards", ["200KB", "5GB"])
def test_the_saved_fingerprint_is_the_model_s(tmp_path, shards):
    model = saved(tmp_path, max_shard_size=shards)
    assert json.loads((tmp_path / "exit_config.json").read_text())["weights"] == model.fingerprint()
    assert load(tmp_path).exit_config == THRESHOLDS
    assert load(tmp_path).exit_config.weights == model.fingerprint()


def test_one_file_comes_before_shards(tmp_path):
    def find(name):
        return tmp_path / name if (tmp_path / name).exists() else None

    assert find_weight_files(find) == []
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"b": shards[1], "a": shards[0], "c": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in shards:
        (tmp_path / name).touch()
    assert find_weight_files(find) == [tmp_path / name for name in shards]
    for name in ("model.safetensors", "model.half.safetensors"):
        (tmp_path / name).touch()
        assert find_weight_files(find, "half" if "half" in name else None) == [tmp_path / name]


def test_a_fingerprint_is_of_names_types_shapes_and_values():
    values = torch.arange(6.0)
    given = [("a", values), ("b", values.reshape(2, 3)), ("a", values.double()), ("a", values + 1)]
    assert len({fingerprint_of([pair]) for pair in given}) == 4
    assert fingerprint_of([("a", values)]) == fingerprint_of([("a", values.clone())])


def test_names_may_lack_the_prefix(tmp_path):
    """As those of a checkpoint that holds the backbone alone."""
    values = torch.arange(6.0)
    save_file({"fc": values}, tmp_path / "model.safetensors")
    weights = CheckpointWeights("here", lambda: [tmp_path / "model.safetensors"])
    assert weights.shapes == {"fc": (6,)}
    assert weights.dtypes == {"F32"}
    assert weights.fingerprint(["backbone.fc"], "backbone.") == fingerprint_of([("backbone.fc", values)])
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DamagedWeightsError, match=r"model\.safetensors cannot be read .*Save or download it again"):
        _ = CheckpointWeights("here", lambda: [tmp_path / "model.safetensors"]).headers


def test_more_parameters_than_weights_are_not_made():
    with limited_tensors(4):
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        with pytest.raises(ValueError, match="describe a network of more than 4 parameters"):
            nn.Linear(1, 1)
    nn.Linear(1, 1)  # no longer watched


def test_a_folder_that_changed_has_another_state(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_state(tmp_path)
    assert folder_state(tmp_path) == before
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "other.json").replace(tmp_path / "config.json")  # of the same name and size
    assert folder_state(tmp_path) != before
