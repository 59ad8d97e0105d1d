# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Which layers keep float32 where a network is trained with automatic mixed precision on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn


@contextmanager
def float32_strided_depthwise(model: nn.Module) -> Iterator[None]:
    """
    Run the grouped convolutions that have a stride in float32 under autocast on a CPU, while the context lasts.

    PyTorch's backward pass of such a convolution takes 5 to 40 times as long in bfloat16 as in float32 there (stride
    2, 64 to 128 channels, on a processor with AMX), and the heads and mobile networks have many: without this,
    bfloat16 slows their training down. On other devices, and without autocast, nothing changes.

    Args:
        model (`nn.Module`): The network in training.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan.training.precision import float32_strided_depthwise

    >>> conv = torch.nn.Conv2d(8, 8, 3, stride=2, groups=8)
    >>> with torch.autocast("cpu", dtype=torch.bfloat16), float32_strided_depthwise(conv):
    ...     print(conv(torch.rand(1, 8, 4, 4)).dtype)
    torch.float32
    ```
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and max(layer.stride) > 1
    ]
    for layer in layers:
        layer.forward = partial(_in_float32, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _in_float32(forward: Callable[[torch.Tensor], torch.Tensor], feature_map: torch.Tensor) -> torch.Tensor:
    if not torch.is_autocast_enabled("cpu") or feature_map.device.type != "cpu":
        return forward(feature_map)
    with torch.autocast("cpu", enabled=False):
        return forward(feature_map.float())


__all__ = ["float32_strided_depthwise"]
