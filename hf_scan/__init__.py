# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Early exits for timm backbones: trained with a `Trainer`, shared on the Hub, faster on the clock."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .calibration import RiskBound, calibrate, certify_thresholds
    from .calibration.monitor import ExitMonitor
    from .costs import MeasuredCosts, measure_costs, predicted_speedup, realised_speedup
    from .data.folders import image_splits
    from .model.configuration_scan import ScanConfig
    from .model.exit_config import ExitConfig
    from .model.exit_rule import AdaptiveOutput, apply_exit_rule
    from .model.modeling_scan import ScanForImageClassification, ScanImageClassifierOutput
    from .training.ema import EmaCallback
    from .training.trainer import ScanTrainer
    from .training.training_args import ScanTrainingArguments
    from .workflows.advise import Advice, advise
    from .workflows.equip import equip
    from .workflows.equip_arguments import Equipped
    from .workflows.search_exits import ExitSearch, search_exits

__version__ = "0.1.0"

# `hf_scan.runtime` answers where neither is installed, and the command line shows its help without them.
_COMMAND_LINE = bool(sys.argv) and Path(sys.argv[0]).stem == "hf-scan"
if find_spec("torch") is not None and find_spec("transformers") is not None and not _COMMAND_LINE:
    import_module(".registration", __name__)

# Imported lazily so that inference does not load training dependencies.
_IMPORTED_WHEN_USED = {
    "AdaptiveOutput": ".model.exit_rule",
    "Advice": ".workflows.advise",
    "EmaCallback": ".training.ema",
    "Equipped": ".workflows.equip_arguments",
    "ExitConfig": ".model.exit_config",
    "ExitMonitor": ".calibration.monitor",
    "ExitSearch": ".workflows.search_exits",
    "MeasuredCosts": ".costs",
    "RiskBound": ".calibration",
    "ScanConfig": ".model.configuration_scan",
    "ScanForImageClassification": ".model.modeling_scan",
    "ScanImageClassifierOutput": ".model.modeling_scan",
    "ScanTrainer": ".training.trainer",
    "ScanTrainingArguments": ".training.training_args",
    "advise": ".workflows.advise",
    "apply_exit_rule": ".model.exit_rule",
    "calibrate": ".calibration",
    "certify_thresholds": ".calibration",
    "equip": ".workflows.equip",
    "image_splits": ".data.folders",
    "measure_costs": ".costs",
    "predicted_speedup": ".costs",
    "realised_speedup": ".costs",
    "search_exits": ".workflows.search_exits",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        return getattr(import_module(_IMPORTED_WHEN_USED[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaptiveOutput",
    "Advice",
    "EmaCallback",
    "Equipped",
    "ExitConfig",
    "ExitMonitor",
    "ExitSearch",
    "MeasuredCosts",
    "RiskBound",
    "ScanConfig",
    "ScanForImageClassification",
    "ScanImageClassifierOutput",
    "ScanTrainer",
    "ScanTrainingArguments",
    "advise",
    "apply_exit_rule",
    "calibrate",
    "certify_thresholds",
    "equip",
    "image_splits",
    "measure_costs",
    "predicted_speedup",
    "realised_speedup",
    "search_exits",
]
