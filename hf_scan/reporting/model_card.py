# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The card beside a checkpoint, from a report of measured figures and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .report import exit_table, speedup_lines


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def create_model_card(
    model: "ScanForImageClassification",
    report: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    model_name: str,
    tags: str | list[str] | None = None,
    finetuned_from: str | None = None,
    include_code: bool = False,
    **metadata: Any,
) -> ModelCard:
    """
    Fills the card's template.

    Args:
        model ([`ScanForImageClassification`]): With its exit configuration.
        report (`Mapping[str, Any]`, *optional*): From [`~hf_scan.reporting.report.exit_report`]. Without one, the
            card has no figures.
        facts (`Mapping[str, Any]`): What is known of the figures: `dataset` (its name), `splits` (number of images by
            name), `evaluated_on` (which of these the report is of; `"test"` by default), `seed`, `machine`, `recipe`
            (a dictionary) and `frontier` (a picture beside the card).
        model_name (`str`): The card's title.
        tags (`str` or `list[str]`, *optional*): More tags.
        finetuned_from (`str`, *optional*): The model on the Hub whose weights training began with.
        include_code (`bool`, *optional*, defaults to `False`): Whether the checkpoint holds its own code.
        metadata: More of the card's metadata, such as `license`, `language` or `datasets`.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    evaluated_on = facts.get("evaluated_on", "test")
    dataset = facts.get("dataset")
    rows = [] if report is None else report["rows"][:-1]
    data = ModelCardData(
        library_name="transformers",  # or `pipeline` would refuse to load it by name
        pipeline_tag="image-classification",
        tags=list(
            dict.fromkeys(
                ["early-exit", "scan", "timm", "hf_scan", *([tags] if isinstance(tags, str) else tags or [])]
            )
        ),
        model_name=model_name,
        base_model=finetuned_from,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset or "unknown",
                dataset_name=dataset or "unknown",
                dataset_split=evaluated_on,
                metric_type="accuracy",
                metric_name=f"Accuracy, {row['name']}",
                metric_value=row["accuracy"],
            )
            for row in rows
            if "accuracy" in row
        ]
        or None,
        **metadata,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        include_code=include_code,
        measured_on=(model.exit_config.costs or {}).get("machine"),
        truncated=model.config.truncated,
        realised=report is not None and any(name.startswith("realised") for name in report["speedup"]),
        backbone=model.config.backbone,
        exit_points=model.config.exit_points,
        attention_type=model.config.attention_type,
        classifier_type=model.config.classifier_type,
        table="" if report is None else exit_table(report),
        speedups=[] if report is None else speedup_lines(report),
        evaluated_on=evaluated_on,
        exit_config=model.exit_config,
        facts=facts,
    )
