# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The exit rule: which exit answers a sample, given its logits. The only definition of it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import ModelOutput

from .exit_config import ExitConfig
from .problem_type import LABEL_CONFIDENCE


@dataclass
class AdaptiveOutput(ModelOutput):
    """
    Answers of adaptive inference, as [`~AdaptiveInferenceMixin.predict_adaptive`] returns them.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Each sample's answer.
        exit_index (`torch.LongTensor` of shape `(batch_size,)`): The exit that gave it, from 0; `num_exits` where the
            ensemble did; -1 for a sample that was skipped because its pixels or logits are not finite.
        confidence (`torch.FloatTensor` of shape `(batch_size,)`): The answer's largest softmax probability, or with
            several labels an image its label confidence, at its exit's temperature.
        ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Which images these are, where they come from a
            stream.
    """

    # Never None; a ModelOutput wants defaults.
    logits: torch.Tensor = None  # type: ignore[assignment]
    exit_index: torch.Tensor = None  # type: ignore[assignment]
    confidence: torch.Tensor = None  # type: ignore[assignment]
    ids: torch.Tensor | None = None


class ExitStep(NamedTuple):
    """
    What happens at an exit that can be reached.

    Args:
        runs_head (`bool`): Whether the exit's head is run.
        threshold (`float`, *optional*): The score above which a sample leaves, rounded to float32 as scores are;
            `None` where none can.
    """

    runs_head: bool
    threshold: float | None


def plan_exits(
    exit_config: ExitConfig, num_exits: int, max_exit: int | None = None, every_head: bool = False
) -> list[ExitStep]:
    """
    Return what happens at each exit that can be reached. A head that no threshold can use is not run.

    Args:
        exit_config ([`ExitConfig`]): The thresholds and the fallback.
        num_exits (`int`): How many exits the network has.
        max_exit (`int`, *optional*): The exit at which everything that is left is answered by the fallback.
        every_head (`bool`, *optional*, defaults to `False`): Whether to run heads that nothing can leave at, so that
            there is an answer at any time. Exits that are switched off stay off.

    Raises:
        `ValueError`: if there are no thresholds or the wrong number of them, or there is no exit `max_exit`.
    """
    last = num_exits - 1 if max_exit is None else max_exit
    if not 0 <= last < num_exits:
        raise ValueError(f"`max_exit` is {max_exit}; expected an exit from 0 to {num_exits - 1}, or None.")
    plan = []
    for index, threshold in enumerate(exit_config.resolve(num_exits)[: last + 1]):
        decides = threshold is not None and threshold < 1 and not (index == last and exit_config.fallback == "deepest")
        runs = index == last or (threshold is not None and (decides or exit_config.needs_history or every_head))
        plan.append(ExitStep(runs, _as_float32(threshold) if decides else None))
    return plan


@functools.lru_cache(maxsize=1024)
def _as_float32(number: float) -> float:
    # Scores are float32. Rounded to it, a threshold compares with them alike as a tensor and as a number.
    return torch.tensor(number, dtype=torch.float32).item()


def fall_back(
    exit_config: ExitConfig, seen: Sequence[torch.Tensor], exits: Sequence[int], num_exits: int
) -> AdaptiveOutput:
    """
    Return the fallback's answers for samples that no exit was confident about.

    Args:
        exit_config ([`ExitConfig`]): The fallback and the temperatures.
        seen (`Sequence[torch.Tensor]`): Logits of the heads that ran, each `(batch_size, num_labels)`.
        exits (`Sequence[int]`): Which exits these are.
        num_exits (`int`): How many exits the network has.
    """
    if exit_config.fallback == "ensemble":
        logits = torch.stack(list(seen)).mean(dim=0)
        exit_index = torch.full(logits.shape[:1], num_exits, device=logits.device)
        return AdaptiveOutput(logits, exit_index, exit_config.confidence(logits))
    if exit_config.fallback == "deepest":
        logits, last = seen[-1], exits[-1]
        exit_index = torch.full(logits.shape[:1], last, device=logits.device)
        return AdaptiveOutput(logits, exit_index, exit_config.confidence(logits, last))
    confidences = torch.stack([exit_config.confidence(*pair) for pair in zip(seen, exits)])
    best = confidences.argmax(dim=0)
    logits = torch.stack(list(seen))[best, torch.arange(len(best), device=best.device)]
    return AdaptiveOutput(logits, torch.tensor(exits, device=best.device)[best], confidences.amax(dim=0))


def apply_exit_rule(exit_logits: Sequence[torch.Tensor], exit_config: ExitConfig) -> AdaptiveOutput:
    """
    Apply the exit rule to logits that are all known: each sample is answered by the first exit whose score is above
    its threshold, else by the fallback. These are the answers that [`~AdaptiveInferenceMixin.predict_adaptive`] gives
    without computing all logits. For scoring and for search; it saves no time.

    Args:
        exit_logits (`Sequence[torch.Tensor]`): One tensor per exit of shape `(batch_size, num_labels)`.
        exit_config ([`ExitConfig`]): The thresholds and the fallback.

    Returns:
        [`AdaptiveOutput`]

    Raises:
        `ValueError`: if there are no thresholds or the wrong number of them.
    """
    num_exits = len(exit_logits)
    plan = plan_exits(exit_config, num_exits)
    ran = [index for index, step in enumerate(plan) if step.runs_head]
    answer = fall_back(exit_config, [exit_logits[index] for index in ran], ran, num_exits)
    # From the deepest exit back to the first: the shallowest that passes has the last word.
    for position, index in reversed(list(enumerate(ran))):
        threshold = plan[index].threshold
        if threshold is not None:
            exits = ran[: position + 1]
            leaves = exit_config.score([exit_logits[i] for i in exits], exits) > threshold
            confidence = exit_config.confidence(exit_logits[index], index)
            answer = AdaptiveOutput(
                logits=torch.where(leaves[:, None], exit_logits[index], answer.logits),
                exit_index=answer.exit_index.masked_fill(leaves, index),
                confidence=torch.where(leaves, confidence, answer.confidence),
            )
    return answer


