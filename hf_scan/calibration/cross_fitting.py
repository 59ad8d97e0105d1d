# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Estimate by cross-fitting how much accuracy thresholds lose on images that did not choose them."""

from collections.abc import Callable

import numpy as np

from .frontier import Frontier


FOLDS = 5
STEPS = 41  # values of the required accuracy that are tried
FARTHEST = 0.03  # the most that it is raised above the target


def least_accuracy_to_ask(
    least_accuracy: float,
    baseline: np.ndarray,
    frontier_of: Callable[[np.ndarray], Frontier],
    accuracies_of: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int = 0,
) -> float:
    """
    Return the accuracy to require on the images that choose a policy, so that other images reach the target in
    expectation.

    A policy that is chosen as the best of many is a little worse on other images: thresholds tuned on one split are
    optimistic. Cross-fitting estimates by how much. Each fifth of the images in turn evaluates the policies that the
    others choose, and the smallest requirement is returned at which, and above which, the mean accuracy over the folds
    reaches the target.

    Args:
        least_accuracy (`float`): The target, in [0, 1].
        baseline (`np.ndarray` of shape `(n,)`): Whether the answers that are compared with are right. The target
            counts as a drop from their mean, on all images and on each fold.
        frontier_of (`Callable`): Returns the frontier of some images, given their rows.
        accuracies_of (`Callable`): Returns the accuracies of policies, `(policies, columns)`, on some images.
        seed (`int`, *optional*, defaults to 0): Seed of the division into folds.

    Returns:
        `float`: the accuracy to require on all images; three points above the target if nothing that was tried reaches
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
