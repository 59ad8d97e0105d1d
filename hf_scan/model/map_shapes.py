# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Tell from a module's output whether it is a map or a grid of tokens, and of which shape."""

import math
from typing import Any, NamedTuple

import torch

from .meta_run import IMAGES
from .stage import Stage, StageState


# A map's reduction is rounded to that of a tap, or to a power of two, if it is as near as this.
ROUNDED = 1.25
MOST_PREFIX_TOKENS = 16


class MapShape(NamedTuple):
    """
    How a tensor is a map.

    Args:
        channels (`int`): Channels of the map.
        reduction (`int`): How many times smaller than the image it is.
        patch_size, num_prefix_tokens, channels_last: As in [`Stage`].
    """

    channels: int
    reduction: int
    patch_size: tuple[int, int] | None = None
    num_prefix_tokens: int = 1
    channels_last: bool = False


def describe_map(
    backbone: Any, name: str, tensors: list[torch.Tensor], size: tuple[int, int], scales: list[int]
) -> MapShape | None:
    """
    Tell how what a module returns is a map, or a grid of tokens.

    Args:
        backbone (`torch.nn.Module`): The network.
        name (`str`): The module.
        tensors (`list[torch.Tensor]`): What it returns for `IMAGES` images.
        size (`tuple[int, int]`): Height and width of the images.
        scales (`list[int]`): The reductions of taps, one of which a grid of tokens has; empty where there are none.

    Returns:
        `MapShape`: the shape; `None` if it is no map.
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
        described = MapShape(channels, reduction, patch_size_of(backbone, reduction), tokens, last)
        if _gives_map(name, tensor, size, described):
            return described
    return None


def patch_size_of(backbone: Any, reduction: int) -> tuple[int, int] | None:
    """Return timm's own patch size, which need not be a square, where a map is as fine as the patches."""
    patch_embed: Any = getattr(backbone, "patch_embed", None)
    if not hasattr(patch_embed, "feat_ratio"):
        return None
    height, width = patch_embed.feat_ratio(as_scalar=False)
    return (height, width) if max(height, width) == reduction else None


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


def _gives_map(name: str, tensor: torch.Tensor, size: tuple[int, int], described: MapShape) -> bool:
    stage = Stage(
        name=name,
        channels=described.channels,
        reduction=described.reduction,
        forward=lambda backbone: (),
        batched=(True,),
        parts=frozenset(),
        channels_last=described.channels_last,
        num_prefix_tokens=described.num_prefix_tokens,
        patch_size=described.patch_size,
    )
    try:
        stage.feature(StageState((tensor,), (True,), IMAGES, size))
    except ValueError:
        return False
    return True


__all__ = ["MapShape", "describe_map", "patch_size_of"]
