import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from scipy.stats import binomtest

from hf_scan import AdaptiveOutput, ExitConfig, ExitMonitor, calibrate
from hf_scan.calibration.monitor import Drift, count_answers

from ..conftest import random_scan_model


def pictures(n: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def calibrated():
    model = random_scan_model()
    rows = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(pictures(400, seed=1))]
    model.exit_config = calibrate(model, rows, max_macs=7e6)
    return model


def test_counts_are_those_of_the_answers(calibrated):
    monitor = ExitMonitor(calibrated)
    images = pictures(50, seed=2)
    answers = [monitor.predict(batch) for batch in images.split(16)]
    alone = calibrated.predict_adaptive(images)
    assert torch.equal(torch.cat([answer.exit_index for answer in answers]), alone.exit_index)
    assert monitor.counts.sum(axis=1).tolist() == alone.exit_index.bincount(minlength=4).tolist()
    by_hand = np.histogram(alone.confidence[alone.exit_index == 0].numpy(), bins=20, range=(0, 1))[0]
    assert monitor.counts[0].tolist() == by_hand.tolist()
    assert sum(monitor.exit_shares) == pytest.approx(1)
    monitor.reset()
    assert monitor.counts.sum() == 0


def test_a_confidence_of_one_is_in_the_last_bin():
    answers = AdaptiveOutput(torch.zeros(3, 2), torch.tensor([0, 2, 2]), torch.tensor([1.0, 0.0, 0.999]))
    counts = count_answers(answers, num_exits=2, bins=4)
    assert counts.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]]


def test_the_reference_is_what_was_seen_when_thresholds_were_found(calibrated):
    monitor = ExitMonitor(calibrated)
    monitor.predict(pictures(400, seed=1))
    assert np.array_equal(monitor.counts, monitor.reference)
    assert monitor.exit_shares == monitor.exit_shares_at_calibration
    assert monitor.drift().distance == 0
    assert monitor.drift().p_value == pytest.approx(1)


def test_drift(calibrated):
    same, other = ExitMonitor(calibrated), ExitMonitor(calibrated)
    assert same.drift().n == 0
    same.predict(pictures(400, seed=3))
    other.predict(pictures(400, seed=3, scale=3.0))
    assert same.drift().p_value > 0.001
    assert other.drift().p_value < 1e-6
    assert other.drift().distance > same.drift().distance


@pytest.mark.parametrize(("reference", "live"), [(10_000, 20), (10_000, 200), (1_000, 1_000)])
def test_the_test_keeps_its_level(calibrated, reference, live):
    """Few images in use against many at calibration, both of one kind."""
    monitor = ExitMonitor(calibrated)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(monitor.reference.size, 0.1))
    p_values = []
    for _ in range(300):
        monitor.reference, monitor.counts = (
            rng.multinomial(n, shares).reshape(monitor.reference.shape) for n in (reference, live)
        )
        p_values.append(monitor.drift().p_value)
    # 300 tests at the level of a twentieth reject more than 28 times with a probability of a thousandth.
    assert (np.array(p_values) < 0.05).sum() <= 28


def test_images_of_the_kind_seldom_look_like_drift(calibrated):
    p_values = []
    for seed in range(40):
        monitor = ExitMonitor(calibrated)
        monitor.predict(pictures(200, seed=10 + seed))
        p_values.append(monitor.drift().p_value)
    # At most a twentieth is below a twentieth; of 40, more than 8 with a probability of a thousandth.
    assert (np.array(p_values) < 0.05).sum() <= 8


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [7, 13, 10]])
def test_every_fourth_also_runs_to_the_end(calibrated, sizes):
    monitor = ExitMonitor(calibrated, shadow_every=4)
    images = pictures(30, seed=4)
    ran = []
    handle = calibrated.backbone.register_forward_pre_hook(lambda module, inputs: ran.append(inputs[0]))
    for batch in images.split(sizes):
        monitor.predict(batch)
    handle.remove()
    assert torch.equal(torch.cat(ran), images[::4])
    found = monitor.disagreement()
    with torch.no_grad():
        deepest = calibrated(images[::4]).logits.argmax(-1)
    differing = int((calibrated.predict_adaptive(images[::4]).logits.argmax(-1) != deepest).sum())
    assert (found.n, found.rate) == (8, differing / 8)
    interval = binomtest(differing, 8).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == (interval.low, interval.high)


