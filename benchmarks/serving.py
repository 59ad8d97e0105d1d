"""Measure how a network with early exits is served: `python benchmarks/serving.py --model runs/quickstart`.

Compares plain batches, static batches with exits (all images of which are answered when the last has left), and the
refilled engine `hf_scan.serving.AsyncEngine`, by open-loop Poisson arrivals: callers do not wait for each other. Load
is a share of the throughput of static batches with exits: all three are sent the same images at the same times.
`--parts` chooses among `stages`, `throughput`, `load`, `simulate` and `ray`; results are merged into `--output`.
`load` takes about 42 times `--seconds`, three minutes by default, and longer where the machine cannot keep up: every
request is answered. `simulate` needs the times of `stages`, of this run or an earlier one.

Times of stages are CPU time on one thread, which other processes on the machine change little. What is simulated says
so, and is computed from them with the library's own scheduler.
"""

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_ray import measure_ray
from serving_simulation import Replica, poisson, seconds_of, simulate, summary

from hf_scan.costs import describe_machine, keep_freed_memory
from hf_scan.serving import AsyncEngine
from hf_scan.serving.loading import load_model
from hf_scan.serving.networks import Arrivals, served_network


SIZES = (1, 2, 4, 8, 16, 32)
LOADS = (0.2, 0.5, 0.7, 0.9, 0.95)
KINDS = ("plain", "static", "refilled")
PARTS = ("stages", "throughput", "load", "simulate", "ray")


class StaticBatches:
    """
    An engine that runs whole batches and answers all images of one together.

    Args:
        answer (`Callable`): Answers a batch of images.
        batch_size (`int`): Images of a batch.
        max_wait_ms (`float`): Milliseconds for which an image waits for others.
    """

    def __init__(self, answer: Any, batch_size: int, max_wait_ms: float) -> None:
        self.answer, self.batch_size, self.max_wait = answer, batch_size, max_wait_ms / 1000
        self.waiting: deque[tuple[Any, Any, Any, float]] = deque()
        self.condition, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    async def __call__(self, image: torch.Tensor) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self.condition:
            self.waiting.append((image, future, loop, time.monotonic()))
            self.condition.notify()
        await future

    def run(self) -> None:
        while True:
            with self.condition:
                while not self.closed:
                    left = self.waiting[0][3] + self.max_wait - time.monotonic() if self.waiting else None
                    if len(self.waiting) >= self.batch_size or (left is not None and left <= 0):
                        break
                    self.condition.wait(left)
                if self.closed:
                    return
                batch = [self.waiting.popleft() for _ in range(min(self.batch_size, len(self.waiting)))]
            with torch.inference_mode():
                self.answer(torch.stack([image for image, *_ in batch]))
            for _, future, loop, _ in batch:
                loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(None))

    async def close(self) -> None:
        with self.condition:
            self.closed = True
            self.condition.notify()
        self.thread.join()


def engine_of(kind: str, model: Any, batch_size: int, max_wait_ms: float, rule: dict[str, Any]) -> Any:
    if kind == "refilled":
        return AsyncEngine(model, batch_size, max_wait_ms, max_queue=1_000_000, **rule)
    plain = kind == "plain"
    answer = model.backbone if plain else lambda images: model.predict_adaptive(images, **rule)
    return StaticBatches(answer, batch_size, max_wait_ms)


async def latencies_of(engine: Any, images: torch.Tensor, arrivals: np.ndarray) -> np.ndarray:
    """Send images at the given times, whatever was answered by then, and return the seconds of each."""
    latencies = np.full(len(arrivals), np.nan)
    start = time.monotonic() + 0.05

    async def one(number: int) -> None:
        await engine(images[number % len(images)])
        # From when it should have been sent, so that a busy sender hides no waiting.
        latencies[number] = time.monotonic() - start - arrivals[number]

    tasks = []
    for number, arrival in enumerate(arrivals):
        if (ahead := start + arrival - time.monotonic()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.ensure_future(one(number)))
    await asyncio.gather(*tasks)
    await engine.close()
    return latencies


def stage_times(model: Any, images: torch.Tensor, rounds: int) -> dict[str, list[dict[int, float]]]:
    """Return the CPU seconds of each stage with its head, and of the plain network, by batch size."""
    # No image leaves, so that every stage sees the whole batch.
    network = served_network(model, None, None, {"thresholds": [0.9999999] * model.num_exits, "fallback": "ensemble"})
    stages: list[dict[int, float]] = [{} for _ in range(network.num_stages)]
    plain: dict[int, float] = {}

    def median(run: Any) -> float:
        found = []
        for _ in range(rounds):
            start = time.thread_time()
            run()
            found.append(time.thread_time() - start)
        return statistics.median(found)

    for size in SIZES:
        group: Any = Arrivals(list(range(size)), list(images[:size]))
        for index, stage in enumerate(stages):
            stage[size] = median(lambda index=index, group=group: network.advance(index, group))
            group = network.advance(index, group)[1]
        batch = images[:size].contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            plain[size] = median(lambda batch=batch: model.backbone(batch))
    return {"stages": stages, "plain": [plain]}


