# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Cut a network at an early exit, to a smaller static one: [`TruncationMixin`]."""

import copy
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from .exit_config import ExitConfig
from .stages import BackboneHead, Stage, keep_parts


Network = TypeVar("Network", bound="TruncationMixin")


class TruncationMixin(PreTrainedModel):
    """A mixin that cuts a [`ScanForImageClassification`] at one of its exits."""

    def cut(self, backbone: nn.Module) -> tuple[list[Stage], BackboneHead]:
        """Cut a backbone at the exit points."""
        raise NotImplementedError

    def truncate_in_place(self, stages: list[Stage]) -> list[Stage]:
        """Remove what the first stage does not use from the backbone, and return that stage alone."""
        if len(stages) != 2:
            raise ValueError(
                f"A truncated network ends at its one exit point; `exit_points` is {self.config.exit_points}. Give "
                "one of them."
            )
        keep_parts(self.backbone, stages[0].parts)
        return stages[:1]

    def truncate(self: Network, exit: int) -> Network:
        """
        Return a small static network that answers as one of the early exits does, to the bit (the paper's model
        compression). It holds the stages up to there and that exit's head, and is saved, pushed and loaded like any
        other.

        Args:
            exit (`int`): Which early exit, from 0.

        Returns:
            [`ScanForImageClassification`]: a copy, in the same mode, with one exit.

        Raises:
            `ValueError`: if there is no such early exit.

        Example:

        ```python
        >>> import torch
        >>> from hf_scan import ScanConfig, ScanForImageClassification

        >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
        >>> small = model.truncate(exit=0)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> torch.equal(small(images).logits, model(images).exit_logits[0])
        True
        >>> small.num_parameters() < 0.2 * model.num_parameters()
        True
        ```
        """
        if self.config.truncated or exit not in range(len(self.exit_heads)):
            raise ValueError(
                f"`exit` is {exit!r}; this network can be truncated at {list(range(self.num_exits - 1))}. What "
                "answers at the deepest exit is `model.backbone`."
            )
        small = copy.deepcopy(self)
        small.config.exit_points = [self.stages[exit].name]
        small.config.head_width = [self.config.head_width[exit]]
        small.config.truncated = True
        small.exit_heads = nn.ModuleList([small.exit_heads[exit]])
        small.stage_layers = small.stage_layers[:1]
        small.stages = small.truncate_in_place(small.cut(small.backbone)[0])
        small.exit_config = ExitConfig(thresholds=[], fallback="deepest")  # there is nothing to decide
        small.train(self.training)  # modules that stand for the removed ones start in training mode
        return small


__all__ = ["TruncationMixin"]
