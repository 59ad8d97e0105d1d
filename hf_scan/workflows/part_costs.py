# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What the parts of a network with many candidate exits cost, in the runtime that will serve."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..costs.measure import count_macs, measure_costs
from ..costs.values import ExitCosts, MeasuredCosts
from ..model.modeling_scan import ScanForImageClassification


RUNTIMES = ("macs", "pytorch", "onnx")


@dataclass(frozen=True)
class PartCosts:
    """
    Costs of stages and heads as shares of the plain network's.

    Args:
        shares ([`~hf_scan.costs.ExitCosts`]): They add up to 1 without the early heads.
        unit (`str`): What was counted or measured, and where.
    """

    shares: ExitCosts
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PartCosts":
        """The inverse of [`PartCosts.to_dict`]."""
        return cls(ExitCosts(**values["shares"]), values["unit"])

    @classmethod
    def of_macs(cls, costs: ExitCosts) -> "PartCosts":
        """Return the shares of counted MACs."""
        scale = 1 / costs.plain
        return cls(ExitCosts([scale * one for one in costs.stages], [scale * one for one in costs.heads]), "MACs")

    @classmethod
    def of_times(cls, costs: MeasuredCosts, batch_size: int, runtime: str) -> "PartCosts":
        """
        Return the shares of measured milliseconds. What the many cuts between candidates cost is taken out of the
        stages, since few of them will be left: all stages together take what the plain network does.
        """
        parts = costs.milliseconds[batch_size]
        plain = costs.plain[batch_size]
        scale = 1 / parts.plain
        shares = ExitCosts(
            [scale * one for one in parts.stages],
            [*(one / plain for one in parts.heads[:-1]), scale * parts.heads[-1]],
        )
        return cls(shares, f"milliseconds of {runtime} in batches of {batch_size}, {costs.machine}")


def costs_of_parts(model: ScanForImageClassification, runtime: str = "macs", batch_size: int = 1) -> PartCosts:
    """
    Count or measure what each part of a network costs.

    Args:
        model ([`ScanForImageClassification`]): In evaluation mode.
        runtime (`str`, *optional*, defaults to `"macs"`): `"macs"` counts; `"pytorch"` and `"onnx"` measure
            milliseconds.
        batch_size (`int`, *optional*, defaults to 1): Images at a time.

    Raises:
        `ValueError`: if there is no such runtime.
        `ImportError`: if ONNX Runtime is asked for and not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"`runtime` is {runtime!r}; expected one of {list(RUNTIMES)}.")
    if runtime == "macs":
        return PartCosts.of_macs(count_macs(model))
    if runtime == "pytorch":
        measured = measure_costs(model.to(memory_format=torch.channels_last), batch_size)
        return PartCosts.of_times(measured, batch_size, "PyTorch")
    from ..runtime.onnx_runtime import ORTScanForImageClassification, threaded_options

    with tempfile.TemporaryDirectory() as folder:
        model.export_onnx(Path(folder, "onnx"))
        options = threaded_options(torch.get_num_threads())
        engine = ORTScanForImageClassification.from_pretrained(Path(folder, "onnx"), session_options=options)
        return PartCosts.of_times(measure_costs(engine, batch_size), batch_size, "ONNX Runtime")  # type: ignore[arg-type]


def serving_runtime() -> str:
    """Return `"onnx"` where the packages of the extra are installed, else `"pytorch"`."""
    installed = all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))
    return "onnx" if installed else "pytorch"


__all__ = ["RUNTIMES", "PartCosts", "costs_of_parts", "serving_runtime"]
