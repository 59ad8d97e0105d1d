"""Several labels an image: the rule, in both engines that need no export, and what fits which network."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hf_scan import ExitConfig, ScanForImageClassification, apply_exit_rule
from hf_scan.model.exit_rule import answers_of, label_set_ids
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.runtime.numpy_rule import apply_exit_rule as numpy_rule

from ..conftest import random_scan_model


SEVERAL = "multi_label_classification"
threshold = st.one_of(st.none(), st.floats(0.5, 0.75), st.just(1.0))
policies = st.fixed_dictionaries(
    {
        "thresholds": st.lists(threshold, min_size=2, max_size=3),
        "fallback": st.sampled_from(["ensemble", "deepest", "most_confident"]),
        "temperatures": st.one_of(st.none(), st.lists(st.floats(0.5, 3), min_size=3, max_size=3)),
    }
)


@pytest.fixture(scope="module")
def several() -> ScanForImageClassification:
    return random_scan_model(problem_type=SEVERAL)


def certainty(row: np.ndarray) -> float:
    """How certain the least certain label is, label by label."""
    probabilities = [1 / (1 + np.exp(-logit)) for logit in row.astype(np.float64)]
    return min(max(p, 1 - p) for p in probabilities)


def rule_by_hand(exit_logits, thresholds, fallback, temperatures):
    """One sample at a time: logits, exit and confidence; and how near a score came to another number."""
    answers, nearest = [], 1.0
    for rows in zip(*exit_logits):
        limits = [*thresholds, None][: len(rows)]
        ran = [index for index, limit in enumerate(limits) if limit is not None or index == len(rows) - 1]
        sure = {index: certainty(rows[index] / (temperatures or [1.0] * 3)[index]) for index in ran}
        for index in ran:
            limit = limits[index]
            if limit is None or limit >= 1 or (index == len(rows) - 1 and fallback == "deepest"):
                continue
            nearest = min(nearest, abs(sure[index] - limit))
            if sure[index] > limit:
                answers.append((rows[index], index, sure[index]))
                break
        else:
            mean = np.mean([rows[index] for index in ran], axis=0)
            best = max(ran, key=sure.__getitem__)
            others = [sure[best] - value for index, value in sure.items() if index != best]
            nearest = min([nearest, *others]) if fallback == "most_confident" else nearest
            answers.append(
                {
                    "ensemble": (mean, len(rows), certainty(mean)),
                    "deepest": (rows[-1], len(rows) - 1, sure[len(rows) - 1]),
                    "most_confident": (rows[best], best, sure[best]),
                }[fallback]
            )
    return [np.array(column) for column in zip(*answers)], nearest


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, batch_size=st.integers(1, 24))
def test_equals_the_rule_by_hand_for_any_batch(several, images, policy, batch_size):
    with torch.no_grad():
        exit_logits = several(images).exit_logits
    (logits, exits, confidence), nearest = rule_by_hand([each.double().numpy() for each in exit_logits], **policy)
    assume(nearest > 1e-5)  # else two roundings may differ
    answers = [several.predict_adaptive(batch, **policy) for batch in images.split(batch_size)]
    streamed = list(several.predict_adaptive_stream([images], batch_size=batch_size, ordered=True, **policy))
    rule = ExitConfig(criterion="label_confidence", **policy)
    arrays = numpy_rule([each.numpy() for each in exit_logits], rule)
    for found in (answers, streamed, [apply_exit_rule(exit_logits, rule)], [arrays]):
        assert np.concatenate([answer.exit_index for answer in found]).tolist() == exits.tolist()
        np.testing.assert_allclose(np.concatenate([answer.logits for answer in found]), logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.concatenate([answer.confidence for answer in found]), confidence, rtol=1e-4)


def test_the_network_of_these_tests_uses_every_exit(several, images):
    found = several.predict_adaptive(images, thresholds=[0.54, 0.54, 0.54]).exit_index
    assert found.unique().tolist() == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(labels=st.integers(2, 90), seed=st.integers(0, 2**16))
def test_sets_of_labels_are_equal_if_their_numbers_are(labels, seed):
    sets = torch.rand(20, labels, generator=torch.Generator().manual_seed(seed)) > 0.9
    numbers = label_set_ids(sets)
    assert torch.equal(numbers[:, None] == numbers, (sets[:, None] == sets).all(dim=-1))
    logits = torch.where(sets, 0.1, -0.1)
    assert torch.equal(answers_of(logits, ExitConfig(criterion="label_confidence")), numbers)
    assert torch.equal(answers_of(logits, ExitConfig()), logits.argmax(dim=-1))


def test_numbers_of_labels_are_the_same_everywhere():
    """Tables of logits are saved with them. The first outputs of SplitMix64 for the seed 0, as published."""
    ids = label_set_ids(torch.eye(3, dtype=torch.bool)).numpy().view(np.uint64)
    assert [hex(number) for number in ids] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_the_loss_is_the_binary_cross_entropy_of_every_exit(several, images):
    labels = (torch.rand(24, 5, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    out = several(images, labels=labels)
    expected = sum(torch.nn.functional.binary_cross_entropy_with_logits(each, labels) for each in out.exit_logits)
    torch.testing.assert_close(out.loss, expected)
    for kind in (torch.int64, torch.bool, torch.float64):
        torch.testing.assert_close(several(images, labels=labels.to(kind)).loss, expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(24, dtype=torch.long), r"shape \(24,\) .*; expected \(batch_size, 5\) numbers from 0 to 1"),
        (torch.zeros(24, 4), r"shape \(24, 4\)"),
        (torch.full((24, 5), 2.0), "holds values from 2 to 2; expected 1 for each label"),
        (torch.full((24, 5), torch.nan), "holds values from nan"),
    ],
)
def test_other_labels_are_refused(several, images, labels, message):
    with pytest.raises(ValueError, match=message):
        several(images, labels=labels)


def test_labels_of_several_are_refused_by_a_network_for_one(model, images):
    with pytest.raises(ValueError, match="set `problem_type` to 'multi_label_classification'"):
        model(images, labels=torch.zeros(24, 5))
    assert model.config.problem_type != SEVERAL  # as Transformers' loss would have it


def test_saved_loaded_truncated_and_in_a_pipeline(several, tmp_path):
    several.exit_config = several.exit_config.replace(thresholds=[0.5, 0.5])
    several.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.exit_config.rule == several.exit_config.rule
    assert loaded.truncate(exit=0).config.problem_type == SEVERAL
    without = ScanForImageClassification.from_pretrained(tmp_path, exit_config=ExitConfig())
    assert without.exit_config == ExitConfig(criterion="label_confidence")
    classify = pipeline("image-classification", model=loaded, image_processor=create_image_processor(loaded))
    answer = classify(Image.new("RGB", (16, 16)), top_k=5, return_exit=True)
    pixels = create_image_processor(loaded)(Image.new("RGB", (16, 16)), return_tensors="pt")["pixel_values"]
    expected = loaded.predict_adaptive(pixels).logits[0].sigmoid()
    assert [entry["score"] for entry in answer] == pytest.approx(expected.sort(descending=True).values.tolist())
    assert answer[0]["exit"] == 0
    several.exit_config = several.exit_config.replace(thresholds=None)
