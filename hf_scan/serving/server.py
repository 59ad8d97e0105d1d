# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""A web server over an engine: [`create_app`], and [`serve`], which runs it."""

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ..extras import require_extra
from .async_engine import AsyncEngine
from .bodies import ByteBudget, ClientDisconnect, files_of
from .images import MAX_PIXELS, ImageReader
from .loading import LoadedModel
from .requests import DeadlineExceeded, EngineClosed, QueueFull


try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from pydantic import BaseModel
    from starlette.exceptions import HTTPException
except ImportError:
    require_extra("serve", "`hf_scan.serving.server`")
    raise

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
HUNG_UP = 499  # nginx's code for a client that closed the connection; nobody reads it


@dataclass(frozen=True)
class ServerSettings:
    """
    The settings of a server.

    Args:
        batch_size (`int`, *optional*, defaults to 16): Images with which a stage is run.
        max_wait_ms (`float`, *optional*, defaults to 2.0): Milliseconds for which an image waits for others.
        max_queue (`int`, *optional*, defaults to 256): Images that are decoded, wait or run at the same time. More are
            refused with 503.
        max_images (`int`, *optional*, defaults to 64): The most images of a request.
        max_bytes (`int`, *optional*, defaults to 32 MiB): The most bytes of a request.
        max_pixels (`int`, *optional*, defaults to 50,000,000): The most pixels of an image.
        timeout_ms (`float`, *optional*, defaults to 30,000): Milliseconds for an answer, after which it is 504.
        decoders (`int`, *optional*, defaults to 2): Threads that decode images.
    """

    batch_size: int = 16
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_images: int = 64
    max_bytes: int = 32 << 20
    max_pixels: int = MAX_PIXELS
    timeout_ms: float = 30_000.0
    decoders: int = 2

    def __post_init__(self) -> None:
        for name in ("max_images", "max_bytes", "max_pixels", "decoders"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a whole number of at least 1.")
        if not self.timeout_ms > 0:
            raise ValueError(f"`timeout_ms` is {self.timeout_ms}; expected a number of milliseconds above 0.")
        if self.max_images > self.max_queue:
            raise ValueError(
                f"`max_images` is {self.max_images}, and `max_queue` {self.max_queue}; expected room for all images "
                "of a request."
            )


class ImageAnswer(BaseModel):
    """The answer to an image: its label, and which exit gave it, how confidently."""

    label: str
    confidence: float
    exit_index: int


class Answers(BaseModel):
    """The answers to the images of a request, in their order."""

    answers: list[ImageAnswer]


class Problem(BaseModel):
    """Why there is no answer."""

    error: str


def _file(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string", "format": "binary"}}}


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            **_file("image/jpeg"),
            **_file("image/png"),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "string", "format": "byte"},
                        "images": {"type": "array", "items": {"type": "string", "format": "byte"}},
                    },
                }
            },
        },
    }
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (400, 408, 413, 415, 503, 504)}


