import json

import numpy as np
import pytest

from hf_scan import ExitConfig
from hf_scan.calibration import ExitTable
from hf_scan.calibration.exit_frontier import exit_frontier
from hf_scan.costs import CostModel
from hf_scan.model.exit_config import RULE
from hf_scan.reporting.saved_frontier import FRONTIER_NAME, SavedFrontier


@pytest.fixture(scope="module")
def table() -> ExitTable:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 3, 5)).astype(np.float32)
    labels = rng.integers(0, 5, 200)
    for depth in range(3):
        logits[np.arange(200), depth, labels] += depth + 0.5
    return ExitTable(logits, labels, np.arange(200, dtype=np.uint64), "search", "none")


def test_policies_are_those_of_the_search_and_do_what_they_say(model, table):
    rule = ExitConfig(fallback="deepest", temperatures=[1.5, 1.0, 1.0])
    costs = CostModel.of(model)
    frontier = SavedFrontier.of(table, rule, costs)
    whole = exit_frontier(table, rule, costs.cumulative, polish=False)
    assert len(frontier) == min(200, len(whole))
    for policy in (0, len(frontier) // 2, len(frontier) - 1):
        config = frontier.exit_config(policy)
        assert (table.predictions(config) == table.labels).mean() == pytest.approx(frontier.accuracy[policy])
        mean = costs.mean(config, table.exit_shares(config)) / costs.plain_image
        assert mean == pytest.approx(frontier.cost[policy])
        assert {name: getattr(config, name) for name in RULE[1:]} == {name: getattr(rule, name) for name in RULE[1:]}


def test_the_cheapest_that_loses_no_more(table, model):
    frontier = SavedFrontier.of(table, ExitConfig(), CostModel.of(model))
    costs = [frontier.cost[frontier.cheapest(drop)] for drop in (0, 1, 5, 20)]
    assert costs == sorted(costs, reverse=True)
    for drop in (0.0, 1.0, 5.0):
        chosen = frontier.cheapest(drop)
        cheaper = np.asarray(frontier.accuracy[:chosen])
        assert frontier.accuracy[chosen] >= frontier.deepest_accuracy - drop / 100 - 1e-9
        assert (cheaper < frontier.deepest_accuracy - drop / 100).all()
    assert frontier.cheapest(-50.0) == int(np.argmax(frontier.accuracy))  # as near as it gets


def test_written_and_read(table, model, tmp_path):
    frontier = SavedFrontier.of(table, ExitConfig(), CostModel.of(model))
    frontier.save(tmp_path)
    assert SavedFrontier.load(tmp_path / FRONTIER_NAME) == frontier


@pytest.mark.parametrize(
    "change",
    [{"cost": []}, {"thresholds": [[2.0, 0.0]]}, {"accuracy": ["high"]}, {"unknown": 1}, {"fallback": "nothing"}],
)
def test_files_of_strangers(change, tmp_path):
    good = {"accuracy": [0.9], "cost": [0.5], "thresholds": [[0.5, None]], "deepest_accuracy": 0.9}
    good |= {"unit": "MACs", "split": "search", "samples": 10}
    (tmp_path / "frontier.json").write_text(json.dumps(good))
    assert len(SavedFrontier.load(tmp_path / "frontier.json")) == 1
    (tmp_path / "frontier.json").write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=r"holds no frontier of thresholds \(.*Delete it, or calibrate anew"):
        SavedFrontier.load(tmp_path / "frontier.json")
