# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""An engine for many callers at once: [`AsyncEngine`]."""

import asyncio
import itertools
import time
from typing import Any, Literal

from .metrics import EngineMetrics
from .networks import served_network
from .requests import Answer, DeadlineExceeded, QueueFull, Request
from .worker import Worker


OnFull = Literal["wait", "raise"]


class AsyncEngine:
    """
    Answers images of many callers, each as soon as it leaves the network. Images of different callers fill batches
    together, in front of each stage anew, as in [`~AdaptiveStreamMixin.predict_adaptive_stream`]: an easy image does
    not wait for a hard one, and an answer is the one that the image gets alone.

    A stage runs when `batch_size` images wait in front of it, or one that has waited in the engine for `max_wait_ms`.
    Stages run in one thread; callers may be in any event loops.

    Args:
        model ([`ScanForImageClassification`] or [`~hf_scan.runtime.ORTScanForImageClassification`]):
            The model. Its exit configuration is read once, when the engine is made.
        batch_size (`int`, *optional*, defaults to 16): Images with which a stage is run.
        max_wait_ms (`float`, *optional*, defaults to 2.0):
            Milliseconds for which an image waits for others, once and not in front of each stage anew. At 0 a stage
            runs whenever the engine is free.
        max_queue (`int`, *optional*, defaults to 1024): Images that are worked on or wait at the same time.
        on_full (`str`, *optional*, defaults to `"wait"`):
            What to do when there are as many: `"wait"` lets the caller wait, `"raise"` raises [`QueueFull`].
        exit_config ([`ExitConfig`], *optional*): Defaults to `model.exit_config`.
        max_exit (`int`, *optional*): The deepest exit that may answer.
        kwargs: Fields of the exit configuration to override, such as `thresholds=[0.9, 0.9]`.

    Raises:
        `TypeError`: if the model is no network with early exits.
        `ValueError`: if a setting is out of range, the model is in training mode, or it has no thresholds.

    Example:

    ```python
    >>> import asyncio
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.serving import AsyncEngine

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> async def main():
    ...     async with AsyncEngine(model, batch_size=8, thresholds=[0.9, 0.9]) as engine:
    ...         return await asyncio.gather(*(engine(image) for image in torch.rand(20, 3, 32, 32)))
    >>> len(asyncio.run(main()))
    20
    ```
    """

    def __init__(
        self,
        model: Any,
        batch_size: int = 16,
        max_wait_ms: float = 2.0,
        max_queue: int = 1024,
        on_full: OnFull = "wait",
        exit_config: Any = None,
        max_exit: int | None = None,
        **kwargs: Any,
    ) -> None:
        _check_settings(batch_size, max_wait_ms, max_queue, on_full)
        network = served_network(model, exit_config, max_exit, kwargs)
        self.model, self.on_full = model, on_full
        self.metrics = EngineMetrics(network.num_stages, batch_size)
        self._network, self._numbers = network, itertools.count()
        self._worker = Worker(network, batch_size, max_wait_ms / 1000, max_queue, self.metrics)

    @property
    def in_flight(self) -> int:
        """Number of images that are worked on, or whose callers wait for room."""
        return self._worker.in_flight

    @property
    def healthy(self) -> bool:
        """Whether the engine accepts images: it is not closed, and no error has stopped it."""
        return self._worker.is_open

    async def __call__(self, image: Any, timeout_ms: float | None = None) -> Answer:
        """
        Return the answer to one image, as soon as it leaves the network. A caller who is cancelled takes the image
        out of the queues.

        Args:
            image (`torch.Tensor` or `np.ndarray` of shape `(num_channels, height, width)`):
                The image, prepared by the model's image processor. Also with a batch dimension of 1.
            timeout_ms (`float`, *optional*): Milliseconds after which the image is given up.

        Returns:
            [`Answer`]

        Raises:
            `TypeError`, `ValueError`: if it is no image that the network takes, or pixels or logits are not finite.
            [`QueueFull`]: with `on_full="raise"`, if `max_queue` images are worked on.
            [`DeadlineExceeded`]: if it is not answered in time.
            [`EngineClosed`]: if the engine is closed, or an error has stopped it.
        """
        if timeout_ms is not None and not timeout_ms > 0:
            raise ValueError(f"`timeout_ms` is {timeout_ms}; expected a number of milliseconds above 0, or None.")
        self._worker.check_open()
        prepared = self._network.prepare(image)
        loop = asyncio.get_running_loop()
        request = Request(next(self._numbers), prepared, loop, time.monotonic())
        if not self._worker.submit(request, wait_for_room=self.on_full == "wait"):
            self.metrics.note_outcome("refused")
            raise QueueFull(
                f"{self._worker.max_queue} images wait in the engine, which is `max_queue`. Ask again later, or make "
                'the engine with `on_full="wait"`.'
            )
        timer = None if timeout_ms is None else loop.call_later(timeout_ms / 1000, _expire, request, timeout_ms)
        try:
            answer = await request.future
        except (asyncio.CancelledError, DeadlineExceeded):
            self._worker.abandon(request)
            self.metrics.note_outcome("cancelled")
            raise
        except Exception:
            self.metrics.note_outcome("failed")
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self.metrics.note_outcome("answered")
        return answer

    async def close(self, answer_waiting: bool = True) -> None:
        """
        Accept no more images, and return when all that were accepted are answered.

        Args:
            answer_waiting (`bool`, *optional*, defaults to `True`): `False` has those that wait raise
                [`EngineClosed`] instead.
        """
        await asyncio.get_running_loop().run_in_executor(None, self._worker.close, answer_waiting)
        # What the worker handed to this loop comes before this does.
        await asyncio.sleep(0)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.close()


def _expire(request: Request, timeout_ms: float) -> None:
    if not request.future.done():
        request.future.set_exception(DeadlineExceeded(f"The image was not answered within {timeout_ms:g} ms."))


def _check_settings(batch_size: int, max_wait_ms: float, max_queue: int, on_full: str) -> None:
    for name, value in {"batch_size": batch_size, "max_queue": max_queue}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; expected a whole number of at least 1.")
    if not 0 <= max_wait_ms < float("inf"):
        raise ValueError(f"`max_wait_ms` is {max_wait_ms!r}; expected a number of milliseconds of at least 0.")
    if on_full not in ("wait", "raise"):
        raise ValueError(f"`on_full` is {on_full!r}; expected 'wait' or 'raise'.")


__all__ = ["AsyncEngine", "OnFull"]
