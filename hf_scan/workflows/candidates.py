# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Where a network could have exits: after every block, with heads of the size that a few exits would have."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.configuration_scan import ScanConfig
from ..model.exit_heads import HEAD_FEATURE_SIZE, head_widths
from ..model.exit_places import find_places
from ..model.modeling_scan import ScanForImageClassification


# Heads that measured best for their cost on a frozen backbone (`benchmarks/head_forms.py`): as wide as a tenth of the
# backbone's MACs pays for, and without attention, which took a third of their time and made none more accurate.
HEADS: dict[str, Any] = {
    "classifier_type": "chain",
    "attention_type": "none",
    "head_feature_size": HEAD_FEATURE_SIZE,  # whatever the heads have that these replace
}
# More exits than these are thinned out, evenly over the depth: neighbours hardly differ.
MOST_CANDIDATES = 16
# Maps that are more times finer than the last one cost too much to read and know too little.
FINEST = 8


@dataclass(frozen=True)
class Candidates:
    """
    Places that are tried for exits.

    Args:
        names (`list[str]`): Modules, from shallow to deep.
        dropped (`dict[str, str]`): Modules that are not tried, with the reason, as the end of a sentence.
    """

    names: list[str]
    dropped: dict[str, str]


def left_out(dropped: Mapping[str, str]) -> list[str]:
    """Return a sentence for each reason for which modules are no candidates."""
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        reasons.setdefault(reason, []).append(name)
    return [f"No candidate: {', '.join(_shortened(names))}, {reason}." for reason, names in reasons.items()]


def find_candidates(backbone: Any, image_shape: tuple[int, int, int] | None = None) -> Candidates:
    """
    Find the modules of a timm model after which an exit could stand: the taps of its `feature_info`, and the blocks
    between them that its forward pass runs once, one after another.

    Args:
        backbone (`torch.nn.Module`): A model of timm, on any device.
        image_shape (`tuple[int, int, int]`, *optional*): Channels, height and width of the images. Defaults to those
            that it was made for.

    Returns:
        [`Candidates`]: at most [`MOST_CANDIDATES`] of them.

    Raises:
        `ValueError`: if the model cannot be cut into stages at all, or has no place for an exit.

    Example:

    ```python
    >>> import timm
    >>> from hf_scan.workflows.candidates import find_candidates

    >>> found = find_candidates(timm.create_model("cifar_resnet20"))
    >>> found.names
    ['layer1.0', 'layer1.1', 'layer1', 'layer2.0', 'layer2.1', 'layer2', 'layer3.0', 'layer3.1']
    >>> found.dropped["layer2.2"]
    "which ends where 'layer2' does"
    ```
    """
    found = find_places(backbone, image_shape)
    dropped = dict(found.dropped)
    names = []
    for place in found.places:
        if place.reduction * FINEST >= found.last.reduction:
            names.append(place.name)
        else:
            dropped[place.name] = f"whose map is more than {FINEST} times finer than the last one"
    if not names:
        raise ValueError(
            f"{type(backbone).__name__} has no place for an early exit: every tap of its `feature_info` is more than "
            f"{FINEST} times finer than the last one. Name `exit_points` of your own."
        )
    kept = _thinned(names, MOST_CANDIDATES)
    dropped |= dict.fromkeys(
        [name for name in names if name not in kept], f"since {MOST_CANDIDATES} are tried, evenly over the depth"
    )
    return Candidates(kept, dropped)


def candidates_of(model: ScanForImageClassification) -> Candidates:
    """Find the candidates of a network, as [`find_candidates`] does."""
    config = model.config
    assert config.image_size is not None  # the network filled it in
    return find_candidates(model.backbone, (config.num_channels, config.image_size, config.image_size))


