"""A search for hyper-parameters."""

import numpy as np
import pytest
from optuna.samplers import GridSampler
from transformers import TrainerCallback

from hf_scan import ScanTrainer

from .samples import arguments, fresh_model, rows


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
    assert trainer.training_objective.mixup is not None
    with pytest.raises(ValueError, match=r"changes \['soft_label_weight'\], and with it the loss"):
        search(tmp_path, weights)
    with pytest.raises(ValueError, match=r"changes \['distillation_preset'\], which is read before trials begin"):
        search(tmp_path, lambda trial: {**learning_rates(trial), "distillation_preset": "successor"})


def test_a_search_without_an_objective(tmp_path):
    with pytest.raises(ValueError, match=r"`direction` is 'maximize' without a `compute_objective`; expected one of"):
        search(tmp_path, learning_rates, compute_metrics=lambda _: {}, direction="maximize")
    with pytest.raises(ValueError, match=r"`direction` is \['minimize', 'maximize'\] without a `compute_objective`"):
        search(tmp_path, learning_rates, direction=["minimize", "maximize"])
