import copy
import pickle

import numpy as np
import pytest
import torch
from optuna.samplers import GridSampler
from transformers import AutoImageProcessor, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_scan import (
    ExitConfig,
    ScanConfig,
    ScanForImageClassification,
    ScanTrainer,
    ScanTrainingArguments,
    calibrate,
)
from hf_scan.training.stage_features import extract_stage_features

from ..conftest import random_scan_model, torchrun


def rows(count: int, seed: int = 0) -> list[dict]:
    """Images whose class can be seen: its colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    pixels += torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(9))[labels] * 3
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels)]


def fresh_model() -> ScanForImageClassification:
    torch.manual_seed(0)
    return ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=5, image_size=16))


def arguments(tmp_path, **kwargs) -> ScanTrainingArguments:
    kwargs = {"max_steps": 4, "per_device_train_batch_size": 8, "logging_steps": 2, "save_strategy": "no", **kwargs}
    return ScanTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], **kwargs)


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


def plain_arguments(tmp_path, **kwargs) -> TrainingArguments:
    kwargs = {"max_steps": 3, "save_strategy": "no", **kwargs}
    return TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], **kwargs)


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


@pytest.mark.parametrize("setting", [{"neftune_noise_alpha": 5.0}, {"use_liger_kernel": True}])
def test_settings_of_language_models(tmp_path, setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` is for language models"):
        arguments(tmp_path, **setting)


def test_own_metrics_get_the_array_of_logits(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {}

    ScanTrainer(
        random_scan_model(), arguments(tmp_path), eval_dataset=rows(9), compute_metrics=compute_metrics
    ).evaluate()
    assert seen["shape"] == (9, 5)


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


def test_labels_out_of_range(tmp_path):
    dataset = [{**row, "labels": 5} for row in rows(8)]
    with pytest.raises(ValueError, match=r"`labels` holds values from 5 to 5; expected class indices from 0 to 4"):
        ScanTrainer(random_scan_model(), arguments(tmp_path), train_dataset=dataset).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_weight", -1.0),
        ("soft_label_weight", float("nan")),
        ("hint_weight", -1e-9),
        ("distillation_temperature", 0.0),
        ("distillation_temperature", float("inf")),
        ("label_weight", float("inf")),
        ("mixup_alpha", float("nan")),
        ("cutmix_alpha", float("inf")),
        ("distillation_warmup_steps", float("nan")),
        ("label_smoothing_factor", -0.1),
        ("label_smoothing_factor", float("nan")),
    ],
)
def test_bad_weights(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected (a number|numbers)"):
        arguments(tmp_path, **{name: value})


def test_presets_and_what_is_given_in_their_place(tmp_path):
    args = arguments(tmp_path)
    assert (args.label_weight, args.soft_label_weight, args.hint_weight) == ([0.5], [0.5], [6.4e-5])
    args = arguments(tmp_path, distillation_preset="successor", label_weight=0.9)
    assert (args.label_weight, args.soft_label_weight, args.hint_weight) == ([0.9], [0.3], [0.0])
    assert not args.scale_by_temperature
    with pytest.raises(ValueError, match=r"`distillation_preset` is 'best'; expected one of \['paper', 'successor'\]"):
        arguments(tmp_path, distillation_preset="best")
    with pytest.raises(ValueError, match=r"`soft_label_weight` is .*, 5 weights; the network has 3 exits"):
        ScanTrainer(random_scan_model(), arguments(tmp_path, soft_label_weight=[0.1] * 5))


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
    assert trainer._distillation_scale() == 0.5
    trainer.state.global_step = 3
    assert trainer._distillation_scale() == 1.0


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


def test_a_loss_that_is_not_finite_stops_before_weights_move(tmp_path):
    model = random_scan_model()
    with torch.no_grad():
        model.exit_heads[1].classifier.fc.weight[0, 0] = torch.inf
    before = model.backbone.conv1.weight.clone()
    trainer = ScanTrainer(model, arguments(tmp_path, learning_rate=1.0, optim="sgd"), train_dataset=rows(8))
    with pytest.raises(FloatingPointError, match=r"`exit_1_label_loss` is not finite at step 1; training stops"):
        trainer.train()
    assert torch.equal(model.backbone.conv1.weight, before)


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
    distillation = trainer.distillation
    trainer.distillation = lambda logits, features, labels, *rest: (
        seen.append(labels) or distillation(logits, features, labels, *rest)
    )
    trainer.train()
    trainer.evaluate()
    assert [tuple(labels.shape) for labels in seen] == [(8, 5), (3,), (8,)]
    torch.testing.assert_close(seen[0].sum(dim=1), torch.ones(8))
    assert ((seen[0] > 0) & (seen[0] < 1)).any()


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha", "distillation_warmup_steps"])
def test_bad_numbers(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1.0; expected a number"):
        arguments(tmp_path, **{name: -1.0})


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
    for name, one in gradients[0].items():
        assert one.norm() > 0
        assert (gradients[1][name] - one).norm() < 1e-5 * one.norm(), name


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


def test_a_model_made_anew_is_set_up_as_one_that_is_given(tmp_path):
    args = arguments(tmp_path, freeze_backbone=True, max_steps=1)
    trainer = ScanTrainer(args=args, model_init=fresh_model, train_dataset=rows(8))
    trainer.train()
    assert trainer.model.backbone_frozen
    weights = fresh_model().backbone.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.backbone.state_dict().items())


def test_an_exit_that_would_learn_nothing(tmp_path):
    for settings, index in (({"label_weight": [0.5, 0.5, 0.0]}, 2), ({"label_weight": 0, "soft_label_weight": 0}, 0)):
        with pytest.raises(ValueError, match=rf"both 0 for exit {index}, which would learn nothing"):
            ScanTrainer(random_scan_model(), arguments(tmp_path, **settings))
    # A frozen deepest exit learns nothing anyway.
    ScanTrainer(random_scan_model(), arguments(tmp_path, label_weight=[0.5, 0.5, 0.0], freeze_backbone=True))


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


def test_terms_of_a_run_are_its_own(tmp_path):
    """A run that ended between two logs leaves nothing to the next."""
    trainer = ScanTrainer(random_scan_model(), arguments(tmp_path, max_steps=3), train_dataset=rows(16))
    trainer.train()
    assert trainer._term_steps == 1
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    terms = sum(value for name, value in first.items() if name.startswith("exit_"))
    assert terms == pytest.approx(first["loss"], rel=1e-3)


def test_a_single_image_on_maps_of_a_single_pixel(tmp_path):
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet18", num_labels=5, image_size=16))
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"A batch holds a single image .* Set `dataloader_drop_last`"):
        ScanTrainer(model, args, train_dataset=rows(9)).train()
    args.dataloader_drop_last = True
    ScanTrainer(model, args, train_dataset=rows(9)).train()


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


def search(tmp_path, space, compute_metrics=None, callbacks=None, **kwargs):
    args = arguments(tmp_path, max_steps=20, eval_strategy="steps", eval_steps=20)
    trainer = ScanTrainer(
        args=args,
        model_init=fresh_model,
        train_dataset=rows(64),
        eval_dataset=rows(32, seed=1),
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )
    rates = {"sampler": GridSampler({"learning_rate": [1e-7, 3e-3]})}
    return trainer, trainer.hyperparameter_search(space, n_trials=2, backend="optuna", **rates, **kwargs)


def learning_rates(trial) -> dict:
    return {"learning_rate": trial.suggest_float("learning_rate", 0, 1)}


class Evaluations(TrainerCallback):
    """Keeps the learning rate and the metrics of each evaluation."""

    def __init__(self):
        self.seen = {}

    def on_evaluate(self, args, state, control, metrics, **_):
        self.seen[args.learning_rate] = metrics


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_objective_of_a_search_fits_its_direction(tmp_path, direction):
    """Transformers' own is the sum of accuracies in both, which is minimised by default: a search for the worst."""
    evaluations = Evaluations()
    given = {} if direction == "minimize" else {"direction": direction}
    _, best = search(tmp_path, learning_rates, callbacks=[evaluations], **given)
    if direction == "minimize":
        values = {rate: metrics["eval_loss"] for rate, metrics in evaluations.seen.items()}
        expected = min(values, key=values.__getitem__)
    else:
        names = [f"eval_exit_{index}_accuracy" for index in range(3)]
        values = {rate: np.mean([metrics[name] for name in names]) for rate, metrics in evaluations.seen.items()}
        expected = max(values, key=values.__getitem__)
    assert len(values) == 2
    assert best.hyperparameters == {"learning_rate": expected}
    assert best.objective == pytest.approx(values[expected])


