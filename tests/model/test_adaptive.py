import copy
import math
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchFeature
from transformers.utils import logging

from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification, apply_exit_rule, measure_costs
from hf_scan.calibration import answering_column
from hf_scan.model.exit_criteria import EXIT_CRITERIA
from hf_scan.model.exit_rule import exit_columns, plan_exits

from ..conftest import random_scan_model


threshold = st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(0.2, 1.0))
policies = st.builds(
    lambda thresholds, fallback, criterion, temperatures: {
        "thresholds": thresholds,
        "fallback": fallback,
        "criterion": criterion,
        "temperatures": temperatures,
    },
    st.one_of(st.lists(threshold, min_size=3, max_size=3), st.lists(threshold, min_size=2, max_size=2)),
    st.sampled_from(["ensemble", "deepest", "most_confident"]),
    st.sampled_from(["confidence", "margin", "entropy", "patience", "ensemble_confidence"]),
    st.one_of(st.none(), st.lists(st.floats(0.5, 3), min_size=3, max_size=3)),
)


def softmax(row: np.ndarray) -> np.ndarray:
    exponentials = np.exp(row - row.max())
    return exponentials / exponentials.sum()


def score_by_hand(criterion: str, seen: list[np.ndarray]) -> float:
    """How sure the last of some exits is of one sample, in float64, from logits at their temperatures."""
    probabilities = softmax(np.mean(seen, axis=0) if criterion == "ensemble_confidence" else seen[-1])
    if criterion == "margin":
        second, first = np.sort(probabilities)[-2:]
        return first - second
    if criterion == "entropy":
        return 1 + sum(p * math.log(p) for p in probabilities) / math.log(len(probabilities))
    if criterion == "patience":
        classes = [int(row.argmax()) for row in seen]
        agreeing = next((n for n, label in enumerate(reversed(classes)) if label != classes[-1]), len(classes))
        return agreeing / (agreeing + 1)
    return probabilities.max()


