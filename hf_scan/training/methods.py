# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Ways of training that raise early exits: which gradients reach a stage, and which samples count at an exit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn

from ..model.exit_criteria import confidence_of
from ..model.stages import parameters_by_stage


@contextmanager
def gradient_equilibrium(model: Any) -> Iterator[None]:
    """
    Divide the gradient of each stage's parameters by the number of exits at or after it, while the context lasts.

    Every exit after a stage adds its gradient, so that early stages get the sum of many. Li et al. scale the gradient
    of head i, of k, by 1 / (k - i + 1) where it enters the backbone, and what comes from later stages by (k - i) /
    (k - i + 1). Unrolled, a stage gets the mean of the gradients of the exits at or after it: this division. Heads
    keep theirs. Optimizers whose steps do not depend on the scale of a gradient, such as Adam, take no notice.

    Source: Li et al., "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019, section 3.1.

    Args:
        model ([`ScanForImageClassification`]): The network.
    """
    handles = []
    for index, parameters in enumerate(parameters_by_stage(model.backbone, model.stages)):
        exits = model.num_exits - index
        handles += [one.register_hook(partial(_divided, exits)) for one in parameters.values() if one.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def separate_heads(optimizer: torch.optim.Optimizer, heads: nn.Module, learning_rate: float) -> None:
    """
    Give the early exits a learning rate of their own: fresh heads on a trained backbone need one that would spoil it.

    Args:
        optimizer (`torch.optim.Optimizer`): Of the whole network. Its groups are divided; other settings stay.
        heads (`nn.Module`): The heads.
        learning_rate (`float`): The learning rate from which the schedule starts.
    """
    own = {id(parameter) for parameter in heads.parameters()}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in own]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


def survivor_weights(exit_logits: Sequence[torch.Tensor], joined: bool = False) -> list[torch.Tensor]:
    """
    Return how much each sample counts at each exit: the more, the less confident the exits before it are, as samples
    that leave earlier never come there. The weight at exit i is the product of 1 - confidence over the exits before,
    divided by its mean over the batch. For a frozen backbone, where a sample's easiness does not change.

    Args:
        exit_logits (`Sequence[torch.Tensor]`): One of shape `(batch_size, num_labels)` per exit, shallow to deep.
        joined (`bool`, *optional*, defaults to `False`): Whether all processes of a launcher call this together, and
            the mean is that over all of their batches.

    Returns:
        `list[torch.Tensor]`: one of shape `(batch_size,)` per exit, without gradient, of mean 1.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan.training.methods import survivor_weights

    >>> sure, unsure = torch.tensor([8.0, 0.0]), torch.tensor([0.0, 0.0])
    >>> first, second = survivor_weights([torch.stack([sure, unsure])] * 2)
    >>> first.tolist(), second.round(decimals=2).tolist()
    ([1.0, 1.0], [0.0, 2.0])
    ```
    """
    survives = [torch.ones_like(exit_logits[0][:, 0], dtype=torch.float32)]
    for logits in exit_logits[:-1]:
        # Not 0, which a confidence of 1.0 would give: a batch of such samples still has a mean.
        survives.append((survives[-1] * (1 - confidence_of(logits.detach().float()))).clamp(min=1e-9))
    means = torch.stack([shares.mean() for shares in survives])
    if joined:
        means = reduce(means, reduction="mean")
    return [shares / mean for shares, mean in zip(survives, means)]


def _divided(exits: int, gradient: torch.Tensor) -> torch.Tensor:
    return gradient / exits


__all__ = ["gradient_equilibrium", "separate_heads", "survivor_weights"]
