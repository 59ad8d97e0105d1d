# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Cut a timm model into stages that run one after another; its modules and their names stay as they are.

PyTorch's symbolic tracer writes the model's `forward_features` down without running it: the modules that it calls, and
what it does between them. Only modules that have an exit point inside are looked into; all others stay the calls that
they are. A stage is a part of that list, made a function of the backbone, and passes on what later parts need.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from .exit_places import default_exit_points, find_exit_points, patch_size_of, taps_of
from .stage import Stage, StageState
from .tracing import as_function, needed_after


def cut_into_stages(
    backbone: Any, exit_points: list[int | str] | None = None, image_shape: tuple[int, int, int] | None = None
) -> list[Stage]:
    """
    Cut a timm model after each exit point. The last stage ends where the model's own head begins.

    Args:
        backbone (`torch.nn.Module`): A model of timm, on any device, the meta device included.
        exit_points (`list[int | str]`, *optional*): Indices into the model's `feature_info`, or names of modules, from
            shallow to deep: its taps, and any other that the forward pass runs once on the way and whose output is a
            map or a grid of tokens. Defaults to those of [`default_exit_points`].
        image_shape (`tuple[int, int, int]`, *optional*): Channels, height and width of the images with which modules
            that are no taps are tried, on the meta device. Defaults to those that the model was made for.

    Returns:
        `list[Stage]`: One more than exit points.

    Raises:
        `ValueError`: if the model has no taps, an exit point is unknown, out of order or the last tap, the model does
            not run through them one after another and once, or there is no map.

    Example:

    ```python
    >>> import timm, torch
    >>> from hf_scan.model.stages import StageState, cut_into_stages

    >>> backbone = timm.create_model("resnet18", num_classes=10).eval()
    >>> state = StageState.from_images(torch.rand(2, 3, 64, 64))
    >>> for stage in cut_into_stages(backbone):
    ...     state = stage.run(backbone, state)
    ...     print(stage.name, tuple(stage.feature(state).shape))
    layer1 (2, 64, 16, 16)
    layer2 (2, 128, 8, 8)
    layer3 (2, 256, 4, 4)
    layer4 (2, 512, 2, 2)
    ```
    """
    taps = taps_of(backbone)
    if exit_points is None:
        exit_points = [tap["module"] for tap in default_exit_points(backbone)]
    program, places = find_exit_points(backbone, exit_points, image_shape)
    common = {"channels_last": getattr(backbone, "output_fmt", None) == "NHWC"}
    stages, start, received = [], 0, [program.image]
    for place in places:
        handed_on = needed_after(program, place.end, place.value)
        name = f"{program.name}, {place.name}"
        forward, parts = as_function(program, received, program.nodes[start : place.end], handed_on, name)
        stages.append(
            Stage(
                name=place.name,
                channels=place.channels,
                reduction=place.reduction,
                forward=forward,
                batched=tuple(program.kinds[node] == "images" for node in handed_on),
                parts=parts,
                num_prefix_tokens=place.num_prefix_tokens,
                patch_size=place.patch_size,
                **common,
            )
        )
        start, received = place.end, handed_on
    last = taps[-1]
    name = f"{program.name}, {last['module']}"
    forward, parts = as_function(program, received, program.nodes[start:], [program.result], name)
    stages.append(
        Stage(
            name=last["module"],
            channels=last["num_chs"],
            reduction=last["reduction"],
            forward=forward,
            batched=(True,),
            parts=parts,
            num_prefix_tokens=getattr(backbone, "num_prefix_tokens", 1),
            patch_size=patch_size_of(backbone, last["reduction"]),
            **common,
        )
    )
    return stages


def keep_parts(backbone: nn.Module, parts: Collection[str]) -> None:
    """
    Remove all modules, parameters and buffers of a backbone but some parts and what is in them.

    Args:
        backbone (`torch.nn.Module`): Changed in place.
        parts (`Collection[str]`): Names of modules, parameters and buffers.
    """
    around = {name[:position] for name in parts for position, sign in enumerate(name) if sign == "."}
    for prefix, module in list(backbone.named_modules()):
        if any(prefix == part or prefix.startswith(f"{part}.") for part in parts):
            continue
        for members in (module._modules, module._parameters, module._buffers):
            for name in list(members):
                full_name = f"{prefix}.{name}" if prefix else name
                if full_name not in parts and full_name not in around:
                    del members[name]


__all__ = ["Stage", "StageState", "cut_into_stages", "default_exit_points", "keep_parts"]
