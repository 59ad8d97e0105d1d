import asyncio
import gc
import random
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.serving import AsyncEngine, DeadlineExceeded, EngineClosed, QueueFull
from hf_scan.serving.requests import Request

from ..conftest import random_scan_model
from .conftest import FATAL, FAULTY, NUM_LABELS, image


LONG = 60_000.0  # milliseconds: longer than any test


async def ask_all(engine, images, **kwargs):
    return await asyncio.gather(*(engine(one, **kwargs) for one in images), return_exceptions=True)


@pytest.mark.parametrize("rule", [{}, {"criterion": "patience", "fallback": "most_confident"}, {"max_exit": 1}])
@pytest.mark.parametrize("kind", ["pytorch", "onnx"])
def test_answers_are_those_that_images_get_alone(kind, rule, request, images):
    if kind == "pytorch":
        network, given = request.getfixturevalue("model"), images
    else:
        network = ORTScanForImageClassification.from_pretrained(request.getfixturevalue("exported"))
        given = images.numpy()
    rule = {"thresholds": [0.6, 0.6], **rule}

    async def main():
        async with AsyncEngine(network, batch_size=5, **rule) as engine:
            return await ask_all(engine, given)

    answers = asyncio.run(main())
    expected = network.predict_adaptive(given, **rule)
    assert [answer.exit_index for answer in answers] == expected.exit_index.tolist()
    assert len(set(expected.exit_index.tolist())) > 1
    np.testing.assert_allclose([answer.confidence for answer in answers], expected.confidence, atol=1e-5)
    np.testing.assert_allclose(np.stack([answer.logits for answer in answers]), expected.logits, atol=1e-4)
    assert [answer.label for answer in answers] == [f"LABEL_{int(row.argmax())}" for row in expected.logits]


@pytest.mark.parametrize("kind", ["pytorch", "onnx"])
def test_images_that_are_not_finite_fail_alone(kind, request, images):
    given = images[:6].clone()
    given[1, 0, 3, 3], given[4, 2, 0, 0] = float("nan"), float("inf")
    if kind == "pytorch":
        network = request.getfixturevalue("model")
    else:
        network, given = (
            ORTScanForImageClassification.from_pretrained(request.getfixturevalue("exported")),
            given.numpy(),
        )

    async def main():
        async with AsyncEngine(network, batch_size=6, thresholds=[0.6, 0.6]) as engine:
            answers = await ask_all(engine, given)
            return answers, (await asyncio.gather(engine(given[1]), return_exceptions=True)), engine.metrics.snapshot()

    answers, alone, counts = asyncio.run(main())
    refused = [answers.pop(4), answers.pop(1), *alone]
    assert all(isinstance(one, ValueError) and "NaN or infinite" in str(one) for one in refused)
    expected = network.predict_adaptive(given[[0, 2, 3, 5]], thresholds=[0.6, 0.6])
    assert [answer.exit_index for answer in answers] == expected.exit_index.tolist()
    assert (counts["requests"]["failed"], counts["requests"]["answered"]) == (3, 4)


def test_an_easy_image_overtakes_a_hard_one(fake):
    async def main():
        engine = AsyncEngine(fake, batch_size=2, max_wait_ms=LONG)
        hard = asyncio.create_task(engine(image(2, 1)))
        await asyncio.sleep(0)
        assert (await engine(image(0, 2))).label == "label 2"
        assert not hard.done()
        # Another hard one fills its batch again.
        answers = await asyncio.gather(engine(image(2, 3)), engine(image(0, 4)), hard)
        await engine.close()
        return [(answer.label, answer.exit_index) for answer in answers]

    assert asyncio.run(main()) == [("label 3", 2), ("label 4", 0), ("label 1", 2)]
    assert fake.ran == [(0, [1, 2]), (0, [3, 4]), (1, [1, 3]), (2, [1, 3])]


