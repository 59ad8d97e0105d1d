# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Sums of the loss's terms between two logs."""

from collections import defaultdict

import torch
from accelerate import Accelerator


class TermSums:
    """
    Sums of the loss's terms since the last log. They stay on the device, as to read one waits for it.

    Args:
        accelerator (`Accelerator`): Adds up what processes have.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator.device))
        self.steps = 0

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Add the terms of a step."""
        for name, term in terms.items():
            self._sums[name] += term.detach()
        self.steps += 1

    def take_means(self) -> dict[str, float]:
        """Return the means over steps and processes, and forget the sums. All processes call it together."""
        means = self.accelerator.reduce(torch.stack(list(self._sums.values())) / self.steps, reduction="mean")
        found = {name: round(mean, 6) for name, mean in zip(self._sums, means.tolist())}
        self.clear()
        return found

    def check_finite(self, step: int) -> None:
        """
        Check the sums, in all processes together: as they share gradients, all stop.

        Args:
            step (`int`): The number of the step, for the error.

        Raises:
            `FloatingPointError`: if one is not finite, by its name. The sums are forgotten then.
        """
        broken = ~torch.stack(list(self._sums.values())).isfinite()
        if self.accelerator.num_processes > 1:
            broken = self.accelerator.reduce(broken.float(), reduction="sum") > 0
        if broken.any():
            name = list(self._sums)[int(broken.nonzero()[0])]
            self.clear()
            raise FloatingPointError(
                f"`{name}` is not finite at step {step}; training stops with the weights of the step before (running "
                "means of batch norm may be spoilt). Lower the learning rate or the term's weight, or set "
                "`max_grad_norm`, and go on from the last checkpoint."
            )


__all__ = ["TermSums"]
