import copy
import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, Image

from hf_scan import ExitConfig, RiskBound, apply_exit_rule, calibrate, certify_thresholds
from hf_scan.calibration import CannotCertifyError, ExitTable, collect_exit_logits, exact_frontier, exit_frontier
from hf_scan.costs import ExitCosts, MeasuredCosts, count_macs
from hf_scan.data import digests_as_text, sample_digests, shared_with, some_digests

from ..conftest import random_scan_model


COSTS = ExitCosts([0.3, 0.3, 0.3], [0.05, 0.05, 0.02])
ZERO = ExitCosts([0, 0, 0], [0, 0, 0])


def table(n: int = 1000, seed: int = 0, split: str = "search", model: str = "") -> ExitTable:
    """Three exits, the deeper the better, on samples of varying difficulty; five classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    logits = rng.normal(size=(n, 3, 5)) + rng.normal(size=(n, 1, 5))
    logits[np.arange(n)[:, None], np.arange(3), labels[:, None]] += np.linspace(3, 4.5, 3) - rng.normal(size=(n, 1))
    return ExitTable(logits.astype(np.float32), labels, rng.integers(0, 2**62, n).astype(np.uint64), split, model)


@pytest.fixture(scope="module")
def network():
    return random_scan_model()


@pytest.fixture
def tables(network):
    """To search and to certify on, of the network."""
    return table(model=network.fingerprint()), table(3000, 1, "certify", network.fingerprint())


def measured(batch_size: int = 1) -> dict:
    """Times in which the second head costs far more than its stage saves."""
    one = ExitCosts(stages=[2.0, 2.0, 2.0], heads=[0.5, 3.0, 0.25])
    times = {1: one}
    if batch_size > 1:
        times[batch_size] = ExitCosts([2.0 * batch_size / 2] * 3, [0.5 * batch_size / 2, 1.0, 0.25])
    plain = {size: sum(costs.stages) + costs.heads[-1] for size, costs in times.items()}
    return MeasuredCosts(ZERO, ZERO, times, {}, plain, "float32", 1, "a machine").to_dict()


def accuracy_and_cost(table: ExitTable, config: ExitConfig, costs: ExitCosts) -> tuple[float, float]:
    """By the simulated rule, and what has run for each sample."""
    answer = apply_exit_rule(torch.from_numpy(table.logits).unbind(1), config)
    right = answer.logits.argmax(-1).numpy() == table.labels
    return right.mean(), np.array(costs.cumulative(config))[answer.exit_index.numpy()].mean()


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_every_policy_of_the_frontier_gives_what_it_says(fallback):
    rows, rule = table(300), ExitConfig(fallback=fallback)
    frontier = exit_frontier(rows, rule, COSTS.cumulative)
    assert len(frontier) > 20
    off = np.isnan(frontier.thresholds)
    assert off.any()
    assert not off.all(axis=1).any() or fallback == "deepest"
    for accuracy, cost, thresholds in zip(frontier.accuracy, frontier.cost, frontier.thresholds):
        config = rule.replace(thresholds=[None if np.isnan(t) else float(t) for t in thresholds])
        # An exit that is on and lets nobody go is still counted; the one that is off is another policy.
        leaving = apply_exit_rule(torch.from_numpy(rows.logits).unbind(1), config.replace(fallback="ensemble"))
        on = config.replace(thresholds=[None if t is None else min(t, 0.999) for t in config.thresholds])
        spent = np.array(COSTS.cumulative(on))[leaving.exit_index.numpy()].mean()
        found = accuracy_and_cost(rows, config, COSTS)[0]
        assert (found, spent) == (pytest.approx(accuracy), pytest.approx(cost))


def test_switching_off_adds_policies_and_loses_none():
    rows = table(300)
    alone = exit_frontier(rows, ExitConfig(), COSTS.cumulative)
    scores, predictions = rows.columns(ExitConfig())
    on = exact_frontier(scores, predictions == rows.labels[:, None], np.array(COSTS.cumulative()), max_policies=10**4)
    for accuracy, cost in zip(on.accuracy, on.cost):
        assert alone.accuracy[alone.cost <= cost + 1e-9].max() >= accuracy - 0.01
    assert alone.cost[0] < on.cost[0] + 1e-9


def test_many_exits():
    """More than are tried in all combinations."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    logits = rng.normal(size=(60, 8, 3)).astype(np.float32)
    logits[np.arange(60)[:, None], np.arange(8), labels[:, None]] += np.linspace(0, 2, 8)
    rows = ExitTable(logits, labels, np.arange(60, dtype=np.uint64), "search", "")
    frontier = exit_frontier(rows, ExitConfig(fallback="deepest"), ExitCosts([1.0] * 8, [0.1] * 8).cumulative)
    assert frontier.thresholds.shape[1] == 7
    assert frontier.accuracy.max() >= (rows.deepest == labels).mean()


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
@pytest.mark.parametrize(
    "target", [{"max_accuracy_drop": 1.0}, {"min_accuracy": 0.8}, {"max_macs": 4e6}, {"speedup": 1.6}], ids=str
)
def test_targets_are_met_on_the_split(network, tables, target, fallback):
    config = calibrate(network, tables[0], fallback=fallback, **target)
    macs = count_macs(network)
    accuracy, _ = accuracy_and_cost(tables[0], config, macs)
    leaving = apply_exit_rule(
        torch.from_numpy(tables[0].logits).unbind(1), config.replace(fallback="ensemble")
    ).exit_index.numpy()
    cost = np.array(macs.cumulative(config))[leaving].mean()
    baseline = (tables[0].deepest == tables[0].labels).mean()
    assert {
        "max_accuracy_drop": accuracy >= baseline - 0.01,
        "min_accuracy": accuracy >= 0.8,
        "max_macs": cost <= 4e6 + 1,
        "speedup": macs.plain / cost >= 1.6 - 1e-6,
    }[next(iter(target))]
    assert config.search["accuracy"] == pytest.approx(accuracy)
    assert config.search["cost"] == pytest.approx(cost / macs.plain)
    assert config.search["cost_unit"].startswith("MACs, computed")
    assert config.search["method"] == "exact frontier"
    assert config.search["fingerprint"] == tables[0].fingerprint
    assert config.fallback == fallback
    # No policy of a coarse grid does better.
    for thresholds in np.stack(np.meshgrid(*[np.linspace(0.2, 1, 9)] * 2), -1).reshape(-1, 2):
        other = config.replace(thresholds=thresholds.tolist())
        theirs = accuracy_and_cost(tables[0], other, macs)[0]
        left_at = apply_exit_rule(torch.from_numpy(tables[0].logits).unbind(1), other.replace(fallback="ensemble"))
        spent = np.array(macs.cumulative(other))[left_at.exit_index.numpy()].mean()
        assert theirs < accuracy + 0.003 or spent > cost * 0.997


