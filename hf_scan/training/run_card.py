# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The model card of a run of [`ScanTrainer`], with the scores of its last evaluation."""

from typing import Any

from huggingface_hub import ModelCard

from ..costs.measure import describe_machine
from ..reporting.model_card import create_model_card
from ..reporting.report import exit_report
from .training_args import ScanTrainingArguments


def card_of_run(
    model: Any,
    args: ScanTrainingArguments,
    splits: dict[str, Any],
    scores: dict[str, float] | None,
    name: str,
    dataset: str | None = None,
    **metadata: Any,
) -> ModelCard:
    """
    Return the model card of a run.

    Args:
        model ([`ScanForImageClassification`]): The network.
        args ([`ScanTrainingArguments`]): The run's arguments.
        splits (`dict[str, Any]`): Datasets by name; the card has the sizes of those that have one.
        scores (`dict[str, float]`, *optional*): Of the last evaluation, as they were logged.
        name (`str`): The title.
        dataset (`str`, *optional*): What the network was trained on.
        metadata: `language`, `license`, `tags`, `finetuned_from` and so on.
    """
    facts: dict[str, Any] = {
        "dataset": dataset,
        "splits": {
            split: len(rows)
            for split, rows in splits.items()
            if hasattr(rows, "__len__") and not isinstance(rows, dict)
        },
        "evaluated_on": "evaluation",
        "seed": args.seed,
        "machine": describe_machine(args.device),
    }
    report = None
    if scores is not None:
        report = exit_report(model, {metric.removeprefix("eval_"): value for metric, value in scores.items()})
    return create_model_card(model, report, facts, model_name=name, **metadata)


__all__ = ["card_of_run"]