def depths_of(model: Any, images: torch.Tensor, rule: dict[str, Any]) -> np.ndarray:
    """Return the stage at which each image leaves."""
    return model.predict_adaptive(images, **rule).exit_index.clamp(max=model.num_exits - 1).numpy()


def static_capacity(times: dict[str, Any], depths: np.ndarray, batch_size: int) -> float:
    """Return the images a second of static batches with exits, from times of stages."""
    rng = np.random.default_rng(0)
    batches = rng.choice(depths, (500, batch_size))
    seconds = sum(
        seconds_of(stage, int(left))
        for index, stage in enumerate(times["stages"])
        for left in (batches >= index).sum(1)
        if left
    )
    return batches.size / seconds


def measure_throughput(model: Any, images: torch.Tensor, given: Any, rule: dict[str, Any]) -> dict[str, Any]:
    """Measure the engine and `predict_adaptive_stream` in turns, on the same images, all of which are there."""
    images = images.repeat(-(-given.images // len(images)), 1, 1, 1)[: given.images]
    found: dict[str, list[float]] = {"stream": [], "engine": [], "stream_cpu": [], "engine_cpu": []}

    async def ask_all() -> None:
        async with AsyncEngine(model, given.batch_size, given.max_wait_ms, max_queue=len(images), **rule) as engine:
            await asyncio.gather(*(engine(image) for image in images))

    def stream() -> None:
        for _ in model.predict_adaptive_stream(images.split(given.batch_size), given.batch_size, **rule):
            pass

    for _ in range(given.rounds):
        for name, run in (("stream", stream), ("engine", lambda: asyncio.run(ask_all()))):
            start, cpu = time.perf_counter(), time.process_time()
            run()
            found[name].append(len(images) / (time.perf_counter() - start))
            found[f"{name}_cpu"].append(len(images) / (time.process_time() - cpu))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        **{name: round(value, 1) for name, value in medians.items()},
        "ratio": round(medians["engine"] / medians["stream"], 3),
        "ratio_of_cpu_time": round(medians["engine_cpu"] / medians["stream_cpu"], 3),
    }


def measured_capacity(model: Any, images: torch.Tensor, given: Any, rule: dict[str, Any]) -> float:
    """Return the images a second of static batches with exits, where all images are there."""
    engine = engine_of("static", model, given.batch_size, given.max_wait_ms, rule)
    arrivals = np.zeros(min(given.images, 600))
    return summary(asyncio.run(latencies_of(engine, images, arrivals)), arrivals)["throughput"]


def measure_load(model: Any, images: torch.Tensor, given: Any, rule: dict[str, Any], capacity: float) -> list[Any]:
    """Measure all three on this machine, in turns and with the same arrivals."""
    rows = []
    for load in given.loads:
        for bursts in (False, True) if load == 0.7 else (False,):
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
            for seed in range(given.rounds):
                arrivals = poisson(load * capacity, int(given.seconds * load * capacity), seed, bursts)
                for kind in KINDS:
                    if kind == "plain" and load > 0.5:
                        continue  # beyond what it can do
                    engine = engine_of(kind, model, given.batch_size, given.max_wait_ms, rule)
                    found[kind].append(summary(asyncio.run(latencies_of(engine, images, arrivals)), arrivals))
            rows += [_row(kind, load, bursts, some) for kind, some in found.items() if some]
    return rows


def simulate_load(times: dict[str, Any], depths: np.ndarray, given: Any, replicas: int) -> list[Any]:
    """Simulate all three, from times of stages."""
    rng = np.random.default_rng(0)
    capacity = static_capacity(times, depths, given.batch_size)
    rows = []
    for load in given.loads:
        for bursts in (False, True):
            rate, count = load * capacity * replicas, 4000 * (1 + 9 * (replicas > 1))
            arrivals, left = poisson(rate, count, 0, bursts), rng.choice(depths, count)
            for kind in KINDS:
                part = times["plain" if kind == "plain" else "stages"]

                def make(kind: str = kind, part: Any = part) -> Replica:
                    return Replica(kind, part, given.batch_size, given.max_wait_ms / 1000)

                rows.append(_row(kind, load, bursts, [summary(simulate(make, replicas, arrivals, left), arrivals)]))
    return rows


def _row(kind: str, load: float, bursts: bool, found: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(one[name] for one in found), 2) for name in found[0]}
    return {"kind": kind, "load": load, "bursts": bursts, **medians}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| load | arrivals | engine | p50 (ms) | p95 (ms) | p99 (ms) | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        arrivals = "bursts" if row["bursts"] else "Poisson"
        figures = " | ".join(f"{row[name]:.1f}" for name in ("p50", "p95", "p99", "throughput"))
        lines.append(f"| {row['load']:.0%} | {arrivals} | {row['kind']} | {figures} |")
    return "\n".join(lines)