def test_a_stage_waits_for_a_batch_and_no_longer_than_it_may(fake):
    async def main():
        async with AsyncEngine(fake, batch_size=64, max_wait_ms=1) as engine:
            assert (await engine(image(2))).exit_index == 2
        async with AsyncEngine(fake, batch_size=4, max_wait_ms=LONG) as engine:
            await ask_all(engine, [image(0, label) for label in range(8)])
            return engine.metrics.snapshot()

    found = asyncio.run(main())
    assert fake.ran[3:] == [(0, [0, 1, 2, 3]), (0, [4, 5, 6, 7])]
    assert (found["batches"], found["images"], found["fill"]) == ([2, 0, 0], [8, 0, 0], [1.0, 0.0, 0.0])


def test_a_full_engine_refuses_or_lets_callers_wait(fake):
    async def main(on_full):
        fake.gate.clear()
        engine = AsyncEngine(fake, batch_size=1, max_queue=3, on_full=on_full)
        tasks = [asyncio.create_task(engine(image(0, label))) for label in range(8)]
        await asyncio.sleep(0)
        assert engine.in_flight == (3 if on_full == "raise" else 8)
        fake.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        return answers, engine.metrics.snapshot()["requests"]

    answers, counts = asyncio.run(main("raise"))
    assert [getattr(answer, "label", None) for answer in answers[:3]] == ["label 0", "label 1", "label 2"]
    assert all(isinstance(answer, QueueFull) for answer in answers[3:])
    assert "`max_queue`" in str(answers[3])
    assert counts == {"answered": 3, "failed": 0, "cancelled": 0, "refused": 5}
    answers, counts = asyncio.run(main("wait"))
    assert [answer.label for answer in answers] == [f"label {label}" for label in range(8)]
    assert counts["answered"] == 8


@pytest.mark.parametrize("by", ["cancellation", "deadline"])
def test_who_does_not_wait_any_more_takes_part_in_no_further_stage(fake, by):
    async def main():
        fake.gate.clear()
        engine = AsyncEngine(fake, batch_size=2, max_wait_ms=LONG, max_queue=4)
        timeout_ms = 20 if by == "deadline" else None
        given_up = [asyncio.create_task(engine(image(2, label), timeout_ms)) for label in range(4)]
        behind = asyncio.create_task(engine(image(2, 8)))  # waits for room
        another = asyncio.create_task(engine(image(2, 9), timeout_ms))
        await asyncio.to_thread(fake.entered.wait, 60)  # stage 0 runs for the first two
        for task in [] if by == "deadline" else [*given_up, another]:
            task.cancel()
        ends = await asyncio.gather(*given_up, another, return_exceptions=True)
        assert {type(end) for end in ends} == {DeadlineExceeded if by == "deadline" else asyncio.CancelledError}
        fake.gate.set()
        closing = asyncio.create_task(engine.close())
        assert (await behind).label == "label 8"
        await closing
        assert engine.in_flight == 0
        return engine.metrics.snapshot()["requests"]

    assert asyncio.run(main()) == {"answered": 1, "failed": 0, "cancelled": 5, "refused": 0}
    assert fake.ran == [(0, [0, 1]), (0, [8]), (1, [8]), (2, [8])]


def test_closing_answers_what_is_in_flight(fake):
    async def main():
        engine = AsyncEngine(fake, batch_size=4, max_wait_ms=LONG, max_queue=4)
        tasks = [asyncio.create_task(engine(image(label % 3, label))) for label in range(10)]
        await asyncio.sleep(0)
        await engine.close()
        assert not engine.healthy
        assert [(await task).label for task in tasks] == [f"label {label}" for label in range(10)]
        with pytest.raises(EngineClosed, match="closed"):
            await engine(image(0))
        await engine.close()  # again does nothing

    asyncio.run(main())


def test_closing_at_once_fails_what_is_in_flight(fake):
    async def main():
        engine = AsyncEngine(fake, batch_size=4, max_wait_ms=LONG, max_queue=2)
        tasks = [asyncio.create_task(engine(image(2))) for _ in range(3)]
        await asyncio.sleep(0)
        await engine.close(answer_waiting=False)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(end) for end in ends] == [EngineClosed] * 3
        assert engine.in_flight == 0

    asyncio.run(main())


