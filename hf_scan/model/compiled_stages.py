# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`CompiledStages`]: what `compile_stages` makes of a network, called in place of its own modules."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from .exit_heads import ExitHead
from .folded_heads import FoldedHead
from .stages import Stage


Call = Callable[..., Any]


class CompiledStages:
    """
    Each stage and each head of a network, compiled by itself for batches that shrink.

    Args:
        stages (`Sequence[Stage]`): The network's stages.
        heads (`Iterable[ExitHead]`): Its early exits' heads, in evaluation mode. On a CPU they are folded instead of
            compiled.
        deepest_head (`Callable`, *optional*): The backbone's own head, if the network has it.
        kwargs: For `torch.compile`.
    """

    def __init__(
        self, stages: Sequence[Stage], heads: Iterable[nn.Module], deepest_head: Call | None, **kwargs: Any
    ) -> None:
        self.options = kwargs
        self.stages: list[Call] = [torch.compile(stage.forward, **kwargs) for stage in stages]
        self.heads: list[Call] = [_compiled_head(head, **kwargs) for head in heads]
        self.deepest_head = None if deepest_head is None else torch.compile(deepest_head, **kwargs)

    def refold(self, heads: Iterable[nn.Module]) -> None:
        """Fold heads anew, whose weights have moved to another device or type."""
        for index, head in enumerate(heads):
            if isinstance(self.heads[index], FoldedHead) and isinstance(head, ExitHead):
                self.heads[index] = FoldedHead(head)


def _compiled_head(head: nn.Module, **kwargs: Any) -> Call:
    if isinstance(head, ExitHead) and all(weight.device.type == "cpu" for weight in head.parameters()):
        return FoldedHead(head)
    # PyTorch keeps a few compiled forms of a function's code and then gives up. All heads share that of `ExitHead`;
    # traced, each has code of its own.
    return torch.compile(fx.symbolic_trace(head) if isinstance(head, ExitHead) else head, **kwargs)


__all__ = ["CompiledStages"]
