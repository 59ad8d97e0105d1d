"""The part `ray` of `serving.py`: Ray Data with two actors against one process, on the same two cores."""

import io
import multiprocessing
import os
import secrets
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_scan.ray import ScanPredictor


CORES = 2
BLOCKS = 40
Ends = list[tuple[float, int, int]]  # of each block: when it was answered, how many images, and by which process


def measure_ray(
    model: str, images: list[Image.Image], count: int, rounds: int, rule: dict[str, Any]
) -> dict[str, Any]:
    """
    Measure the images a second from image files in parquet to answers: of `ScanPredictor` in one process with two
    threads, which is `predict_adaptive_stream` with decoding, and of Ray Data with two actors of one thread each.

    Both run in turns on two cores. Steady state is from when each process that answers has finished a block to the
    end. With start-up it is from nothing: the process or Ray is started, and libraries and the network are loaded.

    Args:
        model (`str`): The folder of a trained network.
        images (`list[PIL.Image.Image]`): Images, which are repeated.
        count (`int`): How many images are answered in each round.
        rounds (`int`): Of which the medians are returned.
        rule (`dict`): Arguments of `predict_adaptive_stream`.

    Returns:
        `dict[str, Any]`: images a second of both, and their ratios.
    """
    # Processes that are started from here on inherit it.
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:CORES])
    found: dict[str, list[float]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="serving-") as folder:
            _write_blocks(Path(folder), images, count)
            for _ in range(rounds):
                for name, run in (("process", _one_process), ("ray", _two_actors)):
                    start = time.time()
                    ends = run(model, folder, rule)
                    assert sum(size for _, size, _ in ends) == count, "images were lost or answered twice"
                    found.setdefault(f"{name}_with_start_up", []).append(count / (ends[-1][0] - start))
                    found.setdefault(f"{name}_steady", []).append(_steady(ends))
    finally:
        os.sched_setaffinity(0, before)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "images": count,
        "blocks": BLOCKS,
        "cores": min(CORES, len(before)),
        "rounds": rounds,
        **{name: round(value, 1) for name, value in medians.items()},
        "ratio_steady": round(medians["ray_steady"] / medians["process_steady"], 3),
        "ratio_with_start_up": round(medians["ray_with_start_up"] / medians["process_with_start_up"], 3),
    }


def _write_blocks(folder: Path, images: list[Image.Image], count: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    contents = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        contents.append(file.getvalue())
    for block, numbers in enumerate(np.array_split(np.arange(count), BLOCKS)):
        rows = {"path": numbers, "bytes": [contents[number % len(contents)] for number in numbers]}
        parquet.write_table(pa.table(rows), folder / f"{block:03}.parquet")


def _steady(ends: Ends) -> float:
    """Return the images a second from when every process has finished a block."""
    first = {process: end for end, _, process in reversed(ends)}
    begin = max(first.values())
    assert begin < ends[-1][0], "a process answered its first block last; measure more images"
    return sum(size for end, size, _ in ends if end > begin) / (ends[-1][0] - begin)


def _one_process(model: str, folder: str, rule: dict[str, Any]) -> Ends:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_answer_blocks, model, folder, rule).result()


def _answer_blocks(model: str, folder: str, rule: dict[str, Any]) -> Ends:
    from pyarrow import parquet

    torch.set_num_interop_threads(1)
    predictor, ends = ScanPredictor(model, threads=CORES, **rule), []
    for path in sorted(Path(folder).glob("*.parquet")):
        table = parquet.read_table(path)
        block = {"path": table["path"].to_numpy(), "bytes": table["bytes"].to_pylist()}
        size = sum(len(answers["id"]) for answers in predictor(block))
        ends.append((time.time(), size, os.getpid()))
    return ends


class WithProcess(ScanPredictor):
    """Tells which process answered."""

    def __call__(self, block: Any) -> Any:
        for answers in super().__call__(block):
            yield {**answers, "process": np.full(len(answers["id"]), os.getpid())}


def _two_actors(model: str, folder: str, rule: dict[str, Any]) -> Ends:
    import ray

    # The actors find this module, and nobody else talks to this Ray.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.update(environment)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # which Ray reads once in a process
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as sockets lie in it
    # Four CPUs are logical: with two, two actors leave none for reading.
    ray.init(num_cpus=CORES + 2, include_dashboard=False, log_to_driver=False, _temp_dir=place)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        # Ray reads small files as one block, which one actor would answer alone.
        answers = (
            ray.data.read_parquet(folder)
            .repartition(BLOCKS)
            .map_batches(
                WithProcess,
                fn_constructor_kwargs={"model": model, **rule},
                compute=ray.data.ActorPoolStrategy(size=CORES),
                num_cpus=1,
                batch_size=None,
            )
        )
        ends: Ends = []
        for block in answers.iter_batches(batch_size=None, prefetch_batches=0):
            ends.append((time.time(), len(block["id"]), int(block["process"][0])))
        return ends
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)


__all__ = ["measure_ray"]
