# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""How long a run will still take: estimated before it starts, and corrected by what its steps took."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState

from ..model.modeling_scan import ScanForImageClassification
from ..training.collation import collate_rows
from .equip_arguments import EquipArguments
from .equip_source import CHECKED_IMAGES


# A correction weighs as much as the first estimate after so many seconds of work.
TRUSTED_SECONDS = 30.0
# Images of a timed batch, and how long batches are timed.
TIMED_BATCH = 8
TIMING_SECONDS = 5.0


class TimeLeft:
    """
    The time that is left of a run of several steps. What a step took corrects the estimate of those that follow: if
    the work so far took twice as long as expected, so will the rest.

    Args:
        seconds (`Mapping[str, float]`): Expected of each step.

    Example:

    ```python
    >>> from hf_scan.workflows.time_left import TimeLeft

    >>> left = TimeLeft({"search": 300.0, "train": 600.0})
    >>> print(left)
    about 15 minutes left
    >>> left.finish("search", 600.0)  # twice as long as expected
    >>> print(left)
    about 19 minutes left
    ```
    """

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self.expected = dict(seconds)
        self.finished = 0.0  # what was expected of the work that is done, and what it took
        self.taken = 0.0

    def finish(self, step: str, seconds: float) -> None:
        """Note that a step took so many seconds."""
        self.finished += self.expected.pop(step, 0.0)
        self.taken += seconds

    def skip(self, step: str, share: float = 1.0) -> None:
        """Leave out a step, or a part of it, that was done before."""
        if step in self.expected:
            self.expected[step] *= 1 - share

    def seconds(self, step: str | None = None, share: float = 0.0, taken: float = 0.0) -> float:
        """
        Return the seconds that are left.

        Args:
            step (`str`, *optional*): The step that is at work.
            share (`float`, *optional*, defaults to 0.0): How much of it is done.
            taken (`float`, *optional*, defaults to 0.0): The seconds that this took.
        """
        done = share * self.expected.get(step or "", 0.0)
        rate = (TRUSTED_SECONDS + self.taken + taken) / (TRUSTED_SECONDS + self.finished + done)
        return rate * (sum(self.expected.values()) - done)

    def text(self, step: str | None = None, share: float = 0.0, taken: float = 0.0) -> str:
        """As [`TimeLeft.seconds`], in words."""
        minutes = max(1, round(self.seconds(step, share, taken) / 60))
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"

    def __str__(self) -> str:
        return f"{self.text()} left"


def expected_seconds(
    arguments: EquipArguments, counts: Mapping[str, int], train: float, new_classes: bool
) -> dict[str, float]:
    """
    Return how long each step of [`~hf_scan.equip`] is expected to take.

    Args:
        arguments ([`EquipArguments`]): What is asked for.
        counts (`Mapping[str, int]`): Images by split.
        train (`float`): Seconds of a train image, as [`seconds_of_an_image`] measures them.
        new_classes (`bool`): Whether a classifier is fitted first.
    """
    # An answer without a gradient takes about half. What is exported and measured takes as long for any images.
    answer, rest = train / 2, 30.0
    epochs, images = arguments.epochs, counts["train"]
    return {
        "plain": answer * (images if new_classes else min(images, CHECKED_IMAGES)),
        "search": train * arguments.search_epochs * images + answer * counts["search"] + rest,
        "joint": 3 * train * epochs * images,  # the backbone's gradients too
        "train": 0.7 * train * epochs * images,  # fewer heads
        "costs": rest,
        "finish": answer * (counts["search"] + counts["test"]) + rest,
    }


def seconds_of_an_image(model: ScanForImageClassification, images: Any) -> float:
    """
    Measure how long it takes to read an image and to train heads on it, with a frozen backbone.

    Args:
        model ([`ScanForImageClassification`]): Its weights stay; averages of its heads' normalisation do not.
        images (`Dataset`): Transformed, with labels.

    Returns:
        `float`: the median of batches that were timed for some seconds.
    """
    cuda = torch.cuda.is_available()  # where the `Trainer` will train
    model.to("cuda" if cuda else "cpu").freeze_backbone()
    model.train()
    model.training_recorded = True  # no weight changes here, so nothing was trained on these images
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < 3 or time.monotonic() - begun < TIMING_SECONDS:
        start = time.monotonic()
        first = len(times) * TIMED_BATCH
        rows = [row % len(images) for row in range(first, first + TIMED_BATCH)]
        pixels = collate_rows(images.__getitems__(rows))["pixel_values"].to(model.device)
        sum(logits.square().mean() for logits in model(pixels).exit_logits).backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - start)
    model.zero_grad()
    model.training_recorded = False
    return median(times[1:]) / TIMED_BATCH  # the first warms up


class TrainingProgress(TrainerCallback):
    """
    A bar of one line for a training, and after each epoch a line with the loss and the time that is left of the run.

    Args:
        left ([`TimeLeft`], *optional*): Of the run, where that has other steps.
        step (`str`, *optional*): The step that trains.
    """

    def __init__(self, left: TimeLeft | None = None, step: str = "") -> None:
        self.left, self.step = left, step
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.start, self.first = time.monotonic(), state.global_step
        if self.left is not None:  # a training that goes on
            self.left.skip(self.step, state.global_step / max(1, state.max_steps))
        layout = "      {percentage:3.0f}% {bar:30} {n_fmt} of {total_fmt} batches, {remaining} to go"
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, leave=False, bar_format=layout)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        line = f"epoch {state.epoch or 0:g} of {args.num_train_epochs:g}: loss {float(logs['loss']):.3f}"
        if self.left is not None:
            done = (state.global_step - self.first) / max(1, state.max_steps - self.first)
            line += f", {self.left.text(self.step, done, time.monotonic() - self.start)} left in all"
        self.bar.clear()
        print(f"      {line}", flush=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


__all__ = ["TimeLeft", "TrainingProgress", "expected_seconds", "seconds_of_an_image"]
