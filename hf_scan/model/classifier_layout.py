# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find the last map, the classifier behind it and the blocks in front of it, in a network that does not name them."""

import dataclasses
from typing import Any

import torch
from torch import fx, nn

from .meta_run import IMAGES, run_on_meta
from .stage import BackboneHead
from .tracing import Program, as_function, trace


# A sequence of more layers than these is looked into, though none of them has layers of its own.
LONG = 8


def is_timm_model(backbone: Any) -> bool:
    """Return whether a network says by timm's means where its maps and its classifier are."""
    return hasattr(backbone, "feature_info") or hasattr(backbone, "pretrained_cfg")


def timm_head(backbone: Any) -> BackboneHead:
    """Return the classifier of a model of timm, which is its `forward_head`."""

    def forward(backbone: Any, feature: Any, pre_logits: bool) -> torch.Tensor:
        # Without the argument where it is the default: networks of users need not have it.
        value: torch.Tensor = (
            backbone.forward_head(feature, pre_logits=True) if pre_logits else backbone.forward_head(feature)
        )
        return value

    feature_size: int = getattr(backbone, "head_hidden_size", getattr(backbone, "num_features", 0))
    return BackboneHead(forward, feature_size)


def split_classifier(
    backbone: nn.Module, names: list[str], image_shape: tuple[int, int, int]
) -> tuple[Program, BackboneHead]:
    """
    Write down the forward pass of any classifier, and split it at its last map.

    Args:
        backbone (`torch.nn.Module`): Takes images, and returns logits.
        names (`list[str]`): Modules whose calls are to be seen.
        image_shape (`tuple[int, int, int]`): Channels, height and width of its images.

    Returns:
        `tuple[Program, BackboneHead]`: the part up to the last map, which it returns, and the part behind.

    Raises:
        `ValueError`: if the network cannot be written down, has several outputs, no classifier or no map.
    """
    program = trace(backbone, [*names, *_classifiers(backbone)], "forward")
    if not isinstance(program.result, fx.Node) or program.kinds[program.result] != "images":
        raise ValueError(f"{program.name} does not return one tensor; expected logits alone.{_WRAP}")
    values = run_on_meta(backbone, program, image_shape, program.nodes)
    logits = values[program.result][0]
    if len(logits) != 1:
        raise ValueError(f"{program.name} returns {len(logits)} tensors; expected logits alone.{_WRAP}")
    if logits[0].ndim != 2 or len(logits[0]) != IMAGES:
        raise ValueError(
            f"{program.name} has no classifier: for {IMAGES} images of {image_shape} it returns "
            f"{tuple(logits[0].shape)}; expected logits of shape ({IMAGES}, num_labels)."
        )
    shapes = {node: tuple(tensors[0].shape) for node, (tensors, _) in values.items() if len(tensors) == 1}
    place = _last_map(backbone, program, shapes)
    end = program.nodes.index(place) + 1
    last = program.result
    before = last.args[0] if last.args and isinstance(last.args[0], fx.Node) else last
    if len(shapes.get(before, ())) != 2 or before not in program.nodes[end:]:
        before = last  # the last layer makes logits of a map
    outputs = {False: last, True: before}
    forwards = {
        key: as_function(program, [place], program.nodes[end:], [node], f"{program.name}, classifier {key}")[0]
        for key, node in outputs.items()
    }

    def forward(backbone: nn.Module, feature: Any, pre_logits: bool) -> torch.Tensor:
        value: torch.Tensor = forwards[pre_logits](backbone, feature)[0]
        return value

    kept = {name: [call for call in calls if call[0] <= end] for name, calls in program.calls.items()}
    features = dataclasses.replace(program, nodes=program.nodes[:end], result=place, calls=kept, ran=values)
    return features, BackboneHead(forward, shapes[before][1], shapes[last][1])


_WRAP = " Wrap it in a module that returns them."


def _classifiers(backbone: nn.Module) -> list[str]:
    """Return the last layers of classifiers that are sequences, whose calls are to be seen."""
    found = []
    for name, module in backbone.named_modules():
        if name and isinstance(module, nn.Sequential) and len(module) and isinstance(module[-1], nn.Linear):
            found.append(f"{name}.{len(module) - 1}" if type(module) is nn.Sequential else name)
    return found[-1:]


def _last_map(backbone: nn.Module, program: Program, shapes: dict[fx.Node, tuple[int, ...]]) -> fx.Node:
    """Return the last map on the way to the logits: what is pooled, or else the last value that is a map."""
    modules = dict(backbone.named_modules())
    maps = [node for node in program.nodes if _is_map(shapes.get(node, ())) and program.kinds[node] == "images"]
    fine = [node for node in maps if not _is_point(shapes[node])]
    after = program.nodes.index(fine[-1]) + 1 if fine else 0
    for node in program.nodes[after:]:
        if _pools(node, modules, shapes.get(node, ())):
            for source in node.all_input_nodes[:1]:
                if source in maps and not program.bypassed(source):
                    return source
    for node in [*reversed(fine), *reversed(maps)]:
        if not program.bypassed(node) and node is not program.result:
            return node
    raise ValueError(
        f"{program.name} has no map in front of its classifier that all images pass; expected a network with "
        "convolutions or tokens, whose blocks its forward pass runs one after another."
    )


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) in (3, 4) and shape[0] == IMAGES


def _is_point(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and (shape[2:] == (1, 1) or shape[1:3] == (1, 1))


def _pools(node: fx.Node, modules: dict[str, nn.Module], shape: tuple[int, ...]) -> bool:
    """Return whether a step makes one value of each map."""
    if len(shape) != 2 and not _is_point(shape):
        return False
    target: Any = modules[str(node.target)] if node.op == "call_module" else node.target
    name = str(target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)).lower()
    return any(word in name for word in ("pool", "mean", "amax"))


def block_names(backbone: nn.Module) -> list[str]:
    """
    Return the modules of a network after which exits can stand by default, in their order: what stands in lists, and
    around and between them, without the parts of blocks, single convolutions and norms.
    """
    found: list[str] = []

    def visit(prefix: str, parent: nn.Module) -> None:
        in_list = isinstance(parent, (nn.Sequential, nn.ModuleList)) and bool(prefix)
        for short, module in parent.named_children():
            name = f"{prefix}{short}"
            if _has_children(module) or _ends_a_block(module):
                if _is_opened(module, in_list):
                    visit(f"{name}.", module)
                if not isinstance(module, nn.ModuleList):
                    found.append(name)

    visit("", backbone)
    return found


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _ends_a_block(module: nn.Module) -> bool:
    """Return whether a layer is an activation or a pooling, after which maps are finished."""
    return type(module).__module__ in ("torch.nn.modules.activation", "torch.nn.modules.pooling")


def _is_opened(module: nn.Module, in_list: bool) -> bool:
    members = list(module.children())
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return len(members) > LONG or any(_has_children(member) for member in members)
    lists = [member for member in members if isinstance(member, (nn.Sequential, nn.ModuleList))]
    return not in_list and any(_has_children(member) for one in lists for member in one)


__all__ = ["block_names", "is_timm_model", "split_classifier", "timm_head"]
