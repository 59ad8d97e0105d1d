import math

import pytest
import torch

from hf_scan.training.losses import SelfDistillationLoss


def test_values_by_hand():
    """Two classes, one sample: every term can be written down."""
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    terms = SelfDistillationLoss(label_weight=0.5, soft_label_weight=0.25, hint_weight=0.1, temperature=1.0)(
        [student, teacher], [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])], torch.tensor([1])
    )
    assert terms["exit_0_label_loss"] == pytest.approx(0.5 * -math.log(3 / 4))
    # KL((1/2, 1/2) || (1/4, 3/4))
    assert terms["exit_0_soft_label_loss"] == pytest.approx(0.25 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)))
    assert terms["exit_0_hint_loss"] == pytest.approx(0.1 * 5)
    assert terms["exit_1_label_loss"] == pytest.approx(math.log(2))
    assert len(terms) == 4


def batch(size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(size, 5, generator=generator, requires_grad=True) for _ in range(3)]
    features = [torch.randn(size, 8, generator=generator, requires_grad=True) for _ in range(3)]
    return logits, features, torch.randint(5, (size,), generator=generator)


def test_the_teacher_gets_no_gradient():
    logits, features, labels = batch(4)
    terms = SelfDistillationLoss()(logits, features, labels)
    sum(value for name, value in terms.items() if name.endswith(("soft_label_loss", "hint_loss"))).backward()
    assert logits[-1].grad is None
    assert features[-1].grad is None
    assert all(part.grad.abs().sum() > 0 for part in (*logits[:-1], *features[:-1]))


def test_terms_do_not_depend_on_the_batch_size():
    logits, features, labels = batch(6)
    once = SelfDistillationLoss()(logits, features, labels)
    twice = SelfDistillationLoss()(
        [torch.cat([x, x]) for x in logits], [torch.cat([x, x]) for x in features], torch.cat([labels, labels])
    )
    assert once.keys() == twice.keys()
    for name in once:
        torch.testing.assert_close(once[name], twice[name])


def test_the_gradient_of_the_soft_labels_hardly_depends_on_the_temperature():
    """That is what the factor T^2 is for (Hinton et al., 2015, section 2.1): for high T the limit is reached."""
    gradients = []
    for temperature in (50.0, 100.0):
        logits, features, labels = batch(4)
        terms = SelfDistillationLoss(temperature=temperature)(logits, features, labels)
        terms["exit_0_soft_label_loss"].backward()
        gradients.append(logits[0].grad)
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_weight_0_leaves_a_term_out():
    terms = SelfDistillationLoss(soft_label_weight=0, hint_weight=0)(*batch(4))
    assert sorted(terms) == ["exit_0_label_loss", "exit_1_label_loss", "exit_2_label_loss"]


def test_label_smoothing_reaches_every_exit():
    plain, smooth = SelfDistillationLoss()(*batch(4)), SelfDistillationLoss(label_smoothing=0.1)(*batch(4))
    assert all((plain[name] == smooth[name]) != name.endswith("_label_loss") or "soft" in name for name in plain)


def test_a_weight_for_each_exit():
    logits, features, labels = batch(4)
    one = SelfDistillationLoss(label_weight=1.0, soft_label_weight=1.0, hint_weight=1.0)(logits, features, labels)
    each = SelfDistillationLoss(label_weight=[0.5, 2], soft_label_weight=[0, 3, 1], hint_weight=[0.25, 0])(
        logits, features, labels
    )
    factors = {
        "exit_0_label_loss": 0.5,
        "exit_1_label_loss": 2,
        "exit_2_label_loss": 1,
        "exit_1_soft_label_loss": 3,
        "exit_0_hint_loss": 0.25,
    }
    for name, factor in factors.items():
        torch.testing.assert_close(each[name], factor * one[name])
    assert each.keys() - factors.keys() == {"exit_2_soft_label_loss"}
    assert float(each["exit_2_soft_label_loss"]) == pytest.approx(0)  # the deepest exit, taught by itself


@pytest.mark.parametrize("weights", [[0.5, 0.5, 1.0, 1.0], []])
def test_too_many_or_too_few_weights(weights):
    with pytest.raises(ValueError, match=rf"`hint_weight` is .*, {len(weights)} weights; the network has 3 exits"):
        SelfDistillationLoss(hint_weight=weights)(*batch(4))


def test_another_teacher_teaches_every_exit_that_has_a_weight():
    logits, features, labels = batch(4)
    teacher = torch.randn(4, 5, requires_grad=True)
    terms = SelfDistillationLoss(soft_label_weight=[1, 1, 1])(logits, features, labels, teacher)
    sum(terms[f"exit_{index}_soft_label_loss"] for index in range(3)).backward()
    assert teacher.grad is None
    assert all(part.grad.abs().sum() > 0 for part in logits)
    # A student that answers as the teacher does has nothing left to learn from it.
    same = SelfDistillationLoss()([teacher.detach(), *logits[1:]], features, labels, teacher)
    assert float(same["exit_0_soft_label_loss"]) == pytest.approx(0, abs=1e-6)


def test_warm_up_scales_what_is_distilled_and_nothing_else():
    full, half = SelfDistillationLoss()(*batch(4)), SelfDistillationLoss()(*batch(4), distillation_scale=0.5)
    for name, value in full.items():
        torch.testing.assert_close(half[name], value * (0.5 if "soft" in name or "hint" in name else 1.0))


def test_without_the_factor_of_the_temperature():
    scaled, plain = (SelfDistillationLoss(scale_by_temperature=flag)(*batch(4)) for flag in (True, False))
    torch.testing.assert_close(scaled["exit_0_soft_label_loss"], 9 * plain["exit_0_soft_label_loss"])


def test_labels_can_be_probabilities():
    logits, features, labels = batch(4)
    hard = SelfDistillationLoss()(logits, features, labels)
    soft = SelfDistillationLoss()(logits, features, torch.nn.functional.one_hot(labels, 5).float())
    for name, value in hard.items():
        torch.testing.assert_close(soft[name], value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_weight", -1.0),
        ("soft_label_weight", [0.5, float("nan")]),
        ("hint_weight", float("inf")),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.5),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*; expected (a number|numbers)"):
        SelfDistillationLoss(**{name: value})
