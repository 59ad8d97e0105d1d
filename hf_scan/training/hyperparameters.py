# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What a search for hyper-parameters compares trials by, and which arguments a trial may change."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np


# Read before a trial has its network, or when the arguments were made.
FIXED_IN_TRIALS = ("distillation_preset", "distillation_teacher")
CHANGES_THE_LOSS = (
    *("label_weight", "soft_label_weight", "hint_weight"),
    *("distillation_temperature", "scale_by_temperature", "label_smoothing_factor"),
)


def evaluation_loss(metrics: dict[str, float]) -> float:
    """Return the loss of an evaluation, to minimise."""
    return metrics["eval_loss"]


def mean_accuracy(metrics: dict[str, float]) -> float:
    """Return the mean accuracy of the exits in an evaluation, to maximise."""
    return float(np.mean([value for name, value in metrics.items() if re.fullmatch(r"eval_exit_\d+_accuracy", name)]))


def default_objective(direction: Any, scores_exits: bool) -> Callable[[dict[str, float]], float]:
    """
    Return the objective for a direction.

    Args:
        direction (`str`): `"minimize"` for the loss or `"maximize"` for the accuracy.
        scores_exits (`bool`): Whether evaluations have the accuracy of each exit.

    Raises:
        `ValueError`: if there is no objective for the direction.
    """
    known = {"minimize": evaluation_loss, **({"maximize": mean_accuracy} if scores_exits else {})}
    if not isinstance(direction, str) or direction not in known:
        raise ValueError(
            f"`direction` is {direction!r} without a `compute_objective`; expected one of {list(known)}. Pass a "
            "`compute_objective` for other metrics, or for several directions."
        )
    return known[direction]


def check_trial(values: dict[str, Any], objective: Callable[..., Any] | None) -> dict[str, Any]:
    """
    Check the arguments of a trial.

    Args:
        values (`dict[str, Any]`): By name.
        objective (`Callable`, *optional*): What trials are compared by.

    Returns:
        `dict[str, Any]`: the arguments as [`~hf_scan.ScanTrainingArguments`] holds them.

    Raises:
        `ValueError`: if an argument has no effect in a trial, or trials could not be compared by the loss.
    """
    if fixed := [name for name in FIXED_IN_TRIALS if name in values]:
        raise ValueError(f"The trial changes {fixed}, which is read before trials begin. Run a search for each value.")
    changed = [name for name in CHANGES_THE_LOSS if name in values]
    if changed and objective is evaluation_loss:
        raise ValueError(
            f"The trial changes {changed}, and with it the loss, whose values cannot be compared between trials. Pass "
            "`direction='maximize'`, for accuracy, or a `compute_objective`."
        )
    lists = [name for name in values if name.endswith("_weight") and not isinstance(values[name], (list, tuple))]
    return {**values, **{name: [values[name]] for name in lists}}


__all__ = ["check_trial", "default_objective", "evaluation_loss", "mean_accuracy"]
