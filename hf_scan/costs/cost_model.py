# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Compute the cost of an answer from measured milliseconds or MACs: [`CostModel`]."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..model.exit_config import ExitConfig
from .measure import count_macs
from .values import ExitCosts, MeasuredCosts


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


@dataclass(frozen=True)
class CostModel:
    """
    A model of the cost of answers, in one unit.

    Args:
        costs ([`ExitCosts`]): Cost of each stage and head.
        plain (`float`): Cost of the plain backbone.
        unit (`str`): Name of the unit.
        images (`int`, *optional*, defaults to 1): Number of images that these costs are for.
        measured ([`MeasuredCosts`], *optional*): The measurement that the costs come from.
    """

    costs: ExitCosts
    plain: float
    unit: str
    images: int = 1
    measured: MeasuredCosts | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, model: "ScanForImageClassification", batch_size: int = 1, macs: bool = False, milliseconds: bool = False
    ) -> "CostModel":
        """
        Create the cost model of a network: in milliseconds if they were measured, in MACs otherwise.

        Args:
            model ([`ScanForImageClassification`]): The network, with its exit configuration.
            batch_size (`int`, *optional*, defaults to 1): Number of images in a batch.
            macs (`bool`, *optional*, defaults to `False`): Whether to use MACs in any case.
            milliseconds (`bool`, *optional*, defaults to `False`): Whether milliseconds are required.

        Raises:
            `ValueError`: if milliseconds are required and were not measured, or not at this batch size.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; expected a whole number of at least 1.")
        if model.exit_config.costs is None and milliseconds:
            raise ValueError(
                "`max_latency_ms` needs measured costs, and `model.exit_config.costs` is None. Measure them: "
                "`model.exit_config = model.exit_config.replace(costs=measure_costs(model))`."
            )
        if model.exit_config.costs is None or macs:
            costs = count_macs(model)
            return cls(costs, costs.plain, "MACs, computed")
        measured = MeasuredCosts.from_dict(model.exit_config.costs)
        measured.cumulative(batch_size=batch_size)  # refuses a size that was not measured
        unit = f"milliseconds, measured in batches of {batch_size}: {measured.machine}, {measured.dtype}"
        return cls(measured.milliseconds[batch_size], measured.plain[batch_size], unit, batch_size, measured)

    def cumulative(self, exit_config: ExitConfig) -> np.ndarray:
        """
        Return the cumulative cost of one image at each exit and for the fallback, `(num_exits + 1,)`. Without
        thresholds, all heads run.
        """
        known = exit_config if exit_config.thresholds is not None else None
        return np.array(self.costs.cumulative(known)) / self.images

    def mean(self, exit_config: ExitConfig, shares: Sequence[float]) -> float:
        """
        Return the mean cost of one image.

        Args:
            exit_config ([`ExitConfig`]): Decides which heads run.
            shares (`Sequence[float]`): Share of the images that exit at each exit and, last, of those that the
                fallback answers. Batches shrink as images exit.
        """
        if self.measured is not None and self.images > 1:
            return self.measured.expected_milliseconds(shares, exit_config, self.images)
        return float(self.cumulative(exit_config) @ np.asarray(shares))

    @property
    def plain_image(self) -> float:
        """Return the plain backbone's cost for one image."""
        return self.plain / self.images
