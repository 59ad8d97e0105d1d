# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Lay out the exits of a network along its forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from .classifier_layout import is_timm_model, split_classifier, timm_head
from .exit_places import ExitPlace, image_shape_of, last_place, last_tap, places_in, tapped_place, taps_of
from .stage import BackboneHead
from .tracing import Program, trace


@dataclass(frozen=True)
class Layout:
    """
    A backbone's forward pass with the places of its exits.

    Args:
        features (`Program`): Its steps up to the last map.
        places (`list[ExitPlace]`): Where exits stand, from shallow to deep.
        last (`ExitPlace`): The last map.
        head ([`BackboneHead`]): The classifier behind it.
    """

    features: Program
    places: list[ExitPlace]
    last: ExitPlace
    head: BackboneHead


def lay_out(
    backbone: Any, exit_points: Sequence[int | str] | None, image_shape: tuple[int, int, int] | None
) -> Layout:
    """
    Find exit points in the forward pass of a network.

    Args:
        backbone (`torch.nn.Module`): A model of timm, or any classifier.
        exit_points (`Sequence[int | str]`, *optional*): As for [`cut_into_stages`].
        image_shape (`tuple[int, int, int]`, *optional*): As for [`cut_into_stages`].

    Raises:
        `ValueError`: if one does not exist or is no place for an exit, or they are out of order.
    """
    name = type(backbone).__name__
    # To find taps where there are none takes a while, and is not needed for the names of modules.
    named = exit_points is not None and not is_timm_model(backbone) and _are_modules(backbone, exit_points)
    taps = [] if named else taps_of(backbone, image_shape)
    known = {tap["module"]: tap for tap in taps}
    names = _names(backbone, default_exit_points(taps) if exit_points is None else exit_points, list(known))
    if is_timm_model(backbone):
        inner = [point for point in names if point not in known]
        features = trace(backbone, [*names, *([taps[-1]["module"]] if inner else [])])
        head = timm_head(backbone)
        places = {point: tapped_place(backbone, features, known[point]) for point in names if point in known}
        last = last_tap(backbone, features, taps[-1])
    else:
        inner, places = names, {}
        features, head = split_classifier(backbone, names, image_shape_of(backbone, image_shape))
        last = last_place(backbone, features, image_shape)
    for point, found in places_in(backbone, features, inner, image_shape, taps).items():
        if isinstance(found, str):
            raise ValueError(f"`exit_points` holds {point!r}, {found}. {_valid(name, list(known))}")
        places[point] = found
    ordered = [places[point] for point in names]
    ends = [place.end for place in ordered]
    if ends != sorted(ends):
        raise ValueError(f"{name} does not run {names} in this order; expected its own.")
    for one, other in pairwise(ordered):
        if one.end == other.end:
            raise ValueError(
                f"`exit_points` holds {one.name!r} and {other.name!r}, which end at the same place. Keep one of them."
            )
    return Layout(features, ordered, last, head)


def default_exit_points(taps: list[dict[str, Any]]) -> list[str]:
    """
    Return the taps where exits are by default: all but the last, without those whose map is more than 8 times finer
    than the last one's (on a network that reduces by 32: those shallower than reduction 4). Where all maps are of one
    size, as in a vision transformer, with a tap after every block: at a quarter, half and three quarters of the depth.
    """
    last = taps[-1]["reduction"]
    if len(taps) > 4 and all(tap["reduction"] == last for tap in taps):
        return [taps[len(taps) * quarter // 4 - 1]["module"] for quarter in (1, 2, 3)]
    return [tap["module"] for tap in taps[:-1] if tap["reduction"] * 8 >= last]


def _are_modules(backbone: nn.Module, exit_points: Sequence[int | str]) -> bool:
    """Return whether all exit points are different names of modules."""
    modules = {name for name, _ in backbone.named_modules() if name}
    return 0 < len(exit_points) == len(set(exit_points)) and modules.issuperset(exit_points)


def _names(backbone: nn.Module, exit_points: Sequence[int | str], taps: list[str]) -> list[str]:
    """Return exit points by their names."""
    valid = _valid(type(backbone).__name__, taps)
    modules = dict(backbone.named_modules())
    names = []
    for point in exit_points:
        if isinstance(point, int):
            if not 0 <= point < len(taps) - 1:
                raise ValueError(f"`exit_points` holds {point!r}, which does not exist. {valid}")
            point = taps[point]
        if not point or point not in {*modules, *taps}:
            raise ValueError(f"`exit_points` holds {point!r}, which does not exist. {valid}")
        if point in taps[-1:]:
            raise ValueError(f"`exit_points` holds {point!r}, where the backbone's own classifier stands. {valid}")
        names.append(point)
    if len(names) != len(set(names)) or not names:
        raise ValueError(f"`exit_points` is {list(exit_points)!r}, which names a place twice or none. {valid}")
    places = [taps.index(name) for name in names if name in taps]
    if places != sorted(places):
        raise ValueError(f"`exit_points` is {list(exit_points)!r}, which is not in order. {valid}")
    return names


def _valid(name: str, taps: list[str]) -> str:
    if not taps:
        return f"{name} can exit after any module that runs once on the way and returns a map."
    return (
        f"{name} can exit after {taps[:-1]} (indices 0 to {len(taps) - 2}), and after any module that runs once on "
        "the way and returns a map; give them from shallow to deep, each once."
    )


__all__ = ["Layout", "lay_out"]
