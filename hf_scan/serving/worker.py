# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The thread of an engine: it runs stages for the images that wait, and hands out answers."""

import asyncio
import threading
import time
from collections import defaultdict, deque
from typing import Any

from ..model.stage_scheduler import StageScheduler
from .metrics import EngineMetrics
from .networks import Arrivals, Result, Row, ServedNetwork
from .requests import Answer, EngineClosed, Request, resolve


class Worker:
    """
    Runs a network in a thread of its own. All methods but those of the thread may be called from any thread.

    Args:
        network ([`ServedNetwork`]): The network.
        batch_size (`int`): Samples with which a stage is run.
        max_wait (`float`): Seconds for which a sample waits for others.
        max_queue (`int`): Requests that are worked on at the same time.
        metrics ([`EngineMetrics`]): Counts what is done.
    """

    def __init__(
        self, network: ServedNetwork, batch_size: int, max_wait: float, max_queue: int, metrics: EngineMetrics
    ) -> None:
        self.network, self.metrics = network, metrics
        self.batch_size, self.max_wait, self.max_queue = batch_size, max_wait, max_queue
        # Only the thread touches it.
        self._scheduler: StageScheduler[Any, Result] = StageScheduler(network.num_stages, batch_size, self._advance)
        self._condition = threading.Condition()
        # What follows is guarded by the condition.
        self._admitted: dict[int, Request] = {}  # in progress; removed once, when the request ends
        self._arrived: list[Request] = []  # admitted, and not yet seen by the thread
        self._overflow: deque[Request] = deque()  # wait until there is room
        self._abandoned: set[int] = set()
        self._wake_at = 1  # how many have to arrive before there is something to do
        self._closing = False
        self._stopped: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def in_flight(self) -> int:
        """How many requests are worked on or wait for it, and have not been abandoned."""
        with self._condition:
            return len(self._admitted.keys() - self._abandoned) + len(self._overflow)

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted."""
        return not self._closing and self._stopped is None

    def check_open(self) -> None:
        """Raise [`EngineClosed`] unless requests are accepted."""
        if self._stopped is not None:
            kind = type(self._stopped).__name__
            raise EngineClosed(f"The engine's worker has stopped ({kind}: {self._stopped}). Make another engine.")
        if self._closing:
            raise EngineClosed("The engine is closed. Make another engine.")

    def submit(self, request: Request, wait_for_room: bool) -> bool:
        """
        Take a request on.

        Args:
            request ([`Request`]): The request.
            wait_for_room (`bool`): Whether it waits where `max_queue` requests are worked on.

        Returns:
            `bool`: `False` if there is no room and it does not wait.

        Raises:
            [`EngineClosed`]: if no requests are accepted.
        """
        with self._condition:
            self.check_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hf_scan-engine", daemon=True)
                self._thread.start()
            if len(self._admitted) < self.max_queue:
                self._admit(request)
            elif wait_for_room:
                self._overflow.append(request)
            else:
                return False
            return True

    def abandon(self, request: Request) -> None:
        """Leave out a request whose answer nobody waits for. It takes part in no further stage."""
        with self._condition:
            if request.number in self._admitted:
                self._abandoned.add(request.number)
                self._condition.notify()  # there may be room for others now
            elif request in self._overflow:
                self._overflow.remove(request)

    def close(self, answer_waiting: bool) -> None:
        """Accept no more requests, and answer those that there are, or let them fail. Returns when all is done."""
        with self._condition:
            self._closing = True
            left = [] if answer_waiting else [*self._admitted.values(), *self._overflow]
            if left:
                self._admitted.clear()
                self._overflow.clear()
                self._abandoned.update(request.number for request in left)
            self._condition.notify()
        self._hand_out([(request, EngineClosed("The engine was closed before the answer.")) for request in left])
        if self._thread is not None:
            self._thread.join()

    def _admit(self, request: Request) -> None:
        self._admitted[request.number] = request
        self._arrived.append(request)
        if len(self._arrived) >= self._wake_at:
            self._condition.notify()

    # What runs in the thread.

    def _run(self) -> None:
        try:
            while (index := self._next_stage()) is not None:
                self._end([self._result(found) for found in self._scheduler.step(index)])
        except BaseException as error:  # a bug, or the interpreter goes down: nobody must wait for ever
            with self._condition:
                self._stopped = error
                left = [*self._admitted.values(), *self._overflow]
                self._admitted.clear()
                self._overflow.clear()
            text = f"The engine's worker has stopped ({type(error).__name__}: {error}). Make another engine."
            self._hand_out([(request, EngineClosed(text)) for request in left])

    def _next_stage(self) -> int | None:
        """Wait until a stage is due and return it, or `None` when the engine is closed and all is answered."""
        scheduler = self._scheduler
        with self._condition:
            while True:
                now = time.monotonic()
                self._take_in()
                index = scheduler.next_stage(all_that_wait=self._closing, since=now - self.max_wait)
                if index is not None:
                    self._wake_at = self.max_queue + 1  # it will look by itself
                    return index
                if self._closing and not self._admitted:
                    return None
                oldest = scheduler.oldest()
                self._wake_at = 1 if oldest is None else self.batch_size - len(scheduler.queues[0])
                self._condition.wait(None if oldest is None else max(0.0, oldest + self.max_wait - now))

    def _take_in(self) -> None:
        """Let what arrived wait in front of the first stage, and leave out what was abandoned."""
        for request in self._arrived:
            self._scheduler.put(Arrivals([request.number], [request.image]), request.arrived)
            request.image = None  # or its pixels would be held until the last stage
        self._arrived.clear()
        if self._abandoned:
            self._scheduler.remove(self._abandoned)
            for number in self._abandoned:
                self._admitted.pop(number, None)
            self._abandoned.clear()
            self._make_room()
            if self._arrived:
                self._take_in()
        self.metrics.note_waiting([len(queue) for queue in self._scheduler.queues])

    def _make_room(self) -> None:
        while self._overflow and len(self._admitted) < self.max_queue:
            self._admit(self._overflow.popleft())

    def _advance(self, index: int, group: Any) -> tuple[list[Result], Any | None]:
        """Run a stage. If it fails for a batch, run it for each sample alone, so that only some of them fail."""
        self.metrics.note_batch(index, len(group))
        try:
            return self.network.advance(index, group)
        except Exception as error:
            if len(group) == 1:
                return [(group.numbers()[0], error)], None
        results: list[Result] = []
        staying = []
        for row in range(len(group)):
            some, stay = self._advance(index, group.select([row]))
            results += some
            staying += [] if stay is None else [stay]
        return results, staying[0].join(staying) if staying else None

    def _result(self, found: Result) -> tuple[int, Answer | Exception]:
        if not isinstance(found, Row):
            return found
        if found.exit_index < 0:
            text = "The network gives logits that are not finite, though the image is. Check its weights."
            return found.number, ValueError(text)
        label = self.network.id2label[found.label]
        return found.number, Answer(found.logits, label, found.exit_index, found.confidence)

    def _end(self, results: list[tuple[int, Answer | Exception]]) -> None:
        """Hand out results, each once, and let others take the room."""
        ended = []
        with self._condition:
            for number, result in results:
                request = self._admitted.pop(number, None)
                if request is not None and number not in self._abandoned:
                    ended.append((request, result))
                self._abandoned.discard(number)
            self._make_room()
        now = time.monotonic()
        self.metrics.note_latencies(
            [(result.exit_index, now - request.arrived) for request, result in ended if isinstance(result, Answer)]
        )
        self._hand_out(ended)

    def _hand_out(self, results: list[tuple[Request, Any]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Any]]] = defaultdict(list)
        for request, result in results:
            by_loop[request.loop].append((request, result))
        for loop, some in by_loop.items():
            try:
                loop.call_soon_threadsafe(resolve, some)
            except RuntimeError:  # the loop is closed, and with it all that waited
                self.metrics.note_outcome("cancelled", len(some))
