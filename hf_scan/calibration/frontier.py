# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find for each cost the policy with the highest accuracy: [`exact_frontier`]."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from .policy import check_table, evaluate_policies


# The most thresholds that are searched jointly, and how many at a time where there are more.
MOST_FREE = 9
FEW = 3


@dataclass(frozen=True)
class Frontier:
    """
    A set of policies of which none dominates another (is both cheaper and more accurate), sorted by cost.

    Args:
        accuracy (`np.ndarray` of shape `(m,)`): In [0, 1], on the scores that were searched.
        cost (`np.ndarray` of shape `(m,)`): Mean cost there.
        thresholds (`np.ndarray` of shape `(m, columns)`): At 1.0 no sample exits, NaN stands for an exit that is
            switched off, and the last column's is 0.0, as it answers every sample that reaches it.
    """

    accuracy: np.ndarray
    cost: np.ndarray
    thresholds: np.ndarray

    def __len__(self) -> int:
        return len(self.cost)

    def select(self, rows: np.ndarray) -> "Frontier":
        """Return some of the policies, by index or by a mask."""
        return Frontier(self.accuracy[rows], self.cost[rows], self.thresholds[rows])

    @classmethod
    def of(cls, confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, thresholds: np.ndarray) -> "Frontier":
        """Return the policies among `thresholds`, `(policies, columns)`, that no other of them dominates."""
        accuracy, cost = evaluate_policies(confidences, correct, costs, thresholds)
        return cls(accuracy, cost, thresholds).select(undominated(accuracy, cost))


def as_thresholds(policy: np.ndarray) -> list[float | None]:
    """Return a row of a frontier's thresholds as an [`ExitConfig`] holds them, with `None` in place of NaN."""
    return [None if np.isnan(threshold) else float(threshold) for threshold in policy]


