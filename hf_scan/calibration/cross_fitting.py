# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What thresholds lose on images that did not choose them, estimated on those that do."""

from collections.abc import Callable

import numpy as np

from .frontier import Frontier


FOLDS = 5
STEPS = 41  # of the accuracy asked for on the images that choose
FARTHEST = 0.03  # that it is raised


def least_accuracy_to_ask(
    least_accuracy: float,
    baseline: np.ndarray,
    frontier_of: Callable[[np.ndarray], Frontier],
    accuracies_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int = 0,
) -> float:
    """
    The best of many policies on some images is a little worse on others, so that more has to be asked of it where it
    is chosen. How much more, cross-fitting tells: in turn, a fifth of the images judges what the others choose, and
    the smallest demand is taken whose choices, and those of all larger ones, keep to what is wanted in the mean.

    Args:
        least_accuracy (`float`): What is wanted, in [0, 1].
        baseline (`np.ndarray` of shape `(n,)`): Whether the answers compared with are right. What is wanted counts
            from their mean, on all images and on each fold.
        frontier_of (`Callable`): Gives the frontier of some images, of which it gets the rows.
        accuracies_of (`Callable`): Gives the accuracies of policies, `(policies, columns)`, on some images.
        seed (`int`, *optional*, defaults to 0): Of the division.

    Returns:
        `float`: what to ask for on all images; three points more than is wanted, if nothing that was tried keeps to
            it.

    Raises:
        `ValueError`: if there are fewer images than folds.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan.calibration import evaluate_policies, exact_frontier, least_accuracy_to_ask

    >>> rng = np.random.default_rng(0)
    >>> confidences, costs = rng.random((200, 3)), np.array([0.4, 0.7, 1.0])
    >>> correct = rng.random((200, 3)) < confidences
    >>> wanted = correct[:, -1].mean() - 0.01
    >>> asked = least_accuracy_to_ask(
    ...     wanted,
    ...     correct[:, -1],
    ...     lambda rows: exact_frontier(confidences[rows], correct[rows], costs, polish=False),
    ...     lambda policies, rows: evaluate_policies(confidences[rows], correct[rows], costs, policies)[0],
    ... )
    >>> bool(wanted <= asked <= wanted + 0.03)
    True
    ```
    """
    n = len(baseline)
    if n < FOLDS:
        raise ValueError(f"`baseline` has {n} values; expected {FOLDS} or more, one for each fold at least.")
    drop = float(baseline.mean()) - least_accuracy
    demands = np.linspace(drop, drop - FARTHEST, STEPS)
    lost = np.zeros(STEPS)
    fold = np.random.default_rng(seed).permutation(np.arange(n) % FOLDS)
    for judging in range(FOLDS):
        chooses, judges = np.flatnonzero(fold != judging), np.flatnonzero(fold == judging)
        frontier = frontier_of(chooses)
        fits = frontier.accuracy[None] >= baseline[chooses].mean() - demands[:, None] - 1e-12
        # The cheapest that fits, or else the most accurate there is.
        rows = np.where(fits.any(axis=1), fits.argmax(axis=1), len(frontier) - 1)
        chosen, which = np.unique(rows, return_inverse=True)
        lost += baseline[judges].mean() - accuracies_of(frontier.thresholds[chosen], judges)[which]
    broken = np.flatnonzero(lost / FOLDS > drop + 1e-12)
    first = min(broken[-1] + 1, STEPS - 1) if len(broken) else 0
    return float(baseline.mean() - demands[first])
