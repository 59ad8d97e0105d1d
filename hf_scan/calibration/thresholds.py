# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""From a held-out split to an [`ExitConfig`]."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ..adaptive import ExitConfig
from ..costs import count_macs
from .exit_table import ExitTable, collect_exit_logits
from .genetic import genetic_search


if TYPE_CHECKING:
    from ..modeling_scan import ScanForImageClassification


def calibrate(
    model: "ScanForImageClassification",
    dataset: Any,
    fallback: Literal["ensemble", "deepest", "most_confident"] = "ensemble",
    split: str = "search",
    criterion: str | Callable[..., torch.Tensor] = "confidence",
    temperatures: list[float | int] | None = None,
    **search_kwargs: Any,
) -> ExitConfig:
    """
    Finds thresholds on a split that neither training nor the final test uses, by the paper's genetic search.

    Args:
        model ([`ScanForImageClassification`]): The trained network.
        dataset (`datasets.Dataset` or [`ExitTable`]): Transformed images with labels, or their logits when they are
            there already.
        fallback, criterion, temperatures (*optional*): As in [`ExitConfig`].
        split (`str`, *optional*, defaults to `"search"`): What the split is called in the result.
        search_kwargs: For [`genetic_search`]: `beta`, `seed`, `generations` and so on. The baseline is the deepest
            exit's accuracy on the split; costs are MACs as shares of the plain backbone's.

    Returns:
        [`ExitConfig`]: to be set as `model.exit_config`. Its `search` says how the thresholds were found.
    """
    table = dataset if isinstance(dataset, ExitTable) else collect_exit_logits(model, dataset, split)
    num_exits = model.num_exits
    rule = ExitConfig(fallback=fallback, criterion=criterion, temperatures=temperatures)
    scores, correct = table.columns(rule)
    columns = num_exits + (fallback != "deepest")
    costs = np.array(count_macs(model).relative()[:columns])
    baseline = float(correct[:, num_exits - 1].mean())
    settings = {"beta": 0.5, "seed": 0, **search_kwargs}
    found = genetic_search(scores[:, :columns], correct[:, :columns], costs, baseline_accuracy=baseline, **settings)
    settings.pop("progress", None)
    search = {
        "method": "genetic",
        **settings,
        "split": table.split,
        "n": len(table.labels),
        "fingerprint": table.fingerprint,
        "baseline_accuracy": baseline,
        "accuracy": found.accuracy,
        "cost": found.cost,
        "cost_unit": "MACs, computed, as a share of the plain backbone's",
    }
    return rule.update(thresholds=found.thresholds, search=search)
