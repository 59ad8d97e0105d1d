# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Make the network known to the Auto classes and the pipeline of Transformers. Imported with the package."""

from transformers import AutoConfig, AutoModelForImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .model.configuration_scan import ScanConfig
from .model.modeling_scan import ScanForImageClassification
from .pipeline import ScanImageClassificationPipeline


AutoConfig.register(ScanConfig.model_type, ScanConfig)
AutoModelForImageClassification.register(ScanConfig, ScanForImageClassification)
# Not by `register_pipeline`, which warns of a task that is there already.
PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = ScanImageClassificationPipeline
