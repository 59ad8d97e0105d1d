import numpy as np
import pytest
import torch

from hf_scan import ExitConfig, apply_exit_rule
from hf_scan.calibration import ExitTable, exact_frontier, exit_frontier
from hf_scan.costs import ExitCosts

from .samples import COSTS, accuracy_and_cost, table


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_every_policy_of_the_frontier_gives_what_it_says(fallback):
    rows, rule = table(300), ExitConfig(fallback=fallback)
    frontier = exit_frontier(rows, rule, COSTS.cumulative)
    assert len(frontier) > 20
    off = np.isnan(frontier.thresholds)
    assert off.any()
    assert not off.all(axis=1).any() or fallback == "deepest"
    for accuracy, cost, thresholds in zip(frontier.accuracy, frontier.cost, frontier.thresholds):
        config = rule.replace(thresholds=[None if np.isnan(t) else float(t) for t in thresholds])
        # An exit that is on and lets nobody go is still counted; the one that is off is another policy.
        leaving = apply_exit_rule(torch.from_numpy(rows.logits).unbind(1), config.replace(fallback="ensemble"))
        on = config.replace(thresholds=[None if t is None else min(t, 0.999) for t in config.thresholds])
        spent = np.array(COSTS.cumulative(on))[leaving.exit_index.numpy()].mean()
        found = accuracy_and_cost(rows, config, COSTS)[0]
        assert (found, spent) == (pytest.approx(accuracy), pytest.approx(cost))


def test_switching_off_adds_policies_and_loses_none():
    rows = table(300)
    alone = exit_frontier(rows, ExitConfig(), COSTS.cumulative)
    scores, predictions = rows.columns(ExitConfig())
    on = exact_frontier(scores, predictions == rows.labels[:, None], np.array(COSTS.cumulative()), max_policies=10**4)
    for accuracy, cost in zip(on.accuracy, on.cost):
        assert alone.accuracy[alone.cost <= cost + 1e-9].max() >= accuracy - 0.01
    assert alone.cost[0] < on.cost[0] + 1e-9


def test_many_exits():
    """More than are tried in all combinations."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = rng.normal(size=(60, 8, 3)).astype(np.float32)
    logits[np.arange(60)[:, None], np.arange(8), labels[:, None]] += np.linspace(0, 2, 8)
    rows = ExitTable(logits, labels, np.arange(60, dtype=np.uint64), "search", "")
    frontier = exit_frontier(rows, ExitConfig(fallback="deepest"), ExitCosts([1.0] * 8, [0.1] * 8).cumulative)
    assert frontier.thresholds.shape[1] == 7
    assert frontier.accuracy.max() >= (rows.deepest == labels).mean()