def create_app(loaded: LoadedModel, settings: ServerSettings | None = None) -> FastAPI:
    """
    Return a web application that classifies images: `POST /predict`, `GET /health`, `GET /metrics`, and a page about
    them at `/docs`. Errors are JSON, `{"error": "..."}`.

    Args:
        loaded ([`LoadedModel`]): The model, from [`load_model`].
        settings ([`ServerSettings`], *optional*): Batches and limits.

    Raises:
        `ValueError`: if the model has no thresholds, or a setting is out of range.

    Example:

    ```python
    >>> from hf_scan import ExitConfig, ScanConfig, ScanForImageClassification
    >>> from hf_scan.model.image_processing_scan import create_image_processor
    >>> from hf_scan.serving.loading import load_model
    >>> from hf_scan.serving.server import create_app

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10))
    >>> model.exit_config = ExitConfig(thresholds=[0.9, 0.9])
    >>> model.save_pretrained("served")
    >>> create_image_processor(model).save_pretrained("served")  # doctest: +ELLIPSIS
    [...]
    >>> app = create_app(load_model("served"))
    >>> sorted(app.openapi()["paths"])
    ['/health', '/metrics', '/predict']
    ```
    """
    service = _Service(loaded, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="hf_scan", description=f"Classifies images by {loaded.name}.", lifespan=lifespan)
    app.state.service = service
    app.add_exception_handler(HTTPException, _explain)  # type: ignore[arg-type]  # it is given no other
    app.add_exception_handler(Exception, _apologise)

    @app.post("/predict", openapi_extra=_BODY, responses=_PROBLEMS, response_model=Answers)
    async def predict(request: Request) -> Any:
        """Classify one image file, several files of a form, or base64 in JSON: `{"images": ["...", ...]}`."""
        return await service.predict(request)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Tell whether images are accepted."""
        state = service.health()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    registry = CollectorRegistry()
    registry.register(service.engine.metrics)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return counts for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Service:
    """What the routes share: the engine, the decoders and the room that is left."""

    def __init__(self, loaded: LoadedModel, settings: ServerSettings) -> None:
        self.loaded, self.settings = loaded, settings
        self.engine = AsyncEngine(
            loaded.model, settings.batch_size, settings.max_wait_ms, settings.max_queue, on_full="raise"
        )
        self.read_image = ImageReader(loaded.processor, loaded.model, settings.max_pixels)
        self.budget = ByteBudget(settings.max_bytes, 8 * settings.max_bytes)
        self.held = 0  # images that are decoded, wait or run
        self._decoders = ThreadPoolExecutor(settings.decoders, "hf_scan-decoder")

    def health(self) -> dict[str, Any]:
        """Return the state of the service."""
        status = "ok" if self.engine.healthy else "stopped"
        changed = self.loaded.files_changed()
        return {"status": status, "model": self.loaded.name, "in_flight": self.held, "files_changed": changed}

    async def predict(self, request: Request) -> Any:
        """Answer a request."""
        try:
            body = await self.budget.read(request)
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        try:
            files = await files_of(request, body, self.settings.max_images)
            with self._room(len(files)):
                answers = await _unless_hung_up(request, self._answer_all(files))
        finally:
            self.budget.held -= len(body)
        return Response(status_code=HUNG_UP) if answers is None else Answers(answers=answers)

    async def close(self) -> None:
        """Answer what is in flight, and stop."""
        await self.engine.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _room(self, count: int) -> "_Room":
        if self.held + count > self.settings.max_queue:
            raise HTTPException(503, "Too many images wait. Try again.", {"Retry-After": "1"})
        return _Room(self, count)

    async def _answer_all(self, files: list[bytes]) -> list[ImageAnswer]:
        tasks = [asyncio.ensure_future(self._answer(*pair, len(files))) for pair in enumerate(files)]
        try:
            return await asyncio.gather(*tasks)
        finally:  # of which some may be left if one failed, or the client hung up
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, position: int, content: bytes, count: int) -> ImageAnswer:
        which = f"Image {position} of {count}: " if count > 1 else ""
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self._decoders, self.read_image, content)
            answer = await self.engine(pixels, timeout_ms=self.settings.timeout_ms)
        except ValueError as error:
            raise HTTPException(400, f"{which}{error}") from error
        except QueueFull as error:
            raise HTTPException(503, "Too many images wait. Try again.", {"Retry-After": "1"}) from error
        except EngineClosed as error:
            raise HTTPException(503, "The server is stopping.", {"Retry-After": "10"}) from error
        except DeadlineExceeded as error:
            raise HTTPException(504, f"{which}{error}") from error
        return ImageAnswer(label=answer.label, confidence=answer.confidence, exit_index=answer.exit_index)


class _Room:
    """Holds room for some images."""

    def __init__(self, service: _Service, count: int) -> None:
        self.service, self.count = service, count

    def __enter__(self) -> None:
        self.service.held += self.count

    def __exit__(self, *error: Any) -> None:
        self.service.held -= self.count


async def _unless_hung_up(request: Request, work: Awaitable[Result]) -> Result | None:
    """Return what `work` gives, or `None` if the client hangs up first, which cancels it."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _explain(request: Request, error: HTTPException) -> JSONResponse:
    texts = {"Not Found": "There is no such page; /docs lists those that there are."}
    return JSONResponse({"error": texts.get(error.detail, error.detail)}, error.status_code, error.headers)


async def _apologise(request: Request, error: Exception) -> JSONResponse:
    logger.error("A request failed.", exc_info=error)
    return JSONResponse({"error": "The server failed to answer; its log says why."}, 500)


def serve(loaded: LoadedModel, host: str, port: int, settings: ServerSettings) -> None:
    """
    Run a server until it is interrupted or terminated (SIGINT, SIGTERM). It then accepts no more requests, answers
    those in flight, and returns.

    Args:
        loaded ([`LoadedModel`]): The model, from [`load_model`].
        host (`str`): The address to listen at; `"127.0.0.1"` is reached from this machine only.
        port (`int`): The port to listen at.
        settings ([`ServerSettings`]): Batches and limits.

    Raises:
        `SystemExit`: if the server cannot listen there; the log says why.
    """
    import uvicorn

    app = create_app(loaded, settings)
    # Connections that neither send nor wait cost little; what they send is counted in `ByteBudget`.
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=60, limit_concurrency=1024
    )
    server = uvicorn.Server(config)
    with _ended_by_signals(server):
        server.run()


@contextmanager
def _ended_by_signals(server: Any) -> Iterator[None]:
    """
    Have SIGINT and SIGTERM end a server of uvicorn and not the process. uvicorn handles both while it runs, and raises
    them again when it has shut down: without this, the process would end as if it had been killed.
    """
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield
        return

    def end(number: int, frame: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


__all__ = ["Answers", "ImageAnswer", "Problem", "ServerSettings", "create_app", "serve"]
