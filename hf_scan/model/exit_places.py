# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Where a network can have exits: at timm's taps, and after any module that runs once on the way and returns a map."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx, nn

from .classifier_layout import block_names as any_block_names
from .classifier_layout import is_timm_model, split_classifier
from .map_shapes import MapShape, describe_map, patch_size_of
from .meta_run import IMAGES, run_on_meta
from .tracing import Program, containers_of, trace


@dataclass(frozen=True)
class ExitPlace:
    """
    A place where an exit can stand.

    Args:
        name (`str`): The module after which it stands.
        end (`int`): The number of the forward pass's steps that have run there.
        value (`torch.fx.Node`): What the module returned.
        channels (`int`): Channels of its map.
        reduction (`int`): How many times smaller than the image its map is.
        patch_size, num_prefix_tokens, channels_last: As in [`Stage`].
    """

    name: str
    end: int
    value: Any
    channels: int
    reduction: int
    patch_size: tuple[int, int] | None = None
    num_prefix_tokens: int = 1
    channels_last: bool = False


@dataclass(frozen=True)
class PlacesFound:
    """
    All places where a network can have exits, at the ends of its blocks.

    Args:
        places (`list[ExitPlace]`): From shallow to deep.
        last (`ExitPlace`): The last map.
        dropped (`dict[str, str]`): Modules after which no exit can stand, with the reason, as the end of a sentence.
    """

    places: list[ExitPlace]
    last: ExitPlace
    dropped: dict[str, str]


def find_places(backbone: Any, image_shape: tuple[int, int, int] | None = None) -> PlacesFound:
    """
    Find all places where a network can have exits: its taps, and the blocks between them.

    Args:
        backbone (`torch.nn.Module`): A model of timm, or any classifier, on any device.
        image_shape (`tuple[int, int, int]`, *optional*): As for [`cut_into_stages`].

    Raises:
        `ValueError`: if it cannot be cut into stages at all.
    """
    found: dict[str, ExitPlace | str] = {}
    if is_timm_model(backbone):
        taps = {tap["module"]: tap for tap in taps_of(backbone)}
        names = block_names(backbone, list(taps))
        tapped, deepest = [name for name in names if name in taps], list(taps)[-1]

        def read(names: list[str]) -> Program:
            return trace(backbone, [*names, deepest])

        features, dropped = _widest(read, names, tapped)
        last = last_tap(backbone, features, taps[deepest])
        for name in [name for name in tapped if name != deepest]:
            try:
                found[name] = tapped_place(backbone, features, taps[name])
            except ValueError as error:
                found[name] = str(error)
        names = [name for name in names if name not in taps and name not in dropped]
        found |= places_in(backbone, features, names, image_shape, list(taps.values()))
    else:
        shape, names = image_shape_of(backbone, image_shape), any_block_names(backbone)
        features, dropped = _widest(lambda names: split_classifier(backbone, names, shape)[0], names, [])
        last = last_place(backbone, features, shape)
        names = [name for name in names if name in features.calls and features.calls[name] and name not in dropped]
        found |= places_in(backbone, features, sorted(names, key=len), shape)
    by_end: dict[int, ExitPlace] = {}
    for name, place in found.items():
        if isinstance(place, str):
            dropped[name] = place
        elif place.end in by_end:
            dropped[name] = f"which ends where {by_end[place.end].name!r} does"
        else:
            by_end[place.end] = place
    return PlacesFound([by_end[end] for end in sorted(by_end)], last, dropped)


def _widest(read: Callable[[list[str]], Program], names: list[str], sure: list[str]) -> tuple[Program, dict[str, str]]:
    """Look into as many modules as can be; return what is seen, and which modules are not, with the reason."""
    try:
        return read(names), {}
    except ValueError:
        seen, dropped = list(sure), dict[str, str]()
    for container in sorted({name.rpartition(".")[0] for name in names if name not in sure}):
        inside = [name for name in names if name.rpartition(".")[0] == container and name not in sure]
        try:
            read([*seen, *inside])
            seen += inside
        except ValueError:
            dropped |= dict.fromkeys(inside, f"since {container!r} decides by what it computes")
    return read(seen), dropped


