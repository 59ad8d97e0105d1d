"""Labels, teachers and mixed images of a step, and which parameters it trains."""

import pickle

import pytest
import torch
from transformers.utils import logging

from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer
from hf_scan.training.stage_features import extract_stage_features

from ..conftest import random_scan_model
from .samples import arguments, fresh_model, rows


def test_labels_out_of_range(tmp_path):
    dataset = [{**row, "labels": 5} for row in rows(8)]
    with pytest.raises(ValueError, match=r"`labels` holds values from 5 to 5; expected class indices from 0 to 4"):
        ScanTrainer(random_scan_model(), arguments(tmp_path), train_dataset=dataset).train()


def one_loss(tmp_path, model, teacher=None, **settings):
    """The terms of a step as they are logged, the logits and the batch."""
    trainer = ScanTrainer(model, arguments(tmp_path, **settings), train_dataset=rows(8), teacher=teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    with torch.no_grad():
        trainer.compute_loss(model, batch)
    logged = {"loss": 0.0}
    trainer.log(logged)
    return logged, model(batch["pixel_values"]).exit_logits, batch


def test_teachers(tmp_path):
    """The ensemble, a network that is handed over, and one that is named."""
    student, teacher = random_scan_model(), random_scan_model(seed=1)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # the same answers in training as in use
            module.train = lambda mode=True, module=module: module
    teacher.save_pretrained(tmp_path / "teacher")
    named = {"distillation_teacher": str(tmp_path / "teacher")}
    terms = {}
    for name, other, settings in (
        ("ensemble", None, {"distillation_teacher": "ensemble"}),
        ("given", teacher, {}),
        ("named", None, named),
    ):
        terms[name], logits, batch = one_loss(tmp_path, student, other, **settings)
        target = torch.stack(logits).mean(0) if name == "ensemble" else teacher(batch["pixel_values"]).logits
        divergence = torch.nn.functional.kl_div(
            (logits[0] / 3).log_softmax(-1), (target / 3).log_softmax(-1), reduction="batchmean", log_target=True
        )
        assert float(terms[name]["exit_0_soft_label_loss"]) == pytest.approx(float(4.5 * divergence), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_of_other_classes(tmp_path):
    with pytest.raises(ValueError, match="The teacher has 3 classes and the network 5; expected the same"):
        ScanTrainer(random_scan_model(), arguments(tmp_path), teacher=random_scan_model(num_labels=3))


def test_warm_up(tmp_path):
    """Nothing is distilled at first, all of it from the middle of four steps on."""
    trainer = ScanTrainer(
        random_scan_model(), arguments(tmp_path, logging_steps=1, distillation_warmup_steps=0.5), train_dataset=rows(8)
    )
    trainer.train()
    seen = [entry["exit_0_soft_label_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen[0] == 0
    assert all(value > 0 for value in seen[1:])
    trainer.state.global_step = 1
    assert trainer.training_objective.distillation_scale(trainer.state) == 0.5
    trainer.state.global_step = 3
    assert trainer.training_objective.distillation_scale(trainer.state) == 1.0


def test_without_a_hint_nothing_waits_for_its_gradient(tmp_path):
    """Where the deepest feature is the wider one, a projection is there for the hint alone."""
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet50", num_labels=5, image_size=16))
    for hint_weight in (0.0, [1e-4, 0.0, 1e-4]):
        args = arguments(tmp_path, max_steps=1, hint_weight=hint_weight)
        ScanTrainer(model, args, train_dataset=rows(8)).train()
        wanted = [
            parameter.requires_grad for head in model.exit_heads for parameter in head.hint_projection.parameters()
        ]
        assert wanted == ([False] * 6 if hint_weight == 0 else [True, True, False, False, True, True])
        model.zero_grad()
        trainer = ScanTrainer(model, args, train_dataset=rows(8))
        trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_stored_features_are_for_a_frozen_backbone(tmp_path):
    model = random_scan_model()
    features = extract_stage_features(model, rows(4), tmp_path / "features")
    for settings in ({}, {"freeze_backbone": True, "mixup_alpha": 0.2}):
        trainer = ScanTrainer(random_scan_model(), arguments(tmp_path, **settings), train_dataset=features)
        with pytest.raises(ValueError, match="Features of a frozen backbone cannot be mixed"):
            trainer.train()
    part = torch.utils.data.Subset(pickle.loads(pickle.dumps(features)), [0, 2])
    assert len(pickle.dumps(features)) < 1000  # a worker opens the files itself
    scores = ScanTrainer(model, arguments(tmp_path), eval_dataset=part).evaluate()
    images = [rows(4)[index] for index in (0, 2)]
    expected = ScanTrainer(model, arguments(tmp_path), eval_dataset=images).evaluate()
    assert scores["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_mixing(tmp_path, monkeypatch):
    """Pairs are mixed with their labels; the images of an odd last batch, and those of an evaluation, are not."""
    model = random_scan_model()
    args = arguments(tmp_path, cutmix_alpha=1.0, mixup_alpha=0.5, max_steps=-1, num_train_epochs=1)
    trainer = ScanTrainer(model, args, train_dataset=rows(11), eval_dataset=rows(8))
    seen = []
    distillation = trainer.training_objective.distillation
    trainer.training_objective.distillation = lambda logits, features, labels, *rest: (
        seen.append(labels) or distillation(logits, features, labels, *rest)
    )
    trainer.train()
    trainer.evaluate()
    assert [tuple(labels.shape) for labels in seen] == [(8, 5), (3,), (8,)]
    torch.testing.assert_close(seen[0].sum(dim=1), torch.ones(8))
    assert ((seen[0] > 0) & (seen[0] < 1)).any()


def test_freezing_can_be_undone(tmp_path, caplog):
    """First the heads, then all of it; and a trainer says so when it finds the backbone frozen."""
    model = fresh_model()
    ScanTrainer(model, arguments(tmp_path, freeze_backbone=True), train_dataset=rows(8))
    assert model.backbone_frozen
    with caplog.at_level("WARNING"):
        logging.enable_propagation()
        ScanTrainer(model, arguments(tmp_path), train_dataset=rows(8))
        logging.disable_propagation()
    assert "The backbone is frozen and stays so" in caplog.text
    model.freeze_backbone(False)
    model.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_an_exit_that_would_learn_nothing(tmp_path):
    for settings, index in (({"label_weight": [0.5, 0.5, 0.0]}, 2), ({"label_weight": 0, "soft_label_weight": 0}, 0)):
        with pytest.raises(ValueError, match=rf"both 0 for exit {index}, which would learn nothing"):
            ScanTrainer(random_scan_model(), arguments(tmp_path, **settings))
    # A frozen deepest exit learns nothing anyway.
    ScanTrainer(random_scan_model(), arguments(tmp_path, label_weight=[0.5, 0.5, 0.0], freeze_backbone=True))


def test_a_single_image_on_maps_of_a_single_pixel(tmp_path):
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet18", num_labels=5, image_size=16))
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"A batch holds a single image .* Set `dataloader_drop_last`"):
        ScanTrainer(model, args, train_dataset=rows(9)).train()
    args.dataloader_drop_last = True
    ScanTrainer(model, args, train_dataset=rows(9)).train()