def test_an_image_that_cannot_be_run_fails_alone(fake):
    async def main():
        engine = AsyncEngine(fake, batch_size=4, max_wait_ms=LONG)
        given = [image(2, 0), image(FAULTY, 1), image(0, 2), image(2, 3)]
        tasks = [asyncio.create_task(engine(one)) for one in given]
        await asyncio.sleep(0)
        await engine.close()
        return await asyncio.gather(*tasks, return_exceptions=True), engine.metrics.snapshot()["requests"]

    ends, counts = asyncio.run(main())
    assert str(ends.pop(1)) == "This image cannot be run."
    assert [end.label for end in ends] == ["label 0", "label 2", "label 3"]
    assert counts == {"answered": 3, "failed": 1, "cancelled": 0, "refused": 0}
    assert fake.ran == [(0, [0, 1, 2, 3]), (0, [0]), (0, [1]), (0, [2]), (0, [3]), (1, [0, 3]), (2, [0, 3])]


def test_nobody_waits_for_a_worker_that_died(fake):
    async def main():
        fake.gate.clear()
        engine = AsyncEngine(fake, batch_size=2, max_queue=3)
        tasks = [asyncio.create_task(engine(image(depth))) for depth in (FATAL, 0, 0, 0, 0)]
        await asyncio.sleep(0)
        fake.gate.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} == {EngineClosed}
        assert "SystemExit: the interpreter goes down" in str(ends[0])
        assert not engine.healthy
        with pytest.raises(EngineClosed, match="has stopped"):
            await engine(image(0))
        await engine.close()

    asyncio.run(main())


def test_callers_in_several_event_loops(fake):
    engine = AsyncEngine(fake, batch_size=8, max_wait_ms=1)
    found: dict[int, list[str]] = {}

    async def main(caller):
        answers = await ask_all(engine, [image(number % 3, caller) for number in range(50)])
        found[caller] = [answer.label for answer in answers]

    threads = [threading.Thread(target=asyncio.run, args=(main(caller),)) for caller in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    asyncio.run(engine.close())
    assert found == {caller: [f"label {caller}"] * 50 for caller in range(4)}


def test_a_loop_that_ends_early_takes_nothing_along(fake):
    fake.gate.clear()
    engine = AsyncEngine(fake, batch_size=1)

    async def leave():
        engine.task = asyncio.ensure_future(engine(image(0)))
        await asyncio.sleep(0)

    asyncio.run(leave())
    fake.gate.set()

    async def stay():
        answer = await engine(image(0, 7))
        await engine.close()
        return answer.label

    assert asyncio.run(stay()) == "label 7"


def test_ten_thousand_requests_are_each_ended_once(fake):
    """With callers that give up, images that cannot be run, and more of both than there is room for."""
    rng = random.Random(0)

    def kept() -> int:
        gc.collect()
        return sum(type(one) is Request for one in gc.get_objects())

    before = kept()  # by tests before this one

    async def one(engine, number, ends):
        depth = FAULTY if rng.random() < 0.002 else rng.randrange(3)
        task = asyncio.ensure_future(engine(image(depth, number % NUM_LABELS)))
        if rng.random() < 0.1:
            await asyncio.sleep(rng.random() / 100)
            task.cancel()
        try:
            answer = await task
            ends[number].append("right" if answer.label == f"label {number % NUM_LABELS}" else "wrong")
        except ValueError:
            ends[number].append("failed" if depth == FAULTY else "wrongly failed")
        except asyncio.CancelledError:
            ends[number].append("cancelled")

    async def main():
        ends: dict[int, list[str]] = {number: [] for number in range(10_000)}
        async with AsyncEngine(fake, batch_size=32, max_wait_ms=0.5, max_queue=500) as engine:
            for start in range(0, len(ends), 1000):
                await asyncio.gather(*(one(engine, number, ends) for number in range(start, start + 1000)))
            assert engine.in_flight == 0
            await asyncio.sleep(0)
            worker = engine._worker
            assert [len(held) for held in (worker._admitted, worker._arrived, worker._overflow)] == [0, 0, 0]
            assert len(worker._scheduler) == 0
        return ends, engine.metrics.snapshot()["requests"]

    ends, counts = asyncio.run(main())
    assert kept() <= before  # nothing is kept of what ended
    assert {len(end) for end in ends.values()} == {1}
    found = Counter(end[0] for end in ends.values())
    assert set(found) == {"right", "failed", "cancelled"}
    assert counts == {
        "answered": found["right"],
        "failed": found["failed"],
        "cancelled": found["cancelled"],
        "refused": 0,
    }


def test_prometheus_reads_the_metrics(fake):
    async def main():
        async with AsyncEngine(fake, batch_size=2, max_wait_ms=1) as engine:
            await ask_all(engine, [image(0), image(1), image(2), image(FAULTY)])
        return engine.metrics

    registry = CollectorRegistry()
    registry.register(asyncio.run(main()))
    text = generate_latest(registry).decode()
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["hf_scan_requests_total", "answered"] == 3
    assert samples["hf_scan_requests_total", "failed"] == 1
    assert samples["hf_scan_batch_images_total", "2"] == 1
    assert samples["hf_scan_batch_fill", "2"] == 0.5
    assert samples["hf_scan_queue_length", "0"] == 0
    assert [samples["hf_scan_latency_seconds_count", str(index)] for index in range(3)] == [1, 1, 1]
    assert samples["hf_scan_latency_seconds_bucket", "0", "+Inf"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\); expected \(3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16), r"shape \(2, 3, 16, 16\); expected \(3, 16, 16\)"),
        (torch.full((3, 16, 16), torch.nan), "NaN or infinite"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), "floating-point"),
        ("photo.jpg", "is a str; expected an array"),
    ],
)
def test_what_is_no_image_is_refused_before_it_is_queued(model, given, message):
    async def main():
        async with AsyncEngine(model, thresholds=[0.6, 0.6]) as engine:
            with pytest.raises((TypeError, ValueError), match=message):
                await engine(given)
            assert engine.in_flight == 0
            return await engine(torch.zeros(1, 3, 16, 16))

    assert asyncio.run(main()).logits.shape == (5,)


