"""The averages of weights: what is evaluated, saved and resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TimmWrapperForImageClassification, Trainer, TrainerCallback, TrainerControl, TrainerState

from hf_scan import EmaCallback, ScanForImageClassification, ScanTrainer
from hf_scan.training.baseline import plain_copy
from hf_scan.training.ema import TRAINED_WEIGHTS_NAME

from ..conftest import random_scan_model
from .samples import arguments, plain_arguments, rows


class Recorder(TrainerCallback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **_):
        self.weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def train(folder, *callbacks, resume=None, **settings) -> ScanTrainer:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **settings}
    args = arguments(folder, learning_rate=0.005, eval_strategy="steps", eval_steps=2, **settings)
    trainer = ScanTrainer(
        random_scan_model(), args, train_dataset=rows(40), eval_dataset=rows(16, seed=1), callbacks=[*callbacks]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run's folder, its trainer when it has ended, and the weights after each step."""
    folder, recorder = tmp_path_factory.mktemp("averaged"), Recorder()
    return folder, train(folder, recorder, EmaCallback(decay=0.6, use_warmup=False)), recorder.weights


def test_averages_are_evaluated_and_saved_and_the_training_is_as_without(averaged, tmp_path):
    folder, trainer, weights = averaged
    expected = weights[0]
    for step, trained in enumerate(weights[1:], start=2):
        for name, tensor in trained.items():
            average = expected[name]
            expected[name] = 0.6 * average + 0.4 * tensor if tensor.is_floating_point() else tensor
        if step in (2, 4):
            saved = ScanForImageClassification.from_pretrained(folder / f"checkpoint-{step}")
            torch.testing.assert_close(saved.state_dict(), expected)
            scores = ScanTrainer(saved, trainer.args, eval_dataset=trainer.eval_dataset).evaluate()
            logged = next(
                entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step
            )
            assert logged["eval_loss"] == scores["eval_loss"]
    torch.testing.assert_close(trainer.model.state_dict(), expected)  # when training has ended
    recorder = Recorder()
    without = train(tmp_path, recorder)
    assert all(torch.equal(weights[3][name], tensor) for name, tensor in recorder.weights[3].items())
    assert without.model.fingerprint() != trainer.model.fingerprint()
    trained = load_file(folder / "checkpoint-4" / TRAINED_WEIGHTS_NAME)
    assert all(torch.equal(trained[name], tensor) for name, tensor in without.model.state_dict().items())


def test_a_resumed_run_ends_as_the_whole_one(averaged, tmp_path):
    folder, trainer, _ = averaged
    callback = EmaCallback(decay=0.6, use_warmup=False)
    again = train(tmp_path, callback, resume=str(folder / "checkpoint-2"))
    assert again.model.fingerprint() == trainer.model.fingerprint()


def test_a_resume_without_the_averages_or_without_the_trained_weights(averaged, tmp_path):
    folder, _, _ = averaged
    with pytest.raises(ValueError, match=r"holds averages of weights, of a run with `EmaCallback`"):
        train(tmp_path / "without", resume=str(folder / "checkpoint-2"))
    train(tmp_path / "plain", max_steps=2)
    with pytest.raises(OSError, match=rf"cannot be read from .*checkpoint-2/{TRAINED_WEIGHTS_NAME}"):
        train(tmp_path / "with", EmaCallback(), resume=str(tmp_path / "plain/checkpoint-2"))
    record = json.loads((folder / "checkpoint-2/checkpoint.json").read_text())
    assert TRAINED_WEIGHTS_NAME in record["files"]  # a damaged one is found like any other


def test_the_best_averages_are_left_in_the_network(tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 6}
    trainer = train(tmp_path, EmaCallback(), **settings)
    best = ScanForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert trainer.model.fingerprint() == best.fingerprint()


def test_a_stock_trainer(tmp_path):
    """Resumed as it began: the folder is found by the arguments."""
    weights = {}
    for name, resumed in (("whole", False), ("resumed", True)):
        args = plain_arguments(tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
        callbacks = [EmaCallback(decay=0.5, use_warmup=False)]
        trainer = Trainer(plain_copy(random_scan_model()), args, train_dataset=rows(40), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2") if resumed else None)
        weights[name] = trainer.model.state_dict()
    saved = TimmWrapperForImageClassification.from_pretrained(tmp_path / "run/checkpoint-4").state_dict()
    for name, tensor in weights["whole"].items():
        assert torch.equal(weights["resumed"][name], tensor)
        assert torch.equal(saved[name], tensor)


def test_another_callback_behind_it_that_asks_for_a_checkpoint(tmp_path):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = True

    settings = {"max_steps": 2, "save_strategy": "no"}
    train(tmp_path / "before", Saves(), EmaCallback(), **settings)
    assert (tmp_path / "before/checkpoint-1" / TRAINED_WEIGHTS_NAME).is_file()
    with pytest.raises(RuntimeError, match="Give `EmaCallback` as the last of `callbacks`"):
        train(tmp_path / "behind", EmaCallback(), Saves(), **settings)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=f"`decay` is {decay}; expected a number of at least 0 and below 1"):
        EmaCallback(decay=decay)


def test_jit_checkpoints_are_refused(tmp_path):
    if not hasattr(plain_arguments(tmp_path), "enable_jit_checkpoint"):
        pytest.skip("this version of Transformers has no such checkpoints")
    args = plain_arguments(tmp_path, enable_jit_checkpoint=True)
    with pytest.raises(ValueError, match="`enable_jit_checkpoint` would write checkpoints without the averages"):
        EmaCallback().on_train_begin(args, TrainerState(), TrainerControl(), model=random_scan_model())
