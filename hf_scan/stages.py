# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A timm model cut into stages that run one after another, its modules and their names untouched.

The cut is read off one forward pass on the meta device, which computes nothing: the modules that produced the final
feature are followed back to the image, each one's input being the very tensor that another one returned. What a model
does between its modules (an addition, a functional activation) breaks that chain, and the model is refused rather than
run differently from the original.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


@dataclass(frozen=True)
class Stage:
    """
    The modules between two exit points, and the feature that the last of them returns.

    Args:
        modules (`tuple[str, ...]`): Names in the backbone, in the order in which they run.
        channels (`int`): Channels of the feature.
        reduction (`int`): How many times smaller than the image the feature's map is.
        channels_first (`bool`): Whether the feature is `(batch_size, channels, height, width)`. Some families of
            timm put the channels last.
    """

    modules: tuple[str, ...]
    channels: int
    reduction: int
    channels_first: bool = True

    def run(self, backbone: nn.Module, feature: torch.Tensor) -> torch.Tensor:
        """Applies the stage's modules of `backbone` to what the stage before returned, or to the image."""
        for name in self.modules:
            feature = backbone.get_submodule(name)(feature)
        return feature


def cut_into_stages(
    backbone: Any, exit_points: list[int | str] | None = None, image_size: int | None = None
) -> list[Stage]:
    """
    Cuts a timm model after each exit point. The last stage ends where the model's own head begins.

    Args:
        backbone (`torch.nn.Module`): A model of timm, on any device, the meta device included.
        exit_points (`list[int | str]`, *optional*): Indices into the model's `feature_info`, or module names that
            stand there, from shallow to deep. Defaults to those of [`default_exit_points`].
        image_size (`int`, *optional*): Height and width of the images. Defaults to what the model was made for; only
            models that take no other size care.

    Returns:
        `list[Stage]`: One more than exit points.

    Raises:
        `ValueError`: if the model has no taps, an exit point is unknown, out of order or the last tap, or the model
            does not run as a chain of modules.
    """
    name = type(backbone).__name__
    taps = _taps(backbone)
    chosen = default_exit_points(backbone) if exit_points is None else _resolve(exit_points, taps, name)
    calls, image, feature = _trace(backbone, image_size)
    chain = _follow_back(calls, image, feature, [tap["module"] for tap in chosen], name)

    stages, start = [], 0
    for tap in chosen:
        end = next((i for i, call in enumerate(chain) if call.name == tap["module"]), None)
        if end is None or end < start:
            raise ValueError(
                f"{name} does not run {tap['module']!r} as one step on the way to its final feature, so there can be "
                "no exit there. Choose other `exit_points` or another backbone."
            )
        modules = tuple(call.name for call in chain[start : end + 1])
        stages.append(Stage(modules, tap["num_chs"], tap["reduction"], _channels_first(chain[end], tap, name)))
        start = end + 1
    last = taps[-1]
    stages.append(Stage(tuple(call.name for call in chain[start:]), last["num_chs"], last["reduction"]))
    return stages


def default_exit_points(backbone: Any) -> list[dict[str, Any]]:
    """The taps where exits are by default: all but the last, without those whose map is more than 8 times finer than
    the last one's (on a network that reduces by 32: those shallower than reduction 4)."""
    *taps, last = _taps(backbone)
    return [tap for tap in taps if tap["reduction"] * 8 >= last["reduction"]]


def _taps(backbone: Any) -> list[dict[str, Any]]:
    info = getattr(backbone, "feature_info", None)
    # A list on the models themselves, timm's `FeatureInfo` on what its feature extraction returns.
    taps = list(getattr(info, "info", info) or [])
    if len(taps) < 2 or not hasattr(backbone, "forward_head"):
        raise ValueError(
            f"{type(backbone).__name__} gives {len(taps)} `feature_info` taps; a backbone with early exits needs two "
            "or more, and timm's `forward_features` and `forward_head`. Choose another backbone, such as 'resnet50'."
        )
    return taps


