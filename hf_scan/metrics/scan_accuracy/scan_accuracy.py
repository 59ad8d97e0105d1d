# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Compute the accuracy of every exit, of the ensemble and of the adaptive answers with `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_scan.model.exit_rule import answering_column, last_answer, num_answers


_CITATION = """\
@inproceedings{zhang2019scan,
  title={SCAN: A Scalable Neural Networks Framework Towards Compact and Efficient Models},
  author={Zhang, Linfeng and Tan, Zhanhong and Song, Jiebo and Chen, Jingwei and Bao, Chenglong and Ma, Kaisheng},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}"""

_DESCRIPTION = """\
Accuracy of a classifier with early exits: of each exit, of the ensemble of the exits and, if thresholds are given, of
the adaptive answers, with the share of samples that each exit answers and the mean cost."""

_INPUTS_DESCRIPTION = """
Args:
    predictions: predicted class of each exit, shallow to deep, and last of the ensemble: `num_exits + 1` a sample.
    confidences: confidence of each prediction, such as its largest softmax probability.
    references: true class of each sample.
    thresholds: one per exit, or one fewer if the fallback answers every sample that reaches the deepest exit. `None`
        switches an exit off. Without thresholds, the scores of the adaptive answers are left out.
    fallback: "ensemble" (default), "deepest" or "most_confident": the answer for samples that exit nowhere. With
        "most_confident", pass its predictions in place of the ensemble's; the scores below then have its name.
    costs: cumulative cost of each exit and of the ensemble, `num_exits + 1` numbers.

Returns:
    `accuracy` (the deepest exit's), `exit_{i}_accuracy`, `ensemble_accuracy`; with thresholds also
    `adaptive_accuracy`, `exit_{i}_share`, `ensemble_share`, and with costs `mean_cost`. All but the cost are in [0,
    1].

Example:
    >>> from hf_scan.metrics import ScanAccuracy
    >>> metric = ScanAccuracy()
    >>> scores = metric.compute(
    ...     predictions=[[0, 1, 1], [1, 1, 1]], confidences=[[0.6, 0.9, 0.8], [0.9, 0.9, 0.9]], references=[1, 1],
    ...     thresholds=[0.7, 0.7], costs=[0.5, 1.0, 1.0])
    >>> scores["exit_0_accuracy"], scores["adaptive_accuracy"], scores["mean_cost"]
    (0.5, 1.0, 0.75)
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ScanAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                    "confidences": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Any,
        confidences: Any,
        references: Any,
        thresholds: list[float | None] | None = None,
        fallback: str = "ensemble",
        costs: list[float] | None = None,
    ) -> dict[str, float]:
        confidences = np.asarray(confidences)
        correct = np.asarray(predictions) == np.asarray(references)[:, None]
        num_exits = correct.shape[1] - 1
        accuracies = correct.mean(axis=0)
        scores = {"accuracy": accuracies[num_exits - 1]}
        scores |= {f"exit_{index}_accuracy": accuracies[index] for index in range(num_exits)}
        if fallback not in ("ensemble", "deepest", "most_confident"):
            raise ValueError(f"`fallback` is {fallback!r}; expected 'ensemble', 'deepest' or 'most_confident'.")
        last = last_answer(fallback)
        scores[f"{last}_accuracy"] = accuracies[num_exits]
        if thresholds is not None:
            if len(thresholds) not in (num_exits, num_exits - 1):
                raise ValueError(f"There are {len(thresholds)} thresholds; expected {num_exits} or {num_exits - 1}.")
            columns = num_answers(num_exits, fallback)
            limits = [*thresholds, None][: columns - 1]
            answers = answering_column(confidences[:, :columns], limits)
            scores["adaptive_accuracy"] = np.take_along_axis(correct, answers[:, None], axis=1).mean()
            shares = np.bincount(answers, minlength=num_exits + 1) / len(answers)
            scores |= {f"exit_{index}_share": shares[index] for index in range(num_exits)}
            scores[f"{last}_share"] = shares[num_exits]
            if costs is not None:
                scores["mean_cost"] = np.asarray(costs)[answers].mean()
        return {name: float(score) for name, score in scores.items()}
