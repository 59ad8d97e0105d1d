import copy

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, EarlyStoppingCallback, Trainer, TrainingArguments

from hf_scan import ExitConfig, ScanForImageClassification, ScanTrainer, calibrate
from hf_scan.training.stage_features import extract_stage_features

from ..conftest import random_scan_model, torchrun
from .samples import arguments, fresh_model, plain_arguments, rows


def test_every_parameter_is_trained_and_every_term_logged(tmp_path):
    model = random_scan_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = ScanTrainer(model, arguments(tmp_path, learning_rate=0.1, optim="sgd"), train_dataset=rows(32))
    trainer.train()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    terms = {f"exit_{i}_{kind}_loss" for i in (0, 1) for kind in ("label", "soft_label", "hint")} | {
        "exit_2_label_loss"
    }
    for entry in logs:
        assert {name for name in entry if name.startswith("exit_")} == terms
        # The terms are what the loss is made of.
        assert sum(entry[name] for name in terms) == pytest.approx(entry["loss"], rel=1e-3)


def test_it_learns(tmp_path):
    model = fresh_model()
    args = arguments(tmp_path, max_steps=40, learning_rate=3e-3, per_device_eval_batch_size=7)
    trainer = ScanTrainer(model, args, train_dataset=rows(64), eval_dataset=rows(33, seed=1))
    trainer.train()
    scores = trainer.evaluate()
    assert all(scores[f"eval_exit_{index}_accuracy"] > 0.8 for index in range(3))
    assert scores["eval_accuracy"] == scores["eval_exit_2_accuracy"]
    assert "eval_adaptive_accuracy" not in scores


@pytest.mark.parametrize("scan", [True, False])
def test_gradients_do_not_depend_on_accumulation(tmp_path, scan):
    """Eight images at once, or two by two with the gradients added up; frozen statistics, or they would differ."""
    norms = []
    for batch_size, steps in ((8, 1), (2, 4)):
        model = random_scan_model()
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            logging_steps=1,
            max_grad_norm=1e9,
        )
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
        # Then the Trainer scales only as the flag tells it to.
        model.accepts_loss_kwargs = scan
        trainer = (ScanTrainer if scan else Trainer)(model, args, train_dataset=rows(8))
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_plain_trainer_trains_every_exit(tmp_path):
    model = fresh_model()
    args = TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=3e-3, use_cpu=True, disable_tqdm=True, report_to=[]
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(64),
        eval_dataset=rows(33, seed=1),
        compute_metrics=lambda p: {"accuracy": np.mean(p.predictions.argmax(-1) == p.label_ids)},
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.8
    out = model.eval()(torch.stack([row["pixel_values"] for row in rows(33, seed=1)]))
    labels = torch.tensor([row["labels"] for row in rows(33, seed=1)])
    assert all((logits.argmax(-1) == labels).float().mean() > 0.8 for logits in out.exit_logits)


@pytest.mark.parametrize("name", ["label_smoothing_factor", "compute_loss_func"])
def test_a_plain_trainer_whose_loss_reaches_no_early_exit(tmp_path, name):
    """Both compute a loss of `logits` in place of the model's."""
    smoothed = name == "label_smoothing_factor"
    args = plain_arguments(tmp_path, **({name: 0.1} if smoothed else {}))
    kwargs = {} if smoothed else {name: lambda out, labels, **_: torch.nn.functional.cross_entropy(out.logits, labels)}
    with pytest.raises(ValueError, match="reached the deepest exit only, so no early exit was trained"):
        Trainer(fresh_model(), args, train_dataset=rows(16), **kwargs).train()


def test_own_losses_of_every_exit_or_of_the_deepest_on_purpose(tmp_path):
    def joined(out, labels, num_items_in_batch=None):
        return sum(torch.nn.functional.cross_entropy(logits, labels) for logits in out.exit_logits)

    Trainer(fresh_model(), plain_arguments(tmp_path), train_dataset=rows(16), compute_loss_func=joined).train()
    model = fresh_model()
    model.exit_heads.requires_grad_(False)
    before = model.backbone.conv1.weight.clone()
    Trainer(model, plain_arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows(16)).train()
    assert not torch.equal(model.backbone.conv1.weight, before)