def exact_frontier(
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    max_policies: int = 1_000_000,
    polish: bool = True,
) -> Frontier:
    """
    Find the frontier over all thresholds, from cached scores.

    With confidences in [0, 1], thresholds are those of an [`ExitConfig`]: 1.0 disables the exit, and 0.0 exits every
    sample with confidence > 0. For other scores, a number above the largest and one below the smallest take their
    place. All other thresholds are halfway between two neighbouring scores ([`possible_thresholds`]).

    Every policy on a grid is evaluated at once, from cumulative sums over a histogram of the samples. The grid of a
    column holds all possible thresholds if these are few, and quantiles otherwise, denser at high confidences, where a
    threshold affects few samples but much accuracy. Then each threshold of each policy on the frontier is moved over
    all possible ones of its column while the others are fixed, in four rounds. If the grid holds all possible
    thresholds, the frontier is exact; accuracy and cost are always those of the policies returned. With more than nine
    thresholds, a grid over all of them would be too large, and the search starts from policies in which samples exit
    at three columns at most.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): Confidence of each possible answer, shallow to deep. A
            sample whose confidence is above no threshold is answered by the last column.
        correct (`np.ndarray` of shape `(n, columns)`): Whether each answer is right.
        costs (`np.ndarray` of shape `(columns,)`): Cumulative cost of each answer.
        max_policies (`int`, *optional*, defaults to 1,000,000): Number of policies on the grid. The more columns, the
            fewer values each threshold takes on it.
        polish (`bool`, *optional*, defaults to `True`): Whether thresholds are then moved between the values of the
            grid. With 10,000 samples and four columns, that takes a few seconds instead of 0.2.

    Returns:
        [`Frontier`]

    Raises:
        `ValueError`: if the arrays do not belong together, are empty, hold NaN, or costs decrease with depth, or if
            `max_policies` is below 1.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan.calibration import exact_frontier

    >>> confidences = np.array([[0.875, 1.0], [0.625, 1.0], [0.5, 1.0]])
    >>> correct = np.array([[True, True], [False, True], [True, True]])
    >>> frontier = exact_frontier(confidences, correct, np.array([1.0, 4.0]))
    >>> frontier.cost.tolist(), frontier.thresholds.tolist()
    ([1.0, 3.0], [[0.0, 0.0], [0.75, 0.0]])
    ```
    """
    confidences, correct, costs = check_table(confidences, correct, costs)
    if max_policies < 1:
        raise ValueError(f"`max_policies` is {max_policies}; expected a number above 0, such as 1,000,000.")
    free = confidences.shape[1] - 1
    exits_nothing = np.array([_exits_nothing(confidences[:, column].max()) for column in range(free)])
    some = [tuple(range(free))] if free <= MOST_FREE else list(itertools.combinations(range(free), FEW))
    parts, exact = [], len(some) == 1
    for columns in some:
        grids, policies = _best_on_grid(confidences, correct, costs, columns, max_policies // len(some))
        numbers = [len(possible_thresholds(confidences[:, column])) for column in columns]
        exact = exact and [len(grid) for grid in grids] == numbers
        part = np.zeros((len(policies), free + 1))
        part[:, :free] = exits_nothing
        part[:, columns] = policies
        parts.append(part)
    frontier = Frontier.of(confidences, correct, costs, np.concatenate(parts))
    if not polish or exact:
        return frontier
    return Frontier.of(confidences, correct, costs, polished(confidences, correct, costs, frontier.thresholds))


def _best_on_grid(
    confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, columns: tuple[int, ...], max_policies: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the grids of some columns and the undominated policies on them, with the other exits disabled."""
    if not columns:
        return [], np.empty((1, 0))
    per_column = max(2, int(max_policies ** (1 / len(columns))))
    grids = [_grid(confidences[:, column], per_column) for column in columns]
    asked = [*columns, -1]
    accuracy, cost = _on_grid(confidences[:, asked], correct[:, asked], costs[asked], grids)
    # Of policies with the same accuracy, keep the cheapest, so that few are left to sort.
    right = np.rint(accuracy.ravel() * len(correct)).astype(np.int64)
    least = np.full(len(correct) + 1, np.inf)
    np.minimum.at(least, right, cost.ravel())
    cheapest = np.flatnonzero(cost.ravel() <= least[right])
    kept = cheapest[undominated(right[cheapest], cost.ravel()[cheapest])]
    places = np.unravel_index(kept, accuracy.shape)
    return grids, np.stack([grid[place] for grid, place in zip(grids, places)], axis=1)


def shared_threshold_frontier(confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray) -> Frontier:
    """
    Find the exact frontier of one threshold shared by all exits, for comparison. Source: Kaya et al., "Shallow-Deep
    Networks", ICML 2019, whose exits share one.

    Args:
        confidences, correct, costs (`np.ndarray`): As for [`exact_frontier`].

    Returns:
        [`Frontier`]
    """
    confidences, correct, costs = check_table(confidences, correct, costs)
    n, free = len(confidences), confidences.shape[1] - 1
    # With threshold t, a sample exits at the first column whose running maximum of confidence is above t: at a column
    # for all t from the maximum before it up to its own. There its answer and cost start to count and stop again.
    highest = np.maximum.accumulate(confidences[:, :free], axis=1)
    ends = np.hstack([np.full((n, 1), -np.inf), highest, np.full((n, 1), np.inf)])
    values = possible_thresholds(highest.ravel())
    right, spent = np.zeros(len(values) + 1), np.zeros(len(values) + 1)
    for column in range(free + 1):
        for end, sign in ((ends[:, column], 1), (ends[:, column + 1], -1)):
            place = np.searchsorted(values, end)  # the first threshold that is not below it
            right += sign * np.bincount(place, weights=correct[:, column], minlength=len(right))
            spent += sign * np.bincount(place, minlength=len(spent)) * costs[column]
    accuracy, cost = np.cumsum(right)[:-1] / n, np.cumsum(spent)[:-1] / n
    kept = undominated(np.round(accuracy, 12), np.round(cost, 12))
    thresholds = np.hstack([np.repeat(values[kept][:, None], free, axis=1), np.zeros((len(kept), 1))])
    return Frontier.of(confidences, correct, costs, thresholds)


def oracle_policy(correct: np.ndarray, costs: np.ndarray, accuracy: float | None = None) -> tuple[float, float]:
    """
    Return the upper bound on any policy: every sample exits at the first exit that is right, and at the first exit if
    none is. Where less accuracy is enough, the samples that are most expensive to answer right exit at the first.

    Args:
        correct (`np.ndarray` of shape `(n, columns)`): Whether each answer is right.
        costs (`np.ndarray` of shape `(columns,)`): Cumulative cost of each answer.
        accuracy (`float`, *optional*): What is enough, in [0, 1]. Defaults to the most that can be reached.

    Returns:
        `tuple[float, float]`: accuracy in [0, 1] and mean cost.
    """
    correct = np.asarray(correct)
    _, correct, costs = check_table(correct, correct, costs)
    further = np.sort((costs[correct.argmax(axis=1)] - costs[0])[correct.any(axis=1)])  # to answer right, not at once
    most, at_once = len(further), int((further == 0).sum())
    count = most if accuracy is None else min(most, max(at_once, math.ceil(accuracy * len(correct) - 1e-9)))
    return count / len(correct), float(costs[0] + further[:count].sum() / len(correct))


def possible_thresholds(scores: np.ndarray, low: float | None = None) -> np.ndarray:
    """
    Return all thresholds that make a difference to a column of scores, each halfway between two neighbouring scores,
    so that rounding moves no sample across: `predict_adaptive` on another runtime, or in batches of another size,
    gives scores that differ in the last digits. Numbers of float32, as scores are; two scores with no such number
    between them are not told apart.

    Args:
        scores (`np.ndarray` of shape `(n,)`): The scores.
        low (`float`, *optional*): The smallest threshold that is allowed. Defaults to no limit.

    Returns:
        `np.ndarray` of shape `(m,)`: ascending. With scores in [0, 1], the last is 1.0, at which no sample exits, and
        the first is 0.0, which exits every sample with a score > 0.
    """
    values = np.unique(scores).astype(np.float64)
    least, most = values[0], values[-1]
    if low is not None:
        values = np.unique([low, *values[(values > low) & (values < 1)], 1.0])
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32).astype(np.float64)
    between = middle[(middle > values[:-1]) & (middle < values[1:])]
    first = [] if low is not None or least == 0 else [0.0 if least > 0 else least - 1]
    return np.concatenate([first, between, [_exits_nothing(most)]])


def _exits_nothing(most: float) -> float:
    """Return the threshold at which no sample exits. No score in [0, 1] is above 1.0, however it is rounded."""
    return 1.0 if most <= 1 else float(most) + 1


def _grid(scores: np.ndarray, size: int) -> np.ndarray:
    """Return `size` of the possible thresholds, or all if they are fewer."""
    values = possible_thresholds(scores)
    if len(values) > size:
        # Half of them at even quantiles, half geometrically denser towards high confidences.
        even = np.linspace(0, 1, size // 2)
        tail = 1 - np.geomspace(1 / len(scores), 1, max(0, size - size // 2 - 2))
        places = np.searchsorted(values, np.quantile(scores, np.concatenate([even, tail]), method="lower"))
        values = values[np.unique([0, *np.minimum(places, len(values) - 1), len(values) - 1])]
    return values


def _on_grid(
    confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, grids: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy and mean cost of every policy on the grid, as arrays with an axis for each threshold."""
    n, free = len(confidences), len(grids)
    # With threshold number j, the samples whose count is above j exit.
    above = np.stack(
        [np.searchsorted(grid, confidences[:, column], side="left") for column, grid in enumerate(grids)], axis=1
    )
    right = np.zeros((), dtype=np.int64)
    spent = np.zeros(())
    for column in range(free + 1):
        shape = tuple(len(grid) + 1 for grid in grids[: min(column + 1, free)])
        cells = np.ravel_multi_index(tuple(above[:, : len(shape)].T), shape)
        counts = np.bincount(cells, minlength=int(np.prod(shape))).reshape(shape)
        rights = np.bincount(cells, weights=correct[:, column], minlength=int(np.prod(shape))).reshape(shape)
        for table in (counts, rights):
            for axis in range(len(shape)):
                if axis == column:  # these exit here
                    reversed_axis = np.flip(table, axis)
                    np.cumsum(reversed_axis, axis=axis, out=reversed_axis)
                else:  # these did not exit before
                    np.cumsum(table, axis=axis, out=table)
        # At threshold j, samples with counts from j + 1 on exit.
        part = tuple(slice(1, None) if axis == column else slice(None, -1) for axis in range(len(shape)))
        right = right[..., None] + rights[part] if column < free else right + rights[part]
        spent = (
            spent[..., None] + costs[column] * counts[part] if column < free else spent + costs[column] * counts[part]
        )
    return right / n, spent / n


def undominated(accuracy: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return the indices of the policies that no other dominates, by cost, and one of those that are equal."""
    order = np.lexsort((-accuracy, cost))
    best = np.maximum.accumulate(accuracy[order])
    better = np.concatenate([[True], best[1:] > best[:-1]])
    return order[better]


POLISHING_ROUNDS = 4
# Policies that are improved in a round, spread evenly over the frontier.
POLISHED_AT_ONCE = 200


def polished(confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """
    Improve policies by moving one threshold at a time, in four rounds.

    Args:
        confidences, correct, costs (`np.ndarray`): As for [`exact_frontier`].
        thresholds (`np.ndarray` of shape `(policies, columns)`): Policies of which none dominates another.

    Returns:
        `np.ndarray` of shape `(m, columns)`: the undominated policies among the given and the new ones.
    """
    free = thresholds.shape[1] - 1
    orders = np.argsort(-confidences[:, :free], axis=0, kind="stable")
    possible = [possible_thresholds(confidences[:, column]) for column in range(free)]
    accuracy, cost = evaluate_policies(confidences, correct, costs, thresholds)
    known: set[tuple[float, ...]] = set()
    for _ in range(POLISHING_ROUNDS):
        fresh = [policy for policy in thresholds if tuple(policy) not in known]
        if not fresh:
            break
        fresh = [fresh[row] for row in np.unique(np.linspace(0, len(fresh) - 1, POLISHED_AT_ONCE, dtype=int))]
        known.update(map(tuple, fresh))
        found = [(thresholds, accuracy, cost)]
        for policy in fresh:
            for column in range(free):
                moved, new_accuracy, new_cost = _moved(
                    confidences, correct, costs, policy, column, orders[:, column], possible[column]
                )
                # Compare each with the most accurate policy that costs no more.
                place = np.searchsorted(cost, new_cost, side="right") - 1
                better = (place < 0) | (new_accuracy > accuracy[np.maximum(place, 0)])
                found.append((moved[better], new_accuracy[better], new_cost[better]))
        thresholds, accuracy, cost = (np.concatenate(values) for values in zip(*found))
        kept = undominated(accuracy, cost)
        thresholds, accuracy, cost = thresholds[kept], accuracy[kept], cost[kept]
    return thresholds


def _moved(
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    policy: np.ndarray,
    column: int,
    order: np.ndarray,
    possible: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a policy with one threshold at each of its undominated values, and their accuracies and costs."""
    n, free = len(confidences), len(policy) - 1
    exits = confidences[:, :free] > policy[:free]
    exits[:, column] = False
    answers = np.where(exits.any(axis=1), exits.argmax(axis=1), free)
    # The samples that reach this column, by descending confidence. A threshold exits the first of them; the others go
    # on to where they are answered now.
    here = order[answers[order] > column]
    later = answers[here]
    right = correct[np.arange(n), answers].sum() + np.cumsum(
        correct[here, column].astype(int) - correct[here, later].astype(int)
    )
    spent = costs[answers].sum() - np.cumsum(costs[later] - costs[column])
    values = confidences[here, column]
    # The threshold that exits all up to here: the first above the next score. Equal scores exit together.
    places = np.searchsorted(possible, values[1:], side="right")
    below = np.append(possible[np.minimum(places, len(possible) - 1)], possible[0])
    ends = np.flatnonzero(values > below) if len(values) else np.empty(0, dtype=int)
    kept = ends[undominated(right[ends], spent[ends])] if len(ends) else ends
    moved = np.repeat(policy[None], len(kept), axis=0)
    moved[:, column] = below[kept]
    return moved, right[kept] / n, spent[kept] / n
