# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The best that thresholds can do: for each cost, the policy with the highest accuracy."""

from dataclasses import dataclass

import numpy as np

from .policy import check_table, evaluate_policies


@dataclass(frozen=True)
class Frontier:
    """
    Policies of which none is both cheaper and better than another, sorted by cost.

    Args:
        accuracy (`np.ndarray` of shape `(m,)`): In [0, 1], on the scores that were searched.
        cost (`np.ndarray` of shape `(m,)`): Mean cost there.
        thresholds (`np.ndarray` of shape `(m, columns - 1)`): One per column but the last; 1.0 lets nothing go.
    """

    accuracy: np.ndarray
    cost: np.ndarray
    thresholds: np.ndarray

    def __len__(self) -> int:
        return len(self.cost)


def exact_frontier(
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    max_policies: int = 1_000_000,
    polish: bool = True,
) -> Frontier:
    """
    Finds the frontier over all thresholds, without a network.

    Every policy on a grid is evaluated at once, from cumulative sums over a histogram of the samples. The grid of a
    column holds what its samples are divided by: all of their confidences where these are few, else quantiles, closer
    to each other towards the surest, where a threshold decides over few samples and over much accuracy. Then each
    threshold of each policy on the frontier is moved over all confidences of its column while the others stay, twice
    over. Where the grid holds all confidences, the frontier is exact; in any case its figures are its policies' own.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): Confidence of each possible answer, shallow to deep. A
            sample that is confident nowhere is answered by the last column.
        correct (`np.ndarray` of shape `(n, columns)`): Whether each answer is right.
        costs (`np.ndarray` of shape `(columns,)`): Cumulative cost of each answer.
        max_policies (`int`, *optional*, defaults to 1,000,000): Policies on the grid. The more columns, the fewer
            values each threshold takes at first.
        polish (`bool`, *optional*, defaults to `True`): Whether thresholds are moved between the values of a grid that
            does not hold all. With 10,000 samples and four columns, seconds instead of a fifth of one.

    Returns:
        [`Frontier`]

    Raises:
        `ValueError`: if the arrays do not belong together, are empty, hold NaN, or costs fall with depth.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan.calibration import exact_frontier

    >>> confidences = np.array([[0.9, 1.0], [0.7, 1.0], [0.6, 1.0]])
    >>> correct = np.array([[True, True], [False, True], [True, True]])
    >>> frontier = exact_frontier(confidences, correct, np.array([1.0, 4.0]))
    >>> frontier.cost.tolist(), frontier.thresholds.tolist()
    ([1.0, 3.0], [[0.0], [0.7]])
    ```
    """
    confidences, correct, costs = check_table(confidences, correct, costs)
    if (np.diff(costs) < 0).any():
        raise ValueError(f"`costs` is {costs.tolist()}; expected cumulative costs, which do not fall with depth.")
    free = confidences.shape[1] - 1
    per_column = max(2, int(max_policies ** (1 / free)))
    grids = [_grid(confidences[:, column], per_column) for column in range(free)]
    accuracy, cost = _on_grid(confidences, correct, costs, grids)
    kept = _undominated(accuracy.ravel(), cost.ravel())
    places = np.unravel_index(kept, accuracy.shape)
    thresholds = np.stack([grid[place] for grid, place in zip(grids, places)], axis=1)
    if polish and any(len(grid) < len(_values(confidences[:, column])) for column, grid in enumerate(grids)):
        thresholds = _polished(confidences, correct, costs, thresholds)
    return Frontier(*evaluate_policies(confidences, correct, costs, thresholds), thresholds)


def _values(confidence: np.ndarray) -> np.ndarray:
    """All thresholds that make a difference: 0, the confidences between, and 1."""
    return np.unique(np.concatenate([[0.0], confidence[(confidence > 0) & (confidence < 1)], [1.0]]))


