"""The classes for Ray: called as they are, and, marked slow, by a Ray of this machine."""

import asyncio
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hf_scan
from hf_scan.ray import ScanPredictor, written_ids
from hf_scan.serving import AsyncEngine

from .conftest import NUM_LABELS, FakeExport, image
from .test_server import expected_answers, picture


ROOT = Path(__file__).parent.parent.parent


def rows_of(blocks) -> dict[str, tuple]:
    """Answers by id, each of which must be there once."""
    rows = [row for block in blocks for row in zip(*(block[name].tolist() for name in NAMES))]
    found = {row[0]: row[1:] for row in rows}
    assert len(found) == len(rows)
    return found


NAMES = ("id", "label", "exit_index", "confidence")


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [picture(number) for number in range(24)]


@pytest.fixture(scope="module")
def expected(checkpoint, pictures):
    answers = expected_answers(checkpoint, pictures)
    return {f"{n}.png": (one["label"], one["exit_index"], one["confidence"]) for n, one in enumerate(answers)}


def block_of(pictures, wrap=lambda content: content) -> dict[str, np.ndarray]:
    images = np.empty(len(pictures), dtype=object)
    images[:] = [wrap(content) for content in pictures]
    return {"path": np.array([f"{number}.png" for number in range(len(pictures))]), "bytes": images}


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_a_block_is_answered_as_images_are_alone(kind, request, pictures, expected):
    predictor = ScanPredictor(str(request.getfixturevalue(kind)), batch_size=5)
    assert rows_of(predictor(block_of(pictures))) == expected
    assert len({exit_index for _, exit_index, _ in expected.values()}) > 1
    in_dictionaries = block_of(pictures, lambda content: {"bytes": content, "path": None})
    assert rows_of(predictor(in_dictionaries)) == expected
    pixels = block_of(pictures, lambda content: np.asarray(predictor.read.decode(content)))
    assert rows_of(predictor(pixels)) == expected
    stacked = {**pixels, "bytes": np.stack(list(pixels["bytes"]))}  # as Arrow's tensors come
    assert rows_of(predictor(stacked)) == expected
    assert list(predictor({name: column[:0] for name, column in pixels.items()})) == []


def test_what_is_no_image_is_skipped_or_raised(checkpoint, pictures, expected):
    block = block_of([*pictures[:7], b"none", pictures[8]])
    with pytest.raises(ValueError, match=r"The image '7.png' cannot be read: The 4 bytes are no image"):
        list(ScanPredictor(str(checkpoint), batch_size=4)(block))
    found = rows_of(ScanPredictor(str(checkpoint), batch_size=4, on_error="skip")(block))
    label, exit_index, confidence = found.pop("7.png")
    assert (label, exit_index, np.isnan(confidence)) == ("", -1, True)
    assert found == {name: expected[name] for name in found}
    assert len(found) == 8
    with pytest.raises(ValueError, match="is a str; expected the bytes"):
        list(ScanPredictor(str(checkpoint))({"path": ["a"], "bytes": ["a.png"]}))


def test_columns_and_settings_that_there_are_not(checkpoint):
    with pytest.raises(ValueError, match=r"has the columns \['image', 'path'\], and no 'bytes'"):
        list(ScanPredictor(str(checkpoint))({"path": [], "image": []}))
    with pytest.raises(ValueError, match="`on_error` is 'ignore'"):
        ScanPredictor(str(checkpoint), on_error="ignore")
    with pytest.raises(OSError, match="none"):
        ScanPredictor("no/such/none")


def test_written_ids_leave_out_what_is_damaged(tmp_path):
    assert written_ids(tmp_path / "none") == frozenset()
    pq.write_table(pa.table({"id": ["a", "b"], "label": ["x", "y"]}), tmp_path / "1.parquet")
    (tmp_path / "2.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-9])
    assert written_ids(tmp_path) == {"a", "b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.parquet", "2.parquet.damaged"]


def test_the_module_does_not_shadow_the_package():
    code = "import hf_scan.ray, sys; print('ray' in sys.modules, hf_scan.ray.ScanPredictor.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "ScanPredictor"]


@pytest.fixture(scope="session")
def ray_() -> Iterator[ModuleType]:
    """A Ray of this machine. Four CPUs are logical: with two, two actors leave none for reading."""
    ray = pytest.importorskip("ray")
    # The processes import what this one does, and ask nobody.
    paths = [Path(hf_scan.__file__).parent.parent, ROOT / "examples", os.environ.get("PYTHONPATH", "")]
    os.environ.update(
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_prestart_worker_first_driver="0",  # processes that nobody may need, while the machine is busy
        PYTHONPATH=os.pathsep.join(str(path) for path in paths if path),
    )
    place = start(ray)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()
    shutil.rmtree(place, ignore_errors=True)


def start(ray: ModuleType, attempts: int = 3) -> str:
    """Start Ray, which gives itself 30 seconds for it, too few on a busy machine, and return its folder."""
    for attempt in range(attempts):
        place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as sockets lie in it
        settings = {"num_cpus": 4, "include_dashboard": False, "log_to_driver": False}
        try:
            ray.init(_temp_dir=place, object_store_memory=150 << 20, **settings)
            return place
        except Exception as error:  # Ray raises no other kind
            ray.shutdown()
            shutil.rmtree(place, ignore_errors=True)
            if "timed out" not in str(error) or attempt + 1 == attempts:
                raise
    raise AssertionError


@pytest.fixture
def folder(tmp_path, pictures) -> Path:
    for number, content in enumerate(pictures):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number}.png").write_bytes(content)
    return tmp_path / "photos"


