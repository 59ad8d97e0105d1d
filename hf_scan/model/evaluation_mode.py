# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Evaluation mode: required by adaptive inference, and entered for a while by what measures."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Put a model into evaluation mode, and each of its modules back into the mode that it was in.

    Args:
        model (`torch.nn.Module`): The model.

    Example:

    ```python
    >>> from torch import nn
    >>> from hf_scan.model.evaluation_mode import evaluating

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     model.training
    False
    >>> [module.training for module in model]
    [True, False]
    ```
    """
    if not isinstance(model, nn.Module):  # an exported network, which has no modes
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


__all__ = ["evaluating"]
