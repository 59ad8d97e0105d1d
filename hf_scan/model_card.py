# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The card beside a checkpoint, from a report of measured figures and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .report import exit_table, speedup_lines


if TYPE_CHECKING:
    from .modeling_scan import ScanForImageClassification

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def create_model_card(
    model: "ScanForImageClassification", report: Mapping[str, Any], facts: Mapping[str, Any], model_name: str
) -> ModelCard:
    """
    Fills the card's template.

    Args:
        model ([`ScanForImageClassification`]): With its exit configuration.
        report (`Mapping[str, Any]`): From [`~hf_scan.report.exit_report`].
        facts (`Mapping[str, Any]`): Where the figures come from: `dataset` (its name), `splits` (number of images by
            name), and, where known, `seed`, `machine` and `recipe` (a dictionary).
        model_name (`str`): The card's title.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    scores = {row["name"]: row["accuracy"] for row in report["rows"][:-1] if "accuracy" in row}
    data = ModelCardData(
        library_name="hf_scan",
        pipeline_tag="image-classification",
        tags=["early-exit", "scan", "timm"],
        model_name=model_name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=facts["dataset"],
                dataset_name=facts["dataset"],
                dataset_split="test",
                metric_type="accuracy",
                metric_name=f"Accuracy, {name}",
                metric_value=accuracy,
            )
            for name, accuracy in scores.items()
        ],
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        backbone=model.config.backbone,
        exit_points=model.config.exit_points,
        attention_type=model.config.attention_type,
        classifier_type=model.config.classifier_type,
        table=exit_table(report),
        speedups=speedup_lines(report),
        exit_config=model.exit_config,
        facts=facts,
    )
