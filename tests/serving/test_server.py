"""The server, called as an application and, where connections matter, over sockets of this machine."""

import asyncio
import base64
import io
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from hf_scan import ScanForImageClassification
from hf_scan.cli import main
from hf_scan.model.image_processing_scan import create_image_processor
from hf_scan.serving import server as server_module
from hf_scan.serving.images import ImageReader
from hf_scan.serving.loading import load_model
from hf_scan.serving.server import ServerSettings, create_app


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(str(checkpoint))


def picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (20, 18)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def expected_answers(checkpoint: Path, pictures: list[bytes]) -> list[dict]:
    model = ScanForImageClassification.from_pretrained(checkpoint).eval()
    processor = create_image_processor(model)
    found = []
    for content in pictures:
        pixels = processor([Image.open(io.BytesIO(content)).convert("RGB")], return_tensors="pt")["pixel_values"]
        answer = model.predict_adaptive(pixels)
        label = model.config.id2label[int(answer.logits.argmax())]
        confidence = pytest.approx(float(answer.confidence), abs=1e-4)
        found.append({"label": label, "confidence": confidence, "exit_index": int(answer.exit_index)})
    return found


def ask(loaded, *requests: dict, **settings) -> list[httpx.Response]:
    """Sends requests one after another."""

    async def run() -> list[httpx.Response]:
        app = create_app(loaded, ServerSettings(**settings))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answers = [await client.request(**{"method": "POST", "url": "/predict", **one}) for one in requests]
        service = app.state.service
        assert (service.held, service.budget.held, service.engine.in_flight) == (0, 0, 0)
        await service.close()
        return answers

    return asyncio.run(run())


def error_of(loaded, request: dict, status: int, **settings) -> str:
    (answer,) = ask(loaded, request, **settings)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    return answer.json()["error"]


def test_one_or_many_images_in_every_form(loaded, checkpoint):
    pictures = [picture(0), picture(1, "JPEG"), picture(2, "WEBP")]
    answers = ask(
        loaded,
        {"content": pictures[0], "headers": {"content-type": "image/png"}},
        {"content": pictures[0]},
        {"json": {"image": in_base64(pictures[0])}},
        {"json": {"image": "data:image/png;base64," + in_base64(pictures[0])}},
        {"json": {"images": [in_base64(content) for content in pictures]}},
        {"files": [("images", (f"{i}.img", content)) for i, content in enumerate(pictures)]},
    )
    expected = expected_answers(checkpoint, pictures)
    assert [answer.status_code for answer in answers] == [200] * 6
    assert all(answer.json() == {"answers": expected[:1]} for answer in answers[:4])
    assert all(answer.json() == {"answers": expected} for answer in answers[4:])


def test_health_metrics_and_the_page(loaded, checkpoint):
    health, _, metrics, page, schema, nowhere, wrong = ask(
        loaded,
        {"method": "GET", "url": "/health"},
        {"content": picture()},
        {"method": "GET", "url": "/metrics"},
        {"method": "GET", "url": "/docs"},
        {"method": "GET", "url": "/openapi.json"},
        {"method": "GET", "url": "/none"},
        {"method": "GET"},
    )
    assert health.json() == {"status": "ok", "model": str(checkpoint), "in_flight": 0, "files_changed": False}
    assert 'hf_scan_requests_total{outcome="answered"} 1.0' in metrics.text
    assert page.status_code == 200
    body = schema.json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert {"image/jpeg", "multipart/form-data", "application/json"} <= body.keys()
    assert (nowhere.status_code, wrong.status_code) == (404, 405)
    assert "error" in nowhere.json()


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"content": b"no image at all"}, 400, "The 15 bytes are no image; expected a file of one of JPEG, PNG"),
        ({"content": b""}, 400, "The request is empty"),
        ({"content": b"<svg/>", "headers": {"content-type": "text/html"}}, 415, "of type 'text/html'; expected an"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "is no JSON"),
        ({"json": ["x"]}, 400, 'Expected {"image"'),
        ({"json": {"images": []}}, 400, "at least one image"),
        ({"json": {"image": "not base64!"}}, 400, "Image 0 is no base64."),
        ({"json": {"image": ""}}, 400, "The image is empty"),
        ({"json": {"image": "http://127.0.0.1/a.png"}}, 400, "The server fetches nothing."),
        ({"data": {"text": "x"}, "files": []}, 415, "x-www-form-urlencoded"),
        ({"content": b"--", "headers": {"content-type": "multipart/form-data"}}, 400, "oundary"),
        ({"json": {"images": ["QUJD"] * 1000}}, 413, "1000 images, more than the 64 that are accepted"),
        ({"files": [("images", ("a", b"x"))] * 1000}, 413, "more than 640 images, and 64 are accepted"),
        ({"files": [("images", ("a", b"x"))] * 65}, 413, "65 images, more than the 64 that are accepted"),
    ],
)
def test_bad_requests_get_a_sentence(loaded, request_, status, message):
    assert message in error_of(loaded, request_, status)


