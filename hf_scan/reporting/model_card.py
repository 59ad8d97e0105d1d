# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Write the model card of a checkpoint from a report of measured figures."""

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
    Fill the template of the card.

    Args:
        model ([`ScanForImageClassification`]): The network, with its exit configuration.
        report (`Mapping[str, Any]`, *optional*): A report of [`~hf_scan.reporting.report.exit_report`]. Without one,
            the card has no figures.
        facts (`Mapping[str, Any]`): The provenance of the figures: `dataset` (its name), `splits` (number of images by
            name), `evaluated_on` (the split of the report, `"test"` by default), `seed`, `machine`, `recipe` (a
            dictionary) and `frontier` (a picture beside the card).
        model_name (`str`): The card's title.
        tags (`str` or `list[str]`, *optional*): Further tags.
        finetuned_from (`str`, *optional*): The model on the Hub whose weights training started from.
        include_code (`bool`, *optional*, defaults to `False`): Whether the checkpoint holds its own code.
        metadata: Further metadata of the card, such as `license`, `language` or `datasets`.

    Returns:
        [`~huggingface_hub.ModelCard`]
    """
    evaluated_on = facts.get("evaluated_on", "test")
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
        eval_results=None
        if report is None
        else _eval_results(report, facts.get("dataset") or "unknown", evaluated_on) or None,
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


def _eval_results(report: Mapping[str, Any], dataset: str, split: str) -> list[EvalResult]:
    """Return the accuracies of a report, except the plain backbone's, which is another model."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=f"Accuracy, {row['name']}",
            metric_value=row["accuracy"],
        )
        for row in report["rows"][:-1]
        if "accuracy" in row
    ]