def last_answer(fallback: str) -> str:
    """Return what the last column of [`exit_columns`] stands for: `"ensemble"` or `"most_confident"`."""
    return "most_confident" if fallback == "most_confident" else "ensemble"


def num_answers(num_exits: int, fallback: str) -> int:
    """Return in how many ways a sample can be answered: by each exit, and by a fallback that is not the deepest."""
    return num_exits + (fallback != "deepest")


def answers_of(logits: torch.Tensor, exit_config: ExitConfig) -> torch.Tensor:
    """
    Return each sample's answer as one number: its class, or, where the criterion is that of several labels an image,
    [`label_set_ids`] of the labels whose probability is above one half. Equal answers have equal numbers.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): The answers.
        exit_config ([`ExitConfig`]): Its criterion is read.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`.
    """
    return label_set_ids(logits > 0) if exit_config.criterion == LABEL_CONFIDENCE else logits.argmax(dim=-1)


def label_set_ids(present: torch.Tensor) -> torch.Tensor:
    """
    Return a number of 64 bits for each set of labels: the sum of those of its labels. Two sets have the same one by
    chance, once in 2^64 (Zobrist, "A New Hashing Method with Application for Game Playing", 1970).

    Args:
        present (`torch.BoolTensor` of shape `(batch_size, num_labels)`): The sets.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`.
    """
    return (present * _label_ids(present.shape[-1]).to(present.device)).sum(dim=-1)


@functools.lru_cache(maxsize=8)
def _label_ids(count: int) -> torch.Tensor:
    # SplitMix64 (Steele et al., OOPSLA 2014), which is the same in every version of every library.
    with np.errstate(over="ignore"):
        mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((mixed ^ (mixed >> np.uint64(31))).view(np.int64))


def exit_columns(
    exit_logits: tuple[torch.Tensor, ...] | list[torch.Tensor], exit_config: ExitConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the answers a sample can get: one column per exit and a last one for the ensemble of the heads that
    run, or, where that is the fallback, for the most confident of them.

    Args:
        exit_logits (`tuple[torch.Tensor]`): One of shape `(batch_size, num_labels)` per exit.
        exit_config ([`ExitConfig`]): Says how exits are scored and which are off. Without thresholds, none is.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: answers, as [`answers_of`] returns them, and scores, both
            `(batch_size, num_exits + 1)`.
    """
    thresholds = exit_config.thresholds or [0.0] * len(exit_logits)
    deepest = len(exit_logits) - 1
    seen: list[torch.Tensor] = []
    exits: list[int] = []
    scores = []
    for index, logits in enumerate(exit_logits):
        if index == deepest or thresholds[index] is not None:
            seen.append(logits)
            exits.append(index)
            scores.append(exit_config.score(seen, exits))
        else:
            scores.append(exit_config.confidence(logits))  # is compared with no threshold
    config = exit_config.replace(fallback=last_answer(exit_config.fallback))
    last = fall_back(config, seen, exits, len(exit_logits))
    predictions = torch.stack([answers_of(logits, exit_config) for logits in (*exit_logits, last.logits)], dim=1)
    return predictions, torch.stack([*scores, last.confidence], dim=1)


def answering_column(confidences: np.ndarray, thresholds: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """
    Return which column answers each sample: the first whose confidence is above its threshold, else the last.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): From shallow to deep; the last column's are not read.
        thresholds (`np.ndarray` of shape `(..., columns)`): For any number of policies. No sample
            is answered at `None`, NaN and 1.0. The last column's is not read and may be left out.

    Returns:
        `np.ndarray` of shape `(..., n)`: column indices.
    """
    limits = np.array([np.inf if t is None else t for t in thresholds]) if isinstance(thresholds, list) else thresholds
    limits = np.asarray(limits, dtype=np.float64)
    free = confidences.shape[1] - 1
    if limits.shape[-1] not in (free, free + 1):
        raise ValueError(
            f"There are {limits.shape[-1]} thresholds for {free + 1} columns; expected one each, or none for the last."
        )
    # From the last exit back to the first: the shallowest that passes has the last word. No array of all exits and
    # policies is built.
    answers = np.full((*limits.shape[:-1], len(confidences)), free, dtype=np.int64)
    for column in reversed(range(free)):
        answers[confidences[:, column] > limits[..., column, None]] = column
    return answers


__all__ = [
    "AdaptiveOutput",
    "ExitStep",
    "answering_column",
    "answers_of",
    "apply_exit_rule",
    "exit_columns",
    "fall_back",
    "label_set_ids",
    "last_answer",
    "num_answers",
    "plan_exits",
]
