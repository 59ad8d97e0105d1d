# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Where a network can have exits: at timm's taps, and after any module that runs once on the way and returns a map."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from .classifier_layout import block_names as any_block_names
from .classifier_layout import is_timm_model, split_classifier, timm_head
from .meta_run import IMAGES, run_on_meta
from .stage import BackboneHead, Stage, StageState
from .tracing import Program, containers_of, trace


# A map's reduction is rounded to that of a tap, or to a power of two, if it is as near as this.
ROUNDED = 1.25


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


def _made_taps(found: "PlacesFound", name: str) -> list[dict[str, Any]]:
    places = [*found.places, found.last]
    if len({place.reduction for place in places}) > 1:
        places = [one for one, other in pairwise(places) if one.reduction != other.reduction] + [found.last]
    if len(places) < 2:
        raise ValueError(
            f"{name} has no place for an early exit: no module in front of its last map runs once on the way and "
            "returns a map. Name `exit_points` of your own."
        )
    return [{"module": one.name, "num_chs": one.channels, "reduction": one.reduction} for one in places]


def patch_size_of(backbone: Any, reduction: int) -> tuple[int, int] | None:
    """Return timm's own patch size, which need not be a square, where a map is as fine as the patches."""
    patch_embed: Any = getattr(backbone, "patch_embed", None)
    if not hasattr(patch_embed, "feat_ratio"):
        return None
    height, width = patch_embed.feat_ratio(as_scalar=False)
    return (height, width) if max(height, width) == reduction else None


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
        places = {point: _tapped(backbone, features, known[point]) for point in names if point in known}
        last = _last_tap(backbone, features, taps[-1])
    else:
        inner, places = names, {}
        features, head = split_classifier(backbone, names, _image_shape(backbone, image_shape))
        last = _last_place(backbone, features, image_shape)
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


def _last_tap(backbone: Any, features: Program, tap: dict[str, Any]) -> ExitPlace:
    """Return the last map of a model of timm."""
    described = tap["num_chs"], tap["reduction"], patch_size_of(backbone, tap["reduction"])
    prefix, last = getattr(backbone, "num_prefix_tokens", 1), getattr(backbone, "output_fmt", None) == "NHWC"
    return ExitPlace(tap["module"], len(features.nodes), features.result, *described, prefix, last)


def _last_place(backbone: Any, features: Program, image_shape: tuple[int, int, int] | None) -> ExitPlace:
    """Return the last map of a network that does not describe it."""
    shape = _image_shape(backbone, image_shape)
    end = len(features.nodes)
    name = _name_of_the_end(features)
    tensors, _ = run_on_meta(backbone, features, shape, [features.result])[features.result]
    described = _describe(backbone, name, tensors, shape[1:], [])
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


def _tapped(backbone: Any, program: Program, tap: dict[str, Any]) -> ExitPlace:
    """Return the place of a tap, about which timm says all."""
    name = tap["module"]
    calls = program.calls.get(name, [])
    if len(calls) != 1 or not isinstance(calls[0][1], fx.Node):
        raise ValueError(
            f"{program.name} calls the module {name!r}, a tap of its `feature_info`, {len(calls)} times on the way to "
            "its final feature; expected once. Choose other `exit_points` or another backbone."
        )
    end, value = calls[0]
    patch_size = patch_size_of(backbone, tap["reduction"])
    prefix, last = getattr(backbone, "num_prefix_tokens", 1), getattr(backbone, "output_fmt", None) == "NHWC"
    return ExitPlace(name, end, value, tap["num_chs"], tap["reduction"], patch_size, prefix, last)


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
    shape = _image_shape(backbone, image_shape)
    values = {name: program.calls[name][0][1] for name in names}
    ran = run_on_meta(backbone, program, shape, values.values())
    scales = sorted({tap["reduction"] for tap in taps}) if taps and own else []
    for name in names:
        tensors, overwritten = ran[values[name]]
        described = _describe(backbone, name, tensors, shape[1:], scales)
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


