"""Criteria: their values by hand, and functions of one's own."""

import math

import pytest
import torch

from hf_scan import ExitConfig
from hf_scan.model.exit_criteria import EXIT_CRITERIA, MEMORYLESS


FIRST = torch.tensor([[0.0, math.log(3.0)]])  # probabilities of 1/4 and 3/4
SECOND = torch.tensor([[math.log(9.0), 0.0]])  # of 9/10 and 1/10, and the other class


VALUES = {
    "confidence": 0.9,
    "margin": 0.8,
    "entropy": 1 + (0.9 * math.log2(0.9) + 0.1 * math.log2(0.1)),
    "patience": 1 / 2,  # one exit in a row
    "ensemble_confidence": math.sqrt(3) / (1 + math.sqrt(3)),  # logits of log(9) / 2 and log(3) / 2
    "label_confidence": 1 / 2,  # a logit of 0
}


@pytest.mark.parametrize("name", sorted(EXIT_CRITERIA))
def test_values_by_hand(name):
    assert EXIT_CRITERIA[name]([FIRST, SECOND]).tolist() == pytest.approx([VALUES[name]])


@pytest.mark.parametrize("name", sorted(EXIT_CRITERIA))
def test_memoryless_ones_read_the_last_logits_only(name):
    score = EXIT_CRITERIA[name]
    same = torch.equal(score([FIRST, FIRST]), score([SECOND, FIRST]))
    assert same == (name in MEMORYLESS)


def test_a_criterion_of_ones_own(model, images, tmp_path):
    """It sees the logits so far, at their temperatures, and is not saved."""
    seen_at = []

    def own(seen):
        seen_at.append(len(seen))
        return 0.5 * seen[-1].softmax(-1).amax(-1)

    config = ExitConfig(thresholds=[0.3, 0.3, 0.3], criterion=own)
    found = model.predict_adaptive(images, config)
    named = model.predict_adaptive(images, thresholds=[0.6, 0.6, 0.6])
    assert torch.equal(found.exit_index, named.exit_index)
    torch.testing.assert_close(found.confidence, named.confidence)
    assert seen_at == [1, 2, 3]
    with pytest.raises(ValueError, match=r"is the function .* which cannot be saved"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("criterion", "found"),
    [
        (lambda seen: seen[-1], r"torch\.Size\(\[24, 5\]\)"),
        (lambda seen: 0.5, "float"),
        (lambda seen: seen[-1].new_full((24,), torch.nan), "scores not finite"),
    ],
)
def test_a_criterion_that_returns_no_scores(model, images, criterion, found):
    with pytest.raises(ValueError, match=rf"returned {found}; expected a tensor of \(24,\) finite scores"):
        model.predict_adaptive(images, thresholds=[0.5, 0.5], criterion=criterion)


def test_patience_leaves_when_so_many_exits_agree(model, images):
    with torch.no_grad():
        classes = torch.stack(model(images).exit_logits).argmax(-1)
    answer = model.predict_adaptive(images, thresholds=[0.5, 0.5, 0.5], criterion="patience")
    agree = classes[0] == classes[1]
    assert torch.equal(answer.exit_index == 1, agree)
    assert 0 < agree.sum() < 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_type_are_compared_alike(model, images, dtype):
    """0.3 is not a number of any of these types, and rounded up in one of them."""
    policy = {"thresholds": [0.3, None, None], "criterion": lambda seen: torch.full((len(seen[0]),), 0.3, dtype=dtype)}
    together = model.predict_adaptive(images, **policy)
    alone = [model.predict_adaptive(image, **policy) for image in images.split(1)]
    assert torch.equal(together.exit_index, torch.cat([answer.exit_index for answer in alone]))
