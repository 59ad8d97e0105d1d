import numpy as np
import pytest
import torch

from hf_scan import ExitConfig, apply_exit_rule, calibrate
from hf_scan.calibration import target as target_module
from hf_scan.calibration.cross_fitting import FOLDS
from hf_scan.costs import MeasuredCosts, count_macs

from ..conftest import random_scan_model
from .samples import accuracy_and_cost, measured


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


def test_thresholds_are_chosen_as_cross_fitting_has_judged_them(network, tables, monkeypatch):
    """On a grid as fine as that of the folds: a finer one fits the images that choose more closely than others."""
    frontier, asked = target_module.exit_frontier, []

    def recorded(*given, **settings):
        asked.append(settings)
        return frontier(*given, **settings)

    monkeypatch.setattr(target_module, "exit_frontier", recorded)
    calibrate(network, tables[0], max_accuracy_drop=1.0)
    assert len(asked) == 1 + FOLDS
    assert all(settings == asked[0] for settings in asked)


def test_a_margin_is_kept_above_the_target(network, tables):
    """Where cross-fitting keeps less; what cannot be kept gives the most accurate thresholds."""
    table = tables[0]
    own = calibrate(network, table, max_accuracy_drop=3.0)
    assert calibrate(network, table, max_accuracy_drop=3.0, accuracy_margin=0.001).thresholds == own.thresholds
    kept = calibrate(network, table, max_accuracy_drop=3.0, accuracy_margin=3.0)
    assert own.search["accuracy"] < table.baseline_accuracy <= kept.search["accuracy"] + 1e-12
    assert own.search["cost"] < kept.search["cost"]
    assert kept.search["accuracy_margin"] == 3.0
    assert "accuracy_margin" not in own.search
    # Thresholds that are found anew on the same images keep it, and those on others do not.
    known = random_scan_model()
    known.exit_config = kept
    assert calibrate(known, table, max_accuracy_drop=3.0).search["accuracy_margin"] == 3.0
    assert "accuracy_margin" not in calibrate(known, tables[1], max_accuracy_drop=3.0).search
    assert "accuracy_margin" not in calibrate(known, table, speedup=1.2).search
    most = calibrate(network, table, max_accuracy_drop=0.0, accuracy_margin=50.0)
    assert most.search["accuracy"] >= kept.search["accuracy"]


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
        ({"max_accuracy_drop": 1, "accuracy_margin": -0.1}, "expected points of accuracy from 0 to 100"),
        ({"speedup": 1.5, "accuracy_margin": 0.5}, "belongs to one of .*'max_accuracy_drop'"),
        ({"accuracy_margin": 0.5}, "belongs to one of"),
    ],
)
def test_infeasible_targets(network, tables, target, message):
    with pytest.raises(ValueError, match=message):
        calibrate(network, tables[0], **target)
