import gc
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_scan import ScanConfig, ScanForImageClassification

from ..conftest import random_scan_model, torchrun
from .stream_of_a_process import noise_rows


LIMITS = [0.6, 0.6, 0.6]


def gathered(answers) -> dict[str, torch.Tensor]:
    """All answers, by the order of their ids."""
    answers = list(answers)
    order = torch.cat([answer.ids for answer in answers]).argsort()
    return {name: torch.cat([answer[name] for answer in answers])[order] for name in list(answers[0])}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch_size=st.integers(1, 12),
    criterion=st.sampled_from(["confidence", "patience"]),
    fallback=st.sampled_from(["ensemble", "deepest"]),
    ordered=st.booleans(),
)
def test_stream_and_batch_and_one_by_one_answer_alike(model, images, sizes, batch_size, criterion, fallback, ordered):
    """Whatever the sizes are in which images come, and those in which they are run."""
    images = images[torch.arange(sum(sizes)) % len(images)]
    policy = {"thresholds": [0.61, 0.59, 0.6], "criterion": criterion, "fallback": fallback}
    answers = list(model.predict_adaptive_stream(images.split(sizes), batch_size, ordered=ordered, **policy))
    ids = torch.cat([answer.ids for answer in answers])
    assert sorted(ids.tolist()) == list(range(len(images)))
    if ordered:
        assert ids.tolist() == sorted(ids.tolist())
    found = gathered(answers)
    alone = [model.predict_adaptive(image[None], **policy) for image in images]
    assert torch.equal(found["exit_index"], torch.cat([answer.exit_index for answer in alone]))
    for name in ("logits", "confidence"):
        expected = torch.cat([answer[name] for answer in alone])
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_every_stage_runs_full_batches_until_the_end(model, images):
    """For the survivors and for no others; only the last run of a stage is smaller."""
    images = images.repeat(3, 1, 1, 1)
    seen: dict[str, list[int]] = {stage.name: [] for stage in model.stages}
    handles = [
        model.backbone.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen[name].append(len(args[0]))
        )
        for name in seen
    ]
    try:
        answers = gathered(model.predict_adaptive_stream(images.split(5), 8, thresholds=LIMITS))
    finally:
        for handle in handles:
            handle.remove()
    for index, sizes in enumerate(seen.values()):
        here = int((answers["exit_index"] >= index).sum())
        assert sum(sizes) == here
        assert sizes == [8] * (here // 8) + [here % 8] * (here % 8 > 0)
    assert seen["layer3"][0] == 8


def test_answers_come_before_the_stream_ends(model, images):
    """And little is read ahead: what waits is less than two batches in front of each stage."""
    taken = Counter()

    def stream():
        for image in images.repeat(10, 1, 1, 1):
            taken["images"] += 1
            yield image[None]

    answered = 0
    for answer in model.predict_adaptive_stream(stream(), batch_size=4, thresholds=LIMITS):
        answered += len(answer.ids)
        assert taken["images"] - answered < 2 * 4 * 3
    assert answered == 240


@pytest.mark.parametrize("kind", ["loader", "dictionaries", "rows", "tensor"])
def test_sources(model, images, kind):
    rows = [{"pixel_values": image, "labels": 0} for image in images]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    source = {
        "loader": DataLoader(rows, batch_size=5),
        "dictionaries": ({"pixel_values": part} for part in images.split(7)),
        "rows": Rows(),
        "tensor": images,
    }[kind]
    found = gathered(model.predict_adaptive_stream(source, batch_size=6, thresholds=LIMITS))
    expected = model.predict_adaptive(images, thresholds=LIMITS)
    assert torch.equal(found["exit_index"], expected.exit_index)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)


def test_an_error_of_the_stream_comes_after_what_was_there_before_it(model, images):
    def stream():
        yield images[:10]
        raise RuntimeError("the camera is gone")

    answers = []
    with pytest.raises(RuntimeError, match="the camera is gone"):
        answers.extend(model.predict_adaptive_stream(stream(), batch_size=8, thresholds=LIMITS))
    assert sorted(torch.cat([answer.ids for answer in answers]).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.randn(2, 3, 8, 8), r"The stream gave images of \(3, 8, 8\) after some of \(3, 16, 16\)"),
        (torch.full((2, 3, 16, 16), torch.nan), "NaN or infinite values"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "expected floating-point numbers"),
    ],
)
def test_bad_images_in_the_stream(model, images, second, message):
    answers = []
    with pytest.raises(ValueError, match=message):
        answers.extend(model.predict_adaptive_stream([images[:3], second], thresholds=LIMITS))
    assert sum(len(answer.ids) for answer in answers) == 3