def test_what_is_saved_is_a_whole_checkpoint(tmp_path):
    model = random_scan_model()
    trainer = ScanTrainer(
        model, arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), train_dataset=rows(16)
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    loaded = ScanForImageClassification.from_pretrained(checkpoint)
    assert AutoImageProcessor.from_pretrained(checkpoint).size["shortest_edge"] == 16
    pixels = torch.stack([row["pixel_values"] for row in rows(4)])
    assert torch.equal(loaded(pixels).logits, copy.deepcopy(model).eval()(pixels).logits)


def test_training_drops_thresholds_found_for_other_weights(tmp_path):
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5], fallback="deepest")
    ScanTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(8)).train()
    assert model.exit_config.replace(trained_on=None) == ExitConfig(fallback="deepest")


def test_what_was_trained_on_is_remembered_and_refused(tmp_path):
    """After a round trip too, for a part of the images, and whatever their order."""
    model = random_scan_model()
    images = rows(60)
    ScanTrainer(model, arguments(tmp_path / "run", max_steps=1), train_dataset=images).train()
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"was trained on the 'search' split, or a part of it: 20 images .* of 20 "):
        calibrate(loaded, images[40:20:-1], max_accuracy_drop=1.0)
    assert calibrate(loaded, rows(60, seed=1), max_accuracy_drop=1.0).trained_on == loaded.exit_config.trained_on


def test_a_push_in_training_takes_the_exit_config_along(tmp_path, monkeypatch):
    trainer = ScanTrainer(random_scan_model(), arguments(tmp_path))
    ExitConfig(thresholds=[0.5, 0.5]).save_pretrained(tmp_path / "checkpoint-1")
    seen = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *_: seen.extend(f.name for f in tmp_path.iterdir()))
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert "exit_config.json" in seen


@pytest.mark.parametrize(
    ("kwargs", "settings", "message"),
    [
        ({"compute_loss_func": print}, {}, "would take the place of self-distillation"),
        ({}, {"batch_eval_metrics": True}, "needs a `compute_metrics` that adds up batches"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(tmp_path, kwargs, settings, message):
    with pytest.raises(ValueError, match=message):
        ScanTrainer(random_scan_model(), arguments(tmp_path, **settings), **kwargs)


def test_arguments_of_a_plain_trainer_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="`args` is a TrainingArguments; expected `ScanTrainingArguments`"):
        ScanTrainer(random_scan_model(), args, train_dataset=rows(8))


def test_a_frozen_backbone_answers_as_before(tmp_path):
    """To the bit, batch norm statistics included; the heads learn."""
    model = fresh_model().eval()
    plain = copy.deepcopy(model.backbone)
    pixels = torch.stack([row["pixel_values"] for row in rows(8)])
    before = model(pixels)
    args = arguments(tmp_path, freeze_backbone=True, max_steps=40, learning_rate=3e-3)
    ScanTrainer(model, args, train_dataset=rows(64)).train()
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.state_dict().values(), plain.state_dict().values()))
    assert torch.equal(model(pixels).logits, plain(pixels))
    labels = torch.tensor([row["labels"] for row in rows(8)])
    for now, then in zip(model(pixels).exit_logits[:-1], before.exit_logits[:-1]):
        now, then = (torch.nn.functional.cross_entropy(logits, labels) for logits in (now, then))
        assert now < 0.9 * then


def test_training_on_stored_features_is_training_on_images(tmp_path):
    """A frozen stage gives the same in every epoch: weights end up the same, to rounding."""
    heads, scores = [], []
    for stored in (False, True):
        model = random_scan_model()
        dataset = rows(24)
        if stored:
            dataset = extract_stage_features(model, dataset, tmp_path / "features")
            assert len(dataset) == 24
        args = arguments(tmp_path, freeze_backbone=True, learning_rate=0.01, optim="sgd")
        trainer = ScanTrainer(model, args, train_dataset=dataset, eval_dataset=dataset)
        trainer.train()
        scores.append(trainer.evaluate())
        heads.append(model.exit_heads.state_dict())
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-5)
    assert scores[0]["eval_exit_0_accuracy"] == scores[1]["eval_exit_0_accuracy"]


