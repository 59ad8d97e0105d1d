# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find the policies of a frontier that meet the target of [`calibrate`]."""

from typing import Any

import numpy as np

from ..costs.cost_model import CostModel
from ..model.exit_config import ExitConfig
from .certify import RiskBound
from .cross_fitting import least_accuracy_to_ask
from .exit_frontier import exit_frontier
from .exit_table import ExitTable
from .frontier import Frontier, as_thresholds, undominated
from .request import ACCURACY_TARGETS


TIE = 1e-6
# Policies of a frontier that are looked at one by one.
MOST_POLICIES = 200
# How thresholds are searched for a target of accuracy.
COARSE: dict[str, Any] = {"max_policies": 200_000, "polish": False}


def policies_on_target(
    table: ExitTable,
    rule: ExitConfig,
    cost_model: CostModel,
    target: dict[str, float],
    latency: str,
    accuracy_margin: float,
    guarantee: RiskBound | None,
) -> Frontier:
    """
    Return the policies of the frontier that meet the target: with a guarantee, those to certify, else the one to take.

    Raises:
        `ValueError`: if the target is infeasible.
    """
    disagreement = guarantee is not None and guarantee.loss == "disagreement"
    truth = table.deepest if disagreement else table.labels
    name, value = next(iter(target.items()), ("", 0.0))
    if name == "max_latency_ms" and latency == "p95":
        frontier, fits, best = _mostly_within(table, rule, cost_model, value, truth)
    else:
        # What cross-fitting judges has to be chosen as it was there: finer thresholds are more optimistic.
        searched = COARSE if name in ACCURACY_TARGETS and guarantee is None else {}
        frontier = exit_frontier(table, rule, cost_model.cumulative, truth, **searched)
        if cost_model.images > 1:
            frontier = _in_shrinking_batches(table, rule, cost_model, frontier)
        if name in ACCURACY_TARGETS:
            if disagreement:  # the frontier is then of agreement
                frontier = _thinned(frontier)
            least_accuracy = _least_accuracy(table, target)
            fits, best = _accurate(table, rule, cost_model, frontier, least_accuracy, accuracy_margin, guarantee)
        elif name:
            fits, best = _cheap(cost_model, frontier, cost_model.plain_image / value if name == "speedup" else value)
        else:
            fits, best = np.ones(len(frontier), dtype=bool), ""
    if not fits.any():
        raise ValueError(f"No thresholds reach `{name}={value:g}` on this split: {best}.")
    frontier = frontier.select(fits)
    if name and name not in ACCURACY_TARGETS:
        return frontier.select(np.array([-1]))  # the most accurate
    if guarantee is None:
        return frontier.select(np.array([0]))  # the cheapest
    return _worth_certifying(table, cost_model, frontier, target, guarantee)


def _least_accuracy(table: ExitTable, target: dict[str, float]) -> float:
    """Return the least accuracy that a target allows: the deepest exit's, where it names none."""
    if "min_accuracy" in target:
        return target["min_accuracy"]
    return table.baseline_accuracy - target.get("max_accuracy_drop", 0.0) / 100


def _accurate(
    table: ExitTable,
    rule: ExitConfig,
    cost_model: CostModel,
    frontier: Frontier,
    least_accuracy: float,
    accuracy_margin: float,
    guarantee: RiskBound | None,
) -> tuple[np.ndarray, str]:
    """Return which policies are accurate enough, and what is achievable, in words."""
    if guarantee is not None and guarantee.loss == "disagreement":
        accuracy = _accuracies(table, rule, frontier.thresholds)
    else:
        accuracy = frontier.accuracy
    highest = accuracy.max()
    fits = accuracy >= least_accuracy - 1e-12
    if guarantee is None and fits.any():
        required = max(
            _required_accuracy(table, rule, cost_model, least_accuracy), least_accuracy + accuracy_margin / 100
        )
        fits = accuracy >= min(required, highest) - 1e-12
    drop = 100 * (table.baseline_accuracy - highest)
    return fits, f"the highest accuracy is {highest:.2%}, {drop:+.2f} points of drop"


