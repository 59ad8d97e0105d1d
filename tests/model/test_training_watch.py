"""Training loops that know nothing of early exits."""

import pytest
import torch

from hf_scan import ExitConfig
from hf_scan.model.training_watch import UNRECORDED, watch_training


class Network(torch.nn.Module):
    """What is watched of a network."""

    def __init__(self):
        super().__init__()
        self.exit_heads = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
        self.exit_config = ExitConfig()
        self.exits_reached: set[int] = set()
        self.training_recorded = False

    def forward(self) -> list[torch.Tensor]:
        logits = [torch.ones(1, 2, requires_grad=True) * 2 for _ in range(2)]
        watch_training(self, logits)
        return logits


def test_exits_that_a_gradient_reaches_are_noted():
    network = Network()
    logits = network()
    assert network.exits_reached == set()
    sum(part.sum() for part in logits).backward()
    assert network.exits_reached == {0, 1}
    assert network.exit_config.trained_on == UNRECORDED
    network()[0].sum().backward()  # once is enough
    assert network.exit_config.trained_on == UNRECORDED


def test_a_loss_of_the_deepest_exit_alone_is_an_error_at_the_next_step():
    network = Network()
    network()[1].sum().backward()
    with pytest.raises(ValueError, match="reached the deepest exit only, so no early exit was trained"):
        network()
    network.exit_heads.requires_grad_(False)  # on purpose
    for _ in range(2):
        network()[1].sum().backward()


def test_a_trainer_that_records_its_images_is_not_noted():
    network = Network()
    network.training_recorded = True
    network()[0].sum().backward()
    assert network.exit_config.trained_on is None
