from pathlib import Path

import evaluate
import numpy as np
import pytest

import hf_scan.metrics
from hf_scan.metrics import ScanAccuracy


PREDICTIONS = [[0, 1, 1, 1], [2, 2, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0]]
CONFIDENCES = [[0.6, 0.9, 0.8, 0.7], [0.95, 0.5, 0.4, 0.6], [0.3, 0.3, 0.9, 0.4], [0.5, 0.5, 0.5, 0.5]]
REFERENCES = [1, 2, 1, 1]


def test_values_by_hand():
    scores = ScanAccuracy().compute(
        predictions=PREDICTIONS,
        confidences=CONFIDENCES,
        references=REFERENCES,
        thresholds=[0.7, 0.7, 0.7],
        costs=[0.4, 0.7, 1.0, 1.0],
    )
    assert scores == {
        "accuracy": 0.5,
        "exit_0_accuracy": 0.5,
        "exit_1_accuracy": 0.75,
        "exit_2_accuracy": 0.5,
        "ensemble_accuracy": 0.75,
        "adaptive_accuracy": 0.75,  # exits 1, 0, 2 and the ensemble answer: right, right, right, wrong
        "exit_0_share": 0.25,
        "exit_1_share": 0.25,
        "exit_2_share": 0.25,
        "ensemble_share": 0.25,
        "mean_cost": pytest.approx((0.7 + 0.4 + 1.0 + 1.0) / 4),
    }


def test_deepest_as_fallback_and_switched_off_exits():
    scores = ScanAccuracy().compute(
        predictions=PREDICTIONS,
        confidences=CONFIDENCES,
        references=REFERENCES,
        thresholds=[None, 0.7],
        fallback="deepest",
    )
    assert [scores[f"exit_{i}_share"] for i in range(3)] == [0.0, 0.25, 0.75]
    assert scores["ensemble_share"] == 0.0
    assert "mean_cost" not in scores


def test_loads_by_path_without_a_network(tmp_path, monkeypatch):
    path = Path(hf_scan.metrics.__file__).parent / "scan_accuracy"
    metric = evaluate.load(str(path), cache_dir=str(tmp_path))
    inputs = {"predictions": PREDICTIONS, "confidences": CONFIDENCES, "references": REFERENCES}
    assert metric.compute(**inputs) == ScanAccuracy().compute(**inputs)


def test_batches_add_up():
    metric = ScanAccuracy()
    for i in range(4):
        metric.add_batch(
            predictions=np.array(PREDICTIONS[i : i + 1]),
            confidences=np.array(CONFIDENCES[i : i + 1]),
            references=REFERENCES[i : i + 1],
        )
    assert metric.compute()["exit_1_accuracy"] == 0.75


def test_bad_thresholds():
    inputs = {"predictions": PREDICTIONS, "confidences": CONFIDENCES, "references": REFERENCES}
    with pytest.raises(ValueError, match="There are 1 thresholds; expected 3 or 2"):
        ScanAccuracy().compute(**inputs, thresholds=[0.5])
    with pytest.raises(ValueError, match="`fallback` is 'oracle'; expected 'ensemble', 'deepest' or"):
        ScanAccuracy().compute(**inputs, thresholds=[0.5, 0.5], fallback="oracle")