Description = tuple[int, int, tuple[int, int] | None, int, bool]
MOST_PREFIX_TOKENS = 16


def _describe(
    backbone: Any, name: str, tensors: list[torch.Tensor], size: tuple[int, int], scales: list[int]
) -> Description | None:
    """
    Return channels, reduction, patch size, prefix tokens and whether channels are last of a map, or `None` where there
    is none. Reductions are those of taps, if there are any.
    """
    if not tensors or tensors[0].ndim not in (3, 4) or len(tensors[0]) != IMAGES:
        return None
    tensor = tensors[0]
    prefix, usually = getattr(backbone, "num_prefix_tokens", 1), getattr(backbone, "output_fmt", None) == "NHWC"
    if tensor.ndim == 4:
        last = _channels_are_last(tensor, usually)
        channels, height = (tensor.shape[3], tensor.shape[1]) if last else tensor.shape[1:3]
        guesses = [(_nearest(size[0] / height, scales), prefix)]
    else:
        last, channels = usually, tensor.shape[2]
        guesses = [(scale, prefix) for scale in scales] or _square_grids(tensor.shape[1], size[0])
    for reduction, tokens in guesses:
        described = channels, reduction, patch_size_of(backbone, reduction), tokens, last
        if _gives_map(name, tensor, size, described):
            return described
    return None


def _square_grids(count: int, size: int) -> list[tuple[int, int]]:
    """Return what a token may stand for in pixels, and how many tokens are in front, if the others make a square."""
    grids = [(math.isqrt(count - prefix), prefix) for prefix in range(min(count, MOST_PREFIX_TOKENS + 1))]
    return [(size // side, prefix) for side, prefix in grids if side**2 == count - prefix and side <= size]


def _channels_are_last(tensor: torch.Tensor, usually: bool) -> bool:
    """Return where the channels of a map of a square image are."""
    first_square, last_square = tensor.shape[1] == tensor.shape[2], tensor.shape[2] == tensor.shape[3]
    return usually if first_square == last_square else first_square


def _nearest(ratio: float, scales: list[int]) -> int:
    """Return a map's reduction as a whole number: a tap's or a power of two where one is near."""
    powers = [2**exponent for exponent in range(11)]
    for known in (scales, powers):
        near = [scale for scale in known if 1 / ROUNDED <= scale / ratio <= ROUNDED]
        if near:
            return min(near, key=lambda scale: abs(math.log(scale / ratio)))
    return max(1, round(ratio))


def _gives_map(name: str, tensor: torch.Tensor, size: tuple[int, int], described: Description) -> bool:
    channels, reduction, patch_size, prefix, last = described
    stage = Stage(
        name=name,
        channels=channels,
        reduction=reduction,
        forward=lambda backbone: (),
        batched=(True,),
        parts=frozenset(),
        channels_last=last,
        num_prefix_tokens=prefix,
        patch_size=patch_size,
    )
    try:
        stage.feature(StageState((tensor,), (True,), IMAGES, size))
    except ValueError:
        return False
    return True


def _image_shape(backbone: Any, given: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
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
        last = _last_tap(backbone, features, taps[deepest])
        for name in [name for name in tapped if name != deepest]:
            try:
                found[name] = _tapped(backbone, features, taps[name])
            except ValueError as error:
                found[name] = str(error)
        names = [name for name in names if name not in taps and name not in dropped]
        found |= places_in(backbone, features, names, image_shape, list(taps.values()))
    else:
        shape, names = _image_shape(backbone, image_shape), any_block_names(backbone)
        features, dropped = _widest(lambda names: split_classifier(backbone, names, shape)[0], names, [])
        last = _last_place(backbone, features, shape)
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


__all__ = [
    "ExitPlace",
    "Layout",
    "PlacesFound",
    "find_places",
    "lay_out",
]
