"""Scores of the exits in an evaluation."""

import pytest
import torch

from hf_scan import ExitConfig, ScanTrainer

from ..conftest import random_scan_model
from .samples import arguments, rows


def test_evaluation_equals_predict_adaptive(tmp_path):
    """Accuracy, shares and cost of the metric are those of answers that were really given."""
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5, None, 0.6])
    dataset = [{**row, "pixel_values": torch.randn(3, 16, 16)} for row in rows(33, seed=1)]
    scores = ScanTrainer(model, arguments(tmp_path), eval_dataset=dataset).evaluate()
    answer = model.predict_adaptive(torch.stack([row["pixel_values"] for row in dataset]))
    labels = torch.tensor([row["labels"] for row in dataset])
    assert scores["eval_adaptive_accuracy"] == pytest.approx(
        float((answer.logits.argmax(-1) == labels).float().mean())
    )
    shares = torch.bincount(answer.exit_index, minlength=4) / 33
    assert [scores[f"eval_exit_{i}_share"] for i in range(3)] == pytest.approx(shares[:3].tolist())
    assert scores["eval_ensemble_share"] == pytest.approx(float(shares[3]))
    assert shares.count_nonzero() == 3
    assert 0 < scores["eval_mean_cost"] < 1.1


def test_own_metrics_get_the_array_of_logits(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {}

    ScanTrainer(
        random_scan_model(), arguments(tmp_path), eval_dataset=rows(9), compute_metrics=compute_metrics
    ).evaluate()
    assert seen["shape"] == (9, 5)


def test_evaluation_of_a_model_that_always_returns_its_masks_and_maps(tmp_path):
    model = random_scan_model()
    expected = ScanTrainer(model, arguments(tmp_path), eval_dataset=rows(9)).evaluate()
    model.config.output_attentions = model.config.output_hidden_states = True
    found = ScanTrainer(model, arguments(tmp_path), eval_dataset=rows(9)).evaluate()
    assert found["eval_accuracy"] == expected["eval_accuracy"]


def test_rows_whose_label_is_ignored(tmp_path):
    """Neither the loss nor the scores count them; timm cannot mix them."""
    model = random_scan_model()
    ignored = [{**row, "labels": -100} for row in rows(4, seed=2)]
    args = arguments(tmp_path, mixup_alpha=0.5, max_steps=1)
    trainer = ScanTrainer(model, args, train_dataset=[*rows(4), *ignored], eval_dataset=[*rows(4), *ignored])
    scores = trainer.evaluate()
    alone = ScanTrainer(model, arguments(tmp_path), eval_dataset=rows(4)).evaluate()
    assert scores["eval_accuracy"] == alone["eval_accuracy"]
    trainer.train()
