# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Where a network can have exits: timm's taps, and any module that runs once on the way and returns a map."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import fx, nn

from .stage import Stage, StageState, tensors_in
from .tracing import Program, containers_of, trace


# A map's reduction is rounded to that of a tap, or to a power of two, if it is as near as this.
ROUNDED = 1.25
IMAGES = 2  # that are tried


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
        patch_size (`tuple[int, int]`, *optional*): As in [`Stage`].
        num_prefix_tokens (`int`, *optional*, defaults to 1): As in [`Stage`].
    """

    name: str
    end: int
    value: fx.Node
    channels: int
    reduction: int
    patch_size: tuple[int, int] | None = None
    num_prefix_tokens: int = 1


def default_exit_points(backbone: Any) -> list[dict[str, Any]]:
    """
    Return the taps where exits are by default: all but the last, without those whose map is more than 8 times finer
    than the last one's (on a network that reduces by 32: those shallower than reduction 4). Where all maps are of one
    size, as in a vision transformer, with a tap after every block: at a quarter, half and three quarters of the depth.
    """
    taps = taps_of(backbone)
    last = taps[-1]["reduction"]
    if len(taps) > 4 and all(tap["reduction"] == last for tap in taps):
        return [taps[len(taps) * quarter // 4 - 1] for quarter in (1, 2, 3)]
    return [tap for tap in taps[:-1] if tap["reduction"] * 8 >= last]


def taps_of(backbone: Any) -> list[dict[str, Any]]:
    """
    Return the `feature_info` of a model of timm, from shallow to deep.

    Raises:
        `ValueError`: if it has fewer than two taps.
    """
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


def patch_size_of(backbone: Any, reduction: int) -> tuple[int, int] | None:
    """Return timm's own patch size, which need not be a square, where a map is as fine as the patches."""
    patch_embed: Any = getattr(backbone, "patch_embed", None)
    if not hasattr(patch_embed, "feat_ratio"):
        return None
    height, width = patch_embed.feat_ratio(as_scalar=False)
    return (height, width) if max(height, width) == reduction else None


def find_exit_points(
    backbone: Any, exit_points: Sequence[int | str], image_shape: tuple[int, int, int] | None
) -> tuple[Program, list[ExitPlace]]:
    """
    Find exit points in the forward pass of a model of timm.

    Args:
        backbone (`torch.nn.Module`): The model.
        exit_points (`Sequence[int | str]`): As for [`cut_into_stages`].
        image_shape (`tuple[int, int, int]`, *optional*): As for [`cut_into_stages`].

    Raises:
        `ValueError`: if one does not exist or is no place for an exit, or they are out of order.
    """
    taps, name = taps_of(backbone), type(backbone).__name__
    known = {tap["module"]: tap for tap in taps}
    names = _names(backbone, exit_points, list(known))
    inner = [point for point in names if point not in known]
    program = trace(backbone, [*names, *([taps[-1]["module"]] if inner else [])])
    places = {point: _tapped(backbone, program, known[point]) for point in names if point in known}
    for point, found in places_in(backbone, program, inner, image_shape).items():
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
    return program, ordered


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
        if point == taps[-1]:
            raise ValueError(f"`exit_points` holds {point!r}, where the backbone's own classifier stands. {valid}")
        names.append(point)
    if len(names) != len(set(names)) or not names:
        raise ValueError(f"`exit_points` is {list(exit_points)!r}, which names a place twice or none. {valid}")
    places = [taps.index(name) for name in names if name in taps]
    if places != sorted(places):
        raise ValueError(f"`exit_points` is {list(exit_points)!r}, which is not in order. {valid}")
    return names


def _valid(name: str, taps: list[str]) -> str:
    return (
        f"{name} can exit after {taps[:-1]} (indices 0 to {len(taps) - 2}), and after any module that runs once on "
        "the way and returns a map; give them from shallow to deep, each once."
    )


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
    prefix = getattr(backbone, "num_prefix_tokens", 1)
    return ExitPlace(name, end, value, tap["num_chs"], tap["reduction"], patch_size, prefix)


