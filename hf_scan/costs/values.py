# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Costs of stages and heads as values, and the speed-ups that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..model.exit_config import ExitConfig
from ..model.exit_rule import plan_exits


@dataclass(frozen=True)
class ExitCosts:
    """
    One number for each stage and each head: multiply-accumulate operations (MACs), parameters, or milliseconds.

    Args:
        stages (`list[float]`): One per stage.
        heads (`list[float]`): One per exit; the last is the backbone's own head.
    """

    stages: list[float]
    heads: list[float]

    @property
    def plain(self) -> float:
        """The backbone without early exits."""
        return sum(self.stages) + self.heads[-1]

    def cumulative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """
        All that has run when an exit answers, earlier heads included.

        Args:
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.

        Returns:
            `list[float]`: one per exit, and a last one for the ensemble, whose mean costs nothing to speak of.
        """
        total: float = 0
        costs = []
        for stage, head in zip(self.stages, self.heads_that_run(exit_config)):
            total += stage + head
            costs.append(total)
        return [*costs, total]

    def relative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """The cumulative costs as shares of the plain backbone's."""
        return [cost / self.plain for cost in self.cumulative(exit_config)]

    def heads_that_run(self, exit_config: ExitConfig | None = None) -> list[float]:
        """The heads' costs, 0 for those that the exit configuration does not run."""
        if exit_config is None:
            return list(self.heads)
        return [cost if runs else 0 for cost, (runs, _) in zip(self.heads, plan_exits(exit_config, len(self.heads)))]


@dataclass(frozen=True)
class MeasuredCosts:
    """
    What [`measure_costs`] found. `exit_config.costs` holds it as a dictionary.

    Args:
        macs ([`ExitCosts`]): MACs of one image. Computed from the shapes.
        parameters ([`ExitCosts`]): Parameters, each counted with the first part that uses it.
        milliseconds (`dict[int, ExitCosts]`): By batch size, the median time of each part for a whole batch.
        spread (`dict[int, ExitCosts]`): Likewise, its interquartile range.
        plain (`dict[int, float]`): By batch size, the median milliseconds of the whole backbone without exits.
        dtype (`str`): Numbers that were computed with.
        threads (`int`): Threads that computed, on a CPU.
        machine (`str`): What it was measured on, in words.
    """

    macs: ExitCosts
    parameters: ExitCosts
    milliseconds: dict[int, ExitCosts]
    spread: dict[int, ExitCosts]
    plain: dict[int, float]
    dtype: str
    threads: int
    machine: str

    @property
    def batch_size(self) -> int:
        """The largest that was measured."""
        return max(self.milliseconds)

    def cumulative(self, exit_config: ExitConfig | None = None, batch_size: int | None = None) -> list[float]:
        """
        Milliseconds for one image of a full batch until an exit answers, as [`ExitCosts.cumulative`].

        Args:
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.
            batch_size (`int`, *optional*): One of those measured. Defaults to the largest.
        """
        size = batch_size or self.batch_size
        return [milliseconds / size for milliseconds in self._measured(size).cumulative(exit_config)]

    def expected_milliseconds(
        self,
        shares: Sequence[float],
        exit_config: ExitConfig | None = None,
        batch_size: int | None = None,
        refilled: bool = False,
    ) -> float:
        """
        Milliseconds for one image, computed from those of the parts and from how many images each exit answers.

        Images leave independently of each other, so how many of a batch are left is binomial. The time of a stage for
        that many is interpolated between the sizes measured.

        Args:
            shares (`Sequence[float]`): Share of the images that leave at each exit, and at last of those that leave
                at none, whatever answers them.
            exit_config ([`ExitConfig`], *optional*): Says which heads run. Defaults to all of them.
            batch_size (`int`, *optional*): One of those measured. Defaults to the largest.
            refilled (`bool`, *optional*, defaults to `False`): Whether stages run full batches to the end, as in
                `predict_adaptive_stream`, rather than what is left of one, as in `predict_adaptive`.

        Raises:
            `ValueError`: if the batch size was not measured, or `shares` does not hold one share more than there are
                exits.
        """
        size = batch_size or self.batch_size
        self._measured(size)
        num_exits = len(self.macs.stages)
        if len(shares) != num_exits + 1 or not abs(sum(shares) - 1) < 1e-3:
            raise ValueError(
                f"`shares` is {list(shares)}; expected {num_exits + 1} shares of the images that add up to 1: one for "
                "each exit, and one for those that leave at none."
            )
        sizes = [0, *sorted(self.milliseconds)]
        total = 0.0
        for index in range(num_exits):
            times = [0.0]
            for measured in sizes[1:]:
                costs = self.milliseconds[measured]
                times.append(costs.stages[index] + costs.heads_that_run(exit_config)[index])
            left = min(1.0, max(0.0, 1 - sum(shares[:index])))
            if refilled:
                total += left * float(np.interp(size, sizes, times))
            else:
                counts = torch.arange(size + 1)
                chances = torch.distributions.Binomial(size, torch.tensor(left, dtype=torch.float64)).log_prob(counts)
                total += float(chances.exp().numpy() @ np.interp(counts.numpy(), sizes, times))
        return total / size

    def _measured(self, batch_size: int) -> ExitCosts:
        if batch_size not in self.milliseconds:
            raise ValueError(
                f"`batch_size` is {batch_size}, and {sorted(self.milliseconds)} were measured. Choose one of them, or "
                f"call `measure_costs(model, batch_size={batch_size})`."
            )
        return self.milliseconds[batch_size]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        values = asdict(self)
        for name in ("milliseconds", "spread", "plain"):
            values[name] = {str(size): value for size, value in values[name].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MeasuredCosts":
        """The inverse of [`MeasuredCosts.to_dict`]."""
        read = dict(values)
        for name in ("macs", "parameters"):
            read[name] = ExitCosts(**values[name])
        for name in ("milliseconds", "spread"):
            read[name] = {int(size): ExitCosts(**costs) for size, costs in values[name].items()}
        read["plain"] = {int(size): value for size, value in values["plain"].items()}
        return cls(**read)


def predicted_speedup(
    costs: MeasuredCosts,
    shares: Sequence[float],
    exit_config: ExitConfig | None = None,
    batch_size: int | None = None,
    refilled: bool = False,
) -> float:
    """
    The plain backbone's time over what adaptive inference should take: [`MeasuredCosts.expected_milliseconds`], whose
    arguments these are. Computed.

    Args:
        costs ([`MeasuredCosts`]): From [`measure_costs`].
        shares (`Sequence[float]`): Share of the images that leave at each exit, and at last of those at none.
        exit_config, batch_size, refilled: as there.
    """
    size = batch_size or costs.batch_size
    expected = costs.expected_milliseconds(shares, exit_config, size, refilled)
    return costs.plain[size] / size / expected


@dataclass(frozen=True)
class RealisedSpeedup:
    """
    What [`realised_speedup`] measured.

    Args:
        batch_size (`int`): Images at a time.
        refilled (`bool`): Whether by `predict_adaptive_stream`.
        plain (`float`): Milliseconds for one image, of the backbone without early exits.
        adaptive (`float`): The same, of adaptive inference with the model's own exit configuration.
        shares (`list[float]`): Share of the images that left at each exit, and at last of those that left at none.
    """

    batch_size: int
    refilled: bool
    plain: float
    adaptive: float
    shares: list[float]

    @property
    def speedup(self) -> float:
        """The plain time over the adaptive one."""
        return self.plain / self.adaptive


__all__ = ["ExitCosts", "MeasuredCosts", "RealisedSpeedup", "predicted_speedup"]
