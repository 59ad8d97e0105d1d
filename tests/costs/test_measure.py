import copy
import itertools
import json
import logging

import pytest
import torch

from hf_scan import ExitConfig, ScanForImageClassification
from hf_scan.costs import (
    MeasuredCosts,
    count_macs,
    count_parameters,
    interleaved_medians,
    measure_costs,
    realised_speedup,
)

from ..conftest import random_scan_model


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


def parameters_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("backbone", ["cifar_resnet20", "vit_tiny_patch16_224"])
def test_every_parameter_is_counted_once(backbone):
    model = random_scan_model(backbone=backbone, image_size=32 if backbone == "cifar_resnet20" else 224)
    costs = count_parameters(model)
    assert costs.plain == parameters_of(model.backbone)
    for head, counted in zip(model.exit_heads, costs.heads):
        assert counted == parameters_of(head) - parameters_of(head.hint_projection)
    small = model.truncate(exit=1)
    assert count_parameters(small).stages == [sum(costs.stages[:2])]
    assert count_parameters(small).heads == [costs.heads[1]]


def on_a_fake_clock(monkeypatch, model):
    """A clock that only the model's parts move: stage k by (k + 1) ms an image, head k by 0.1 ms an image."""
    clock = [0.0]

    def read() -> float:
        clock[0] += 1e-12  # PyTorch divides by what it measured
        return clock[0]

    monkeypatch.setattr("torch.utils.benchmark.utils.timer.timer", read)

    def after(module, milliseconds):
        def tick(module, inputs, output):
            clock[0] += milliseconds / 1000 * len(inputs[0])

        module.register_forward_hook(tick)

    for index in range(model.num_exits):
        after(getattr(model.backbone, f"layer{index + 1}"), index + 1.0)
    for head in model.exit_heads:
        after(head, 0.1)


def test_each_part_gets_its_own_time(monkeypatch):
    model = random_scan_model()
    on_a_fake_clock(monkeypatch, model)
    costs = measure_costs(model, batch_size=6, rounds=2)
    assert sorted(costs.milliseconds) == [1, 2, 4, 6]
    for size, milliseconds in costs.milliseconds.items():
        assert milliseconds.stages == pytest.approx([1.0 * size, 2.0 * size, 3.0 * size])
        assert milliseconds.heads == pytest.approx([0.1 * size, 0.1 * size, 0.0], abs=1e-6)
        assert costs.plain[size] == pytest.approx(6.0 * size)
        assert costs.spread[size].stages == pytest.approx([0, 0, 0], abs=1e-9)
    assert costs.cumulative() == pytest.approx([1.1, 3.2, 6.2, 6.2])
    assert costs.cumulative(ExitConfig(thresholds=[None, 0.5]), batch_size=2) == pytest.approx([1.0, 3.1, 6.1, 6.1])
    assert costs.macs == count_macs(model)


def test_costs_are_saved_with_the_model(tmp_path):
    model = random_scan_model()
    costs = measure_costs(model, batch_size=3, rounds=1)
    assert MeasuredCosts.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5], costs=costs.to_dict())
    model.save_pretrained(tmp_path)
    loaded = ScanForImageClassification.from_pretrained(tmp_path)
    assert MeasuredCosts.from_dict(loaded.exit_config.costs) == costs
    # They are those of other exits once there are others.
    for exit_config in (model.exit_config, ExitConfig(costs=costs.to_dict())):
        model.exit_config = exit_config
        model.save_pretrained(tmp_path)
        with_fewer = ScanForImageClassification.from_pretrained(tmp_path, exit_points=["layer1"])
        assert with_fewer.exit_config.costs is None


def test_measuring_elsewhere_leaves_the_model_alone():
    model = random_scan_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    costs = measure_costs(model, dtype=torch.float64, threads=threads + 1, rounds=1)
    assert (costs.dtype, costs.threads) == ("float64", threads + 1)
    assert f"{threads + 1} threads" in costs.machine
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())


def test_a_truncated_network_has_costs_too(images):
    small = random_scan_model().truncate(exit=0)
    costs = measure_costs(small, batch_size=2, rounds=1)
    assert len(costs.milliseconds[2].stages) == len(costs.milliseconds[2].heads) == 1
    assert realised_speedup(small, images, batch_size=8, rounds=1).shares == [0.0, 1.0]


def test_where_time_is_proportional_batches_do_not_matter(monkeypatch):
    model = random_scan_model()
    on_a_fake_clock(monkeypatch, model)
    costs = measure_costs(model, batch_size=8, rounds=1)
    shares = [0.4, 0.3, 0.2, 0.1]
    expected = sum(share * cost for share, cost in zip(shares, costs.cumulative()))
    for batch_size in (1, 2, 4, 8):
        for refilled in (False, True):
            found = costs.expected_milliseconds(shares, batch_size=batch_size, refilled=refilled)
            assert found == pytest.approx(expected, rel=1e-5)


