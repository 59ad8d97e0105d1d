import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_scan import ExitConfig, RiskBound, apply_exit_rule, calibrate, certify_thresholds
from hf_scan.calibration import (
    CannotCertifyError,
)
from hf_scan.costs import count_macs

from ..conftest import random_scan_model
from .samples import dataset, measured, table


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
    for rows in (tables[0], tables[0].select(np.arange(999), "new"), replace(others, **mixed)):
        with pytest.raises(ValueError, match=r"were searched on the '(search|new|certify)' split, or a part of it"):
            certify_thresholds(network, rows, RiskBound(5.0))
    assert certify_thresholds(network, tables[1], RiskBound(5.0)).guarantee["n"] == 3000


@pytest.mark.slow
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


def test_thresholds_that_are_slower_than_the_plain_network_say_so(tables, warnings):
    network = random_scan_model()
    network.exit_config = ExitConfig(costs=measured())
    slow = calibrate(network, tables[0], beta=1000.0, generations=5, progress=False)
    assert slow.search["cost"] > 1
    assert f"cost {slow.search['cost']:.3f} times as much as the plain network (milliseconds" in warnings.text
    warnings.clear()
    assert calibrate(network, tables[0], max_accuracy_drop=5.0).search["cost"] < 1
    assert "as much as the plain network" not in warnings.text


def test_too_few_for_halves_says_so(network):
    rows = table(200, model=network.fingerprint())
    with pytest.raises(CannotCertifyError, match=r"100 samples .*Half of the split's 200 images .* twice as many"):
        calibrate(network, rows, guarantee=RiskBound(1.0))


def test_a_warning_says_what_the_next_thresholds_need(network, tables, caplog):
    few = tables[1].select(np.arange(320))
    with caplog.at_level("WARNING", logger="hf_scan"):
        calibrate(network, tables[0], guarantee=RiskBound(1.0), certify_dataset=few)
    assert "Only the network without early exits is certified on the 320 images" in caplog.text
    number = re.search(r"About ([\d,]+) would certify the next cheaper thresholds", caplog.text)
    assert int(number[1].replace(",", "")) > 320


def test_settings_of_numpy_can_be_saved(network, tables, tmp_path):
    config = calibrate(network, tables[0], seed=np.int64(3), generations=np.int32(2), progress=False)
    config.save_pretrained(tmp_path)
    assert ExitConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("fallback", ["ensemble", "deepest"])
def test_calibrate_predicts_what_predict_adaptive_does(fallback):
    """Accuracy and cost that the search promises are those of real answers on the same images."""
    model = random_scan_model()
    config = calibrate(model, dataset(), fallback=fallback, threshold_range=0.7, beta=0.02, progress=False)
    answer = model.predict_adaptive(torch.stack([row["pixel_values"] for row in dataset()]), config)
    labels = torch.tensor([row["labels"] for row in dataset()])
    assert len(answer.exit_index.unique()) > 1
    assert config.search["accuracy"] == pytest.approx(float((answer.logits.argmax(-1) == labels).float().mean()))
    costs = torch.tensor(count_macs(model).relative())
    assert config.search["cost"] == pytest.approx(float(costs[answer.exit_index].mean()), rel=1e-5)
    assert config.search["n"] == 70
    assert len(config.thresholds) == (3 if fallback == "ensemble" else 2)
    assert config.fallback == fallback


def test_empty_split(model):
    with pytest.raises(ValueError, match="The 'search' split is empty"):
        calibrate(model, [])