def _cheap(cost_model: CostModel, frontier: Frontier, most: float) -> tuple[np.ndarray, str]:
    """Return which policies cost at most so much, and what is achievable, in words."""
    least, unit = frontier.cost.min(), cost_model.unit.split(",")[0]
    times = cost_model.plain_image / least
    best = f"the least is {least:.5g} {unit} for an image, {times:.2f} times as fast as the plain backbone"
    return frontier.cost <= most * (1 + 1e-12), best


def _worth_certifying(
    table: ExitTable, cost_model: CostModel, frontier: Frontier, target: dict[str, float], guarantee: RiskBound
) -> Frontier:
    """Return the policies to certify: those that keep the bound here, the safest, and the network without exits."""
    baseline = table.baseline_accuracy
    compared = baseline if guarantee.loss == "gap" else 1.0
    # What does not keep the bound here is not worth a test there; the safest is tested in any case.
    promising = compared - frontier.accuracy <= guarantee.max_drop / 100
    promising[-1] = True
    frontier = _thinned(frontier.select(promising))
    if guarantee.loss == "error" or (target and baseline < _least_accuracy(table, target)):
        return frontier
    # Without early exits nothing is lost for certain, and so it is tested first; on the frontier it need not be.
    plain = np.zeros((1, frontier.thresholds.shape[1]))
    plain[0, : table.num_exits - 1] = np.nan
    top = Frontier(np.array([compared]), np.array([cost_model.plain_image]), plain)
    return Frontier(*(np.concatenate(pair) for pair in zip(vars(frontier).values(), vars(top).values())))


def _mostly_within(
    table: ExitTable, rule: ExitConfig, cost_model: CostModel, limit: float, truth: np.ndarray
) -> tuple[Frontier, np.ndarray, str]:
    """Return accuracy over the share of images that cost more than a limit, and which policies keep that to 5 %."""

    def costs_of(config: ExitConfig) -> np.ndarray:
        cumulative = cost_model.cumulative(config)
        return (cumulative > limit) + TIE * cumulative / cumulative[-1]  # how much more only breaks ties

    frontier = exit_frontier(table, rule, costs_of, truth)
    return frontier, frontier.cost <= 0.05 + TIE, f"at least {frontier.cost.min():.1%} of the images take longer"


def _in_shrinking_batches(table: ExitTable, rule: ExitConfig, cost_model: CostModel, frontier: Frontier) -> Frontier:
    """Return a frontier with the costs of batches that shrink as samples exit, in place of those of full batches."""
    frontier = _thinned(frontier)
    policies = [rule.replace(thresholds=as_thresholds(policy)) for policy in frontier.thresholds]
    cost = np.array([cost_model.mean(policy, table.exit_shares(policy)) for policy in policies])
    return Frontier(frontier.accuracy, cost, frontier.thresholds).select(undominated(frontier.accuracy, cost))


def _required_accuracy(table: ExitTable, rule: ExitConfig, cost_model: CostModel, least_accuracy: float) -> float:
    """Return the accuracy to require on the split, so that other images have the target's."""

    def frontier_of(rows: np.ndarray) -> Frontier:
        part = table.select(rows)
        return exit_frontier(part, rule, cost_model.cumulative, **COARSE)

    def accuracies_of(policies: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _accuracies(table.select(rows), rule, policies)

    return least_accuracy_to_ask(least_accuracy, table.deepest == table.labels, frontier_of, accuracies_of)


def _accuracies(table: ExitTable, rule: ExitConfig, policies: np.ndarray) -> np.ndarray:
    configs = (rule.replace(thresholds=as_thresholds(policy)) for policy in policies)
    return np.array([(table.predictions(config) == table.labels).mean() for config in configs])


def _thinned(frontier: Frontier) -> Frontier:
    return frontier.select(np.unique(np.linspace(0, len(frontier) - 1, MOST_POLICIES, dtype=int)))


__all__ = ["policies_on_target"]