def _grid(confidence: np.ndarray, size: int) -> np.ndarray:
    """So many of them, or all."""
    values = _values(confidence)
    if len(values) > size:
        # Half of them spread evenly over the samples, half towards the surest in equal ratios.
        even = np.linspace(0, 1, size // 2)
        tail = 1 - np.geomspace(1 / len(confidence), 1, max(0, size - size // 2 - 2))
        values = _values(np.quantile(confidence, np.concatenate([even, tail]), method="lower"))
    return values


def _on_grid(
    confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, grids: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and mean cost of every policy on the grid, each an array with an axis for every threshold."""
    n, free = len(confidences), len(grids)
    # With threshold number j, the samples above j in this count leave.
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
                if axis == column:  # these leave here
                    reversed_axis = np.flip(table, axis)
                    np.cumsum(reversed_axis, axis=axis, out=reversed_axis)
                else:  # these did not leave before
                    np.cumsum(table, axis=axis, out=table)
        # Threshold j keeps counts up to j, and lets those from j + 1 on go.
        part = tuple(slice(1, None) if axis == column else slice(None, -1) for axis in range(len(shape)))
        right = right[..., None] + rights[part] if column < free else right + rights[part]
        spent = (
            spent[..., None] + costs[column] * counts[part] if column < free else spent + costs[column] * counts[part]
        )
    return right / n, spent / n


def _undominated(accuracy: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the policies that none beats in both, by cost; of equal ones, one."""
    order = np.lexsort((-accuracy, cost))
    best = np.maximum.accumulate(accuracy[order])
    better = np.concatenate([[True], best[1:] > best[:-1]])
    return order[better]


POLISHING_ROUNDS = 2


def _polished(confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The frontier of these policies and of those that come of moving one threshold at a time, twice over."""
    free = thresholds.shape[1]
    orders = np.argsort(-confidences[:, :free], axis=0, kind="stable")
    accuracy, cost = evaluate_policies(confidences, correct, costs, thresholds)
    known: set[tuple[float, ...]] = set()
    for _ in range(POLISHING_ROUNDS):
        fresh = [policy for policy in thresholds if tuple(policy) not in known]
        known.update(map(tuple, fresh))
        found = [(thresholds, accuracy, cost)]
        for policy in fresh:
            for column in range(free):
                moved, new_accuracy, new_cost = _moved(confidences, correct, costs, policy, column, orders[:, column])
                # Of the policies there, the best that costs no more.
                place = np.searchsorted(cost, new_cost, side="right") - 1
                better = (place < 0) | (new_accuracy > accuracy[np.maximum(place, 0)])
                found.append((moved[better], new_accuracy[better], new_cost[better]))
        thresholds, accuracy, cost = (np.concatenate(values) for values in zip(*found))
        kept = _undominated(accuracy, cost)
        thresholds, accuracy, cost = thresholds[kept], accuracy[kept], cost[kept]
    return thresholds


def _moved(
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    policy: np.ndarray,
    column: int,
    order: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A policy with one column's threshold at each value that no other of that column beats; accuracies and costs."""
    n, free = len(confidences), len(policy)
    leaves = confidences[:, :free] > policy
    leaves[:, column] = False
    answers = np.where(leaves.any(axis=1), leaves.argmax(axis=1), free)
    # Who gets here, surest first. Those up to some place leave; the others go on to where they are answered.
    here = order[answers[order] > column]
    later = answers[here]
    right = correct[np.arange(n), answers].sum() + np.cumsum(
        correct[here, column].astype(int) - correct[here, later].astype(int)
    )
    spent = costs[answers].sum() - np.cumsum(costs[later] - costs[column])
    values = confidences[here, column]
    below = np.append(values[1:], 0.0)  # as threshold, it lets go of all up to here, but for equal ones
    ends = np.flatnonzero((values > below) & (below < 1))
    kept = ends[_undominated(right[ends], spent[ends])] if len(ends) else ends
    moved = np.repeat(policy[None], len(kept), axis=0)
    moved[:, column] = below[kept]
    return moved, right[kept] / n, spent[kept] / n
