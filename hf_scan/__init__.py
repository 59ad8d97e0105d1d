# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Early exits for timm backbones: trained with a `Trainer`, shared on the Hub, faster on the clock."""

from transformers import AutoConfig, AutoModelForImageClassification

from .adaptive import AdaptiveOutput, ExitConfig, apply_exit_rule
from .calibration import calibrate
from .configuration_scan import ScanConfig
from .modeling_scan import ScanForImageClassification, ScanImageClassifierOutput
from .trainer import ScanTrainer
from .training_args import ScanTrainingArguments


__version__ = "0.1.0.dev0"

AutoConfig.register(ScanConfig.model_type, ScanConfig)
AutoModelForImageClassification.register(ScanConfig, ScanForImageClassification)

__all__ = [
    "AdaptiveOutput",
    "ExitConfig",
    "ScanConfig",
    "ScanForImageClassification",
    "ScanImageClassifierOutput",
    "ScanTrainer",
    "ScanTrainingArguments",
    "apply_exit_rule",
    "calibrate",
]
