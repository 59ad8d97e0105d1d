"""`hf-scan serve` as a process of its own, asked over sockets of this machine. Slow, as each starts a process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .test_server import expected_answers, in_base64, picture, wait_until


# Ten minutes of load by `SERVING_LOAD_SECONDS=600 pytest -m slow --timeout=900 ... -k memory`.
LOAD_SECONDS = float(os.environ.get("SERVING_LOAD_SECONDS", 30))
START_SECONDS = 300  # imports take long where the machine is busy

pytestmark = pytest.mark.slow


@contextmanager
def served(checkpoint: Path, *settings: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process that accepts requests, and its address."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "hf-scan", "serve", "--model", checkpoint, "--port", port, *settings]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + START_SECONDS
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.05)
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def outcomes(url: str) -> dict[str, int]:
    """How many images ended in which way, as Prometheus reads it."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {one.labels["outcome"]: int(one.value) for one in samples if one.name == "hf_scan_requests_total"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_terminated_answers_first(checkpoint, number):
    with served(checkpoint, "--batch-size", "64", "--max-wait-ms", "3000") as (process, url):
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/predict", content=picture(), timeout=60))
        )
        thread.start()
        wait_until(lambda: httpx.get(f"{url}/health").json()["in_flight"] == 1)
        process.send_signal(number)
        thread.join(60)
        assert answers[0].json() == {"answers": expected_answers(checkpoint, [picture()])}
        assert process.wait(60) == 0


def test_each_of_many_requests_is_answered_once(checkpoint):
    """2,000 requests over 16 connections, of which every tenth has three images and every twentieth no image."""
    count, connections = 2000, 16
    pictures = [picture(number) for number in range(50)]
    expected = expected_answers(checkpoint, pictures)
    found: dict[int, list[tuple[int, object]]] = {number: [] for number in range(count)}

    def request_of(number: int) -> tuple[dict, int, object]:
        """What is sent, and the answer that it should get."""
        of = [(number + offset) % len(pictures) for offset in range(3 if number % 10 == 0 else 1)]
        if number % 20 == 1:
            return {"content": b"none"}, 400, None
        if len(of) == 1:
            return {"content": pictures[of[0]]}, 200, [expected[of[0]]]
        return {"json": {"images": [in_base64(pictures[one]) for one in of]}}, 200, [expected[one] for one in of]

    async def caller(client: httpx.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            answer = await client.post("/predict", timeout=120, **request_of(number)[0])
            found[number].append((answer.status_code, answer.json().get("answers")))

    async def run(url: str) -> None:
        numbers = iter(range(count))
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(base_url=url, limits=limits) as client:
            await asyncio.gather(*(caller(client, numbers) for _ in range(connections)))

    with served(checkpoint) as (_, url):
        assert socket.socket().connect_ex(("127.0.0.2", int(url.rpartition(":")[2]))) != 0  # not at all addresses
        asyncio.run(run(url))
        assert httpx.get(f"{url}/health").json()["in_flight"] == 0
        counts = outcomes(url)
    assert {number: ends for number, ends in found.items() if ends != [request_of(number)[1:]]} == {}
    images = sum(len(answers) for ((_, answers),) in found.values() if answers is not None)
    assert images == count + 2 * count // 10 - count // 20
    assert counts == {"answered": images, "failed": 0, "cancelled": 0, "refused": 0}


@pytest.mark.timeout(START_SECONDS + 2 * LOAD_SECONDS + 300)
def test_memory_is_bounded_under_load(checkpoint):
    """By callers of whom some send too much, some send no image, and some hang up."""
    content = picture(0, "JPEG", (300, 300))
    held: list[int] = []
    seen: set[int] = set()

    async def call(client: httpx.AsyncClient, number: int, end: float) -> None:
        kind: dict = {"content": content}
        if number % 8 == 2:
            kind = {"json": {"images": [in_base64(content if number == 2 else b"QUJD")] * 100}}
        elif number % 8 == 3:
            kind = {"content": content[:1000]}
        while time.monotonic() < end:
            with suppress(httpx.HTTPError):
                answer = await client.post("/predict", timeout=0.03 if number % 8 == 1 else 60, **kind)
                seen.add(answer.status_code)

    async def run(url: str, memory: Path) -> None:
        end = time.monotonic() + LOAD_SECONDS
        async with httpx.AsyncClient(base_url=url) as client:
            calls = [asyncio.ensure_future(call(client, number, end)) for number in range(24)]
            while time.monotonic() < end:
                await asyncio.sleep(LOAD_SECONDS / 60)
                held.append(int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            await asyncio.gather(*calls)

    with served(checkpoint, "--max-queue", "64") as (process, url):
        asyncio.run(run(url, Path(f"/proc/{process.pid}/statm")))
        wait_until(lambda: httpx.get(f"{url}/health", timeout=60).json()["in_flight"] == 0)
        assert httpx.post(f"{url}/predict", content=content, timeout=60).status_code == 200
        counts = outcomes(url)
    megabytes = [round(size / 2**20, 1) for size in (held[0], held[9], max(held), held[-1])]
    print(f"{LOAD_SECONDS:g} s, {counts}: first, after a sixth, most and last MiB: {megabytes}")
    assert seen <= {200, 400, 413, 503}
    assert {200, 400, 413} <= seen
    assert counts["answered"] > 0
    # After a warm-up. An image of each request would be far more.
    assert max(held[-10:]) - max(held[5:15]) < 50 << 20
