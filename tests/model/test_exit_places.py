import copy
import json
import pickle

import pytest
import timm
import torch

from hf_scan import ScanConfig, ScanForImageClassification
from hf_scan.model.exit_places import find_places

from ..conftest import random_scan_model


POINTS = ["layer1.1", "layer2", "layer3.0"]


@pytest.fixture(scope="module")
def blocks() -> ScanForImageClassification:
    return random_scan_model(exit_points=POINTS)


def test_every_block_is_a_place_or_is_named_with_the_reason():
    with torch.device("meta"):
        found = find_places(timm.create_model("test_convnext"))
    assert [(place.name, place.channels, place.reduction) for place in found.places] == [
        ("stages.0", 24, 4),
        ("stages.1.blocks.0", 32, 8),
        ("stages.1", 32, 8),
        ("stages.2.blocks.0", 48, 16),
        ("stages.2.blocks.1", 48, 16),
        ("stages.2.blocks.2", 48, 16),
        ("stages.2", 48, 16),
        ("stages.3.blocks.0", 64, 32),
    ]
    assert found.last.reduction == 32
    assert found.dropped["stages.2.blocks.3"] == "which ends where 'stages.2' does"
    assert found.dropped["stages.3.blocks.1"] == "behind which only the backbone's own classifier stands"


def test_blocks_that_are_hidden_are_named():
    """Parts of a block go around one another, and a block of a network that keeps several tensors hides nothing."""
    with torch.device("meta"):
        found = find_places(timm.create_model("cs3darknet_focus_s"))
    assert "stages.1" in [place.name for place in found.places]
    assert found.dropped["stages.1.blocks.0"] == "which stands in a branch: what comes before it also goes around it"


def test_exits_inside_of_stages_are_saved_and_loaded(blocks, tmp_path):
    blocks.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["exit_points"] == POINTS
    loaded = ScanForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for one, other in zip(loaded(images).exit_logits, blocks(images).exit_logits, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(blocks(images).logits, blocks.backbone(images))


@pytest.mark.parametrize("exit", [0, 1, 2])
def test_a_network_is_truncated_inside_of_a_stage(blocks, exit, tmp_path):
    small = blocks.truncate(exit)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = blocks(images).exit_logits[exit]
        assert torch.equal(small(images).logits, expected)
        small.save_pretrained(tmp_path)
        assert torch.equal(ScanForImageClassification.from_pretrained(tmp_path)(images).logits, expected)
    last = {"layer1.1": "layer1.2", "layer2": "layer3", "layer3.0": "layer3.1"}[POINTS[exit]]
    assert not any(name.startswith(f"backbone.{last}") for name in small.state_dict())


def test_copies_and_pickles_have_the_same_stages(blocks):
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for other in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
            assert torch.equal(other(images).exit_logits[0], blocks(images).exit_logits[0])


def test_samples_leave_inside_of_a_stage(blocks):
    images = torch.randn(32, 3, 16, 16)
    answer = blocks.predict_adaptive(images, thresholds=[0.5, 0.5, 0.5])
    assert set(answer.exit_index.tolist()) >= {0, 2}
    with torch.no_grad():
        logits = blocks(images).exit_logits
    for row, index in enumerate(answer.exit_index.tolist()):
        if index < len(POINTS):
            torch.testing.assert_close(answer.logits[row], logits[index][row])


def test_gradients_reach_every_block():
    model = ScanForImageClassification(ScanConfig(exit_points=POINTS, backbone="cifar_resnet20", num_labels=5))
    model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.backbone.named_parameters())
    assert all(
        parameter.grad is not None for name, parameter in model.exit_heads.named_parameters() if "hint" not in name
    )


def test_a_place_that_does_not_exist_is_refused_on_load(blocks, tmp_path):
    blocks.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "exit_points": ["layer1.1", "layer9", "layer3.0"]}))
    with pytest.raises(ValueError, match=r"config\.json of .*`exit_points` holds 'layer9', which does not exist"):
        ScanForImageClassification.from_pretrained(tmp_path)