def test_a_search_over_weights_of_the_loss(tmp_path):
    """As numbers. Its values cannot be compared then, and mixing belongs to the trial."""

    def weights(trial):
        return {**learning_rates(trial), "soft_label_weight": 0.25, "mixup_alpha": 0.5}

    trainer, best = search(tmp_path, weights, direction="maximize")
    assert best.hyperparameters == {"learning_rate": 3e-3}
    assert trainer.distillation.soft_label_weight == [0.25]
    assert trainer._mixup is not None
    with pytest.raises(ValueError, match=r"changes \['soft_label_weight'\], and with it the loss"):
        search(tmp_path, weights)
    with pytest.raises(ValueError, match=r"changes \['distillation_preset'\], which is read before trials begin"):
        search(tmp_path, lambda trial: {**learning_rates(trial), "distillation_preset": "successor"})


def test_a_search_without_an_objective(tmp_path):
    with pytest.raises(ValueError, match=r"`direction` is 'maximize' without a `compute_objective`; expected one of"):
        search(tmp_path, learning_rates, compute_metrics=lambda _: {}, direction="maximize")
    with pytest.raises(ValueError, match=r"`direction` is \['minimize', 'maximize'\] without a `compute_objective`"):
        search(tmp_path, learning_rates, direction=["minimize", "maximize"])