def block_names(backbone: nn.Module, taps: list[str]) -> list[str]:
    """Return the taps, and inside and between them the outermost modules that stand in a list, in their order."""
    around_taps, modules = containers_of(taps), dict(backbone.named_modules())
    # A tap that stands in no list is a stage, whose own modules are blocks.
    stages = {tap for tap in taps if type(modules[tap.rpartition(".")[0]]) not in (nn.Sequential, nn.ModuleList)}
    found: list[str] = []

    def visit(prefix: str, parent: nn.Module) -> None:
        for short, module in parent.named_children():
            name = f"{prefix}{short}"
            is_list = isinstance(module, (nn.Sequential, nn.ModuleList))
            compound = any(True for _ in module.children())
            listed = compound and (isinstance(parent, (nn.Sequential, nn.ModuleList)) or prefix[:-1] in stages)
            if name in taps or name in around_taps or is_list:
                visit(f"{name}.", module)
                if name in taps:
                    found.append(name)
            elif listed:
                found.append(name)
            elif any(isinstance(child, (nn.Sequential, nn.ModuleList)) for child in module.children()):
                visit(f"{name}.", module)

    visit("", backbone)
    return found


def taps_of(backbone: Any, image_shape: tuple[int, int, int] | None = None) -> list[dict[str, Any]]:
    """
    Return the `feature_info` of a model of timm, from shallow to deep. For any other network, make one: of the places
    that [`find_places`] finds, the last of each height and width, or all where they are all of one.

    Raises:
        `ValueError`: if there are fewer than two taps.
    """
    if not is_timm_model(backbone):
        return _made_taps(find_places(backbone, image_shape), type(backbone).__name__)
    info = getattr(backbone, "feature_info", None)
    # A list on the models themselves, timm's `FeatureInfo` on what its feature extraction returns. Where a module has
    # several, one for each of the tensors that it returns, the first stands for it.
    taps = list({tap["module"]: tap for tap in reversed(getattr(info, "info", info) or [])}.values())[::-1]
    if len(taps) < 2 or not hasattr(backbone, "forward_head"):
        raise ValueError(
            f"{type(backbone).__name__} gives {len(taps)} `feature_info` taps; a backbone with early exits needs two "
            "or more, and timm's `forward_features` and `forward_head`. Choose another backbone, such as 'resnet50'."
        )
    return taps


def _made_taps(found: PlacesFound, name: str) -> list[dict[str, Any]]:
    places = [*found.places, found.last]
    if len({place.reduction for place in places}) > 1:
        places = [one for one, other in pairwise(places) if one.reduction != other.reduction] + [found.last]
    if len(places) < 2:
        raise ValueError(
            f"{name} has no place for an early exit: no module in front of its last map runs once on the way and "
            "returns a map. Name `exit_points` of your own."
        )
    return [{"module": one.name, "num_chs": one.channels, "reduction": one.reduction} for one in places]


def tapped_place(backbone: Any, program: Program, tap: dict[str, Any]) -> ExitPlace:
    """Return the place of a tap, about which timm says all."""
    name = tap["module"]
    calls = program.calls.get(name, [])
    if len(calls) != 1 or not isinstance(calls[0][1], fx.Node):
        raise ValueError(
            f"{program.name} calls the module {name!r}, a tap of its `feature_info`, {len(calls)} times on the way to "
            "its final feature; expected once. Choose other `exit_points` or another backbone."
        )
    end, value = calls[0]
    return ExitPlace(name, end, value, *_shape_of_tap(backbone, tap))


def last_tap(backbone: Any, features: Program, tap: dict[str, Any]) -> ExitPlace:
    """Return the last map of a model of timm."""
    return ExitPlace(tap["module"], len(features.nodes), features.result, *_shape_of_tap(backbone, tap))


def _shape_of_tap(backbone: Any, tap: dict[str, Any]) -> MapShape:
    """Return the shape of a tap's map, about which timm says all."""
    prefix, last = getattr(backbone, "num_prefix_tokens", 1), getattr(backbone, "output_fmt", None) == "NHWC"
    return MapShape(tap["num_chs"], tap["reduction"], patch_size_of(backbone, tap["reduction"]), prefix, last)