def places_in(
    backbone: Any, program: Program, names: Iterable[str], image_shape: tuple[int, int, int] | None
) -> dict[str, ExitPlace | str]:
    """
    Look for modules in a forward pass, and try on the meta device what they return.

    Args:
        backbone (`torch.nn.Module`): A model of timm.
        program ([`Program`]): Its forward pass, in which the modules and the last tap are seen.
        names (`Iterable[str]`): The modules.
        image_shape (`tuple[int, int, int]`, *optional*): As for [`cut_into_stages`].

    Returns:
        `dict[str, ExitPlace | str]`: for each the place, or why there is none, as the end of a sentence.

    Raises:
        `ValueError`: if the network does not run with an image of this shape.
    """
    taps = taps_of(backbone)
    last = program.calls.get(taps[-1]["module"], [])
    end = last[0][0] if len(last) == 1 else len(program.nodes)
    found: dict[str, ExitPlace | str] = {name: _why_not(program, name, end) for name in names}
    names = [name for name in names if not found[name]]
    if not names:
        return found
    shape = image_shape or _image_shape(backbone)
    values = {name: program.calls[name][0][1] for name in names}
    ran = run_on_meta(backbone, program, shape, values.values())
    scales = sorted({tap["reduction"] for tap in taps})
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


def _describe(
    backbone: Any, name: str, tensors: list[torch.Tensor], size: tuple[int, int], scales: list[int]
) -> tuple[int, int, tuple[int, int] | None, int] | None:
    """Return channels, reduction, patch size and prefix tokens of a map, or `None` where there is none."""
    prefix = getattr(backbone, "num_prefix_tokens", 1)
    for tensor in tensors[:1]:
        if tensor.ndim not in (3, 4) or len(tensor) != IMAGES:
            continue
        if tensor.ndim == 4:
            last = _channels_are_last(tensor, getattr(backbone, "output_fmt", None) == "NHWC")
            channels, height = (tensor.shape[3], tensor.shape[1]) if last else tensor.shape[1:3]
            reductions = [_nearest(size[0] / height, scales)]
        else:
            channels, reductions = tensor.shape[2], scales
        for reduction in reductions:
            patch_size = patch_size_of(backbone, reduction)
            described = channels, reduction, patch_size, prefix
            if _gives_map(backbone, name, tensor, size, described):
                return described
    return None


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


def _gives_map(
    backbone: Any,
    name: str,
    tensor: torch.Tensor,
    size: tuple[int, int],
    described: tuple[int, int, tuple[int, int] | None, int],
) -> bool:
    channels, reduction, patch_size, prefix = described
    stage = Stage(
        name=name,
        channels=channels,
        reduction=reduction,
        forward=lambda backbone: (),
        batched=(True,),
        parts=frozenset(),
        channels_last=getattr(backbone, "output_fmt", None) == "NHWC",
        num_prefix_tokens=prefix,
        patch_size=patch_size,
    )
    try:
        stage.feature(StageState((tensor,), (True,), IMAGES, size))
    except ValueError:
        return False
    return True