def _resolve(exit_points: list[int | str], taps: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    names = [tap["module"] for tap in taps]
    valid = f"{name} can exit after {names[:-1]} (indices 0 to {len(names) - 2}), given from shallow to deep"
    indices = []
    for point in exit_points:
        index = names.index(point) if point in names else point
        if not isinstance(index, int) or not 0 <= index < len(names) - 1:
            raise ValueError(f"`exit_points` holds {point!r}, which does not exist. {valid}.")
        indices.append(index)
    if indices != sorted(set(indices)) or not indices:
        raise ValueError(f"`exit_points` is {exit_points!r}, which is not in order or is empty. {valid}, each once.")
    return [taps[index] for index in indices]


@dataclass
class _Call:
    """One execution of a module. A tensor is known by its identity and its version, which in-place changes raise."""

    name: str
    source: tuple[int, int] | None
    target: tuple[int, int] | None = None
    tensors: list[torch.Tensor] = field(default_factory=list)


class _Features(nn.Module):
    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(image)


def _trace(backbone: Any, image_size: int | None) -> tuple[list[_Call], torch.Tensor, torch.Tensor]:
    """Records every call of a module in one forward pass, in the order in which the calls end."""
    calls: list[_Call] = []
    running: list[_Call] = []

    def version(value: Any) -> tuple[int, int] | None:
        return (id(value), value._version) if isinstance(value, torch.Tensor) else None

    def started(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            # A step of a stage is called with the feature and nothing else.
            source = version(args[0]) if len(args) == 1 and not kwargs and tensors else None
            running.append(_Call(name, source, tensors=tensors))

        return hook

    def ended(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = running.pop()
        call.target = version(output)
        call.tensors.append(output)  # kept alive, so that no identity is used twice
        calls.append(call)

    channels, height, width = backbone.pretrained_cfg["input_size"]
    channels = getattr(backbone, "in_chans", channels)
    height, width = (image_size or height), (image_size or width)
    tensors = (*backbone.named_parameters(), *backbone.named_buffers())
    weights = {f"backbone.{name}": tensor.detach().to("meta") for name, tensor in tensors}
    dtype = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
    image = torch.empty(2, channels, height, width, device="meta", dtype=dtype)

    modes = [(module, module.training) for module in backbone.modules()]
    handles = []
    for name, module in backbone.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(started(name), with_kwargs=True))
            handles.append(module.register_forward_hook(ended))
    try:
        backbone.eval()
        with torch.no_grad():
            feature = functional_call(_Features(backbone), weights, (image,))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return calls, image, feature


def _follow_back(
    calls: list[_Call], image: torch.Tensor, feature: Any, tap_names: list[str], name: str
) -> list[_Call]:
    """The calls that lead from the image to the feature, the outermost ones that have no exit point inside."""
    chain: list[_Call] = []
    wanted = (id(feature), feature._version) if isinstance(feature, torch.Tensor) else None
    outermost_first = reversed(calls)
    while wanted != (id(image), 0):
        # The iterator goes on where it stopped: what feeds a call has ended before it.
        call = next(
            (
                call
                for call in outermost_first
                if call.target == wanted and not any(tap.startswith(call.name + ".") for tap in tap_names)
            ),
            None,
        )
        if call is None or call.source is None or wanted is None:
            step = chain[0].name if chain else "the head"
            raise ValueError(
                f"{name} cannot be cut into stages: what {step!r} receives was not returned by one of its modules "
                "from one tensor alone. Choose another backbone, such as 'resnet50'."
            )
        chain.insert(0, call)
        wanted = call.source
    return chain


def _channels_first(call: _Call, tap: dict[str, Any], name: str) -> bool:
    shape = tuple(call.tensors[-1].shape)
    if len(shape) == 4 and tap["num_chs"] in (shape[1], shape[3]):
        return shape[1] == tap["num_chs"]
    raise ValueError(
        f"{name} returns a feature of shape {shape} at {tap['module']!r}; expected a map of {tap['num_chs']} "
        "channels. Choose other `exit_points` or another backbone."
    )