def test_settings_that_cannot_be(model):
    for settings, message in (
        ({"batch_size": 0}, "`batch_size` is 0; expected a whole number of at least 1"),
        ({"max_queue": 2.5}, "`max_queue` is 2.5"),
        ({"max_wait_ms": -1}, "`max_wait_ms` is -1"),
        ({"max_wait_ms": float("nan")}, "`max_wait_ms` is nan"),
        ({"on_full": "drop"}, "`on_full` is 'drop'; expected 'wait' or 'raise'"),
        ({"max_exit": 7}, "`max_exit` is 7"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({}, "thresholds"),
    ):
        with pytest.raises(ValueError, match=message):
            AsyncEngine(model, **settings)
    with pytest.raises(TypeError, match="is a Linear; expected a `ScanForImageClassification`"):
        AsyncEngine(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="training mode"):
        AsyncEngine(random_scan_model().train(), thresholds=[0.6, 0.6])


def test_a_deadline_has_to_be_ahead(fake):
    async def main():
        async with AsyncEngine(fake) as engine:
            with pytest.raises(ValueError, match="`timeout_ms` is 0"):
                await engine(image(0), timeout_ms=0)

    asyncio.run(main())


def test_an_exported_network_is_served_without_pytorch(exported):
    code = f"""
import asyncio, sys
for name in ("torch", "transformers", "timm", "fastapi", "prometheus_client"):
    sys.modules[name] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("torch", "transformers") else found(name, *rest)
import numpy as np
from hf_scan.runtime import ORTScanForImageClassification
from hf_scan.serving import AsyncEngine
async def main():
    network = ORTScanForImageClassification.from_pretrained({str(exported)!r})
    async with AsyncEngine(network, thresholds=[0.6, 0.6]) as engine:
        return await asyncio.gather(*(engine(np.zeros((3, 16, 16), np.float32)) for _ in range(3)))
print(len(asyncio.run(main())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "3", done.stderr[-2000:]
