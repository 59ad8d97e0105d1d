import numpy as np
import pytest
import torch
from PIL import Image

from hf_scan.demo.network import DemoNetwork, int8_folder
from hf_scan.model.exit_rule import apply_exit_rule


@pytest.fixture(scope="module")
def network(checkpoint) -> DemoNetwork:
    return DemoNetwork(str(checkpoint))


@pytest.fixture(scope="module")
def pictures(network) -> list[Image.Image]:
    return [Image.open(path) for path in network.samples]


@pytest.mark.parametrize("thresholds", [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [None, 0.4]])
def test_what_is_explained_is_what_the_network_answers(network, pictures, thresholds):
    rule = network.first_rule().replace(thresholds=thresholds)
    with torch.inference_mode():
        expected = network.network.predict_adaptive(network.pixels(pictures), exit_config=rule)
        defined = apply_exit_rule(network.network(network.pixels(pictures)).exit_logits, rule)
    assert expected.exit_index.tolist() == defined.exit_index.tolist()
    for row, picture in enumerate(pictures):
        view = network.explain(picture, rule, timed=False)
        assert view.exit_index == int(expected.exit_index[row])
        assert view.label == network.labels[int(expected.logits[row].argmax())]
        assert view.confidence == pytest.approx(float(expected.confidence[row]), abs=1e-5)
        assert [one.state for one in view.exits].count("answered") == 1
        assert view.exits[view.exit_index].state == "answered"
        assert {one.state for one in view.exits[view.exit_index + 1 :]} <= {"not run"}
    labels, exits, _ = zip(*network.answer(pictures, rule))
    assert list(exits) == expected.exit_index.tolist()
    assert list(labels) == [network.labels[int(row.argmax())] for row in expected.logits]


def test_costs_and_times(network, pictures):
    rule = network.first_rule().replace(thresholds=[0.0, 0.0])
    view = network.explain(pictures[0], rule)
    costs = network.macs
    assert view.macs == pytest.approx((costs.stages[0] + costs.heads[0]) / costs.plain)
    assert [one.macs for one in view.exits] == sorted(one.macs for one in view.exits)
    assert view.milliseconds > 0
    assert view.plain_milliseconds > 0


def test_attention_is_a_picture_for_each_early_exit(network, pictures):
    view = network.explain(pictures[0], network.first_rule(), timed=False)
    first, second, deepest = (one.attention for one in view.exits)
    assert deepest is None
    assert first.size == (160, 160)
    assert np.abs(np.asarray(first).astype(int) - np.asarray(second)).max() > 0


def test_the_frontier_lies_beside_the_checkpoint_or_is_found(network, checkpoint, tmp_path):
    assert network.frontier.samples == 300
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    without = DemoNetwork(str(bare))
    assert (without.frontier, without.samples) == (None, [])
    assert without.first_rule().thresholds == [0.9, 0.9]  # nothing is known of it
    for number in range(20):
        path = tmp_path / "photos" / f"LABEL_{number % 5}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (12 * number, 40, 90)).save(path)
    found = DemoNetwork(str(bare), data=tmp_path / "photos")
    assert found.frontier.samples == len(found.samples) == 20
    assert found.first_rule() == found.frontier.exit_config(found.frontier.cheapest(0.0))
    (tmp_path / "photos" / "LABEL_0").rename(tmp_path / "photos" / "zebra")
    with pytest.raises(ValueError, match=r"has folders \['zebra'\]; expected images in folders that are named like"):
        DemoNetwork(str(bare), data=tmp_path / "photos")


def test_int8_is_an_export_in_the_folder(checkpoint, tmp_path):
    assert int8_folder(str(checkpoint)) is None
    (tmp_path / "int8" / "onnx").mkdir(parents=True)
    assert int8_folder(str(tmp_path)) == "int8"