@pytest.mark.parametrize(
    ("asked", "criterion"),
    [
        ({}, "confidence"),
        ({"speedup": 1.2}, "confidence"),
        *(({"max_accuracy_drop": 1.0}, name) for name in ("margin", "patience", "ensemble_confidence")),
        ({"guarantee": RiskBound(max_drop=5.0)}, "confidence"),
    ],
    ids=str,
)
def test_thresholds_lie_on_no_score(network, tables, asked, criterion):
    """Nor move by the rounding to float32 that scores have; what is certified is what is returned."""
    given = {"certify_dataset": tables[1]} if "guarantee" in asked else {} if asked else {"progress": False}
    config = calibrate(network, tables[0], criterion=criterion, **asked, **given)
    scores, _ = tables[0].columns(config)
    for column, threshold in zip(scores.T, config.thresholds):
        assert threshold is None or (threshold == np.float32(threshold) and threshold not in column)
    if "guarantee" in asked:
        alone = random_scan_model()
        alone.exit_config = config.replace(guarantee=None)
        certified = certify_thresholds(alone, tables[1], asked["guarantee"])
        assert certified.rule == config.guarantee["rule"]
        assert (certified.guarantee["risk"], certified.guarantee["p_value"]) == (
            config.guarantee["risk"],
            config.guarantee["p_value"],
        )


