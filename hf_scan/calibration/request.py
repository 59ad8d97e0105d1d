# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Check the arguments of [`calibrate`]."""

import inspect
from typing import Any

import numpy as np

from ..model.exit_config import ExitConfig
from .certify import RiskBound, check_bound
from .exit_table import ExitTable
from .genetic import genetic_search
from .splits import check_not_among


ACCURACY_TARGETS = ("max_accuracy_drop", "min_accuracy")


def check_roles(config: ExitConfig, tables: list[ExitTable], given: bool) -> None:
    """Check that no split both chooses thresholds and certifies them, now or the time before."""
    certified_on = (config.guarantee or {}).get("fingerprint")
    if tables[0].fingerprint == certified_on:
        raise ValueError(
            f"The {tables[0].split!r} split certified the thresholds that the model has; searching on it would "
            "invalidate the guarantee. Search on other images, or drop the guarantee first: `model.exit_config = "
            "model.exit_config.replace(guarantee=None)`."
        )
    if given:
        check_not_among(tables[1], config.searched_on, "Thresholds were searched")


def check_target(
    target: dict[str, float],
    latency: str,
    batch_size: int,
    accuracy_margin: float | None,
    guarantee: RiskBound | None,
    certify_dataset: Any,
    search_kwargs: dict[str, Any],
) -> None:
    """Check the target and the arguments of [`calibrate`] that have the same names, before images are read."""
    if guarantee is not None:
        check_bound(guarantee)
    for name, value in target.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"`{name}` is {value!r}; expected a number.")
    if len(target) > 1:
        raise ValueError(f"{' and '.join(f'`{name}`' for name in target)} are given; pass one of them.")
    if (target or guarantee is not None) and search_kwargs:
        raise TypeError(f"{sorted(search_kwargs)} are for the genetic search, which runs only without a target.")
    if unknown := sorted(set(search_kwargs) - set(inspect.signature(genetic_search).parameters)):
        raise TypeError(
            f"`calibrate` has no arguments {unknown}; expected one of its targets, or arguments of `genetic_search`."
        )
    if accuracy_margin is not None and not 0 <= accuracy_margin <= 100:
        raise ValueError(
            f"`accuracy_margin` is {accuracy_margin}; expected points of accuracy from 0 to 100, such as 0.5."
        )
    if accuracy_margin and (guarantee is not None or not set(target) & set(ACCURACY_TARGETS)):
        raise ValueError(
            f"`accuracy_margin` is {accuracy_margin:g}; it belongs to one of {list(ACCURACY_TARGETS)} without a "
            "`guarantee`, which is certified on images that chose nothing. Leave it out."
        )
    if certify_dataset is not None and guarantee is None:
        raise ValueError(
            "`certify_dataset` is given without a `guarantee`; pass one such as `RiskBound(max_drop=1.0)`."
        )
    if latency not in ("mean", "p95"):
        raise ValueError(f"`latency` is {latency!r}; expected 'mean' or 'p95'.")
    if latency == "p95" and batch_size != 1:
        raise ValueError("`latency='p95'` is for single images: the images of a batch are answered together.")
    for name, value in target.items():
        if name == "min_accuracy" and not 0 < value <= 1:
            raise ValueError(f"`min_accuracy` is {value}; expected a share in (0, 1], such as 0.95.")
        if name == "max_accuracy_drop" and not -100 <= value <= 100:
            raise ValueError(f"`max_accuracy_drop` is {value}; expected points, such as 0.5.")
        if name in ("max_latency_ms", "max_macs", "speedup") and not 0 < value < float("inf"):
            raise ValueError(f"`{name}` is {value}; expected a number above 0.")


__all__ = ["ACCURACY_TARGETS", "check_roles", "check_target"]
