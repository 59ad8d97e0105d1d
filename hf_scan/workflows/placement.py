# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Which of many candidate exits to keep: the frontier over subsets, thresholds included, chosen by cross-fitting."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..calibration.cross_fitting import FOLDS, least_accuracy_to_ask
from ..calibration.exit_table import ExitTable
from ..calibration.frontier import Frontier, exact_frontier, oracle_policy, undominated
from ..calibration.policy import evaluate_policies
from ..costs.values import ExitCosts
from ..model.exit_config import ExitConfig


# Subsets are tried all, up to so many exits; larger ones grow from the best of these, an exit at a time.
ALL_SUBSETS = 3
POLICIES_OF_A_SUBSET = 5_000
# A further exit must lower the cost by this share of it. Less is within the noise of times.
WORTH_AN_EXIT = 0.01


@dataclass(frozen=True)
class Problem:
    """
    Scores of candidates on a split, and what they cost.

    Args:
        scores (`np.ndarray` of shape `(n, candidates + 1)`): Confidences, the deepest exit's last.
        correct (`np.ndarray` of shape `(n, candidates + 1)`): Whether the answers are right.
        stages, heads (`np.ndarray` of shape `(candidates + 1,)`): The cost of each part, in shares of the plain
            network's.
        baseline (`np.ndarray` of shape `(n,)`): Whether the plain network's answers are right.
    """

    scores: np.ndarray
    correct: np.ndarray
    stages: np.ndarray
    heads: np.ndarray
    baseline: np.ndarray

    @classmethod
    def of(
        cls,
        table: ExitTable,
        costs: ExitCosts,
        temperatures: Sequence[float] | None = None,
        plain: ExitTable | None = None,
    ) -> "Problem":
        """
        Return the problem of a table of exit logits and of costs in any unit. The deepest exit is the plain network's
        answer, unless that of another table is.
        """
        temperature = None if temperatures is None else list(temperatures)
        config = ExitConfig(fallback="deepest", temperatures=temperature)
        scores, predictions = table.columns(config)
        right = predictions == table.labels[:, None]
        count, whole = table.num_exits, costs.plain
        return cls(
            scores=scores[:, :count],
            correct=right[:, :count],
            stages=np.array(costs.stages) / whole,
            heads=np.array(costs.heads) / whole,
            baseline=right[:, count - 1] if plain is None else plain.deepest == plain.labels,
        )

    @property
    def candidates(self) -> int:
        return self.scores.shape[1] - 1

    def select(self, rows: np.ndarray) -> "Problem":
        """Return the problem on some of the samples."""
        return Problem(self.scores[rows], self.correct[rows], self.stages, self.heads, self.baseline[rows])

    def cumulative(self, exits: Sequence[int]) -> np.ndarray:
        """Return the cost of an answer at each of some exits and at the deepest one, `(exits + 1,)`."""
        columns = [*exits, self.candidates]
        heads = np.cumsum(self.heads[columns])
        return np.cumsum(self.stages)[columns] + heads

    def evaluate(self, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return accuracy and mean cost of policies `(policies, candidates + 1)`, NaN where there is no exit."""
        accuracies, costs = np.empty(len(thresholds)), np.empty(len(thresholds))
        for row, policy in enumerate(thresholds):
            exits = np.flatnonzero(~np.isnan(policy[:-1])).tolist()
            columns = [*exits, self.candidates]
            accuracy, cost = evaluate_policies(
                self.scores[:, columns], self.correct[:, columns], self.cumulative(exits), policy[None, columns]
            )
            accuracies[row], costs[row] = accuracy[0], cost[0]
        return accuracies, costs


@dataclass(frozen=True)
class Placement:
    """
    The exits that were chosen, and what they are worth.

    Args:
        exits (`list[int]`): Which candidates, from shallow to deep.
        thresholds (`list[float]`): Their thresholds.
        accuracy, cost (`float`): On all samples; the cost as a share of the plain network's.
        fitted_drop (`float`): Points lost against the plain network, by cross-fitting: the whole choice, of exits and
            thresholds, is made on four fifths of the samples and judged on the others, in turn.
        fitted_cost (`float`): The cost, in the same way.
        accuracy_margin (`float`): Points above the target for the accuracy that were kept on these samples, so that
            others reach the target in expectation.
        alone (`list[float]`): Of each candidate, the cost with no other exit beside it, at the same target.
        oracle_cost (`float`): The least cost of the accuracy that was asked for, if one knew which answers are right.
    """

    exits: list[int]
    thresholds: list[float]
    accuracy: float
    cost: float
    fitted_drop: float
    fitted_cost: float
    accuracy_margin: float
    alone: list[float]
    oracle_cost: float


def place_exits(problem: Problem, max_exits: int, max_accuracy_drop: float) -> Placement:
    """
    Choose the exits with the lowest cost at which no more accuracy is lost than may be.

    Args:
        problem ([`Problem`]): All candidates.
        max_exits (`int`): The most early exits that are chosen.
        max_accuracy_drop (`float`): Points that may be lost against the plain network, on other images.

    Returns:
        [`Placement`]: without exits where none pays.
    """
    least = float(problem.baseline.mean()) - max_accuracy_drop / 100
    frontiers: dict[bytes, Frontier] = {}  # of the folds, which are asked for twice

    def frontier_of(rows: np.ndarray) -> Frontier:
        if (key := rows.tobytes()) not in frontiers:
            frontiers[key] = placement_frontier(problem.select(rows), max_exits)
        return frontiers[key]

    asked = least_accuracy_to_ask(
        least,
        problem.baseline,
        frontier_of,
        lambda policies, rows: problem.select(rows).evaluate(policies)[0],
    )
    frontier = placement_frontier(problem, max_exits)
    policy = frontier.thresholds[_cheapest(frontier, asked)]
    accuracy, cost = problem.evaluate(policy[None])
    exits = np.flatnonzero(~np.isnan(policy[:-1])).tolist()
    drop, fitted_cost = _cross_fitted(problem, frontier_of, asked - float(problem.baseline.mean()))
    alone = []
    for candidate in range(problem.candidates):
        single = _subset_frontier(problem, (candidate,))
        alone.append(float(single.cost[_cheapest(single, asked)]))
    columns = [*exits, problem.candidates]
    return Placement(
        exits=exits,
        thresholds=policy[exits].tolist(),
        accuracy=float(accuracy[0]),
        cost=float(cost[0]),
        fitted_drop=100 * drop,
        fitted_cost=fitted_cost,
        accuracy_margin=100 * max(asked - least, 0.0),
        alone=alone,
        oracle_cost=oracle_policy(problem.correct[:, columns], problem.cumulative(exits), asked)[1],
    )


def placement_frontier(problem: Problem, max_exits: int) -> Frontier:
    """
    Return the frontier over all subsets of at most `max_exits` candidates and their thresholds. All subsets of up to
    three are tried, each on a grid of thresholds; larger ones grow from the cheapest of these by an exit at a time.

    Args:
        problem ([`Problem`]): All candidates.
        max_exits (`int`): The most exits of a policy.

    Returns:
        [`Frontier`]: with a threshold for each candidate and the deepest exit; NaN where a policy has no exit.
    """
    parts = [
        _subset_frontier(problem, exits)
        for count in range(min(max_exits, ALL_SUBSETS, problem.candidates) + 1)
        for exits in itertools.combinations(range(problem.candidates), count)
    ]
    frontier = _joined(parts)
    for _ in range(ALL_SUBSETS, min(max_exits, problem.candidates)):
        largest = {tuple(np.flatnonzero(~np.isnan(policy[:-1])).tolist()) for policy in frontier.thresholds}
        most = max(len(exits) for exits in largest)
        grown = {
            tuple(sorted({*exits, other}))
            for exits in largest
            if len(exits) == most >= ALL_SUBSETS
            for other in range(problem.candidates)
            if other not in exits
        }
        frontier = _joined([frontier, *(_subset_frontier(problem, exits) for exits in sorted(grown))])
    return frontier


def _subset_frontier(problem: Problem, exits: tuple[int, ...]) -> Frontier:
    columns = [*exits, problem.candidates]
    found = exact_frontier(
        problem.scores[:, columns],
        problem.correct[:, columns],
        problem.cumulative(exits),
        max_policies=POLICIES_OF_A_SUBSET,
        polish=False,
    )
    thresholds = np.full((len(found), problem.candidates + 1), np.nan)
    thresholds[:, columns] = found.thresholds
    return Frontier(found.accuracy, found.cost, thresholds)


def _joined(parts: Sequence[Frontier]) -> Frontier:
    """Return the policies of several frontiers that no other beats; a further exit has to be worth something."""
    joined = Frontier(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))
    counts = (~np.isnan(joined.thresholds[:, :-1])).sum(axis=1)
    return joined.select(undominated(joined.accuracy, joined.cost * (1 + WORTH_AN_EXIT) ** counts))


def _cheapest(frontier: Frontier, asked: float) -> int:
    """Return the cheapest policy that is as accurate as asked, or else the most accurate."""
    fits = np.flatnonzero(frontier.accuracy >= min(asked, frontier.accuracy.max()) - 1e-12)
    return int(fits[frontier.cost[fits].argmin()])


def _cross_fitted(
    problem: Problem, frontier_of: Callable[[np.ndarray], Frontier], demand: float, seed: int = 0
) -> tuple[float, float]:
    """Return what is lost and what is spent by choices on four fifths of the samples, judged on the others."""
    n = len(problem.scores)
    fold = np.random.default_rng(seed).permutation(np.arange(n) % FOLDS)
    lost, spent = 0.0, 0.0
    for judging in range(FOLDS):
        chooses, judges = np.flatnonzero(fold != judging), problem.select(fold == judging)
        frontier = frontier_of(chooses)
        row = _cheapest(frontier, float(problem.baseline[chooses].mean()) + demand)
        accuracy, cost = judges.evaluate(frontier.thresholds[row][None])
        lost += float(judges.baseline.mean()) - accuracy[0]
        spent += cost[0]
    return lost / FOLDS, spent / FOLDS


__all__ = ["Placement", "Problem", "place_exits", "placement_frontier"]