def test_answers_of_a_stream(calibrated):
    monitor = ExitMonitor(calibrated, shadow_every=2)
    for answers in calibrated.predict_adaptive_stream(pictures(40, seed=5).split(10), batch_size=8):
        monitor.update(answers)
    assert monitor.counts.sum() == 40
    assert monitor.disagreement().n == 0
    assert np.isnan(monitor.disagreement().rate)


def test_prometheus_reads_it(calibrated):
    monitor = ExitMonitor(calibrated, shadow_every=1)
    registry = CollectorRegistry()
    registry.register(monitor)
    answers = monitor.predict(pictures(20, seed=6))
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    counted = {s.labels["exit"]: s.value for s in families["hf_scan_answers"].samples if s.name.endswith("_total")}
    assert counted == {str(i): n for i, n in enumerate(answers.exit_index.bincount(minlength=4).tolist())}
    sums = [s.value for s in families["hf_scan_confidence"].samples if s.name.endswith("_sum")]
    assert sum(sums) == pytest.approx(float(answers.confidence.sum()), rel=1e-5)
    infinite = [s.value for s in families["hf_scan_confidence"].samples if s.labels.get("le") == "+Inf"]
    assert sum(infinite) == 20
    assert families["hf_scan_shadow_samples"].samples[0].value == 20
    assert families["hf_scan_drift_p_value"].samples[0].value == pytest.approx(monitor.drift().p_value)


def another(calibrated, **request):
    rows = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(pictures(400, seed=1))]
    return calibrate(calibrated, rows, **request)


def test_other_thresholds_have_another_reference(calibrated):
    """Counts of the former thresholds say nothing about them."""
    before = calibrated.exit_config
    monitor = ExitMonitor(calibrated)
    monitor.predict(pictures(30, seed=7))
    try:
        calibrated.exit_config = another(calibrated, max_macs=5.5e6)
        assert calibrated.exit_config.rule != before.rule
        monitor.predict(pictures(400, seed=1))
        assert np.array_equal(monitor.reference, calibrated.exit_config.reference["counts"])
        assert monitor.drift() == Drift(distance=0.0, p_value=pytest.approx(1.0), n=400)
        # Answers of a stream too, and a threshold that is changed in place.
        answers = calibrated.predict_adaptive(pictures(20, seed=8))
        calibrated.exit_config.thresholds[0] = 0.9
        monitor.update(answers)
        assert monitor.counts.sum() == 20
        calibrated.exit_config = calibrated.exit_config.replace(thresholds=[0.5, 0.5])
        with pytest.raises(ValueError, match="has no `reference` to compare with"):
            monitor.predict(pictures(4, seed=9))
    finally:
        calibrated.exit_config = before


def test_a_reference_of_another_network(calibrated):
    reference = {"bins": 20, "counts": calibrated.exit_config.reference["counts"][1:]}
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5], reference=reference)
    with pytest.raises(ValueError, match="has 3 rows of `counts`, and the network has 3 exits; expected 4 rows"):
        ExitMonitor(model)


def test_images_are_cast_to_the_networks_type(calibrated):
    model = random_scan_model().bfloat16()
    model.exit_config = calibrated.exit_config
    monitor = ExitMonitor(model, shadow_every=2)
    monitor.predict(pictures(8, seed=10))
    assert (monitor.counts.sum(), monitor.disagreement().n) == (8, 4)


def test_skipped_images_are_not_counted(calibrated):
    images = pictures(12, seed=11)
    images[[2, 5]] = torch.nan
    monitor = ExitMonitor(calibrated, shadow_every=2)
    monitor.update(calibrated.predict_adaptive(images, on_error="skip"), images)
    assert (monitor.counts.sum(), monitor.disagreement().n) == (10, 5)
    other = ExitMonitor(calibrated, shadow_every=2)
    other.predict(images[~images.isnan().flatten(1).any(1)])
    assert np.array_equal(monitor.counts, other.counts)
    assert monitor.disagreement() == other.disagreement()


def test_bad_arguments(calibrated):
    with pytest.raises(ValueError, match="`shadow_every` is 0"):
        ExitMonitor(calibrated, shadow_every=0)
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.5, 0.5])
    with pytest.raises(ValueError, match="has no `reference` to compare with"):
        ExitMonitor(model)
