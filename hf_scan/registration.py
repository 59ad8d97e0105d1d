# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Register the network with the Auto classes and the pipeline of Transformers, when the package is imported."""

from transformers import AutoConfig, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .model.configuration_scan import ScanConfig
from .model.modeling_scan import ScanForImageClassification
from .pipeline import ScanImageClassificationPipeline


AutoConfig.register(ScanConfig.model_type, ScanConfig)
AutoModelForImageClassification.register(ScanConfig, ScanForImageClassification)
# Not by `register_pipeline`, which warns if the task is known already.
PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = ScanImageClassificationPipeline