def throughput_text(found: dict[str, Any]) -> str:
    return (
        f"Engine over `predict_adaptive_stream`, all images there from the start: {found['ratio']:.2f} of the images "
        f"a second, {found['ratio_of_cpu_time']:.2f} of the images a second of CPU time."
    )


def ray_text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['images']} image files in {found['blocks']} parquet files, from bytes to answers, on the same "
        f"{found['cores']} cores: `predict_adaptive_stream` in one process with {found['cores']} threads, and Ray "
        f"Data with {found['cores']} actors of one thread. Medians of {found['rounds']} rounds, images a second.",
        "",
        "| | one process | Ray Data | ratio |",
        "|---|---|---|---|",
    ]
    for name, text in (("steady", "steady state"), ("with_start_up", "with start-up, loading the network")):
        one, two = found[f"process_{name}"], found[f"ray_{name}"]
        lines.append(f"| {text} | {one:.0f} | {two:.0f} | {found[f'ratio_{name}']:.2f} |")
    return "\n".join(lines)


def as_text(results: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    parts = ["# Serving\n", f"{__doc__}"]
    for name, found in results.items():
        if name == "cpu_seconds":
            continue
        shares = ", ".join(f"{share:.1%}" for share in found["exit_shares"])
        settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items())
        parts.append(f"## {name}\n\nOf the images {shares} leave at each exit. {settings}.")
        for part, write in (("throughput", throughput_text), ("ray", ray_text)):
            if part in found:
                parts.append(f"### {part.capitalize()}\n\n{found['machines'][part]}.\n\n{write(found[part])}")
        for part, rows in found.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict):
                machine = found["machines"]["load" if part == "measured" else "simulate"]
                parts.append(f"### {part.capitalize()}\n\n{machine}.\n\n{table(rows)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a trained network with thresholds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-wait-ms", type=float, default=2.0)
    parser.add_argument("--thresholds", type=float, nargs="+", help="in place of the model's own")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--images", type=int, default=1000, help="for the throughput")
    parser.add_argument("--ray-images", type=int, default=20_000, help="for the part ray (default: 20000)")
    parser.add_argument("--seconds", type=float, default=4, help="of arrivals at each load (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output.is_file() else {}
    if "simulate" in given.parts and "stages" not in given.parts and "cpu_seconds" not in results:
        parser.error(f"`simulate` needs times of stages, and {given.output} has none; add `stages` to `--parts`.")
    keep_freed_memory()
    images = digits(given.model)
    loaded = load_model(given.model, given.threads)
    model, rule = loaded.model, {} if given.thresholds is None else {"thresholds": given.thresholds}
    depths = depths_of(model, images, rule)
    shares = np.bincount(depths, minlength=model.num_exits) / len(depths)
    settings = {"batch_size": given.batch_size, "max_wait_ms": given.max_wait_ms, "threads": given.threads}
    name = "own thresholds" if given.thresholds is None else f"thresholds {given.thresholds}"
    found = results.setdefault(name, {})
    found |= {"settings": settings, "exit_shares": shares.round(4).tolist()}
    machine = describe_machine(model.device)
    found["machines"] = {**found.get("machines", {}), **dict.fromkeys(given.parts, machine)}
    if "stages" in given.parts:
        results["cpu_seconds"] = stage_times(model, images, rounds=9)
    if "throughput" in given.parts:
        found["throughput"] = measure_throughput(model, images, given, rule)
        print(json.dumps(found["throughput"], indent=2))
    if "load" in given.parts:
        capacity = statistics.median(measured_capacity(model, images, given, rule) for _ in range(3))
        found["measured_capacity"] = round(capacity, 1)
        found["measured"] = measure_load(model, images, given, rule, capacity)
        print(f"Measured on this machine, {name}\n\n{table(found['measured'])}\n")
    if "simulate" in given.parts:
        times = {
            part: [{int(size): seconds for size, seconds in stage.items()} for stage in stages]
            for part, stages in results["cpu_seconds"].items()
        }
        for replicas in (1, 100):
            rows = found[f"simulated, {replicas} replicas"] = simulate_load(times, depths, given, replicas)
            print(f"Simulated from CPU times of stages, {replicas} replicas, {name}\n\n{table(rows)}\n")
    if "ray" in given.parts:
        found["ray"] = measure_ray(given.model, digit_images(), given.ray_images, given.rounds, rule)
        print(ray_text(found["ray"]))
    given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    given.output.with_suffix(".md").write_text(as_text(results), encoding="utf-8")


def digit_images() -> list[Any]:
    """Return the test images of `examples/quickstart.py`."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from quickstart import load_splits

    return list(load_splits()["test"]["image"])


def digits(model: str) -> torch.Tensor:
    """Return the test images of `examples/quickstart.py`, prepared."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(model)
    pixels: torch.Tensor = processor(digit_images(), return_tensors="pt")["pixel_values"]
    return pixels


if __name__ == "__main__":
    main()
