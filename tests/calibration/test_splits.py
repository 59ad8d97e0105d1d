import copy
from dataclasses import replace

import numpy as np
import pytest

from hf_scan import ExitConfig, RiskBound, calibrate, certify_thresholds
from hf_scan.calibration import ExitTable
from hf_scan.data import digests_as_text

from ..conftest import random_scan_model
from .samples import table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.select(np.arange(9)), "has 9 samples; thresholds need at least 10"),
        (lambda t: t.select(t.labels == 2), "one class only, 2"),
        (
            lambda t: ExitTable(np.where(t.logits > 4, np.nan, t.logits), t.labels, t.samples, t.split, t.model),
            "not finite",
        ),
        (lambda t: ExitTable(t.logits * 0, t.labels, t.samples, t.split, t.model), "the same score for every sample"),
        (
            lambda t: ExitTable(t.logits, t.labels, t.samples, t.split, "ab" * 32),
            "was computed with other weights than the model's",
        ),
        (lambda t: replace(t, labels=t.labels + 1), "labels from 1 to 5, and the network has 5 classes"),
        (lambda t: replace(t, logits=t.logits[:, :2]), "has 2 exits with 5 labels, and the network has 3"),
    ],
)
@pytest.mark.parametrize("step", ["search", "certify"])
def test_splits_that_will_not_do(network, tables, change, message, step):
    search, certification = tables
    if step == "search":
        search = change(search)
    else:
        certification = change(certification)
    with pytest.raises(ValueError, match=message):
        calibrate(network, search, guarantee=RiskBound(5.0), certify_dataset=certification)


def test_scores_of_exactly_one_ask_for_temperatures(network, tables, warnings):
    sure = replace(tables[0], logits=tables[0].logits * 60)
    config = calibrate(network, sure, max_accuracy_drop=1.0)
    assert "scores on the 'search' split are exactly 1.0 at exit 0 (" in warnings.text
    assert "Pass `temperatures=[...]`" in warnings.text
    warnings.clear()
    cooled = calibrate(network, sure, max_accuracy_drop=1.0, temperatures=[60, 60, 60])
    assert "exactly 1.0" not in warnings.text
    assert cooled.search["cost"] < config.search["cost"]
    with pytest.raises(ValueError, match=r"the same score for every sample at each exit.*Pass `temperatures="):
        calibrate(network, replace(tables[0], logits=tables[0].logits * 1e6), max_accuracy_drop=1.0)


def test_splits_that_share_images(network, tables):
    search, certification = tables
    mixed = ExitTable(
        *(
            np.concatenate([getattr(certification, name), getattr(search, name)[:100]])
            for name in ("logits", "labels", "samples")
        ),
        "mixed",
        search.model,
    )
    for other in (search, mixed):
        with pytest.raises(ValueError, match=r"share 1000? images"):
            calibrate(network, search, guarantee=RiskBound(5.0), certify_dataset=other)


def test_images_that_were_trained_on(network, tables):
    network = random_scan_model()
    network.exit_config = ExitConfig(trained_on=digests_as_text(tables[0].samples))
    message = (
        "was trained on the 'search' split, or a part of it: 512 images whose digests are recorded are in it, of 512"
    )
    with pytest.raises(ValueError, match=message):
        calibrate(network, tables[0], max_accuracy_drop=1.0)
    kept = calibrate(network, tables[1], max_accuracy_drop=1.0)
    assert kept.trained_on == network.exit_config.trained_on


@pytest.mark.parametrize(("size", "refused"), [(500, True), (50, False)])
def test_a_hundredth_of_the_training_images_is_recognised(network, size, refused):
    """512 of 50,000 are remembered; of 500 that were trained on, about five of these. Fifty are too few to tell."""
    rng = np.random.default_rng(0)
    trained = rng.integers(0, 2**62, 50_000).astype(np.uint64)
    network = copy.deepcopy(network)  # which keeps what it was trained on
    network.exit_config = ExitConfig(trained_on=digests_as_text(trained))
    caught = 0
    for seed in range(20):
        rows = table(size, seed, model=network.fingerprint())
        rows = replace(rows, samples=rng.choice(trained, size, replace=False))
        try:
            calibrate(network, rows, max_accuracy_drop=5.0)
        except ValueError as error:
            caught += "was trained on" in str(error)
    assert (caught >= 15) if refused else (caught <= 2)


def test_a_few_images_that_are_in_both_splits_by_chance_are_no_reason_to_refuse(network):
    trained = np.arange(50_000, dtype=np.uint64) * np.uint64(2**40 + 1)
    network = copy.deepcopy(network)  # which keeps what it was trained on
    network.exit_config = ExitConfig(trained_on=digests_as_text(trained))
    rows = table(5000, 3, model=network.fingerprint())
    rows.samples[:25] = trained[:25]  # as in CIFAR-100
    calibrate(network, rows, max_accuracy_drop=5.0)


def test_an_image_that_is_there_ten_times_counts_once(network, tables):
    search, certification = tables
    one = certification.select(np.arange(400))
    ten = certification.select(np.tile(np.arange(400), 10))
    for certifies in (one, ten):
        config = calibrate(network, search, guarantee=RiskBound(9.0), certify_dataset=certifies)
        assert config.guarantee["n"] == 400
        network.exit_config = config.replace(guarantee=None, searched_on=None)
        assert certify_thresholds(network, certifies, RiskBound(9.0)).guarantee["n"] == 400
    network.exit_config = ExitConfig()
