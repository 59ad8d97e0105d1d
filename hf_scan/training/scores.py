# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Scores of the exits in an evaluation of [`ScanTrainer`]."""

from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..costs.measure import count_macs
from ..metrics.scan_accuracy.scan_accuracy import ScanAccuracy
from ..model.exit_rule import label_set_ids
from ..model.problem_type import MULTI_LABEL


def exit_scores(prediction: EvalPrediction, model: Any) -> dict[str, float]:
    """
    Return the accuracy of each exit, and with thresholds that of the answers and what they cost.

    Args:
        prediction (`EvalPrediction`): Classes and confidences of the columns of
            [`~hf_scan.model.exit_rule.exit_columns`], and the labels. Those of -100 do not count, as for the loss.
        model ([`ScanForImageClassification`]): The network, with the thresholds.
    """
    labels = np.asarray(prediction.label_ids)
    if model.config.problem_type == MULTI_LABEL:
        labels = label_set_ids(torch.from_numpy(labels > 0.5)).numpy()
    elif labels.ndim == 2:  # of shape (n, 1), or distributions
        labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(axis=1)
    counts = labels != -100
    predictions, confidences = (np.asarray(column)[counts] for column in prediction.predictions)
    exit_config = model.exit_config
    adaptive: dict[str, Any] = {"fallback": exit_config.fallback}
    if exit_config.thresholds is not None:
        adaptive["thresholds"] = exit_config.thresholds
        adaptive["costs"] = count_macs(model).relative(exit_config)
    return ScanAccuracy().compute(
        predictions=predictions, confidences=confidences, references=labels[counts], **adaptive
    )


__all__ = ["exit_scores"]
