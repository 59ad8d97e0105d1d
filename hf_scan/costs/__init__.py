# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Count multiplications and parameters of stages and heads, measure milliseconds, predict and measure speed-ups."""

from .allocator import allocator_hint, keep_freed_memory
from .cost_model import CostModel
from .measure import (
    count_macs,
    count_parameters,
    describe_machine,
    interleaved_medians,
    measure_costs,
    realised_speedup,
)
from .values import ExitCosts, MeasuredCosts, RealisedSpeedup, predicted_speedup


__all__ = [
    "CostModel",
    "ExitCosts",
    "MeasuredCosts",
    "RealisedSpeedup",
    "allocator_hint",
    "count_macs",
    "count_parameters",
    "describe_machine",
    "interleaved_medians",
    "keep_freed_memory",
    "measure_costs",
    "predicted_speedup",
    "realised_speedup",
]
