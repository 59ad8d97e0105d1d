import pytest
import torch

from hf_scan import ExitConfig
from hf_scan.costs import ExitCosts, count_macs, interleaved_medians, measure_times

from .conftest import random_scan_model


def test_macs_by_hand():
    """A CIFAR ResNet-20 at 32x32: 3x3 convolutions of 16, 32 and 64 channels, two 1x1 shortcuts, a linear layer."""
    costs = count_macs(random_scan_model(num_labels=100, image_size=32, exit_points=["layer1", "layer2"]))
    stem = 32 * 32 * 9 * 3 * 16
    stage_1 = 6 * 32 * 32 * 9 * 16 * 16
    stage_2 = 16 * 16 * (9 * 16 * 32 + 5 * 9 * 32 * 32 + 16 * 32)
    stage_3 = 8 * 8 * (9 * 32 * 64 + 5 * 9 * 64 * 64 + 32 * 64)
    assert costs.stages == [stem + stage_1, stage_2, stage_3]
    assert costs.heads[-1] == 64 * 100
    assert costs.plain == sum(costs.stages) + 6400
    # Brought to 8x8 and 64 channels; depthwise 9 and pointwise 64, at half of that for the mask; a linear layer.
    squeeze = 8 * 8 * (4 * 32 + 32 * 64)
    attention = 2 * 4 * 4 * (9 * 64 + 64 * 64)
    classifier = 8 * 8 * (9 * 64 + 64 * 64) + 64 * 100
    assert costs.heads[1] == squeeze + attention + classifier


def test_cumulative_costs_count_the_heads_that_ran():
    costs = ExitCosts(stages=[100, 200, 300], heads=[10, 20, 5])
    assert costs.plain == 605
    assert costs.cumulative() == [110, 330, 635, 635]
    assert costs.cumulative(ExitConfig(thresholds=[None, 0.5])) == [100, 320, 625, 625]
    # With the deepest exit as fallback, a head that lets nothing go does not run.
    assert costs.cumulative(ExitConfig(thresholds=[1.0, 0.5], fallback="deepest")) == [100, 320, 625, 625]
    assert costs.cumulative(ExitConfig(thresholds=[1.0, 0.5])) == [110, 330, 635, 635]
    assert costs.relative()[0] == pytest.approx(110 / 605)


def test_counting_leaves_the_mode_alone():
    model = random_scan_model().train()
    count_macs(model)
    assert model.training


def test_calls_are_interleaved():
    order = []
    interleaved_medians(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, seconds_per_round=0
    )
    measured = order[-6:]
    assert measured == ["a", "b"] * 3


def test_measured_times_are_of_what_they_say(images, monkeypatch):
    """No seconds are asserted: each call is replaced by one that is told how long it took."""
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.6, None, 0.7])
    seen = {}

    def medians(calls, rounds, seconds_per_round):
        for name, call in calls.items():
            batches = []
            handle = model.backbone.layer3.register_forward_hook(
                lambda m, args, out, b=batches: b.append(len(args[0]))
            )
            call()
            handle.remove()
            seen[name] = sum(batches)
        return {"plain": 4.0, "adaptive": 2.0, "0": 1.0, "1": 2.0, "2": 3.0, "3": 4.0}

    monkeypatch.setattr("hf_scan.costs.interleaved_medians", medians)
    times = measure_times(model, images, batch_size=10)
    answers = model.predict_adaptive(images).exit_index
    assert seen == {"plain": 24, "adaptive": int((answers >= 2).sum()), "0": 0, "1": 0, "2": 24, "3": 24}
    assert times.plain == pytest.approx(4000 / 24)
    assert times.realised_speedup == pytest.approx(2.0)
    assert times.shares == pytest.approx((torch.bincount(answers, minlength=4) / 24).tolist())
    expected = 4 / sum(share * time for share, time in zip(times.shares, (1.0, 2.0, 3.0, 4.0)))
    assert times.predicted_speedup == pytest.approx(expected)
