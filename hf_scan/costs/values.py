# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Hold the costs of stages and heads, and compute the speed-ups that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from ..model.exit_config import ExitConfig
from ..model.exit_rule import plan_exits


@dataclass(frozen=True)
class ExitCosts:
    """
    A cost for each stage and each head: multiply-accumulate operations (MACs), parameters, or milliseconds.

    Args:
        stages (`list[float]`): One per stage.
        heads (`list[float]`): One per exit; the last is the backbone's own head.
    """

    stages: list[float]
    heads: list[float]

    @property
    def plain(self) -> float:
        """Return the cost of the backbone without early exits."""
        return sum(self.stages) + self.heads[-1]

    def cumulative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """
        Return the cost of everything that has run when an exit answers, earlier heads included.

        Args:
            exit_config ([`ExitConfig`], *optional*): Decides which heads run. Defaults to all of them.

        Returns:
            `list[float]`: one per exit, and a last one for the ensemble, whose mean is taken to cost nothing.
        """
        total: float = 0
        costs = []
        for stage, head in zip(self.stages, self.heads_that_run(exit_config)):
            total += stage + head
            costs.append(total)
        return [*costs, total]

    def relative(self, exit_config: ExitConfig | None = None) -> list[float]:
        """Return the cumulative costs as shares of the plain backbone's."""
        return [cost / self.plain for cost in self.cumulative(exit_config)]

    def heads_that_run(self, exit_config: ExitConfig | None = None) -> list[float]:
        """Return the heads' costs, 0 for those that the exit configuration does not run."""
        if exit_config is None:
            return list(self.heads)
        return [cost if runs else 0 for cost, (runs, _) in zip(self.heads, plan_exits(exit_config, len(self.heads)))]


@dataclass(frozen=True)
class MeasuredCosts:
    """
    The result of [`measure_costs`]. `exit_config.costs` holds it as a dictionary.

    Args:
        macs ([`ExitCosts`]): MACs of one image, computed from the shapes.
        parameters ([`ExitCosts`]): Parameters, each counted with the first part that uses it.
        milliseconds (`dict[int, ExitCosts]`): Median milliseconds of each part for a whole batch, by batch size.
        spread (`dict[int, ExitCosts]`): Interquartile range of the same.
        plain (`dict[int, float]`): Median milliseconds of the whole backbone without exits for a whole batch, by batch
            size.
        dtype (`str`): The type that was computed with.
        threads (`int`): Number of threads, on a CPU.
        machine (`str`): The machine, in words.
        plain_spread (`dict[int, float]`, *optional*): Interquartile range of `plain`, by batch size.
    """

    macs: ExitCosts
    parameters: ExitCosts
    milliseconds: dict[int, ExitCosts]
    spread: dict[int, ExitCosts]
    plain: dict[int, float]
    dtype: str
    threads: int
    machine: str
    plain_spread: dict[int, float] = field(default_factory=dict)

    @property
    def noise(self) -> dict[int, float]:
        """The whole backbone's interquartile range as a share of its median, by batch size."""
        return {size: spread / self.plain[size] for size, spread in self.plain_spread.items()}

    @property
    def batch_size(self) -> int:
        """Return the largest batch size that was measured."""
        return max(self.milliseconds)

    def cumulative(self, exit_config: ExitConfig | None = None, batch_size: int | None = None) -> list[float]:
        """
        Return the milliseconds for one image of a full batch until an exit answers, as [`ExitCosts.cumulative`].

        Args:
            exit_config ([`ExitConfig`], *optional*): Decides which heads run. Defaults to all of them.
            batch_size (`int`, *optional*): One of the sizes measured. Defaults to the largest.
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
        Compute the expected milliseconds for one image from those of the parts and the share of images at each exit.

        Images exit independently of each other, so the number left in a batch is binomial. The time of a stage for
        that many is interpolated between the sizes measured.

        Args:
            shares (`Sequence[float]`): Share of the images that exit at each exit and, last, of those that the
                fallback answers, with whichever exit.
            exit_config ([`ExitConfig`], *optional*): Decides which heads run. Defaults to all of them.
            batch_size (`int`, *optional*): One of the sizes measured. Defaults to the largest.
            refilled (`bool`, *optional*, defaults to `False`): Whether stages run full batches to the end, as in
                `predict_adaptive_stream`, rather than batches that shrink, as in `predict_adaptive`.

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
                "each exit, and one for those that the fallback answers."
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
        """Return the fields as JSON values."""
        values = asdict(self)
        for name in ("milliseconds", "spread", "plain", "plain_spread"):
            values[name] = {str(size): value for size, value in values[name].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MeasuredCosts":
        """Create the costs from what [`MeasuredCosts.to_dict`] returned."""
        read = dict(values)
        for name in ("macs", "parameters"):
            read[name] = ExitCosts(**values[name])
        for name in ("milliseconds", "spread"):
            read[name] = {int(size): ExitCosts(**costs) for size, costs in values[name].items()}
        for name in ("plain", "plain_spread"):  # the latter is not in older files
            read[name] = {int(size): value for size, value in values.get(name, {}).items()}
        return cls(**read)


def predicted_speedup(
    costs: MeasuredCosts,
    shares: Sequence[float],
    exit_config: ExitConfig | None = None,
    batch_size: int | None = None,
    refilled: bool = False,
) -> float:
    """
    Compute the speed-up of adaptive inference: the plain backbone's latency over the expected latency,
    [`MeasuredCosts.expected_milliseconds`].

    Args:
        costs ([`MeasuredCosts`]): Measured costs.
        shares, exit_config, batch_size, refilled: As in [`MeasuredCosts.expected_milliseconds`].
    """
    size = batch_size or costs.batch_size
    expected = costs.expected_milliseconds(shares, exit_config, size, refilled)
    return costs.plain[size] / size / expected


@dataclass(frozen=True)
class RealisedSpeedup:
    """
    The result of [`realised_speedup`].

    Args:
        batch_size (`int`): Number of images in a batch.
        refilled (`bool`): Whether `predict_adaptive_stream` was measured.
        plain (`float`): Milliseconds for one image of the backbone without early exits.
        adaptive (`float`): Milliseconds for one image of adaptive inference with the model's own exit configuration.
        shares (`list[float]`): Share of the images that exited at each exit and, last, of those that the fallback
            answered.
    """

    batch_size: int
    refilled: bool
    plain: float
    adaptive: float
    shares: list[float]

    @property
    def speedup(self) -> float:
        """Return the plain latency over the adaptive one."""
        return self.plain / self.adaptive


__all__ = ["ExitCosts", "MeasuredCosts", "RealisedSpeedup", "predicted_speedup"]