def test_of_many_images_the_error_says_which(loaded):
    images = [in_base64(picture()), in_base64(b"none"), in_base64(picture())]
    assert error_of(loaded, {"json": {"images": images}}, 400).startswith("Image 1 of 3: The 4 bytes are no image")


def test_sizes_are_checked_before_pixels_are_decoded(loaded, monkeypatch):
    content = picture()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    assert "20 x 18 pixels, more than the 300" in error_of(loaded, {"content": content}, 400, max_pixels=300)


@pytest.mark.parametrize("pixels", [100_000, 20_000], ids=["as PIL knows them", "below its limit"])
def test_a_decompression_bomb(loaded, pixels):
    header = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    header += (40).to_bytes(4, "little") + pixels.to_bytes(4, "little") * 2 + b"\x01\0\x18\0" + bytes(24)
    assert "pixels" in error_of(loaded, {"content": header}, 400)


def test_damaged_images(loaded):
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = picture(0, kind, (64, 64))
        assert "image" in error_of(loaded, {"content": whole[: len(whole) // 2]}, 400)


def test_a_program_in_an_image_is_not_run(loaded):
    assert "no image" in error_of(loaded, {"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 400)


def test_too_many_bytes_are_refused_before_they_are_read(loaded):
    assert "more than the 100 bytes" in error_of(loaded, {"content": picture()}, 413, max_bytes=100)

    async def in_pieces():
        for _ in range(1000):
            yield b"x" * 10

    assert "more than the 100 bytes" in error_of(loaded, {"content": in_pieces()}, 413, max_bytes=100)


def test_a_camera_held_upright(loaded):
    image = Image.open(io.BytesIO(picture()))
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(file, "PNG", exif=exif)
    assert ImageReader(loaded.processor, loaded.model).decode(file.getvalue()).size == (18, 20)


def test_images_are_decoded_in_other_threads(loaded, monkeypatch):
    decode, threads = ImageReader.decode, []

    def note(self, content):
        threads.append(threading.current_thread())
        return decode(self, content)

    monkeypatch.setattr(ImageReader, "decode", note)
    ask(loaded, {"json": {"images": [in_base64(picture(number)) for number in range(6)]}}, decoders=2)
    assert len(threads) == 6
    assert threading.current_thread() not in threads  # in which the event loop runs
    assert 1 <= len(set(threads)) <= 2


def test_an_export_is_served_as_well(exported, checkpoint):
    (answer,) = ask(load_model(str(exported), threads=1), {"content": picture(3)})
    assert answer.json() == {"answers": expected_answers(checkpoint, [picture(3)])}


def test_exports_that_prepare_images_take_bytes(loaded):
    takes_bytes = SimpleNamespace(manifest=SimpleNamespace(image={"dtype": "uint8"}))
    pixels = ImageReader(loaded.processor, takes_bytes)(picture(3))
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    mean, std = (np.array(values) for values in (loaded.processor.image_mean, loaded.processor.image_std))
    expected = ImageReader(loaded.processor, loaded.model)(picture(3)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose((pixels / 255 - mean) / std, expected, atol=0.02)


def test_a_full_server_says_so(loaded):
    async def run():
        app = create_app(loaded, ServerSettings(max_queue=4, max_images=3, batch_size=64, max_wait_ms=200))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            three = {"images": [in_base64(picture())] * 3}
            answers = await asyncio.gather(*(client.post("/predict", json=three) for _ in range(3)))
        assert app.state.service.held == 0
        await app.state.service.close()
        return answers

    answers = asyncio.run(run())
    assert sorted(answer.status_code for answer in answers) == [200, 503, 503]
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert (refused.json()["error"], refused.headers["retry-after"]) == ("Too many images wait. Try again.", "1")


def test_an_answer_that_is_late(loaded):
    message = error_of(loaded, {"content": picture()}, 504, batch_size=64, max_wait_ms=60_000, timeout_ms=30)
    assert message == "The image was not answered within 30 ms."


def test_a_worker_that_died(loaded, monkeypatch):
    def die(index, state):
        raise SystemExit("killed")

    monkeypatch.setattr(loaded.model, "run_stage", die, raising=False)
    lost, health, again = ask(
        loaded, {"content": picture()}, {"method": "GET", "url": "/health"}, {"content": picture()}
    )
    assert (lost.status_code, again.status_code, health.status_code) == (503, 503, 503)
    assert health.json()["status"] == "stopped"
    assert lost.json() == {"error": "The server is stopping."}


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_a_folder_that_changes_is_not_read_again(kind, request, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), place)
    loaded = load_model(str(place), threads=1)
    before = ask(loaded, {"content": picture(4)})
    for path in place.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")  # in place, under whoever maps it
    after, health = ask(loaded, {"content": picture(4)}, {"method": "GET", "url": "/health"})
    assert after.json() == before[0].json()
    assert health.json()["files_changed"]


@contextmanager
def running(loaded, **settings) -> Iterator[tuple[int, object]]:
    """A server in a thread of this process: its port and its service."""
    app = create_app(loaded, ServerSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], app.state.service
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("It did not come about within 30 seconds.")


def test_a_client_that_hangs_up_takes_its_images_along(loaded):
    with running(loaded, batch_size=64, max_wait_ms=60_000) as (port, service):
        content = picture()
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        for sent in (head + content, head + content[:10]):  # waits for the answer; in the middle of its request
            with closing(socket.create_connection(("127.0.0.1", port))) as client:
                client.sendall(sent)
                expected = 1 if sent.endswith(content) else 0
                wait_until(lambda expected=expected: service.engine.in_flight == expected and service.budget.held)
        wait_until(lambda: (service.held, service.budget.held, service.engine.in_flight) == (0, 0, 0))
        assert service.engine.metrics.snapshot()["requests"]["cancelled"] == 1


def test_many_callers_at_once(loaded, checkpoint):
    pictures = [picture(number) for number in range(8)]
    expected = expected_answers(checkpoint, pictures)

    async def run(port):
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post("/predict", content=pictures[i % 8]) for i in range(160)))

    with running(loaded, batch_size=8) as (port, service):
        answers = asyncio.run(run(port))
        counts = service.engine.metrics.snapshot()["requests"]
    assert [answer.json()["answers"][0] for answer in answers] == [expected[i % 8] for i in range(160)]
    assert counts == {"answered": 160, "failed": 0, "cancelled": 0, "refused": 0}


def test_settings_that_cannot_be():
    for settings, message in (
        ({"max_images": 0}, "`max_images` is 0"),
        ({"timeout_ms": 0}, "`timeout_ms` is 0"),
        ({"max_images": 65, "max_queue": 64}, "expected room for all images of a request"),
    ):
        with pytest.raises(ValueError, match=message):
            ServerSettings(**settings)


def test_the_command(checkpoint, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(server_module, "serve", lambda *given: seen.append(given))
    given = ["--model", str(checkpoint), "--port", "8123", "--max-megabytes", "0.5", "--batch-size", "4"]
    assert main(["serve", *given]) == 0
    ((loaded, host, port, settings),) = seen
    assert (loaded.name, host, port) == (str(checkpoint), "127.0.0.1", 8123)
    assert (settings.max_bytes, settings.max_pixels, settings.batch_size) == (2**19, 50_000_000, 4)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", str(checkpoint)]) == 1
    assert "pip install 'hf_scan[serve]'" in capsys.readouterr().err