def classified(ray, folder, predictor, checkpoint):
    images = ray.data.read_binary_files(str(folder), include_paths=True, override_num_blocks=8)
    return answered(images, predictor, checkpoint)


def answered(images, predictor, checkpoint):
    from ray.data import ActorPoolStrategy

    return images.map_batches(
        predictor,
        fn_constructor_kwargs={"model": str(checkpoint), "batch_size": 2},
        compute=ActorPoolStrategy(size=2),
        num_cpus=1,
        batch_size=None,
    )


def by_name(rows) -> dict[str, tuple]:
    assert len({row["id"] for row in rows}) == len(rows)
    return {Path(row["id"]).name: (row["label"], row["exit_index"], row["confidence"]) for row in rows}


@pytest.mark.slow
def test_two_actors_answer_each_image_once(ray_, folder, checkpoint, expected, tmp_path):
    class WithProcess(ScanPredictor):
        def __call__(self, block):
            (tmp_path / str(os.getpid())).touch()
            while len(list(tmp_path.glob("[0-9]*"))) < 2:  # or the first that is there might do all
                time.sleep(0.01)
            for answers in super().__call__(block):
                yield {**answers, "process": np.full(len(answers["id"]), os.getpid())}

    rows = classified(ray_, folder, WithProcess, checkpoint).take_all()
    assert by_name(rows) == expected
    processes = {row["process"] for row in rows}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.slow
