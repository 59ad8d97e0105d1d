# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Run a network on the meta device, to see the shapes of what it computes."""

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from .stage import tensors_in
from .tracing import Program


IMAGES = 2  # that are tried


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
    if program.ran is not None:
        return program.ran
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


__all__ = ["IMAGES", "run_on_meta"]
