"""Training and calibration with several labels an image."""

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from transformers import Trainer

from hf_scan import (
    ExitMonitor,
    RiskBound,
    ScanConfig,
    ScanForImageClassification,
    ScanTrainer,
    calibrate,
    certify_thresholds,
)
from hf_scan.calibration import ExitTable, collect_exit_logits
from hf_scan.training.baseline import plain_copy
from hf_scan.training.losses import SelfDistillationLoss

from ..conftest import random_scan_model
from .samples import arguments, plain_arguments


SEVERAL = "multi_label_classification"


def rows(count: int, seed: int = 0) -> list[dict]:
    """Images whose labels are the channels that are bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count, 3), generator=generator).float()
    pixels = torch.randn(count, 3, 16, 16, generator=generator) * 0.3 + 3 * labels[:, :, None, None] - 1.5
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels)]


def fresh() -> ScanForImageClassification:
    torch.manual_seed(0)
    return ScanForImageClassification(
        ScanConfig(backbone="cifar_resnet20", num_labels=3, image_size=16, problem_type=SEVERAL)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained network and its scores."""
    model, folder = fresh(), tmp_path_factory.mktemp("run")
    args = arguments(folder, max_steps=60, learning_rate=3e-3)
    trainer = ScanTrainer(model, args, train_dataset=rows(96), eval_dataset=rows(64, seed=1))
    trainer.train()
    return model.eval(), trainer.evaluate()


def test_every_exit_learns_every_label(trained):
    """Of an image, all labels have to be right."""
    model, scores = trained
    pixels = torch.stack([row["pixel_values"] for row in rows(64, seed=1)])
    labels = torch.stack([row["labels"] for row in rows(64, seed=1)])
    with torch.no_grad():
        exit_logits = model(pixels).exit_logits
    for index, logits in enumerate(exit_logits):
        right = ((logits > 0) == (labels == 1)).all(dim=1).float().mean()
        assert scores[f"eval_exit_{index}_accuracy"] == pytest.approx(float(right))
        assert right > 0.5  # one in eight by chance


def test_a_plain_trainer_trains_every_exit(tmp_path):
    model = fresh()
    args = plain_arguments(tmp_path, max_steps=60, learning_rate=3e-3)
    Trainer(model, args, train_dataset=rows(96)).train()
    pixels = torch.stack([row["pixel_values"] for row in rows(64, seed=1)])
    labels = torch.stack([row["labels"] for row in rows(64, seed=1)])
    with torch.no_grad():
        for logits in model.eval()(pixels).exit_logits:
            assert ((logits > 0) == (labels == 1)).float().mean() > 0.9
    assert plain_copy(model).config.problem_type == SEVERAL


def test_thresholds_on_target_with_a_guarantee_and_a_monitor(trained, tmp_path):
    model, _ = trained
    search, others = rows(300, seed=2), rows(300, seed=3)
    table = collect_exit_logits(model, search)
    table.save(tmp_path / "table.safetensors")
    model.exit_config = calibrate(model, ExitTable.load(tmp_path / "table.safetensors"), max_accuracy_drop=2.0)
    found = model.exit_config.search
    pixels = torch.stack([row["pixel_values"] for row in search])
    labels = torch.stack([row["labels"] for row in search])
    answers = model.predict_adaptive(pixels)
    right = ((answers.logits > 0) == (labels == 1)).all(dim=1).float().mean()
    assert found["accuracy"] == pytest.approx(float(right))
    assert found["accuracy"] >= found["baseline_accuracy"] - 0.02
    assert (answers.exit_index < 2).any()
    guaranteed = calibrate(model, search, guarantee=RiskBound(20.0), certify_dataset=others)
    assert guaranteed.criterion == "label_confidence"
    assert certify_thresholds(model, others, RiskBound(20.0)).guarantee["n"] == 300
    monitor = ExitMonitor(model, shadow_every=1)
    monitor.predict(pixels)
    with torch.no_grad():
        deepest = model(pixels).logits
    differing = ((deepest > 0) != (answers.logits > 0)).any(dim=1).sum()
    assert monitor.disagreement().rate == pytest.approx(float(differing) / 300)


def test_labels_to_calibrate_on_that_are_none(trained):
    model, _ = trained
    soft = [{**row, "labels": row["labels"] * 0.5} for row in rows(20)]
    with pytest.raises(ValueError, match="1 for a label that it has and 0 for the others"):
        calibrate(model, soft)
    with pytest.raises(ValueError, match=r"labels of shape \(20,\) for 20 images; expected 3 for each"):
        calibrate(model, [{**row, "labels": 1} for row in rows(20)])
    with pytest.raises(ValueError, match="expected 'label_confidence'"):
        calibrate(model, rows(20), criterion="entropy")


def test_the_loss_by_hand():
    """Binary cross-entropy with labels, and of each label's two probabilities the divergence from the teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator, requires_grad=True) for _ in range(2))
    labels = torch.randint(2, (6, 4), generator=generator).float()
    terms = SelfDistillationLoss(hint_weight=0.0, multi_label=True)([student, teacher], None, labels)
    torch.testing.assert_close(terms["exit_0_label_loss"], 0.5 * bce(student, labels))
    torch.testing.assert_close(terms["exit_1_label_loss"], bce(teacher, labels))
    p, q = (teacher.detach() / 3).sigmoid(), (student / 3).sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(terms["exit_0_soft_label_loss"], 0.5 * 9 * divergence.mean())
    terms["exit_0_soft_label_loss"].backward()
    assert teacher.grad is None
    same = SelfDistillationLoss(multi_label=True)([teacher, teacher], None, labels)
    assert float(same["exit_0_soft_label_loss"].detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("setting", ["mixup_alpha", "cutmix_alpha", "label_smoothing_factor"])
@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible")
def test_settings_for_one_label_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match="is for one label an image"):
        ScanTrainer(fresh(), arguments(tmp_path, **{setting: 0.1}))


def test_names_of_several_labels_are_refused(tmp_path):
    named = [{**row, "labels": ["a", "b"]} for row in rows(8)]
    with pytest.raises(ValueError, match=r"has the labels \['a', 'b'\] for an image; expected one label, or"):
        ScanTrainer(fresh(), arguments(tmp_path), train_dataset=named).train()


def test_a_teacher_and_lists_of_numbers(tmp_path):
    """As Parquet files have them, under `label`."""
    listed = [{"pixel_values": row["pixel_values"], "label": row["labels"].int().tolist()} for row in rows(16)]
    teacher = random_scan_model(num_labels=3, problem_type=SEVERAL)
    trainer = ScanTrainer(fresh(), arguments(tmp_path, max_steps=1), train_dataset=listed, teacher=teacher)
    trainer.train()
    expected = ScanTrainer(fresh(), arguments(tmp_path, max_steps=1), train_dataset=rows(16), teacher=teacher)
    expected.train()
    assert trainer.model.fingerprint() == expected.model.fingerprint()
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
