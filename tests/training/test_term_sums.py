"""Terms of the loss between two logs."""

import pytest
import torch

from hf_scan import ScanTrainer

from ..conftest import random_scan_model
from .samples import arguments, rows


def test_a_loss_that_is_not_finite_stops_before_weights_move(tmp_path):
    model = random_scan_model()
    with torch.no_grad():
        model.exit_heads[1].classifier.fc.weight[0, 0] = torch.inf
    before = model.backbone.conv1.weight.clone()
    trainer = ScanTrainer(model, arguments(tmp_path, learning_rate=1.0, optim="sgd"), train_dataset=rows(8))
    with pytest.raises(FloatingPointError, match=r"`exit_1_label_loss` is not finite at step 1; training stops"):
        trainer.train()
    assert torch.equal(model.backbone.conv1.weight, before)


def test_terms_of_a_run_are_its_own(tmp_path):
    """A run that ended between two logs leaves nothing to the next."""
    trainer = ScanTrainer(random_scan_model(), arguments(tmp_path, max_steps=3), train_dataset=rows(16))
    trainer.train()
    assert trainer._terms.steps == 1
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    terms = sum(value for name, value in first.items() if name.startswith("exit_"))
    assert terms == pytest.approx(first["loss"], rel=1e-3)
