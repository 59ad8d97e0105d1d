# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Evaluate thresholds on cached scores."""

from typing import Any

import numpy as np

from ..model.exit_rule import answering_column


def evaluate_policies(
    confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the accuracy and mean cost of policies on cached scores.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): As for [`answering_column`].
        correct (`np.ndarray` of shape `(n, columns)`): Whether each answer is right.
        costs (`np.ndarray` of shape `(columns,)`): Cumulative cost of each answer.
        thresholds (`np.ndarray` of shape `(policies, columns)`): The policies.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: accuracies in [0, 1] and mean costs, of shape `(policies,)`.

    Raises:
        `ValueError`: as [`check_table`], or if the number of thresholds is not that of the columns.
    """
    confidences, correct, costs = check_table(confidences, correct, costs)
    thresholds = np.atleast_2d(np.asarray(thresholds, dtype=float))
    accuracies, mean_costs = [np.empty(0)], [np.empty(0)]
    at_once = max(1, 2**24 // max(1, len(confidences)))  # policies, so that their answers take little memory
    for start in range(0, len(thresholds), at_once):
        answers = answering_column(confidences, thresholds[start : start + at_once])
        accuracies.append(np.take_along_axis(correct, answers.T, axis=1).mean(axis=0))
        mean_costs.append(costs[answers].mean(axis=-1))
    return np.concatenate(accuracies), np.concatenate(mean_costs)


def check_table(
    confidences: np.ndarray, correct: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Check the arguments of [`evaluate_policies`], and return them as arrays.

    Raises:
        `ValueError`: if they are not numbers, do not belong together, are empty, or hold NaN, if `correct` holds
            numbers other than 0 and 1, or if costs are not above 0 or decrease with depth.
    """
    confidences, correct, costs = (
        _numbers(name, values)
        for name, values in (("confidences", confidences), ("correct", correct), ("costs", costs))
    )
    if confidences.ndim != 2 or confidences.shape != correct.shape or costs.shape != confidences.shape[1:]:
        raise ValueError(
            f"`confidences` {confidences.shape}, `correct` {correct.shape} and `costs` {costs.shape} do not belong "
            "together; expected (n, columns), (n, columns) and (columns,)."
        )
    if confidences.size == 0:
        raise ValueError(f"`confidences` has shape {confidences.shape}; expected samples, and a column for each exit.")
    if not np.isfinite(confidences).all():
        raise ValueError("`confidences` must be finite; look for NaN in the logits.")
    if correct.dtype != bool and not np.isin(correct, (0, 1)).all():
        raise ValueError(
            "`correct` holds numbers other than 0 and 1; expected whether each answer is right, such as "
            "`predictions == labels[:, None]`."
        )
    if not (np.isfinite(costs).all() and (costs > 0).all()):
        raise ValueError(f"`costs` is {costs.tolist()}; expected finite numbers above 0.")
    if (np.diff(costs) < 0).any():
        raise ValueError(f"`costs` is {costs.tolist()}; expected cumulative costs, which do not decrease with depth.")
    return confidences, correct.astype(bool, copy=False), costs.astype(float, copy=False)


def _numbers(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths, a tensor with a gradient
        raise ValueError(f"`{name}` is not an array of numbers: {error}") from error
    if array.dtype.kind not in "buif":
        raise ValueError(f"`{name}` holds {array.dtype}; expected an array of numbers.")
    return array