def spread_over(names: Sequence[str], costs: Sequence[float], most: int) -> list[str]:
    """
    Return at most so many of some places, evenly over the cost of a network.

    Args:
        names (`Sequence[str]`): The places, from shallow to deep.
        costs (`Sequence[float]`): Of each stage, the last one behind them included, in any unit.
        most (`int`): How many.

    Example:

    ```python
    >>> from hf_scan.workflows.candidates import spread_over

    >>> spread_over(["a", "b", "c", "d"], [0.1, 0.1, 0.1, 0.3, 0.4], 2)
    ['c', 'd']
    ```
    """
    reached = np.cumsum(costs)[:-1] / sum(costs)
    wanted = np.arange(1, most + 1) / (most + 1)
    return [names[place] for place in sorted({int(np.abs(reached - share).argmin()) for share in wanted})]


def _thinned(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    places = np.linspace(0, len(names) - 1, most).round().astype(int)
    return [names[place] for place in places]


def _shortened(names: list[str], most: int = 6) -> list[str]:
    return names if len(names) <= most else [*names[:most], f"and {len(names) - most} more"]


def with_candidates(
    config: ScanConfig, max_exits: int, exit_points: list[str] | None = None, backbone: nn.Module | None = None
) -> ScanConfig:
    """
    Return a configuration with an exit at every candidate, each with a head as wide as if there were `max_exits`.

    Args:
        config ([`ScanConfig`]): Of the network; its exits and heads are replaced.
        max_exits (`int`): How many exits the network will have in the end.
        exit_points (`list[str]`, *optional*): The candidates. Defaults to those of [`find_candidates`].
        backbone (`torch.nn.Module`, *optional*): The backbone, where no configuration makes it.
    """
    wanted = _changed(config, **HEADS, head_width=None, exit_points=exit_points)
    with torch.device("meta"):
        if exit_points is None:
            wanted.exit_points = list(candidates_of(network_of(wanted, backbone)).names)
        wide = network_of(wanted, backbone)
    deepest, macs = wide.stages[-1], wide.weights_used(wide.stages)
    feature_size = wide.backbone_head.feature_size
    widths = []
    for stage in wide.stages[:-1]:
        strides = [max(1, deepest.reduction // stage.reduction)] * max_exits
        widths.append(head_widths(wanted, [stage.channels] * max_exits, strides, feature_size, macs)[0])
    return _changed(wanted, head_width=widths)


def network_of(config: ScanConfig, backbone: nn.Module | None) -> ScanForImageClassification:
    """Return a network of a configuration, around a copy of a backbone that no configuration makes."""
    own = copy.deepcopy(backbone) if config.backbone_source == "custom" else None
    return ScanForImageClassification(copy.deepcopy(config), own)


def with_exits(config: ScanConfig, exit_points: list[str]) -> ScanConfig:
    """Return a configuration with some of the exits of another, and their heads as they are there."""
    assert isinstance(config.head_width, list)
    places = [list(config.exit_points or []).index(point) for point in exit_points]
    widths = [config.head_width[place] for place in places]
    return _changed(config, exit_points=list(exit_points), head_width=widths)


def _changed(config: ScanConfig, **changes: Any) -> ScanConfig:
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def keep_exits(model: ScanForImageClassification, exit_points: list[str]) -> ScanForImageClassification:
    """
    Return a network with some of the exits of another, with the same weights.

    Args:
        model ([`ScanForImageClassification`]): With exits at all of these places.
        exit_points (`list[str]`): The exits to keep, from shallow to deep.
    """
    small = network_of(with_exits(model.config, exit_points), model.backbone)
    small.backbone.load_state_dict(model.backbone.state_dict())
    for head, point in zip(small.exit_heads, exit_points):
        head.load_state_dict(model.exit_heads[list(model.config.exit_points or []).index(point)].state_dict())
    small.exit_config = small.exit_config.replace(trained_on=model.exit_config.trained_on)
    return small.train(model.training)


__all__ = [
    "HEADS",
    "Candidates",
    "candidates_of",
    "find_candidates",
    "keep_exits",
    "left_out",
    "network_of",
    "spread_over",
    "with_candidates",
    "with_exits",
]
