# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Run a batch through exported stages, and route its samples at each exit."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..model.problem_type import LABEL_CONFIDENCE
from .numpy_rule import AdaptiveAnswer, ExitSettings, Step, fall_back


@dataclass
class Group:
    """
    Samples that go through the network together.

    Args:
        rows (`np.ndarray` of shape `(n,)`): Positions of the samples in the batch or stream.
        state (`list[np.ndarray]`): Their state after the last stage that ran.
        seen (`list[np.ndarray]`): Logits of the heads that ran, as far as the rule still needs them.
        exits (`list[int]`): The exits of these heads.
    """

    rows: np.ndarray
    state: list[Any]
    seen: list[np.ndarray] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self) -> list[int]:
        """Return the positions as whole numbers."""
        numbers: list[int] = self.rows.tolist()
        return numbers

    def select(self, rows: Any) -> "Group":
        """Return a group of some samples, by their positions in this one."""
        count = len(self.rows)
        state = [value[rows] if len(value) == count else _windows(value, rows, count) for value in self.state]
        return Group(self.rows[rows], state, [logits[rows] for logits in self.seen], self.exits)

    @staticmethod
    def join(groups: Sequence["Group"]) -> "Group":
        """Return one group of the samples of several that are equally far."""
        return Group(
            np.concatenate([group.rows for group in groups]),
            [np.concatenate(values) for values in zip(*(group.state for group in groups))],
            [np.concatenate(logits) for logits in zip(*(group.seen for group in groups))],
            groups[0].exits,
        )


def run_batch(
    engine: Any, images: np.ndarray, settings: ExitSettings, plan: list[Step], max_time_ms: float | None
) -> AdaptiveAnswer:
    """
    Run a batch stage by stage, each for the samples that have not left.

    Args:
        engine ([`ExportedScan`]): Runs the stages.
        images (`np.ndarray`): The batch.
        settings, plan: The rule.
        max_time_ms (`float`, *optional*): The time after which the remaining samples get the fallback's answer.
    """
    started = now = time.perf_counter()
    count = len(images)
    parts: list[AdaptiveAnswer] = []
    group: Group | None = Group(np.arange(count), [images])
    for index in range(len(plan)):
        assert group is not None
        gone, group = advance(engine, settings, plan, index, group)
        parts += gone
        if group is None:
            break
        before, now = now, time.perf_counter()
        # Assumes that the next stage takes as long as this one did.
        if max_time_ms is not None and group.seen and 1000 * (2 * now - before - started) > max_time_ms:
            parts.append(answer_with_fallback(settings, group, engine.num_exits))
            break
    if len(parts) == 1:
        return AdaptiveAnswer(parts[0].logits, parts[0].exit_index, parts[0].confidence)
    order = np.concatenate([part.ids for part in parts]).argsort()
    names = ("logits", "exit_index", "confidence")
    return AdaptiveAnswer(*(np.concatenate([getattr(part, name) for part in parts])[order] for name in names))


def advance(
    engine: Any, settings: ExitSettings, plan: list[Step], index: int, group: Group
) -> tuple[list[AdaptiveAnswer], Group | None]:
    """Run one stage and its head; return the answers of the samples that leave, and the group that goes on."""
    step = plan[index]
    state, logits = engine.run(index, group.state, step.runs)
    if not step.runs:
        return [], Group(group.rows, state, group.seen, group.exits)
    earlier = settings.needs_history
    seen, exits = ([*group.seen, logits], [*group.exits, index]) if earlier else ([logits], [index])
    gone = []
    stay = Group(group.rows, state, seen, exits)
    if step.limit is not None:
        score = settings.score(seen, exits)
        leaves = score > step.limit
        if leaves.any():
            out = leaves.nonzero()[0]
            confidence = score[out]
            if settings.criterion not in ("confidence", LABEL_CONFIDENCE):
                confidence = settings.confidence(logits[out], index)
            gone.append(AdaptiveAnswer(logits[out], np.full(len(out), index), confidence, group.rows[out]))
            on = (~leaves).nonzero()[0]
            if len(on) == 0:
                return gone, None
            stay = stay.select(on)
    if index < len(plan) - 1:
        return gone, stay
    return [*gone, answer_with_fallback(settings, stay, engine.num_exits)], None


def answer_with_fallback(settings: ExitSettings, group: Group, num_exits: int) -> AdaptiveAnswer:
    """Answer all samples of a group with the fallback."""
    logits, exit_index, confidence = fall_back(settings, group.seen, group.exits, num_exits)
    check_finite(confidence)
    return AdaptiveAnswer(logits, exit_index, confidence, group.rows)


def _windows(value: np.ndarray, rows: Any, count: int) -> np.ndarray:
    """Select images from a value with several rows per image."""
    per_image = value.reshape(count, -1, *value.shape[1:])[rows]
    return per_image.reshape(-1, *value.shape[1:])


def check_finite(confidence: np.ndarray) -> None:
    """Raise a `ValueError` if a confidence is NaN: some logits are not finite."""
    if not np.isfinite(confidence.sum()):
        raise ValueError("The network gives logits that are not finite, though the images are. Check its weights.")


__all__ = ["Group", "advance", "answer_with_fallback", "check_finite", "run_batch"]
