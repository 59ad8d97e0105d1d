# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Cut a network into stages that run one after another; its modules and their names stay as they are.

PyTorch's symbolic tracer writes the forward pass of a timm model's features down without running it: the modules that
it calls, and what it does between them. (Of any other classifier: all up to the last map, behind which its own
classifier stands.) Only modules that have an exit point inside are looked into; all others stay the calls that
they are. A stage is a part of that list, made a function of the backbone, and passes on what later parts need.
"""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .exit_layout import lay_out
from .stage import BackboneHead, Stage, StageState
from .tracing import as_function, needed_after


def cut_into_stages(
    backbone: Any, exit_points: list[int | str] | None = None, image_shape: tuple[int, int, int] | None = None
) -> list[Stage]:
    """
    Cut a network after each exit point. The last stage ends where the network's own head begins.

    Args:
        backbone (`torch.nn.Module`): A model of timm, or any classifier that returns logits for images, on any device,
            the meta device included.
        exit_points (`list[int | str]`, *optional*): Indices into the model's `feature_info`, or names of modules, from
            shallow to deep: its taps, and any other that the forward pass runs once on the way and whose output is a
            map or a grid of tokens. Defaults to the taps
            that are not too fine, or a few of them.
        image_shape (`tuple[int, int, int]`, *optional*): Channels, height and width of the images with which modules
            that are no taps are tried, on the meta device. Defaults to those that a model of timm was made for;
            any other network needs it.

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
    return cut_network(backbone, exit_points, image_shape)[0]


def cut_network(
    backbone: Any, exit_points: list[int | str] | None = None, image_shape: tuple[int, int, int] | None = None
) -> tuple[list[Stage], BackboneHead]:
    """Cut a network as [`cut_into_stages`] does, and return the classifier behind the last stage too."""
    layout = lay_out(backbone, exit_points, image_shape)
    program = layout.features
    stages, start, received = [], 0, [program.image]
    for place in [*layout.places, layout.last]:
        is_last = place is layout.last
        handed_on = [program.result] if is_last else needed_after(program, place.end, place.value)
        end = len(program.nodes) if is_last else place.end
        name = f"{program.name}, {place.name}"
        forward, parts = as_function(program, received, program.nodes[start:end], handed_on, name)
        stages.append(
            Stage(
                name=place.name,
                channels=place.channels,
                reduction=place.reduction,
                forward=forward,
                batched=(True,) if is_last else tuple(program.kinds[node] == "images" for node in handed_on),
                parts=parts,
                channels_last=place.channels_last,
                num_prefix_tokens=place.num_prefix_tokens,
                patch_size=place.patch_size,
            )
        )
        start, received = end, handed_on
    return stages, layout.head


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


def parameters_by_stage(backbone: nn.Module, stages: Iterable[Stage]) -> list[dict[str, nn.Parameter]]:
    """Return the parameters of each stage, by name. One that several stages use is the first's."""
    left = dict(backbone.named_parameters())
    found = []
    for stage in stages:
        used = [name for name in left if any(name == part or name.startswith(f"{part}.") for part in stage.parts)]
        found.append({name: left.pop(name) for name in used})
    return found


__all__ = [
    "BackboneHead",
    "Stage",
    "StageState",
    "cut_into_stages",
    "cut_network",
    "keep_parts",
    "parameters_by_stage",
]