def test_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    """The disk fills up while the optimizer is saved: what was half written goes, what was whole stays."""
    model = random_scan_model()
    trainer = ScanTrainer(model, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=rows(16))
    save = torch.save

    def full_disk(thing, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")
        save(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .* resumed from .*checkpoint-2\."):
        trainer.train()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    ScanTrainer(model, trainer.args, train_dataset=rows(16)).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )


def test_two_processes_take_the_step_of_one_with_the_joined_batch(tmp_path):
    """Started with torchrun; each has four of the eight images, and no unused parameter is searched for."""
    gradients, averages = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        log = torchrun("tests.training.gradients_of_a_step", folder, processes, processes=processes)
        assert "find_unused_parameters" not in log
        gradients.append(torch.load(folder / "gradients.pt"))
        averages.append(torch.load(folder / "averages.pt"))
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-4, atol=1e-6)
    for method, of_one in gradients[0].items():
        for name, one in of_one.items():
            assert one.norm() > 0, (method, name)
            assert (gradients[1][method][name] - one).norm() < 1e-5 * one.norm(), (method, name)


def test_a_sharded_network_has_the_same_gradients():
    """PyTorch's own sharding, batch norm included. Accelerate shards on accelerators only."""
    assert (
        torchrun("tests.training.gradients_when_sharded").count("the same gradients, and a step in training mode") == 2
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"dataloader_drop_last": True},
        {"label_smoothing_factor": 0.1},
        {"activation_checkpointing": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_trainer_can_do_else(tmp_path, settings):
    """An epoch whose last batch is smaller; compiled, it is the same run."""
    if "activation_checkpointing" in settings and not hasattr(TrainingArguments, "activation_checkpointing"):
        settings = {"gradient_checkpointing": True}
    losses = []
    for given in ({}, settings):
        args = arguments(tmp_path, max_steps=-1, num_train_epochs=1, logging_steps=1, **given)
        trainer = ScanTrainer(fresh_model(), args, train_dataset=rows(20), eval_dataset=rows(8))
        trainer.train()
        assert trainer.evaluate()["eval_accuracy"] >= 0
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    plain, found = losses
    assert len(found) == (2 if "dataloader_drop_last" in settings else 3)
    if "label_smoothing_factor" in settings:
        assert found[0] != pytest.approx(plain[0], rel=1e-3)
    else:
        assert found == pytest.approx(plain[: len(found)], rel=1e-3)


def test_a_model_made_anew_is_set_up_as_one_that_is_given(tmp_path):
    args = arguments(tmp_path, freeze_backbone=True, max_steps=1)
    trainer = ScanTrainer(args=args, model_init=fresh_model, train_dataset=rows(8))
    trainer.train()
    assert trainer.model.backbone_frozen
    weights = fresh_model().backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.backbone.state_dict().items())


@pytest.mark.parametrize("error", [OSError("the Hub is away"), RuntimeError("Connection closed by peer")])
def test_other_errors_while_saving_are_left_alone(tmp_path, monkeypatch, error):
    """A push that fails after the checkpoint was written, say: the checkpoint stays."""
    trainer = ScanTrainer(
        random_scan_model(), arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=rows(16)
    )

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", fail)  # which comes last
    with pytest.raises(type(error), match=str(error)):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_early_stopping(tmp_path):
    """Nothing is learned with a rate of 0, so that training stops after the patience, with the best weights."""
    args = arguments(
        tmp_path,
        max_steps=20,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_exit_0_accuracy",
    )
    model = random_scan_model()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
    trainer = ScanTrainer(
        model,
        args,
        train_dataset=rows(16),
        eval_dataset=rows(16),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.best_global_step == 1
