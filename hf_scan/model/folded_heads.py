# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Exit heads as bare function calls with batch norms folded into the weights, for CPUs."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .exit_heads import ExitHead


class FoldedHead:
    """
    An exit head for inference, as a list of function calls. For one image, the overhead of calling a module or a
    convolution is as large as its arithmetic. So batch norms are folded into the convolutions before them, no modules
    are called, and for one image a depthwise and a pointwise convolution are merged into one dense convolution, which
    has more multiplications and fewer calls. `benchmarks/head_cost.py --forms` measures the effect.

    Args:
        head ([`ExitHead`]): In evaluation mode. When its weights change, a new one has to be made.
    """

    def __init__(self, head: ExitHead) -> None:
        chains = [head.squeeze, nn.Sequential() if head.attention is None else head.attention.mask]
        squeeze, mask, features = (_without_norms(chain) for chain in (*chains, head.classifier.features))
        self.fit = None if head.attention is None else head.attention.fit
        # What comes first works on a finer map, where more multiplications tell.
        self.batch = [_calls(chain) for chain in (squeeze, mask, features, [head.classifier.fc])]
        self.single = [self.batch[0], _calls(_dense(mask)), _calls(_dense(features)), self.batch[3]]

    def __call__(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the same as [`ExitHead`], to floating-point tolerance."""
        squeeze, attention, features, last = self.single if len(feature) == 1 else self.batch
        feature = _run(squeeze, feature)
        mask = None if self.fit is None else self.fit(_run(attention, feature), feature)
        if mask is not None:
            feature = feature * mask
        pooled = _run(features, feature)
        return pooled, _run(last, pooled), mask


Call = Callable[[torch.Tensor], torch.Tensor]


def _run(calls: list[Call], values: torch.Tensor) -> torch.Tensor:
    for call in calls:
        values = call(values)
    return values


def _calls(layers: Iterable[nn.Module]) -> list[Call]:
    return [_call(layer) for layer in layers]


def _call(layer: nn.Module) -> Call:
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return layer.forward
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return partial(nn.functional.linear, weight=weight, bias=bias)
    sizes = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    return partial(torch.conv2d, weight=weight, bias=bias, **sizes)


def _without_norms(chain: nn.Sequential) -> list[nn.Module]:
    """Return the layers with each batch norm folded into the convolution before it."""
    layers: list[nn.Module] = []
    for layer in chain:
        if isinstance(layer, nn.BatchNorm2d):
            conv = layers.pop()
            assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
            layer = fuse_conv_bn_eval(conv, layer, transpose=isinstance(conv, nn.ConvTranspose2d))
        layers.append(layer)
    return layers


# More weights than those of a head of the default width would take longer to read than a call takes.
MAX_DENSE_WEIGHTS = 2**17


def _dense(layers: list[nn.Module]) -> list[nn.Module]:
    """Return the layers with each depthwise convolution and the pointwise one behind it as one dense convolution."""
    found: list[nn.Module] = []
    for layer in layers:
        depthwise = found[-1] if found else None
        if (
            isinstance(layer, nn.Conv2d)
            and isinstance(depthwise, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and depthwise.groups == depthwise.in_channels == depthwise.out_channels
            and layer.weight.numel() * depthwise.weight[0].numel() <= MAX_DENSE_WEIGHTS
        ):
            dense = copy.deepcopy(depthwise)
            dense.groups, dense.out_channels, dense.bias = 1, layer.out_channels, layer.bias
            weight = (layer.weight * depthwise.weight.transpose(0, 1)).detach()
            dense.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
            found[-1] = dense
        else:
            found.append(layer)
    return found


__all__ = ["MAX_DENSE_WEIGHTS", "Call", "FoldedHead"]
