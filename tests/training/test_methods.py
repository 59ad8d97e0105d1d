import copy

import pytest
import torch
import torch.nn.functional as F

from hf_scan import ScanTrainer
from hf_scan.model.stages import parameters_by_stage
from hf_scan.training.losses import SelfDistillationLoss
from hf_scan.training.methods import gradient_equilibrium, survivor_weights

from ..conftest import random_scan_model
from .samples import arguments, fresh_model, rows


def gradients(model, losses):
    """The gradient of each stage's parameters, for each loss."""

    def of(parameter):
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    found = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        stages = parameters_by_stage(model.backbone, model.stages)
        found.append([[of(parameter) for parameter in stage.values()] for stage in stages])
    return found


def test_a_stage_gets_the_mean_of_the_gradients_of_the_exits_after_it():
    model = random_scan_model().double().train()  # in which sums of gradients are exact enough to compare
    images, labels = torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, model.num_labels, (6,))
    losses = [F.cross_entropy(logits, labels) for logits in model(images).exit_logits]
    each = gradients(model, losses)
    head = next(model.exit_heads[0].parameters())
    with gradient_equilibrium(model):
        [balanced] = gradients(model, [sum(losses)])
        of_head = head.grad.clone()
    [summed] = gradients(model, [sum(losses)])
    assert torch.equal(of_head, head.grad)  # heads keep theirs
    for index, stage in enumerate(balanced):
        for place, found in enumerate(stage):
            expected = torch.stack([one[index][place] for one in each[index:]]).mean(dim=0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            # After the context, gradients are sums again.
            whole = expected * (model.num_exits - index)
            torch.testing.assert_close(summed[index][place], whole, rtol=1e-4, atol=1e-6)


def test_samples_that_leave_earlier_count_less():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    first, second, third = survivor_weights([probabilities.log()] * 3)
    assert first.tolist() == [1.0, 1.0, 1.0]
    survives = torch.tensor([0.1, 0.4, 0.5])
    sure = torch.tensor([[200.0, 0.0], [200.0, 0.0]])  # of a confidence of exactly 1.0
    assert survivor_weights([sure] * 3)[2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(second, survives / survives.mean())
    torch.testing.assert_close(third, survives**2 / (survives**2).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_samples_repeat_them(smoothing):
    """A sample of twice the weight counts as two, in the labels' term and the teacher's."""
    loss = SelfDistillationLoss(hint_weight=0.0, label_smoothing=smoothing)
    logits, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([1, 4, 0])
    weighted = loss([logits, teacher], None, labels, sample_weights=[torch.tensor([0.75, 1.5, 0.75]), torch.ones(3)])
    again = torch.tensor([0, 1, 1, 2])
    repeated = loss([logits[again], teacher[again]], None, labels[again])
    for name in ("exit_0_label_loss", "exit_0_soft_label_loss"):
        torch.testing.assert_close(weighted[name], repeated[name])
    plain = loss([logits, teacher], None, labels)
    ones = loss([logits, teacher], None, labels, sample_weights=[torch.ones(3)] * 2)
    for name, term in plain.items():
        torch.testing.assert_close(ones[name], term)


def test_ignored_labels_count_in_no_weighted_mean():
    loss = SelfDistillationLoss(soft_label_weight=0.0, hint_weight=0.0)
    logits, labels = torch.randn(4, 5), torch.tensor([1, -100, 0, 2])
    ones = loss([logits] * 2, None, labels, sample_weights=[torch.ones(4)] * 2)
    torch.testing.assert_close(ones["exit_0_label_loss"], loss([logits] * 2, None, labels)["exit_0_label_loss"])


def states(model):
    own = {name: value.clone() for name, value in model.state_dict().items()}
    heads = {name: value for name, value in own.items() if name.startswith("exit_heads")}
    return heads, {name: value for name, value in own.items() if name not in heads}


def test_the_backbone_trains_alone_first(tmp_path):
    """As a plain network does, with weight decay; the heads stay as they are, running means included."""
    model = random_scan_model()
    heads, backbone = states(model)
    settings = {"max_steps": 4, "weight_decay": 0.1, "save_strategy": "no"}
    trained = copy.deepcopy(model)
    ScanTrainer(trained, arguments(tmp_path, backbone_steps=4, **settings), train_dataset=rows(8)).train()
    heads_after, backbone_after = states(trained)
    assert all(torch.equal(value, heads_after[name]) for name, value in heads.items())
    assert any(not torch.equal(value, backbone_after[name]) for name, value in backbone.items())
    # Half of the steps: then the heads train too.
    joint = copy.deepcopy(model)
    trainer = ScanTrainer(joint, arguments(tmp_path, backbone_steps=0.5, **settings), train_dataset=rows(8))
    trainer.train()
    assert any(not torch.equal(value, states(joint)[0][name]) for name, value in heads.items())


def test_heads_have_a_learning_rate_of_their_own(tmp_path):
    """In one step of gradient descent, each parameter moves by its own rate times its gradient."""
    model = fresh_model()
    moves = {}
    for rate in (None, 0.5):
        trained = copy.deepcopy(model)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        args = arguments(tmp_path, head_learning_rate=rate, lr_scheduler_type="constant", **settings)
        trainer = ScanTrainer(trained, args, train_dataset=rows(8))
        trainer.train()
        groups = trainer.optimizer.param_groups
        held = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(held) == sorted(id(parameter) for parameter in trained.parameters())  # each once
        before = dict(model.named_parameters())
        moves[rate] = {name: value.detach() - before[name].detach() for name, value in trained.named_parameters()}
    for name, move in moves[0.5].items():
        times = 5 if name.startswith("exit_heads") else 1
        torch.testing.assert_close(move, times * moves[None][name], rtol=1e-3, atol=1e-6)


METHODS = {
    "gradient_equilibrium": True,
    "survivor_weighting": True,
    "backbone_steps": 2,
    "head_learning_rate": 0.01,
}


@pytest.mark.parametrize("name", METHODS)
def test_resumed_it_ends_at_the_same_weights(tmp_path, name):
    model = random_scan_model()
    settings = {"save_steps": 3, "save_strategy": "steps", name: METHODS[name]}
    whole = copy.deepcopy(model)
    ScanTrainer(whole, arguments(tmp_path / "whole", max_steps=6, **settings), train_dataset=rows(16)).train()
    again = copy.deepcopy(model)
    resumed = ScanTrainer(again, arguments(tmp_path / "whole", max_steps=6, **settings), train_dataset=rows(16))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_each_method_changes_what_is_trained(tmp_path):
    model = fresh_model()
    ends = {}
    for name, value in {"": None, **METHODS}.items():
        trained = copy.deepcopy(model)
        extra = {name: value} if name else {}
        settings = arguments(tmp_path, max_steps=3, optim="sgd", max_grad_norm=0.0, save_strategy="no", **extra)
        ScanTrainer(trained, settings, train_dataset=rows(16)).train()
        ends[name] = torch.cat([value.flatten().float() for value in trained.state_dict().values()])
    for name in METHODS:
        assert not torch.equal(ends[name], ends[""]), name


@pytest.mark.parametrize("name", ["gradient_equilibrium", "backbone_steps"])
def test_methods_for_a_backbone_are_refused_where_it_is_frozen(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` is about training the backbone"):
        arguments(tmp_path, freeze_backbone=True, **{name: METHODS[name]})