def test_an_exit_that_costs_more_than_it_saves_is_switched_off(network, tables):
    network = random_scan_model()
    network.exit_config = ExitConfig(costs=measured())
    config = calibrate(network, tables[0], max_accuracy_drop=1.0)
    assert config.thresholds[1] is None
    assert config.thresholds[0] is not None
    assert config.search["cost_unit"].startswith("milliseconds, measured in batches of 1: a machine, float32")
    assert config.costs == network.exit_config.costs  # kept


@pytest.mark.parametrize("latency", ["mean", "p95"])
def test_a_budget_in_milliseconds(tables, latency):
    network = random_scan_model()
    with pytest.raises(ValueError, match="needs measured costs"):
        calibrate(network, tables[0], max_latency_ms=4.0)
    network.exit_config = ExitConfig(costs=measured())
    config = calibrate(network, tables[0], max_latency_ms=5.0, latency=latency)
    assert config.search["milliseconds"][latency] <= 5.0 + 1e-9
    assert config.search["latency"] == latency
    left_at = apply_exit_rule(torch.from_numpy(tables[0].logits).unbind(1), config).exit_index.numpy()
    each = np.array(MeasuredCosts.from_dict(measured()).cumulative(config))[left_at]
    assert config.search["milliseconds"]["mean"] == pytest.approx(each.mean())
    assert (each <= config.search["milliseconds"]["p95"] + 1e-9).mean() >= 0.95
    if latency == "p95":
        assert (each > 5.0).mean() <= 0.05
        mean = calibrate(network, tables[0], max_latency_ms=5.0)
        assert config.search["accuracy"] != mean.search["accuracy"]


def test_batches(tables):
    """What is left of a batch takes longer for each image, and that counts."""
    network = random_scan_model()
    network.exit_config = ExitConfig(costs=measured(8))
    config = calibrate(network, tables[0], speedup=1.3, batch_size=8)
    assert config.search["cost"] <= 1 / 1.3 + 1e-9
    costs = MeasuredCosts.from_dict(measured(8))
    left_at = apply_exit_rule(torch.from_numpy(tables[0].logits).unbind(1), config).exit_index
    shares = (left_at.bincount(minlength=4) / len(left_at)).tolist()
    expected = costs.expected_milliseconds(shares, config, 8)
    assert config.search["milliseconds"]["mean"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="`batch_size` is 4"):
        calibrate(network, tables[0], speedup=1.3, batch_size=4)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"min_accuracy": 0.999},
            r"No thresholds reach `min_accuracy=0.999` on this split: the highest accuracy is \d",
        ),
        ({"max_accuracy_drop": -40}, r"the highest accuracy is \d.*points of drop"),
        ({"speedup": 50}, r"No thresholds reach `speedup=50` .* the least is .* MACs for an image, \d"),
        ({"max_macs": 10.0}, "the least is"),
        ({"min_accuracy": 95}, r"expected a share in \(0, 1\]"),
        ({"speedup": 0}, "`speedup` is 0; expected a number above 0"),
        ({"speedup": 2, "max_macs": 1e6}, "pass one of them"),
        ({"max_latency_ms": 1.0, "latency": "p50"}, "expected 'mean' or 'p95'"),
        ({"certify_dataset": []}, "without a `guarantee`"),
    ],
)
def test_infeasible_targets(network, tables, target, message):
    with pytest.raises(ValueError, match=message):
        calibrate(network, tables[0], **target)


def test_settings_of_the_genetic_search_are_not_ignored(network, tables):
    with pytest.raises(TypeError, match=r"\['beta'\] are for the genetic search"):
        calibrate(network, tables[0], max_accuracy_drop=1.0, beta=0.5)
    with pytest.raises(TypeError, match=r"`calibrate` has no arguments \['max_drop'\]"):
        calibrate(network, [], max_drop=0.5)  # before the images are looked at


@pytest.mark.parametrize("batch_size", [0, -1, None])
def test_batch_sizes_that_are_none(network, tables, batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}; expected"):
        calibrate(network, tables[0], speedup=1.1, batch_size=batch_size)


def test_p95_is_for_single_images(network, tables):
    with pytest.raises(ValueError, match="is for single images"):
        calibrate(network, tables[0], max_latency_ms=5.0, latency="p95", batch_size=8)


