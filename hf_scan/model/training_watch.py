# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Notice how a network is trained, also by a training loop that knows nothing of early exits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .provenance import join_trained_on, unknown_images


UNRECORDED = unknown_images("images of a training loop other than ScanTrainer, which keeps no record")


def watch_training(model: Any, exit_logits: Sequence[torch.Tensor]) -> None:
    """
    Watch which exits a loss reaches, in training. Once a gradient has reached one, the network's `trained_on` says so,
    unless a trainer that records its images has set `model.training_recorded`.

    Args:
        model ([`ScanForImageClassification`]): The network, whose `exits_reached` holds those of the call before.
        exit_logits (`Sequence[torch.Tensor]`): One of shape `(batch_size, num_labels)` per exit.

    Raises:
        `ValueError`: if the loss of the call before reached the deepest exit and none of the early ones, which learn
            nothing from it.
    """
    deepest = len(exit_logits) - 1
    if model.exits_reached == {deepest} and _has_learning_heads(model):
        model.exits_reached = set()
        raise ValueError(
            "The loss of the last training step reached the deepest exit only, so no early exit was trained. This is "
            "what a loss of `logits` does, such as that of `label_smoothing_factor` in a plain `Trainer`. Use the "
            "`loss` that the model returns for `labels`, a loss of `exit_logits`, or `ScanTrainer`; to train the "
            "deepest exit alone, call `model.exit_heads.requires_grad_(False)`."
        )
    reached: set[int] = set()
    model.exits_reached = reached if deepest > 0 else set()
    for index, logits in enumerate(exit_logits):
        if logits.requires_grad:
            logits.register_hook(partial(_note, model, reached, index))


def _has_learning_heads(model: Any) -> bool:
    return any(parameter.requires_grad for parameter in model.exit_heads.parameters())


def _note(model: Any, reached: set[int], index: int, _: torch.Tensor) -> None:
    reached.add(index)
    trained_on = model.exit_config.trained_on
    if not model.training_recorded and UNRECORDED not in (trained_on or ""):
        model.exit_config = model.exit_config.replace(trained_on=join_trained_on(trained_on, UNRECORDED))


__all__ = ["UNRECORDED", "watch_training"]