def rule_by_hand(
    exit_logits: list[np.ndarray], thresholds: list, fallback: str, criterion: str, temperatures: list | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The rule one sample at a time; and how near a score came to its threshold."""
    logits, exits, nearest = [], [], 1.0
    for rows in zip(*exit_logits):
        seen, scaled, places = [], [], []
        for index, row in enumerate(rows):
            limit = thresholds[index] if index < len(thresholds) else None
            deepest = index == len(rows) - 1
            if limit is None and not deepest:
                continue
            seen.append(row)
            scaled.append(row / (temperatures[index] if temperatures else 1))
            places.append(index)
            if limit is None or limit >= 1 or (deepest and fallback == "deepest"):
                continue
            score = score_by_hand(criterion, scaled)
            nearest = min(nearest, abs(score - limit))
            if score > limit:
                answer, where = row, index
                break
        else:
            answer, where = np.mean(seen, axis=0), len(rows)
            if fallback == "deepest":
                answer, where = rows[-1], len(rows) - 1
            elif fallback == "most_confident":
                confidences = [softmax(row).max() for row in scaled]
                best = int(np.argmax(confidences))
                nearest = min([nearest, *(confidences[best] - c for c in confidences if c != confidences[best])])
                answer, where = seen[best], places[best]
        logits.append(answer)
        exits.append(where)
    return np.array(logits), np.array(exits), nearest


def problem_of(criterion: str) -> str:
    """The `problem_type` of networks that take a criterion."""
    return f"{'multi' if criterion == 'label_confidence' else 'single'}_label_classification"


def test_the_network_of_these_tests_uses_every_exit(model, images):
    assert model.predict_adaptive(images, thresholds=[0.6, 0.6, 0.6]).exit_index.unique().tolist() == [0, 1, 2, 3]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, batch_size=st.integers(1, 24), seed=st.integers(0, 2**16))
def test_equals_the_rule_on_full_logits_for_any_batch(model, images, policy, batch_size, seed):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        exit_logits = model(images).exit_logits
    expected, exits, nearest = rule_by_hand([logits.double().numpy() for logits in exit_logits], **policy)
    assume(nearest > 1e-5)  # else two roundings may differ

    answers = [model.predict_adaptive(images[rows], **policy) for rows in order.split(batch_size)]
    back = order.argsort()
    assert torch.cat([answer.exit_index for answer in answers])[back].tolist() == exits.tolist()
    logits = torch.cat([answer.logits for answer in answers])[back]
    torch.testing.assert_close(logits.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    # Each confidence is that of the answer, at its exit's temperature.
    temperatures = torch.tensor([*(policy["temperatures"] or [1.0] * 3), 1.0])[torch.from_numpy(exits)]
    confidence = torch.cat([answer.confidence for answer in answers])[back]
    torch.testing.assert_close(confidence, (logits / temperatures[:, None]).softmax(-1).amax(-1))

    simulated = apply_exit_rule(exit_logits, ExitConfig(**policy))
    assert simulated.exit_index.tolist() == exits.tolist()
    torch.testing.assert_close(simulated.logits.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(simulated.confidence, confidence, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, batch_size=st.integers(1, 24))
def test_a_stage_runs_for_the_survivors_and_for_no_others(model, images, policy, batch_size):
    """Counts the samples that every stage and head is given."""
    assume(policy["fallback"] != "most_confident")  # which answers with an exit after all of them
    config = ExitConfig(**policy)
    seen: Counter[str] = Counter()
    handles = []
    for name, module in [
        *((f"stage {i}", model.backbone.get_submodule(s.name)) for i, s in enumerate(model.stages)),
        *((f"head {i}", head) for i, head in enumerate(model.exit_heads)),
    ]:

        def hook(module, args, output, name=name):
            seen[name] += len(args[0])

        handles.append(module.register_forward_hook(hook))
    try:
        exits = torch.cat([model.predict_adaptive(b, config).exit_index for b in images.split(batch_size)])
    finally:
        for handle in handles:
            handle.remove()
    for index in range(model.num_exits):
        # Who answers at this exit or behind it has needed the stage.
        here = int((exits >= index).sum())
        assert seen[f"stage {index}"] == here
        if index < model.num_exits - 1:
            assert seen[f"head {index}"] == (here if plan_exits(config, model.num_exits)[index][0] else 0)


@pytest.mark.parametrize("criterion", ["confidence", "patience"])
@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
@pytest.mark.parametrize("thresholds", [[0.5, 0.4, 0.6], [0.5, None, 1.0], [None, None, 0.3], [1.0, 0.6, None]])
def test_the_rule_on_tables_agrees(model, images, thresholds, fallback, criterion):
    """Search and metrics work on columns of scores and classes; they must mean the same."""
    with torch.no_grad():
        exit_logits = model(images).exit_logits
    config = ExitConfig(thresholds=thresholds, fallback=fallback, criterion=criterion)
    predictions, scores = (column.numpy() for column in exit_columns(exit_logits, config))
    columns = 3 + (fallback != "deepest")
    answers = answering_column(scores[:, :columns], thresholds[: columns - 1])
    simulated = apply_exit_rule(exit_logits, config)
    assert predictions[np.arange(24), answers].tolist() == simulated.logits.argmax(-1).tolist()
    if fallback != "most_confident":  # whose answers come from an exit too
        assert answers.tolist() == simulated.exit_index.tolist()


def test_thresholds_0_and_1_are_the_first_exit_and_the_fallback(model, images):
    assert model.predict_adaptive(images, thresholds=[0.0, 0.0]).exit_index.unique().tolist() == [0]
    assert model.predict_adaptive(images, thresholds=[1.0, 1.0, 1.0]).exit_index.unique().tolist() == [3]
    deepest = model.predict_adaptive(images, thresholds=[1.0, 1.0], fallback="deepest")
    assert deepest.exit_index.unique().tolist() == [2]
    with torch.inference_mode():
        assert torch.equal(deepest.logits, model.backbone(images))


def test_the_models_own_configuration_is_the_default(images):
    model = random_scan_model()
    model.exit_config = ExitConfig(thresholds=[0.0, 0.0, 0.0])
    assert model.predict_adaptive(images).exit_index.unique().tolist() == [0]
    assert model.predict_adaptive(images, thresholds=[None, 0.0, 0.0]).exit_index.unique().tolist() == [1]
    for zeros in ((0, 0), np.zeros(2, dtype=np.float32), torch.zeros(2)):
        assert model.predict_adaptive(images, thresholds=zeros).exit_index.unique().tolist() == [0]
    assert model.exit_config.thresholds == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("count", [1, 4])
def test_wrong_number_of_thresholds(model, images, count):
    with pytest.raises(ValueError, match=rf"holds {count} numbers and the network has 3 exits; expected 3, or 2"):
        model.predict_adaptive(images, thresholds=[0.5] * count)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_thresholds_out_of_range(model, images, value):
    with pytest.raises(ValueError, match=r"expected numbers in \[0, 1\], or None to switch an exit off"):
        model.predict_adaptive(images, thresholds=[0.5, value])


@pytest.mark.parametrize("thresholds", [0.5, ["a", 0.5]])
def test_thresholds_that_are_no_numbers(model, images, thresholds):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\] or None for each exit"):
        model.predict_adaptive(images, thresholds=thresholds)


def test_no_thresholds_and_unknown_arguments(model, images):
    with pytest.raises(ValueError, match=r"no thresholds to exit by\. Pass `thresholds="):
        model.predict_adaptive(images)
    with pytest.raises(TypeError, match=r"no \['treshold'\]; expected some of"):
        model.predict_adaptive(images, treshold=0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_pixels(model, images, value):
    images = images.clone()
    images[3, 1, 2, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite values at position 3 of the batch; expected finite"):
        model.predict_adaptive(images, thresholds=[0.5, 0.5])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda images: BatchFeature({"pixel_values": images}),
        lambda images: BatchFeature({"pixel_values": list(images.numpy())}),
        lambda images: {"pixel_values": images, "labels": torch.zeros(len(images))},
        lambda images: (images, torch.zeros(len(images), dtype=torch.long)),
        lambda images: [images],
        lambda images: list(images),
        lambda images: images.numpy(),
        lambda images: next(iter(DataLoader(TensorDataset(images), batch_size=len(images)))),
    ],
)
@pytest.mark.parametrize("count", [2, 5])
def test_images_in_whatever_holds_them(model, images, wrap, count):
    """Two images in a list are no pair of images and labels."""
    images, policy = images[:count].float(), {"thresholds": [0.5, 0.5]}
    expected = model.predict_adaptive(images, **policy).logits
    assert torch.equal(model.predict_adaptive(wrap(images), **policy).logits, expected)
    assert torch.equal(model(wrap(images)).logits, model(images).logits)
    streamed = list(model.predict_adaptive_stream([wrap(images)], batch_size=count, ordered=True, **policy))
    torch.testing.assert_close(torch.cat([some.logits for some in streamed]), expected)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (Image.new("RGB", (16, 16)), "Image"),
        ([Image.new("RGB", (16, 16))] * 2, r"list of \['Image'\]"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 8, 8)], r"list of \['Tensor'\]"),
        ({"images": torch.zeros(1, 3, 16, 16)}, "dict"),
        ("cat.png", "str"),
        (None, "NoneType"),
    ],
)
def test_what_holds_no_images_is_named(model, given, found):
    with pytest.raises(TypeError, match=rf"The images are a {found}; expected a tensor .*image processor"):
        model.predict_adaptive(given, thresholds=[0.5, 0.5])


def test_training_mode_is_refused(images):
    with pytest.raises(ValueError, match=r"training mode.*Call `model\.eval\(\)` first"):
        random_scan_model().train().predict_adaptive(images, thresholds=[0.5, 0.5])


@pytest.mark.parametrize("name", ["backbone", "backbone.bn1", "exit_heads", "exit_heads.1"])
def test_one_module_in_training_mode_is_refused(images, name):
    """Put into it alone, before or after the first answer."""
    model = random_scan_model()
    for _ in range(2):
        model.get_submodule(name).train()
        for call in (
            lambda: model.predict_adaptive(images, thresholds=[0.5, 0.5]),
            lambda: list(model.predict_adaptive_stream([images], batch_size=8, thresholds=[0.5, 0.5])),
            lambda: measure_costs(model, batch_size=1, rounds=1),
            lambda: copy.deepcopy(model).predict_adaptive(images, thresholds=[0.5, 0.5]),
        ):
            with pytest.raises(ValueError, match=r"a module of it is in training mode.*Call `model\.eval\(\)` first"):
                call()
        model.get_submodule(name).eval()
        model.predict_adaptive(images, thresholds=[0.5, 0.5])


@pytest.mark.parametrize("way", ["forward", "batch", "stream"])
def test_pixels_from_0_to_255_are_warned_of_once(model, way, caplog):
    def answer(images: torch.Tensor) -> None:
        if way == "forward":
            model(images)
        elif way == "batch":
            model.predict_adaptive(images, thresholds=[0.5, 0.5])
        else:
            list(model.predict_adaptive_stream([images], batch_size=4, thresholds=[0.5, 0.5]))

    raw = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    white = (1 - torch.tensor(model.config.preprocessing["mean"])) / torch.tensor(model.config.preprocessing["std"])
    logging.enable_propagation()
    logging.warning_once.cache_clear()
    try:
        for images in (raw, white.reshape(1, 3, 1, 1).expand(4, 3, 16, 16)):
            answer(images)
        assert "are not scaled by the network" not in caplog.text
        for _ in range(2):
            answer(255 * raw)
    finally:
        logging.disable_propagation()
    assert caplog.text.count("Prepare images with it; pixels from 0 to 255 are not scaled") == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("criterion", "oracle", "`criterion` is 'oracle'; expected one of"),
        ("temperatures", [1.0, 0.0, 1.0], "`temperatures` is .*; expected a number above 0"),
        ("temperatures", [1.0], "`temperatures` holds 1 numbers and the network has 3 exits"),
    ],
)
def test_bad_criteria_and_temperatures(model, images, field, value, message):
    with pytest.raises(ValueError, match=message):
        model.predict_adaptive(images, thresholds=[0.5, 0.5], **{field: value})


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_the_depth_can_be_capped(model, images, fallback):
    """Whoever would go on gets the fallback of what has run, and nothing behind runs."""
    policy = {"thresholds": [0.6, 0.6, 0.6], "fallback": fallback}
    calls = Counter()
    handle = model.backbone.layer3.register_forward_hook(lambda *_: calls.update(["layer3"]))
    capped = model.predict_adaptive(images, max_exit=1, **policy)
    handle.remove()
    assert not calls
    with torch.no_grad():
        logits = model(images).exit_logits[:2]
    confidences = torch.stack(logits).softmax(-1).amax(-1)
    first, second = confidences > 0.6
    rest = {
        "ensemble": (torch.stack(logits).mean(0), torch.full((24,), 3)),
        "deepest": (logits[1], torch.full((24,), 1)),
        "most_confident": (torch.stack(logits)[confidences.argmax(0), torch.arange(24)], confidences.argmax(0)),
    }[fallback]
    expected = torch.where(first[:, None], logits[0], torch.where(second[:, None], logits[1], rest[0]))
    torch.testing.assert_close(capped.logits, expected, rtol=1e-4, atol=1e-4)
    assert capped.exit_index.tolist() == torch.where(first, 0, torch.where(second, 1, rest[1])).tolist()
    assert (~first & ~second).any()


def test_a_deadline_gives_everyone_the_best_answer_so_far(model, images, monkeypatch):
    """On a clock that moves by 10 ms a stage: 25 ms are enough for two of them, not for a third."""
    clock = iter(np.arange(0.0, 1.0, 0.01))
    monkeypatch.setattr("hf_scan.model.adaptive.time.perf_counter", lambda: next(clock))
    policy = {"thresholds": [0.6, 1.0, 0.6], "fallback": "deepest"}
    answer = model.predict_adaptive(images, max_time_ms=25, **policy)
    assert answer.exit_index.unique().tolist() == [0, 1]  # the second exit answers, though nothing can leave there
    clock = iter(np.arange(0.0, 1.0, 0.01))
    first = model.predict_adaptive(images, max_time_ms=0.001, **policy)
    with torch.no_grad():
        torch.testing.assert_close(first.logits, model(images).exit_logits[0])
    clock = iter(np.arange(0.0, 1.0, 0.01))
    assert model.predict_adaptive(images, max_time_ms=1000, **policy).exit_index.unique().tolist() == [0, 2]
    clock = iter(np.arange(0.0, 1.0, 0.01))
    off = model.predict_adaptive(images, max_time_ms=0.001, thresholds=[None, 0.6, 0.6])
    assert off.exit_index.unique().tolist() == [1, 3]  # the first exit that is on is always computed


@pytest.mark.parametrize("limit", [{"max_time_ms": 0}, {"max_time_ms": -1.0}, {"max_exit": 3}, {"max_exit": -1}])
def test_limits_out_of_range(model, images, limit):
    ((name, value),) = limit.items()
    with pytest.raises(ValueError, match=f"`{name}` is {value}; expected"):
        model.predict_adaptive(images, thresholds=[0.5, 0.5], **limit)


@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_network_whose_answers_are_not_finite(images, fallback, criterion, batch_size):
    """Such logits leave at no exit, whatever the thresholds."""
    model = random_scan_model(problem_type=problem_of(criterion))
    with torch.no_grad():
        for head in (*(head.classifier.fc for head in model.exit_heads), model.backbone.get_classifier()):
            head.bias[0] = math.nan
    policy = {"thresholds": [0.0, 0.0, 0.0], "fallback": fallback, "criterion": criterion}
    with pytest.raises(ValueError, match="logits that are not finite"):
        model.predict_adaptive(images[:batch_size], **policy)
    with pytest.raises(ValueError, match="logits that are not finite"):
        list(model.predict_adaptive_stream([images], batch_size=batch_size, **policy))


class TensorMemory(TorchDispatchMode):
    """The most bytes that tensors which are made while it is on hold at a time."""

    def __init__(self):
        super().__init__()
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("threshold", [math.nextafter(1, 0), 0.5])
def test_exits_take_no_more_memory_than_the_plain_network_does(compiled, threshold):
    """At the finest maps, where a head's are as large as the stage's. A few numbers for each image aside."""
    model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    images = torch.rand(16, 3, 32, 32)

    def peak(call):
        call(images)
        with TensorMemory() as memory:
            call(images)
        return memory.peak

    with torch.inference_mode():
        plain = peak(model.backbone)
        if compiled:
            model.compile_stages(backend="eager")
        assert peak(partial(model.predict_adaptive, thresholds=[threshold] * 3)) <= 1.01 * plain


def test_bad_images_are_skipped_and_the_others_answered(model, images):
    bad = images.clone()
    bad[3, 1, 2, 2], bad[8, 0, 0, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="at positions 3, 8 of the batch"):
        model.predict_adaptive(bad, thresholds=[0.6, 0.6])
    answer = model.predict_adaptive(bad, thresholds=[0.6, 0.6], on_error="skip")
    expected = model.predict_adaptive(images, thresholds=[0.6, 0.6])
    good = [row for row in range(len(images)) if row not in (3, 8)]
    assert answer.exit_index[[3, 8]].tolist() == [-1, -1]
    assert answer.logits[[3, 8]].isnan().all()
    assert torch.equal(answer.exit_index[good], expected.exit_index[good])
    torch.testing.assert_close(answer.logits[good], expected.logits[good])
    nothing = model.predict_adaptive(bad[3:4], thresholds=[0.6, 0.6], on_error="skip")
    assert nothing.exit_index.tolist() == [-1]
    assert nothing.logits.shape == (1, 5)


@pytest.mark.parametrize("criterion", sorted(EXIT_CRITERIA))
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("fallback", ["ensemble", "deepest", "most_confident"])
def test_logits_that_are_not_finite_leave_at_no_exit(images, criterion, value, fallback):
    """Whatever the criterion makes of them, and alone as in a batch; the others in the batch are answered."""
    model = random_scan_model(problem_type=problem_of(criterion))
    run_exit, answers_of_the_third = model.run_exit, model(images[2:3]).exit_logits

    def spoiled(index, state):
        logits = run_exit(index, state).clone()
        third = (logits - answers_of_the_third[index]).abs().amax(dim=1) < 1e-4
        logits[third, 2] = value
        return logits

    model.run_exit = spoiled
    policy = {"thresholds": [0.0, 0.0, 0.0], "criterion": criterion, "fallback": fallback}
    with pytest.raises(ValueError, match="not finite at position 0 of the batch"):
        model.predict_adaptive(images[2:3], **policy)
    with pytest.raises(ValueError, match="not finite at position 2 of the batch"):
        model.predict_adaptive(images[:6], **policy)
    answer = model.predict_adaptive(images[:6], on_error="skip", **policy)
    assert (answer.exit_index == -1).tolist() == [False, False, True, False, False, False]
    assert answer.logits[[0, 1, 3, 4, 5]].isfinite().all()