def _image_shape(backbone: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model of timm was made for."""
    channels, height, width = backbone.pretrained_cfg["input_size"]
    patch_embed = getattr(backbone, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if isinstance(size, tuple) and len(size) == 2:
        height, width = size
    return channels, height, width


def run_on_meta(
    backbone: nn.Module, program: Program, image_shape: tuple[int, int, int], wanted: Iterable[fx.Node]
) -> dict[fx.Node, tuple[list[torch.Tensor], bool]]:
    """
    Run a forward pass on the meta device, which computes shapes and nothing else, on a copy without weights.

    Args:
        backbone (`torch.nn.Module`): The network, on any device.
        program ([`Program`]): Its forward pass.
        image_shape (`tuple[int, int, int]`): Channels, height and width of the images.
        wanted (`Iterable[torch.fx.Node]`): Values to return.

    Returns:
        `dict[torch.fx.Node, tuple[list[torch.Tensor], bool]]`: of each value the tensors, and whether the first of
        them is overwritten later.

    Raises:
        `ValueError`: if it does not run with such images.
    """
    copied = _on_meta(backbone).eval()
    modules, found = dict(copied.named_modules()), dict.fromkeys(wanted)
    example = next(copied.parameters(), torch.empty((), device="meta"))
    values: dict[fx.Node, Any] = {program.image: example.new_empty(IMAGES, *image_shape, requires_grad=False)}
    versions: dict[fx.Node, int] = {}
    try:
        with torch.no_grad():
            for node in program.nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = _step(copied, modules, node, args, kwargs)
                if node in found:
                    versions[node] = next((tensor._version for tensor in tensors_in(values[node])), 0)
    except Exception as error:  # whatever the model's code says to an image that does not fit
        raise ValueError(
            f"{program.name} does not run on an image of {image_shape}, on which its modules were tried: "
            f"{' '.join(str(error).split())[:300]}. Give the `image_size` that it was made for, or exit at its taps."
        ) from error
    answers = {}
    for node in found:
        tensors = list(tensors_in(values[node]))
        answers[node] = tensors, bool(tensors) and tensors[0]._version != versions[node]
    return answers


def _step(root: nn.Module, modules: dict[str, nn.Module], node: fx.Node, args: Any, kwargs: Any) -> Any:
    target: Any = node.target
    if node.op == "call_module":
        return modules[target](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "get_attr":
        owner, _, name = target.rpartition(".")
        return getattr(modules[owner], name)
    return target(*args, **kwargs)


def _on_meta(backbone: nn.Module) -> nn.Module:
    """Return a copy of a network without its weights. (What it keeps from a run stays in the copy.)"""
    memo: dict[int, Any] = {}
    for tensor in chain(backbone.parameters(), backbone.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(backbone, memo)
    for module in copied.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to("meta"))
    return copied


@dataclass(frozen=True)
class PlacesFound:
    """
    All places where a network can have exits, at the ends of its blocks.

    Args:
        places (`list[ExitPlace]`): From shallow to deep.
        last_reduction (`int`): How many times smaller than the image the deepest map is.
        dropped (`dict[str, str]`): Modules after which no exit can stand, with the reason, as the end of a sentence.
    """

    places: list[ExitPlace]
    last_reduction: int
    dropped: dict[str, str]


def find_places(backbone: Any, image_shape: tuple[int, int, int] | None = None) -> PlacesFound:
    """
    Find all places where a model of timm can have exits: its taps, and the blocks between them.

    Args:
        backbone (`torch.nn.Module`): The model, on any device.
        image_shape (`tuple[int, int, int]`, *optional*): As for [`cut_into_stages`].

    Raises:
        `ValueError`: if it cannot be cut into stages at all.
    """
    taps = {tap["module"]: tap for tap in taps_of(backbone)}
    last = list(taps)[-1]
    program, names, dropped = _widest_trace(backbone, list(taps))
    found: dict[str, ExitPlace | str] = {}
    for name in [name for name in names if name in taps and name != last]:
        try:
            found[name] = _tapped(backbone, program, taps[name])
        except ValueError as error:
            found[name] = str(error)
    blocks = [name for name in names if name not in taps]
    found |= places_in(backbone, program, blocks, image_shape)
    by_end: dict[int, ExitPlace] = {}
    for name in [*(name for name in found if name in taps), *(name for name in found if name not in taps)]:
        place = found[name]
        if isinstance(place, str):
            dropped[name] = place
        elif place.end in by_end:
            dropped[name] = f"which ends where {by_end[place.end].name!r} does"
        else:
            by_end[place.end] = place
    return PlacesFound([by_end[end] for end in sorted(by_end)], taps[last]["reduction"], dropped)


def _widest_trace(backbone: Any, taps: list[str]) -> tuple[Program, list[str], dict[str, str]]:
    """Look into as many modules as can be; return which blocks are seen, and why the others are not."""
    names = block_names(backbone, taps)
    try:
        return trace(backbone, [*names, taps[-1]]), names, {}
    except ValueError:
        seen: list[str] = list(taps)
        dropped: dict[str, str] = {}
    for container in sorted({name.rpartition(".")[0] for name in names if name not in taps}):
        inside = [name for name in names if name.rpartition(".")[0] == container and name not in taps]
        try:
            trace(backbone, [*seen, *inside])
            seen += inside
        except ValueError:
            dropped |= dict.fromkeys(inside, f"since {container!r} decides by what it computes")
    return trace(backbone, seen), [name for name in names if name in seen], dropped


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
    "PlacesFound",
    "default_exit_points",
    "find_exit_points",
    "find_places",
    "patch_size_of",
    "taps_of",
]
