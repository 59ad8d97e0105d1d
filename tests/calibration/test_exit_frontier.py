import itertools

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


def many(exits: int, n: int = 300, seed: int = 0) -> ExitTable:
    """Exits that know different things, so that several of them are worth it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    logits = rng.normal(size=(n, exits, 3)).astype(np.float32)
    logits[np.arange(n)[:, None], np.arange(exits), labels[:, None]] += np.linspace(0, 2, exits)
    return ExitTable(logits, labels, np.arange(n, dtype=np.uint64), "search", "")


@pytest.mark.parametrize(("exits", "policies"), [(8, 400_000), (13, 40_000)])
def test_many_exits(exits, policies):
    """Every policy gives what it says, also beyond the combinations that are all tried; a head that is off is free."""
    rows, rule = many(exits), ExitConfig(fallback="deepest")
    costs = ExitCosts([1.0] * exits, [0.01] * exits)
    frontier = exit_frontier(rows, rule, costs.cumulative, max_policies=policies, polish=False)
    assert frontier.thresholds.shape[1] == exits - 1
    assert frontier.accuracy.max() >= (rows.deepest == rows.labels).mean()
    # Grown beyond those that are all tried, where the grid is fine enough for it to pay.
    assert (~np.isnan(frontier.thresholds)).sum(axis=1).max() >= (4 if exits == 8 else 2)
    assert np.all(np.diff(frontier.cost) > 0)
    assert np.all(np.diff(frontier.accuracy) > 0)
    for accuracy, cost, thresholds in zip(frontier.accuracy, frontier.cost, frontier.thresholds):
        exits_on = np.flatnonzero(~np.isnan(thresholds)).tolist()
        config = rule.replace(thresholds=[None if np.isnan(t) else min(float(t), 0.999999) for t in thresholds])
        assert accuracy_and_cost(rows, config, costs) == (pytest.approx(accuracy), pytest.approx(cost))
        spent = costs.cumulative(config)
        assert spent[exits - 1] == pytest.approx(exits + 0.01 * (len(exits_on) + 1))


def test_the_reduction_covers_what_it_says():
    """Each combination of three is on the frontier or beaten, with as many policies as it is tried with."""
    rows, rule = many(8), ExitConfig(fallback="deepest")
    costs = ExitCosts([1.0] * 8, [0.01] * 8)
    frontier = exit_frontier(rows, rule, costs.cumulative, max_policies=40_000, polish=False)
    for exits_on in itertools.combinations(range(7), 3):
        config = rule.replace(thresholds=[0.5 if index in exits_on else None for index in range(7)])
        columns = [*exits_on, 7]
        scores, predictions = rows.columns(config)
        right = predictions[:, columns] == rows.labels[:, None]
        alone = exact_frontier(scores[:, columns], right, np.array(costs.cumulative(config))[columns], 600, False)
        for accuracy, cost in zip(alone.accuracy, alone.cost):
            assert frontier.accuracy[frontier.cost <= cost + 1e-9].max() >= accuracy - 1e-9
