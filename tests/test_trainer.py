import copy

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, Trainer, TrainingArguments

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments

from .conftest import random_scan_model


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
    assert model.exit_config == ExitConfig(fallback="deepest")


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
    ],
)
def test_bad_weights(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected a number"):
        arguments(tmp_path, **{name: value})