def test_bad_arguments(images):
    model = random_scan_model()
    with pytest.raises(ValueError, match="`batch_size` is 0; expected a whole number of at least 1"):
        model.predict_adaptive_stream([images], batch_size=0, thresholds=LIMITS)
    with pytest.raises(ValueError, match=r"Call `model\.eval\(\)` first"):
        model.train().predict_adaptive_stream([images], thresholds=LIMITS)
    assert list(model.eval().predict_adaptive_stream([], thresholds=LIMITS)) == []


@pytest.mark.parametrize("backbone", ["test_vit", "xcit_nano_12_p8_224", "swin_tiny_patch4_window7_224", "selecsls42"])
def test_any_family_in_a_stream(backbone):
    """Several tensors between stages, and what is the same for all images, are joined and divided rightly."""
    torch.manual_seed(0)
    model = ScanForImageClassification(ScanConfig(backbone=backbone, num_labels=4)).eval()
    images = torch.randn(5, 3, model.config.image_size, model.config.image_size)
    with torch.no_grad():
        confidences = [logits.softmax(-1).amax(-1) for logits in model(images).exit_logits]
    # Between the second and the third of five, so that some stay at every exit and no rounding decides.
    thresholds = [float(values.sort().values[1:3].mean()) for values in confidences]
    expected = model.predict_adaptive(images, thresholds=thresholds)
    found = gathered(model.predict_adaptive_stream(images.split(2), batch_size=3, thresholds=thresholds))
    assert torch.equal(found["exit_index"], expected.exit_index)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=1e-3, atol=1e-4)


def test_two_processes_share_a_dataset(tmp_path):
    """Started with torchrun: nothing is lost, nothing is answered twice, and the answers are those of one process."""
    torchrun("tests.model.stream_of_a_process", tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(len(part["ids"]) > 5 for part in parts)
    both = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = both["ids"].argsort()
    assert both["ids"][order].tolist() == list(range(21))
    rows = noise_rows(21)
    expected = random_scan_model().predict_adaptive(
        torch.stack([rows[index]["pixel_values"] for index in range(21)]), thresholds=LIMITS
    )
    assert torch.equal(both["exit_index"][order], expected.exit_index)
    torch.testing.assert_close(both["logits"][order], expected.logits, rtol=1e-4, atol=1e-4)


def test_empty_batches_are_passed_over(model, images):
    batches = [images[:0], images[:3], images[:0], images[3:5]]
    answers = gathered(model.predict_adaptive_stream(batches, batch_size=4, thresholds=LIMITS))
    assert answers["ids"].tolist() == list(range(5))


def test_an_unordered_stream_keeps_nothing_of_what_is_done(model, images):
    """Nor does an ordered one, once an image's answer is given."""
    for ordered in (False, True):
        held = []
        tracemalloc.start()
        batches = (images[:20] for _ in range(150))
        answers = model.predict_adaptive_stream(batches, batch_size=20, ordered=ordered, thresholds=[0.0, 0.0])
        for position, answer in enumerate(answers):
            del answer
            if position in (20, 148):
                gc.collect()  # of what is in circles, Python frees nothing at once
                held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert held[1] - held[0] < 20_000  # the numbers of 2,500 images alone would take four times that


@pytest.mark.parametrize("ordered", [False, True])
def test_a_bad_image_costs_the_others_nothing(model, images, ordered):
    bad = images.clone()
    bad[3, 0, 2, 2] = torch.nan
    good = [row for row in range(len(images)) if row != 3]
    expected = model.predict_adaptive(images, thresholds=LIMITS)
    answers = gathered(
        model.predict_adaptive_stream(bad.split(5), batch_size=4, ordered=ordered, on_error="skip", thresholds=LIMITS)
    )
    assert answers["ids"].sort().values.tolist() == list(range(len(images)))
    assert not ordered or answers["ids"].tolist() == list(range(len(images)))
    found = {name: values[answers["ids"].argsort()] for name, values in answers.items()}
    assert found["exit_index"][3] == -1
    assert found["logits"][3].isnan().all()
    assert torch.equal(found["exit_index"][good], expected.exit_index[good])
    torch.testing.assert_close(found["logits"][good], expected.logits[good], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ordered", [False, True])
def test_an_error_says_which_image_and_comes_after_the_answers(model, images, ordered):
    bad = images.clone()
    bad[7, 0, 2, 2] = torch.inf
    seen = []
    stream = model.predict_adaptive_stream(bad.split(5), batch_size=4, ordered=ordered, thresholds=LIMITS)
    with pytest.raises(ValueError, match=r"at position 7 of the stream"):
        seen.extend(row for answer in stream for row in answer.ids.tolist())
    assert sorted(seen) == [row for row in range(10) if row != 7]


def test_a_way_of_treating_errors_that_there_is_not(model, images):
    with pytest.raises(ValueError, match="`on_error` is 'ignore'; expected 'raise' or 'skip'"):
        model.predict_adaptive_stream([images], on_error="ignore", thresholds=LIMITS)
