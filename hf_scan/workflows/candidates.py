# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Where a network could have exits: after every block, with heads of the size that a few exits would have."""

import copy
from typing import Any

import torch
from torch import nn

from ..model.configuration_scan import ScanConfig
from ..model.exit_heads import head_widths
from ..model.modeling_scan import ScanForImageClassification
from ..model.stages import Stage, cut_into_stages


# Heads that measured best for their cost: they work at a width that a tenth of the backbone's MACs pays for, and
# attention stays in the layout of ONNX Runtime's convolutions.
HEADS: dict[str, Any] = {"classifier_type": "chain", "attention_type": "nearest"}
# More exits than these are thinned out, evenly over the depth: neighbours hardly differ.
MOST_CANDIDATES = 16
# Maps that are more times finer than the last one cost too much to read and know too little.
FINEST = 8


def candidate_exit_points(backbone: Any) -> list[str]:
    """
    Return the modules of a timm model after which an exit could stand, from shallow to deep: the taps of its
    `feature_info`, and the blocks between them that its forward pass runs once, one after another.

    Args:
        backbone (`torch.nn.Module`): A model of timm, on any device.

    Returns:
        `list[str]`: at most [`MOST_CANDIDATES`] names.

    Raises:
        `ValueError`: if the model cannot be cut into stages at all.

    Example:

    ```python
    >>> import timm
    >>> from hf_scan.workflows.candidates import candidate_exit_points

    >>> "layer2" in candidate_exit_points(timm.create_model("cifar_resnet20"))
    True
    ```
    """
    last = cut_into_stages(backbone)[-1]
    taps = [tap["module"] for tap in backbone.feature_info]
    names: list[str] = []
    for name in _blocks(backbone, taps):
        if name == last.name:
            break
        # Together with those before: two names of one place, as of a stage and its last block, are refused; the
        # stage's stays.
        for before in (names, names[:-1])[: 2 if name in taps else 1]:
            stages = _cut(backbone, [*before, name])
            if (
                stages is not None
                and stages[-2].reduction * FINEST >= last.reduction
                and _holds_weights(backbone, stages)
            ):
                names = [*before, name]
                break
    if not names:
        raise ValueError(
            f"{type(backbone).__name__} has no place for an early exit: every tap of its `feature_info` is more than "
            f"{FINEST} times finer than the last one. Name `exit_points` of your own."
        )
    return _thinned(names, MOST_CANDIDATES)


def _blocks(backbone: nn.Module, taps: list[str]) -> list[str]:
    """Return the taps, and inside and between them the outermost modules that stand in a list, in their order."""
    modules = dict(backbone.named_modules())
    found: list[str] = []

    def visit(prefix: str, parent: nn.Module) -> None:
        for short, module in parent.named_children():
            name = f"{prefix}{short}"
            listed = isinstance(parent, (nn.Sequential, nn.ModuleList)) and any(True for _ in module.children())
            around_tap = any(tap.startswith(f"{name}.") for tap in taps)
            if name in taps or around_tap or isinstance(module, (nn.Sequential, nn.ModuleList)):
                visit(f"{name}.", module)
                if name in taps:
                    found.append(name)
            elif listed or (parent is modules.get(prefix[:-1]) and prefix[:-1] in taps):
                found.append(name)
            elif any(isinstance(child, (nn.Sequential, nn.ModuleList)) for child in module.children()):
                visit(f"{name}.", module)

    visit("", backbone)
    return found


def _cut(backbone: Any, names: list[str]) -> list[Stage] | None:
    """Return the stages, or `None` where the network cannot be cut: in a branch, without a map, twice at a place."""
    try:
        return cut_into_stages(backbone, list(names))
    except (ValueError, RuntimeError):
        return None


def _holds_weights(backbone: nn.Module, stages: list[Stage]) -> bool:
    """Return whether anything is left behind the last exit that costs something."""
    left = tuple(f"{part}." for part in stages[-1].parts)
    return any(f"{name}.".startswith(left) for name, _ in backbone.named_parameters())


def _thinned(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    places = torch.linspace(0, len(names) - 1, most).round().int().tolist()
    return [names[place] for place in places]


def with_candidates(config: ScanConfig, max_exits: int, exit_points: list[str] | None = None) -> ScanConfig:
    """
    Return a configuration with an exit at every candidate, each with a head as wide as if there were `max_exits`.

    Args:
        config ([`ScanConfig`]): Of the network; its exits and heads are replaced.
        max_exits (`int`): How many exits the network will have in the end.
        exit_points (`list[str]`, *optional*): The candidates. Defaults to [`candidate_exit_points`].
    """
    wanted = _changed(config, **HEADS, head_width=None, exit_points=exit_points)
    with torch.device("meta"):
        if exit_points is None:
            wanted.exit_points = list(
                candidate_exit_points(ScanForImageClassification(copy.deepcopy(wanted)).backbone)
            )
        wide = ScanForImageClassification(copy.deepcopy(wanted))
    deepest, macs = wide.stages[-1], wide.weights_used(wide.stages)
    feature_size = getattr(wide.backbone, "head_hidden_size", wide.backbone.num_features)
    widths = []
    for stage in wide.stages[:-1]:
        strides = [max(1, deepest.reduction // stage.reduction)] * max_exits
        widths.append(head_widths(wanted, [stage.channels] * max_exits, strides, feature_size, macs)[0])
    return _changed(wanted, head_width=widths)


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
    small = ScanForImageClassification(with_exits(model.config, exit_points))
    small.backbone.load_state_dict(model.backbone.state_dict())
    for head, point in zip(small.exit_heads, exit_points):
        head.load_state_dict(model.exit_heads[list(model.config.exit_points or []).index(point)].state_dict())
    small.exit_config = small.exit_config.replace(trained_on=model.exit_config.trained_on)
    return small.train(model.training)


__all__ = ["HEADS", "candidate_exit_points", "keep_exits", "with_candidates", "with_exits"]
