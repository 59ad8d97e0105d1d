# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What is asked of an engine, what it answers, and why it may not."""

import asyncio
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """
    The answer to one image.

    Args:
        logits (`torch.Tensor` or `np.ndarray` of shape `(num_labels,)`): Logits of the exit that answered.
        label (`str`): The label with the largest logit.
        exit_index (`int`): The exit that answered, from 0; `num_exits` where the ensemble did.
        confidence (`float`): The largest softmax probability, or with several labels an image the label confidence, at
            the exit's temperature.
    """

    logits: Any
    label: str
    exit_index: int
    confidence: float


class QueueFull(RuntimeError):  # noqa: N818 - as `queue.Full`, and it is nobody's mistake
    """Raised if `max_queue` images wait in an engine that refuses more. Ask again later."""


class EngineClosed(RuntimeError):  # noqa: N818
    """Raised if an engine is closed, or its worker has stopped. Make another."""


class DeadlineExceeded(TimeoutError):  # noqa: N818
    """Raised if an image is not answered within its `timeout_ms`."""


class Request:
    """
    An image on its way, and who waits for it.

    Args:
        number (`int`): Its number, of which there is one a request.
        image: The image, as the network prepares it.
        loop (`asyncio.AbstractEventLoop`): The event loop in which the caller waits.
        arrived (`float`): When it came, in seconds.
    """

    __slots__ = ("arrived", "future", "image", "loop", "number")

    def __init__(self, number: int, image: Any, loop: asyncio.AbstractEventLoop, arrived: float) -> None:
        self.number, self.image, self.loop, self.arrived = number, image, loop, arrived
        self.future: asyncio.Future[Answer] = loop.create_future()


def resolve(results: list[tuple[Request, Answer | Exception]]) -> None:
    """Hand results to those who wait for them, in their event loop. Who does not wait any more is left out."""
    for request, result in results:
        if request.future.done():
            continue
        if isinstance(result, Exception):
            request.future.set_exception(result)
        else:
            request.future.set_result(result)


__all__ = ["Answer", "DeadlineExceeded", "EngineClosed", "QueueFull", "Request", "resolve"]