def test_killed_actors_lose_no_row(ray_, checkpoint, pictures, expected, tmp_path):
    """3,000 rows in 30 blocks, of two actors that are killed in the middle of a block, one after the other."""

    class Mortal(ScanPredictor):
        def __call__(self, block):
            for answers in super().__call__(block):
                yield answers
                if len(list(tmp_path.glob("killed-*"))) < 2:
                    (tmp_path / f"killed-{os.getpid()}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)

    count = 3000
    rows = {"path": list(range(count)), "bytes": [pictures[number % len(pictures)] for number in range(count)]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    images = ray_.data.read_parquet(str(tmp_path / "rows.parquet")).repartition(30)
    found = answered(images, Mortal, checkpoint).take_all()
    assert sorted(row["id"] for row in found) == list(range(count))
    names = list(expected)
    assert all(
        (row["label"], row["exit_index"], row["confidence"]) == expected[names[row["id"] % len(names)]]
        for row in found
    )
    assert len(list(tmp_path.glob("killed-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_the_example_resumes(ray_, kind, checkpoint, pictures, expected, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import ray_batch

    source, output = tmp_path / "source", tmp_path / "answers"
    source.mkdir()
    rows = [*zip(expected, pictures), ("broken.png", b"none")]

    def write(name: str, some: list[tuple[str, bytes]]) -> None:
        if kind == "parquet":
            pq.write_table(
                pa.table({"id": [row[0] for row in some], "image": [row[1] for row in some]}), source / name
            )
        else:
            for path, content in some:
                (source / path).write_bytes(content)

    given = ["--model", str(checkpoint), "--input", str(source), "--output", str(output), "--actors", "1"]
    monkeypatch.setattr(sys, "argv", ["ray_batch.py", *given])
    write("1.parquet", rows[:-3])
    ray_batch.main()
    assert len(pq.read_table(output)) == len(rows) - 3
    files = set(output.iterdir())
    write("2.parquet", rows[-3:])
    ray_batch.main()
    answers = pq.read_table(output).to_pylist()
    (broken,) = (row for row in answers if row["id"].endswith("broken.png"))
    assert (broken["label"], broken["exit_index"]) == ("", -1)
    assert by_name([row for row in answers if row != broken]) == expected
    added = set(output.iterdir()) - files
    assert sum(len(pq.read_table(file)) for file in added) == 3  # and what was there is as it was


@pytest.mark.slow
def test_the_deployment_answers(ray_, checkpoint, pictures, expected, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import ray_serve
    from ray import serve

    serve.start(http_options={"location": "NoServer"})
    handle = serve.run(ray_serve.Classifier.bind(str(checkpoint)), route_prefix=None)

    async def ask_all():
        return await asyncio.gather(*(handle.remote(content) for content in [*pictures, b"none"]))

    *answers, refused = asyncio.run(ask_all())
    serve.shutdown()
    found = {f"{n}.png": (one["label"], one["exit_index"], one["confidence"]) for n, one in enumerate(answers)}
    assert found == expected
    assert "no image" in refused["error"]


@pytest.mark.slow
def test_an_easy_request_overtakes_a_hard_one(ray_, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import ray_serve
    from ray import serve

    class Pair(ray_serve.Classifier.func_or_class):
        def __init__(self):
            self.engine = AsyncEngine(FakeExport(), batch_size=2, max_wait_ms=3_600_000)
            self.read = lambda content: image(*map(int, content.split()))

    serve.start(http_options={"location": "NoServer"})
    handle = serve.run(serve.deployment(max_ongoing_requests=64)(Pair).bind(), route_prefix=None)
    hard = handle.remote(b"2 1")
    easy = handle.remote(b"0 2").result(timeout_s=120)
    with pytest.raises(TimeoutError):
        hard.result(timeout_s=0.1)
    another = [handle.remote(b"2 3"), handle.remote(b"0 4")]  # fills its batch again
    labels = [easy["label"], *(one.result(timeout_s=120)["label"] for one in (hard, *another))]
    serve.shutdown()
    assert labels == ["label 2", "label 1", "label 3", "label 4"]


def fake_classifier(folder: Path, **settings) -> type:
    """The class of the deployment, over a fake network. Each replica leaves its process in the folder."""
    import ray_serve

    class Fake(ray_serve.Classifier.func_or_class):
        def __init__(self):
            (folder / f"{os.getpid()}.replica").touch()
            self.engine = AsyncEngine(FakeExport(), **settings)
            self.read = lambda content: image(*map(int, content.split()))

        async def __call__(self, given):
            if given == b"die" and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return await super().__call__(b"0 0" if given == b"die" else given)

    return Fake


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_of_which_some_were_in_a_killed_replica(ray_, tmp_path, monkeypatch):
    """With callers that give up and images that cannot be run. Who was in the replica that died asks again."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from ray import serve

    count, callers, rng = 10_000, 100, random.Random(0)
    ends: dict[int, list[str]] = {number: [] for number in range(count)}
    again: list[int] = []

    async def ask(handle, number: int, content: bytes, gives_up: bool) -> str:
        response = handle.remote(content)
        if gives_up:
            await asyncio.sleep(rng.random() / 100)
            response.cancel()
        try:
            answer = await response
        except (asyncio.CancelledError, serve.exceptions.RequestCancelledError):
            return "cancelled" if gives_up else "wrongly cancelled"
        except ray_.exceptions.RayActorError:
            again.append(number)
            return await ask(handle, number, content, gives_up)
        if "error" in answer:
            return "failed" if content.startswith(b"-1") else "wrongly failed"
        return "right" if answer["label"] == f"label {number % NUM_LABELS}" else "wrong"

    async def caller(handle, numbers: Iterator[int]) -> None:
        for number in numbers:
            depth = -1 if rng.random() < 0.002 else rng.randrange(3)
            content = b"die" if number == 3000 else f"{depth} {number % NUM_LABELS}".encode()
            ends[number].append(await ask(handle, number, content, number != 3000 and rng.random() < 0.1))

    async def ask_all(handle) -> None:
        numbers = iter(range(count))
        await asyncio.gather(*(caller(handle, numbers) for _ in range(callers)))

    classifier = fake_classifier(tmp_path, batch_size=32, max_wait_ms=1)
    serve.start(http_options={"location": "NoServer"})
    deployment = serve.deployment(max_ongoing_requests=64, num_replicas=2)(classifier)
    asyncio.run(ask_all(serve.run(deployment.bind(), route_prefix=None)))
    serve.shutdown()
    assert {len(end) for end in ends.values()} == {1}
    assert {end[0] for end in ends.values()} == {"right", "failed", "cancelled"}
    assert ends[3000] == ["right"]
    assert 3000 in again
    assert len(list(tmp_path.glob("*.replica"))) >= 2


@pytest.mark.slow
def test_replicas_are_added_under_load(ray_, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import ray_serve
    from ray import serve

    settings = ray_serve.Classifier._deployment_config.autoscaling_config
    assert (settings.min_replicas, settings.max_replicas) == (1, 8)
    quick = {"target_ongoing_requests": 2, "upscale_delay_s": 0.1, "metrics_interval_s": 0.1, "max_replicas": 2}
    deployment = serve.deployment(max_ongoing_requests=64, autoscaling_config=quick)(
        fake_classifier(tmp_path, batch_size=64, max_wait_ms=3_600_000)
    )
    serve.start(http_options={"location": "NoServer"})
    handle = serve.run(deployment.bind(), route_prefix=None)
    waiting = [handle.remote(b"0 1") for _ in range(16)]  # which no batch takes
    end = time.monotonic() + 300
    while len(list(tmp_path.glob("*.replica"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    for one in waiting:
        one.cancel()
    serve.shutdown()
    assert len(list(tmp_path.glob("*.replica"))) == 2