def test_bad_requests():
    model = random_scan_model()
    for wrong in ({"batch_size": 0}, {"threads": 0}, {"rounds": 0}):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            measure_costs(model, **wrong)
    with pytest.raises(ValueError, match=r"call `model\.eval\(\)`|Call `model\.eval\(\)`"):
        measure_costs(model.train())


@pytest.mark.parametrize("refilled", [False, True])
def test_realised_speedup_is_of_what_it_says(images, monkeypatch, refilled):
    """By a clock that only the model's parts move, and by the batches that reach the last stage."""
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.6, None, 0.7])
    answers = model.predict_adaptive(images).exit_index
    on_a_fake_clock(monkeypatch, model)
    batches = []
    model.backbone.layer3.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    measured = realised_speedup(model, images, batch_size=4, refilled=refilled, rounds=3)
    assert measured.shares == pytest.approx((torch.bincount(answers, minlength=4) / 24).tolist())
    # Every image runs the first stage and its head, and what did not exit there the other stages.
    left = int((answers >= 2).sum())
    assert measured.plain == pytest.approx(1 + 2 + 3)
    assert measured.adaptive == pytest.approx((24 * (1 + 0.1) + left * (2 + 3)) / 24)
    assert measured.speedup == pytest.approx(measured.plain / measured.adaptive)
    # Both run four times to warm up, then in turns; in the end, it is seen where images exit.
    shrunk = [count for batch in answers.split(4) if (count := int((batch >= 2).sum()))]
    refills = [min(4, left - start) for start in range(0, left, 4)]
    assert sum(refills) == sum(shrunk) == left
    plain, adaptive = [4] * 6, refills if refilled else shrunk
    assert batches == plain * 4 + adaptive * 4 + (plain + adaptive) * 3 + shrunk


def whole_networks(model) -> list[int]:
    """Compile the stages, and note how often a compiled form of the whole backbone runs."""
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.backbone.modules())
    runs = []

    def backend(graph, example_inputs):
        counted = sum(node.op == "call_function" and "conv2d" in str(node.target) for node in graph.graph.nodes)

        def run(*arguments):
            if counted == convolutions:
                runs.append(counted)
            return graph.forward(*arguments)

        return run

    model.compile_stages(backend=backend)
    return runs


def test_compiled_stages_are_compared_with_a_compiled_network(images):
    """In what is realised, and in the costs from which speed-ups are predicted."""
    torch.compiler.reset()
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.6, 0.7])
    runs = whole_networks(model)
    realised_speedup(model, images[:8], batch_size=4, rounds=3)
    assert len(runs) == 2 * (2 + 2 + 3)  # batches, and calls that warm up, tell how long one takes, and are measured
    runs.clear()
    measure_costs(model, rounds=1)
    assert len(runs) > 1
    runs.clear()
    realised_speedup(model, images[:8], batch_size=4, rounds=3, plain=model.backbone)
    assert not runs
    torch.compiler.reset()


def test_the_plain_network_may_be_any_compiled_module(images):
    """Which has a length where the module has one, and so no truth value."""
    torch.compiler.reset()
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.6, 0.7])
    plain = torch.compile(model.backbone, backend="eager")
    assert realised_speedup(model, images, batch_size=8, rounds=1, plain=plain).plain > 0
    torch.compiler.reset()


def test_shares_say_where_images_leave_and_not_who_answers(images):
    """Nothing leaves, and the most confident exit, often an early one, answers at the end."""
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[1.0, 1.0, 1.0], fallback="most_confident")
    assert (model.predict_adaptive(images).exit_index < 2).any()
    assert realised_speedup(model, images, batch_size=8, rounds=1).shares == [0.0, 0.0, 0.0, 1.0]


def test_noise_is_said(model, caplog, monkeypatch):
    """A machine whose clock jumps is warned of; the spread is kept with the costs."""
    costs = measure_costs(model, batch_size=2, rounds=2)
    assert set(costs.plain_spread) == {1, 2}
    assert costs.noise[2] == pytest.approx(costs.plain_spread[2] / costs.plain[2])
    assert MeasuredCosts.from_dict(costs.to_dict()) == costs
    older = costs.to_dict()
    del older["plain_spread"]
    assert MeasuredCosts.from_dict(older).noise == {}
    monkeypatch.setattr(logging.getLogger("hf_scan"), "propagate", True)
    for clock in ([1.0], [1.0, 1.0, 9.0]):
        caplog.clear()
        seconds = itertools.cycle(clock)
        timed = copy.copy(model)
        # As an exported network times itself.
        timed.time_parts = lambda images, seconds=seconds: [next(seconds)] * (2 * model.num_exits + 1)
        measure_costs(timed, rounds=9)
        assert ("vary by" in caplog.text) == (len(clock) > 1)
