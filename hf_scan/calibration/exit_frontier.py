# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find the frontier of a network over all thresholds and over which exits are switched off."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..model.exit_config import ExitConfig
from ..model.exit_rule import num_answers
from .exit_table import ExitTable
from .frontier import FEW, MOST_FREE, Frontier, exact_frontier, polished, undominated


Exits = tuple[int, ...]  # that are switched on

# All combinations of so many early exits are tried; of more, the small ones, and what grows from the best of them.
ALL_COMBINATIONS = 5
MOST_COMBINATIONS = 700
MOST_GROWN = 12  # combinations of one size that are grown
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

    With at most five early exits, every combination of exits that are switched on is searched. With more, these are:
    every combination of at most three (of two, with more than 16 early exits); all together, up to nine; and those
    that grow, an exit at a time, from the twelve combinations with the most policies on the frontier, until a larger
    one adds none. What is left out can only be a combination of four or more none of whose parts was among the best,
    so the frontier may miss policies there, and never overstates one: accuracy and cost are those of the policies
    returned.

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
    early = table.num_exits - 1
    last = num_answers(table.num_exits, exit_config.fallback) - 1

    def problem_of(exits_on: Exits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        thresholds = [0.5 if index in exits_on else None for index in range(early)]
        config = exit_config.replace(thresholds=thresholds)
        columns = sorted({*exits_on, early, last})
        scores, predictions = table.columns(config)
        right = predictions[:, columns] == truth[:, None]
        return scores[:, columns], right, np.asarray(costs_of(config), dtype=float)[columns]

    combinations = list(_combinations(early))
    most = max(1, min(MOST_POLICIES_EACH, max_policies // len(combinations)))
    found = {exits_on: exact_frontier(*problem_of(exits_on), most, polish=False) for exits_on in combinations}
    if early > ALL_COMBINATIONS:
        size = _complete_size(early)
        while grown := _grown(found, early, size):
            found |= {exits_on: exact_frontier(*problem_of(exits_on), most, polish=False) for exits_on in grown}
            size += 1
    if polish:
        for exits_on, rows in _merged(found).items():
            problem = problem_of(exits_on)
            if len(problem[2]) > 1:
                moved = polished(*problem, found[exits_on].thresholds[rows])
                found[exits_on] = Frontier.of(*problem, np.concatenate([found[exits_on].thresholds, moved]))
    parts = []
    for exits_on, rows in _merged(found).items():
        part = found[exits_on].select(rows)
        policies = np.full((len(rows), last), np.nan)
        policies[:, sorted({*exits_on, early, last})[:-1]] = part.thresholds[:, :-1]
        parts.append(Frontier(part.accuracy, part.cost, policies))
    joined = Frontier(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))
    return joined.select(np.argsort(joined.cost, kind="stable"))


def _complete_size(early: int) -> int:
    """Return up to how many early exits that are switched on all combinations are tried."""
    if early <= ALL_COMBINATIONS:
        return early
    counts = itertools.accumulate(math.comb(early, count) for count in range(FEW + 1))
    return max(2, sum(count <= MOST_COMBINATIONS for count in counts) - 1)


def _combinations(early: int) -> Iterator[Exits]:
    """Yield the early exits that are switched on, for each combination that is tried in any case."""
    most = _complete_size(early)
    for count in range(most + 1):
        yield from itertools.combinations(range(early), count)
    if most < early <= MOST_FREE:
        yield tuple(range(early))


def _grown(found: dict[Exits, Frontier], early: int, size: int) -> list[Exits]:
    """Return the combinations with one exit more than the best ones of a size, as far as they are new."""
    best = {exits_on: len(rows) for exits_on, rows in _merged(found).items() if len(exits_on) == size}
    chosen = sorted(best, key=lambda exits_on: (-best[exits_on], exits_on))[:MOST_GROWN]
    grown = {
        tuple(sorted({*exits_on, other})) for exits_on in chosen for other in range(early) if other not in exits_on
    }
    return sorted(grown - set(found))


def _merged(found: dict[Exits, Frontier]) -> dict[Exits, np.ndarray]:
    """Return for each combination the rows of its policies that no policy of any other dominates, if there are any."""
    accuracy = np.concatenate([frontier.accuracy for frontier in found.values()])
    cost = np.concatenate([frontier.cost for frontier in found.values()])
    lengths = [len(frontier) for frontier in found.values()]
    kept = np.zeros(len(accuracy), dtype=bool)
    kept[undominated(accuracy, cost)] = True
    parts = np.split(kept, np.cumsum(lengths)[:-1])
    return {exits_on: np.flatnonzero(part) for exits_on, part in zip(found, parts) if part.any()}