def last_place(backbone: Any, features: Program, image_shape: tuple[int, int, int] | None) -> ExitPlace:
    """Return the last map of a network that does not describe it."""
    shape = image_shape_of(backbone, image_shape)
    end = len(features.nodes)
    name = _name_of_the_end(features)
    tensors, _ = run_on_meta(backbone, features, shape, [features.result])[features.result]
    described = describe_map(backbone, name, tensors, shape[1:], [])
    if described is None:
        raise ValueError(
            f"{features.name} has no map in front of its classifier: {name!r} returns "
            f"{[tuple(tensor.shape) for tensor in tensors]} for {IMAGES} images of {shape}. Choose another "
            "network, or another image size."
        )
    return ExitPlace(name, end, features.result, *described)


def _name_of_the_end(features: Program) -> str:
    """Return the outermost of the modules that end last."""
    ends = {name: calls[-1][0] for name, calls in features.calls.items() if calls}
    last = max(ends.values(), default=0)
    return min((name for name in ends if ends[name] == last), key=len, default="images")


def places_in(
    backbone: Any,
    program: Program,
    names: Iterable[str],
    image_shape: tuple[int, int, int] | None,
    taps: list[dict[str, Any]] | None = None,
) -> dict[str, ExitPlace | str]:
    """
    Look for modules in a forward pass, and try on the meta device what they return.

    Args:
        backbone (`torch.nn.Module`): The network.
        program ([`Program`]): Its steps up to the last map, in which the modules and the last tap are seen.
        names (`Iterable[str]`): The modules.
        image_shape (`tuple[int, int, int]`, *optional*): As for [`cut_into_stages`].
        taps (`list[dict[str, Any]]`, *optional*): Those of a model of timm.

    Returns:
        `dict[str, ExitPlace | str]`: for each the place, or why there is none, as the end of a sentence.

    Raises:
        `ValueError`: if the network does not run with an image of this shape.
    """
    own = taps is not None and is_timm_model(backbone)
    last = program.calls.get(taps[-1]["module"], []) if taps and own else []
    end = last[0][0] if len(last) == 1 else len(program.nodes)
    found: dict[str, ExitPlace | str] = {name: _why_not(program, name, end) for name in names}
    names = [name for name in names if not found[name]]
    if not names:
        return found
    shape = image_shape_of(backbone, image_shape)
    values = {name: program.calls[name][0][1] for name in names}
    ran = run_on_meta(backbone, program, shape, values.values())
    scales = sorted({tap["reduction"] for tap in taps}) if taps and own else []
    for name in names:
        tensors, overwritten = ran[values[name]]
        described = describe_map(backbone, name, tensors, shape[1:], scales)
        if overwritten:
            found[name] = "whose output is overwritten in place by what follows; name the module that does so"
        elif described is None:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            found[name] = f"which returns {shapes} for {IMAGES} images of {shape}, and no map"
        else:
            found[name] = ExitPlace(name, program.calls[name][0][0], values[name], *described)
    return found


def _why_not(program: Program, name: str, last: int) -> str:
    """Return why there can be no exit after a module, as far as the steps tell, or an empty string."""
    calls = program.calls.get(name, [])
    if len(calls) != 1:
        return f"which {program.name} runs {len(calls)} times on the way to its final feature; expected once"
    end, value = calls[0]
    if not isinstance(value, fx.Node):
        return "which returns several tensors"
    if program.kinds[value] != "images":
        return "which does not depend on the images"
    if end >= last:
        return "behind which only the backbone's own classifier stands"
    if program.bypassed(value):
        return "which stands in a branch: what comes before it also goes around it"
    return ""


def image_shape_of(backbone: Any, given: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """Return channels, height and width of the images that are given, or that a model of timm was made for."""
    if given is not None:
        return given
    if not is_timm_model(backbone):
        raise ValueError(
            f"{type(backbone).__name__} does not say which images it was made for; expected `image_size` in pixels, "
            "such as 224."
        )
    channels, height, width = backbone.pretrained_cfg["input_size"]
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple) and len(size) == 2:
        height, width = size
    return channels, height, width


__all__ = [
    "ExitPlace",
    "PlacesFound",
    "find_places",
    "image_shape_of",
    "last_place",
    "last_tap",
    "places_in",
    "tapped_place",
    "taps_of",
]