@pytest.mark.parametrize("loss", ["gap", "disagreement", "error"])
def test_a_guarantee(network, tables, loss):
    """The cheapest that pass; what the result says of itself is so."""
    bound = RiskBound(max_drop={"gap": 2.0, "disagreement": 8.0, "error": 25.0}[loss], delta=0.1, loss=loss)
    config = calibrate(network, tables[0], guarantee=bound, certify_dataset=tables[1])
    answers = apply_exit_rule(torch.from_numpy(tables[1].logits).unbind(1), config).logits.argmax(-1).numpy()
    deepest = tables[1].deepest
    labels = tables[1].labels
    risk = {
        "gap": (deepest == labels).mean() - (answers == labels).mean(),
        "disagreement": (answers != deepest).mean(),
        "error": (answers != labels).mean(),
    }[loss]
    said = config.guarantee
    assert said["risk"] == pytest.approx(100 * risk)
    assert said["risk"] < said["max_drop"] == bound.max_drop
    assert said["p_value"] <= said["delta"] == 0.1
    assert (said["n"], said["split"], said["fingerprint"]) == (3000, "certify", tables[1].fingerprint)
    assert said["loss"] == loss
    assert config.search["fingerprint"] == tables[0].fingerprint
    # Without a guarantee as much may be lost on the split itself, and the policy is cheaper.
    if loss == "gap":
        assert calibrate(network, tables[0], max_accuracy_drop=2.0).search["cost"] <= config.search["cost"]


def test_a_guarantee_from_one_split(network, tables):
    """Half of it chooses, the other half certifies."""
    config = calibrate(network, tables[1], guarantee=RiskBound(3.0))
    assert config.search["n"] + config.guarantee["n"] == 3000
    assert abs(config.search["n"] - 1500) < 10
    assert config.search["fingerprint"] != config.guarantee["fingerprint"]


def test_a_guarantee_and_a_budget(network, tables):
    config = calibrate(network, tables[0], speedup=1.5, guarantee=RiskBound(5.0), certify_dataset=tables[1])
    assert config.search["cost"] <= 1 / 1.5
    assert config.guarantee["policies_tested"] == 1
    assert config.search["accuracy"] == calibrate(network, tables[0], speedup=1.5).search["accuracy"]


def test_what_cannot_be_certified(network, tables):
    few = tables[1].select(np.arange(100))
    with pytest.raises(CannotCertifyError, match=r"which about .* samples would certify"):
        calibrate(network, tables[0], guarantee=RiskBound(2.0), certify_dataset=few)


def test_thresholds_from_anywhere_can_be_certified(network, tables):
    network = random_scan_model()
    network.exit_config = ExitConfig(thresholds=[0.95, None, 0.5])
    config = certify_thresholds(network, tables[1], RiskBound(5.0))
    assert config.thresholds == [0.95, None, 0.5]
    assert config.guarantee["n"] == 3000
    network.exit_config = ExitConfig(thresholds=[0.0, 0.0])
    with pytest.raises(CannotCertifyError):
        certify_thresholds(network, tables[1], RiskBound(1.0))
    network.exit_config = calibrate(network, tables[0], max_accuracy_drop=0.0)
    # All of the images that chose them, or most, or some among others: whatever the split is called.
    others = tables[1].select(np.arange(500))
    mixed = {
        name: np.concatenate([getattr(tables[0], name)[:200], getattr(others, name)])
        for name in ("logits", "labels", "samples")
    }
    for table in (tables[0], tables[0].select(np.arange(999), "new"), replace(others, **mixed)):
        with pytest.raises(ValueError, match=r"were searched on the '(search|new|certify)' split, or a part of it"):
            certify_thresholds(network, table, RiskBound(5.0))
    assert certify_thresholds(network, tables[1], RiskBound(5.0)).guarantee["n"] == 3000


def test_what_is_certain_is_certified(network, caplog):
    """Without early exits nothing is lost, though on a small split some policy looks better, and is no longer."""
    fingerprint = network.fingerprint()
    search = table(80, 5, model=fingerprint)
    few = table(310, 6, "certify", fingerprint)
    for loss in ("gap", "disagreement"):
        config = calibrate(network, search, guarantee=RiskBound(1.0, loss=loss), certify_dataset=few)
        assert config.guarantee["p_value"] <= 0.05
        if config.thresholds[:2] == [None, None]:
            assert config.guarantee["risk"] == 0


