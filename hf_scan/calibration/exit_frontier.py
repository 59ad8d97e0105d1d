# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find the frontier of a network over all thresholds and over which exits are switched off."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..model.exit_config import ExitConfig
from ..model.exit_rule import num_answers
from .exit_table import ExitTable
from .frontier import FEW, MOST_FREE, Frontier, exact_frontier, polished, undominated


# With more early exits than these, only combinations with few of them switched on are tried.
ALL_COMBINATIONS = 5
MOST_POLICIES_EACH = 1_000_000


def exit_frontier(
    table: ExitTable,
    exit_config: ExitConfig,
    costs_of: Callable[[ExitConfig], Sequence[float] | np.ndarray],
    truth: np.ndarray | None = None,
    max_policies: int = 4_000_000,
    polish: bool = True,
) -> Frontier:
    """
    Find the best accuracy for every cost, as [`exact_frontier`] does, also over which exits are switched off: such an
    exit costs nothing, and the ensemble is formed without it.

    With more than five early exits, only combinations with at most three of them switched on are tried and, up to
    nine, the one with all switched on.

    Args:
        table ([`ExitTable`]): The logits to search on.
        exit_config ([`ExitConfig`]): Criterion, temperatures and fallback.
        costs_of (`Callable`): Returns the cumulative cost of each exit and of the fallback, `(num_exits + 1,)`, for a
            configuration in which some exits are switched off.
        truth (`np.ndarray` of shape `(n,)`, *optional*): The classes that count as right. Defaults to the labels.
        max_policies (`int`, *optional*, defaults to 4,000,000): Policies on the grids of all combinations together, at
            most a million for each.
        polish (`bool`, *optional*, defaults to `True`): As in [`exact_frontier`].

    Returns:
        [`Frontier`]: with a threshold for each exit that samples can exit at; NaN for those that are switched off.
    """
    truth = table.labels if truth is None else truth
    last = num_answers(table.num_exits, exit_config.fallback) - 1
    combinations = list(_combinations(table.num_exits - 1))
    problems, found = [], []
    for exits_on in combinations:
        thresholds = [0.5 if index in exits_on else None for index in range(table.num_exits - 1)]
        config = exit_config.replace(thresholds=thresholds)
        columns = sorted({*exits_on, table.num_exits - 1, last})
        scores, predictions = table.columns(config)
        right = predictions[:, columns] == truth[:, None]
        problem = (scores[:, columns], right, np.asarray(costs_of(config), dtype=float)[columns])
        problems.append(problem)
        most = max(1, min(MOST_POLICIES_EACH, max_policies // len(combinations)))
        found.append(exact_frontier(*problem, most, polish=False))
    origins, rows = _merged(found)
    for index, problem in enumerate(problems if polish else []):
        chosen = rows[origins == index]
        if len(chosen) and len(problem[2]) > 1:
            moved = polished(*problem, found[index].thresholds[chosen])
            found[index] = Frontier.of(*problem, np.concatenate([found[index].thresholds, moved]))
    origins, rows = _merged(found)
    policies = np.full((len(rows), last), np.nan)
    accuracy, cost = np.empty(len(rows)), np.empty(len(rows))
    for policy, (index, row) in enumerate(zip(origins, rows)):
        columns = sorted({*combinations[index], table.num_exits - 1, last})
        accuracy[policy], cost[policy] = found[index].accuracy[row], found[index].cost[row]
        policies[policy, columns[:-1]] = found[index].thresholds[row, :-1]
    return Frontier(accuracy, cost, policies)


def _combinations(early: int) -> Iterator[tuple[int, ...]]:
    """Yield the early exits that are switched on, for each combination that is tried."""
    most = early if early <= ALL_COMBINATIONS else FEW
    for count in range(most + 1):
        yield from itertools.combinations(range(early), count)
    if most < early <= MOST_FREE:
        yield tuple(range(early))


def _merged(found: list[Frontier]) -> tuple[np.ndarray, np.ndarray]:
    """Merge frontiers; return the frontier and the row of each policy that no other dominates."""
    accuracy = np.concatenate([frontier.accuracy for frontier in found])
    cost = np.concatenate([frontier.cost for frontier in found])
    origin = np.concatenate([np.full(len(frontier), index) for index, frontier in enumerate(found)])
    row = np.concatenate([np.arange(len(frontier)) for frontier in found])
    kept = undominated(accuracy, cost)
    return origin[kept], row[kept]
