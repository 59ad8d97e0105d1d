# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Run a stream through exported stages. Samples that stay are collected until they fill a batch again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..model.stage_scheduler import StageScheduler
from .numpy_rule import AdaptiveAnswer, ExitSettings, Step
from .routing import Group, advance


def run_stream(
    engine: Any,
    settings: ExitSettings,
    plan: list[Step],
    source: Iterable[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    arrived: list[int] | None,
) -> Iterator[AdaptiveAnswer]:
    """
    Yield answers as they are ready. An error of the source is raised after all images before it are answered.

    Args:
        engine ([`ExportedScan`]): Runs the stages.
        settings, plan: The rule.
        source (`Iterable`): Positions and images of each batch.
        batch_size (`int`): Samples at a time.
        arrived (`list[int]`, *optional*): The positions are appended to it in order of arrival.
    """
    scheduler: StageScheduler[Group, AdaptiveAnswer] = StageScheduler(
        len(plan), batch_size, lambda index, group: advance(engine, settings, plan, index, group)
    )
    error: Exception | None = None
    batches = iter(source)
    while True:
        try:
            rows, images = next(batches)
        except StopIteration:
            break
        except Exception as raised:  # whatever the stream's own code says
            error = raised
            break
        if arrived is not None:
            arrived.extend(rows.tolist())
        scheduler.put(Group(rows, [images]))
        yield from scheduler.run()
    yield from scheduler.run(all_that_wait=True)
    if error is not None:
        raise error


def numbered(
    batches: Any, images_of: Callable[[Any], np.ndarray], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield positions and images from an array, an iterable of batches of any size, or a dataset of `pixel_values`."""
    if hasattr(batches, "dtype"):  # an array; a `datasets.Dataset` has a shape too
        batches = [batches]
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, (list, tuple)):
        batches = _batched(batches, batch_size)
    start = 0
    for batch in batches:
        pixels = batch["pixel_values"] if isinstance(batch, Mapping) else batch
        if len(pixels) == 0:
            continue
        images = images_of(pixels)
        yield np.arange(start, start + len(images)), images
        start += len(images)


def _batched(dataset: Any, batch_size: int) -> Iterator[Any]:
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i]["pixel_values"] for i in range(start, min(start + batch_size, len(dataset)))]
        yield np.stack([np.asarray(row) for row in rows])


def in_order(answers: Iterable[AdaptiveAnswer], arrived: list[int]) -> Iterator[AdaptiveAnswer]:
    """Yield answers in order of arrival, holding each back until all earlier ones are there."""
    waiting: dict[int, tuple[AdaptiveAnswer, int]] = {}
    position = 0
    for answer in answers:
        assert answer.ids is not None
        waiting.update((row, (answer, place)) for place, row in enumerate(answer.ids.tolist()))
        ready = []
        while position < len(arrived) and arrived[position] in waiting:
            ready.append(waiting.pop(arrived[position]))
            position += 1
        if ready:
            names = ready[0][0].keys()
            yield AdaptiveAnswer(**{name: np.stack([held[name][i] for held, i in ready]) for name in names})


__all__ = ["in_order", "numbered", "run_stream"]