def test_a_guarantee_is_not_saved_with_other_thresholds(network, tables, tmp_path):
    config = calibrate(network, tables[0], guarantee=RiskBound(3.0), certify_dataset=tables[1])
    config.save_pretrained(tmp_path)
    assert ExitConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ValueError, match="The guarantee is of"):
        config.thresholds = [0.01] * 3
    config.thresholds[:] = [0.01] * 3
    with pytest.raises(ValueError, match="The guarantee is of"):
        config.save_pretrained(tmp_path)
    edited = json.loads((tmp_path / "exit_config.json").read_text())
    (tmp_path / "exit_config.json").write_text(json.dumps({**edited, "thresholds": [0.01] * 3}))
    with pytest.raises(ValueError, match="The guarantee is of"):
        ExitConfig.from_pretrained(tmp_path)


def test_numbers_of_numpy_can_be_saved(network, tables, tmp_path):
    bound = RiskBound(np.float32(5.0), np.float64(0.1))
    config = calibrate(
        network, tables[0], max_accuracy_drop=np.float32(2.0), guarantee=bound, certify_dataset=tables[1]
    )
    config.save_pretrained(tmp_path)


def test_the_guarantee_goes_with_the_rule(network, tables):
    config = calibrate(network, tables[0], guarantee=RiskBound(3.0), certify_dataset=tables[1])
    assert config.replace(costs=None).guarantee is not None
    assert config.replace(thresholds=config.thresholds).guarantee is not None
    for change in (
        {"thresholds": [0.1, 0.1]},
        {"fallback": "deepest"},
        {"criterion": "margin"},
        {"temperatures": [2.0] * 3},
    ):
        other = config.replace(**change)
        assert (other.guarantee, other.search, other.reference) == (None, None, None)


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


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the package logs, which Transformers does not hand on by itself."""
    monkeypatch.setattr(logging.getLogger("hf_scan"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


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


def test_thresholds_that_are_slower_than_the_plain_network_say_so(tables, warnings):
    network = random_scan_model()
    network.exit_config = ExitConfig(costs=measured())
    slow = calibrate(network, tables[0], beta=1000.0, generations=5, progress=False)
    assert slow.search["cost"] > 1
    assert f"cost {slow.search['cost']:.3f} times what the plain network does (milliseconds" in warnings.text
    warnings.clear()
    assert calibrate(network, tables[0], max_accuracy_drop=5.0).search["cost"] < 1
    assert "plain network does" not in warnings.text


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


def test_images_that_searched_do_not_certify_what_was_rounded(network, tables):
    """The thresholds are others then, and what they were found on is remembered all the same."""
    config = calibrate(network, tables[0], max_accuracy_drop=5.0)
    network.exit_config = config.replace(thresholds=[t and round(t, 2) for t in config.thresholds])
    assert network.exit_config.search is None
    with pytest.raises(ValueError, match="The thresholds were searched on the 'search' split"):
        certify_thresholds(network, tables[0], RiskBound(9.0))
    network.exit_config = ExitConfig()


def test_no_split_takes_both_parts_in_turn(network, tables):
    search, certification = tables
    network.exit_config = calibrate(network, search, guarantee=RiskBound(5.0), certify_dataset=certification)
    with pytest.raises(ValueError, match="certified the thresholds that the model has"):
        calibrate(network, certification, max_accuracy_drop=5.0)
    with pytest.raises(ValueError, match="Thresholds were searched on the 'search' split"):
        calibrate(network, table(500, 7, model=search.model), guarantee=RiskBound(5.0), certify_dataset=search)
    twice = certification.select(np.r_[np.arange(3000), np.arange(3000)])
    with pytest.raises(ValueError, match="certified the thresholds that the model has"):
        calibrate(network, twice, max_accuracy_drop=5.0)
    # Anew, with the parts as they were.
    calibrate(network, search, guarantee=RiskBound(6.0), certify_dataset=certification)
    network.exit_config = ExitConfig()


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


def test_too_few_for_halves_says_so(network):
    rows = table(200, model=network.fingerprint())
    with pytest.raises(CannotCertifyError, match=r"100 samples .*Half of the split's 200 images .* twice as many"):
        calibrate(network, rows, guarantee=RiskBound(1.0))


def test_a_warning_says_what_the_next_thresholds_need(network, tables, caplog):
    few = tables[1].select(np.arange(320))
    with caplog.at_level("WARNING", logger="hf_scan"):
        calibrate(network, tables[0], guarantee=RiskBound(1.0), certify_dataset=few)
    assert "Only the network without early exits keeps the guarantee on the 320 images" in caplog.text
    number = re.search(r"About ([\d,]+) would certify the next cheaper thresholds", caplog.text)
    assert int(number[1].replace(",", "")) > 320


@pytest.mark.parametrize(
    ("targets", "kind", "message"),
    [
        ({"guarantee": 1.0}, TypeError, "The guarantee is 1.0; expected a `RiskBound`"),
        ({"max_accuracy_drop": "0.5"}, TypeError, "`max_accuracy_drop` is '0.5'; expected a number"),
        ({"max_accuracy_drop": 1.0, "temperatures": [1.0]}, ValueError, "`temperatures` holds 1 numbers"),
        (
            {"max_accuracy_drop": 1.0, "criterion": lambda seen: -seen[-1].abs().amax(dim=-1)},
            ValueError,
            "gives scores from -.* expected scores in .0, 1., as thresholds are",
        ),
    ],
)
def test_targets_of_the_wrong_kind(network, tables, targets, kind, message):
    with pytest.raises(kind, match=message):
        calibrate(network, tables[0], **targets)


def test_bounds_are_numbers():
    for bad in ({"max_drop": "1"}, {"delta": None}):
        with pytest.raises(TypeError, match="expected a number"):
            RiskBound(**bad)


def test_settings_of_numpy_can_be_saved(network, tables, tmp_path):
    config = calibrate(network, tables[0], seed=np.int64(3), generations=np.int32(2), progress=False)
    config.save_pretrained(tmp_path)
    assert ExitConfig.from_pretrained(tmp_path) == config


def test_an_image_is_known_by_its_bytes_whatever_the_columns():
    pixels = [np.full((4, 4, 3), value, dtype=np.uint8) for value in range(6)]
    images = Dataset.from_dict({"img": pixels, "fine_label": list(range(6))}).cast_column("img", Image())
    renamed = images.rename_columns({"img": "image", "fine_label": "labels"}).add_column("row", list(range(6)))
    assert np.array_equal(sample_digests(images), sample_digests(renamed))
    assert len(set(sample_digests(images).tolist())) == 6
    assert shared_with(sample_digests(renamed)[:3], some_digests(images)) == (3, 3.0)
    for odd in ("", ": ", "x: y", "0: 0"):  # what a stranger's file may hold
        assert shared_with(sample_digests(images), odd)[0] == 0


def test_halves_keep_what_is_there_twice_together():
    rows = table(100)
    twice = rows.select(np.r_[np.arange(100), np.arange(0, 100, 2)])
    first, second = twice.halves(("a", "b"), seed=3)
    assert len(first) + len(second) == 150
    assert not set(first.samples.tolist()) & set(second.samples.tolist())
    assert (first.split, second.split) == ("a", "b")


def test_a_fingerprint_does_not_depend_on_the_order_or_on_the_transform(network):
    rows = Dataset.from_dict({"image": [[float(i)] * 768 for i in range(30)], "labels": [i % 3 for i in range(30)]})

    def prepare(scale):
        return lambda batch: {
            "pixel_values": [torch.tensor(values).view(3, 16, 16) * scale for values in batch["image"]],
            "labels": batch["labels"],
        }

    plain = collect_exit_logits(network, rows.with_transform(prepare(0.1)))
    other = collect_exit_logits(network, rows.shuffle(seed=0).with_transform(prepare(0.2)))
    assert plain.fingerprint == other.fingerprint
    assert (
        plain.fingerprint
        != collect_exit_logits(network, rows.select(range(29)).with_transform(prepare(1.0))).fingerprint
    )
