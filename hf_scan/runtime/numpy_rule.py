# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The exit rule in NumPy, for engines without PyTorch. Tests check it against `hf_scan/model/exit_rule.py`."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..model.named_errors import write_whole
from ..model.problem_type import LABEL_CONFIDENCE


FALLBACKS = ("ensemble", "deepest", "most_confident")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last axis, in float32."""
    shifted = logits.astype(np.float32, copy=False) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def confidence_of(logits: np.ndarray) -> np.ndarray:
    """Return the largest softmax probability over the last axis, in float32."""
    shifted = logits.astype(np.float32, copy=False) - logits.max(axis=-1, keepdims=True)
    return 1 / np.exp(shifted).sum(axis=-1)


def label_confidence_of(logits: np.ndarray) -> np.ndarray:
    """Return the smallest max(p, 1 - p) over the last axis, with p the sigmoid probabilities, in float32."""
    return 1 / (1 + np.exp(-np.abs(logits.astype(np.float32, copy=False)).min(axis=-1)))


def _margin(seen: Sequence[np.ndarray]) -> np.ndarray:
    probabilities = np.exp(log_softmax(seen[-1]))
    second, first = np.moveaxis(np.partition(probabilities, -2, axis=-1)[..., -2:], -1, 0)
    return first - second


def _entropy(seen: Sequence[np.ndarray]) -> np.ndarray:
    log_probabilities = log_softmax(seen[-1])
    certainty = (np.exp(log_probabilities) * log_probabilities).sum(axis=-1)
    return np.clip(1 + certainty / np.log(np.float32(seen[-1].shape[-1])), 0, 1)


def _patience(seen: Sequence[np.ndarray]) -> np.ndarray:
    predictions = np.stack([logits.argmax(axis=-1) for logits in reversed(seen)])
    agreeing = (predictions == predictions[0]).cumprod(axis=0).sum(axis=0).astype(np.float32)
    finite = np.isfinite(seen[-1]).all(axis=-1)
    return np.where(finite, agreeing / (agreeing + 1), np.float32(np.nan))


def mean_of(seen: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of several exits' logits."""
    return np.mean(np.stack(list(seen)), axis=0)


CRITERIA: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {
    "confidence": lambda seen: confidence_of(seen[-1]),
    "margin": _margin,
    "entropy": _entropy,
    "patience": _patience,
    "ensemble_confidence": lambda seen: confidence_of(mean_of(seen)),
    "label_confidence": lambda seen: label_confidence_of(seen[-1]),
}
MEMORYLESS = frozenset({"confidence", "margin", "entropy", LABEL_CONFIDENCE})


@dataclass
class AdaptiveAnswer:
    """
    The answers of an engine without PyTorch: [`~hf_scan.AdaptiveOutput`] with NumPy arrays.

    Args:
        logits (`np.ndarray` of shape `(batch_size, num_labels)`): The answer to each sample.
        exit_index (`np.ndarray` of shape `(batch_size,)`): The exit that gave it, from 0; `num_exits` where the
            ensemble did. int64.
        confidence (`np.ndarray` of shape `(batch_size,)`): The answer's largest softmax probability, at its exit's
            temperature.
        ids (`np.ndarray` of shape `(batch_size,)`, *optional*): Positions of the images in a stream. int64.
    """

    logits: np.ndarray
    exit_index: np.ndarray
    confidence: np.ndarray
    ids: np.ndarray | None = None

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Return the names of the fields that are not None."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) is not None]

    def items(self) -> list[tuple[str, Any]]:
        """Return the names and values of these fields."""
        return [(name, getattr(self, name)) for name in self.keys()]


@dataclass(frozen=True)
class ExitSettings:
    """
    [`~hf_scan.ExitConfig`] for environments without PyTorch: the same fields, which are explained there.

    Raises:
        `ValueError`: if a threshold is not a number in [0, 1], a temperature is not above 0, or there is no such
            criterion or fallback.

    Example:

    ```python
    >>> from hf_scan.runtime import ExitSettings

    >>> ExitSettings(thresholds=[0.9, None, 0.8]).replace(fallback="deepest").resolve(num_exits=3)
    [0.9, None, 0.8]
    ```
    """

    thresholds: list[float | None] | None = None
    criterion: str = "confidence"
    temperatures: list[float] | None = None
    fallback: str = "ensemble"
    search: dict[str, Any] | None = None
    guarantee: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    trained_on: str | None = None
    searched_on: str | None = None
    costs: dict[str, Any] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        for threshold in self.thresholds or []:
            if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
                raise ValueError(
                    f"`thresholds` is {self.thresholds}; expected numbers in [0, 1], or None to switch an exit off."
                )
        if self.criterion not in CRITERIA:
            raise ValueError(f"`criterion` is {self.criterion!r}; expected one of {sorted(CRITERIA)}.")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"`fallback` is {self.fallback!r}; expected one of {sorted(FALLBACKS)}.")
        for temperature in self.temperatures or []:
            if not (_is_number(temperature) and 0 < temperature < float("inf")):
                raise ValueError(f"`temperatures` is {self.temperatures}; expected a number above 0 for each exit.")

    @classmethod
    def of(cls, exit_config: Any) -> "ExitSettings":
        """Return the rule of an [`~hf_scan.ExitConfig`], or of anything with fields of these names."""
        return cls(**{name: getattr(exit_config, name) for name in RULE})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExitSettings":
        """Build settings from what `exit_config.json` holds. Keys of newer versions are left out."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @property
    def rule(self) -> dict[str, Any]:
        """The fields that define the exit rule."""
        return {name: getattr(self, name) for name in RULE}

    def resolve(self, num_exits: int) -> list[float | None]:
        """
        Return the thresholds of a network with `num_exits` exits, one each.

        Raises:
            `ValueError`: if there are none, or not as many as exits.
        """
        if self.thresholds is None:
            raise ValueError(
                "There are no thresholds to exit by. Pass `thresholds=[...]`, or find some with "
                "`hf_scan.calibrate(engine, search_split)` and set `engine.exit_config`."
            )
        if len(self.thresholds) not in (num_exits, num_exits - 1):
            raise ValueError(
                f"`thresholds` holds {len(self.thresholds)} numbers and the network has {num_exits} exits; expected "
                f"{num_exits}, or {num_exits - 1} where the fallback answers all that reach the end."
            )
        if self.temperatures is not None and len(self.temperatures) != num_exits:
            raise ValueError(
                f"`temperatures` holds {len(self.temperatures)} numbers and the network has {num_exits} exits; "
                "expected one each."
            )
        return [*self.thresholds, None][:num_exits]

    @property
    def needs_history(self) -> bool:
        """Whether the logits of earlier exits matter once these have been passed."""
        return self.fallback != "deepest" or self.criterion not in MEMORYLESS

    def scaled(self, logits: np.ndarray, exit_index: int) -> np.ndarray:
        """Return an exit's logits divided by its temperature."""
        return logits if self.temperatures is None else logits / np.float32(self.temperatures[exit_index])

    def confidence(self, logits: np.ndarray, exit_index: int | None = None) -> np.ndarray:
        """Return how confident an answer is, by one class or by all labels as the criterion is."""
        scaled = logits if exit_index is None else self.scaled(logits, exit_index)
        return label_confidence_of(scaled) if self.criterion == LABEL_CONFIDENCE else confidence_of(scaled)

    def score(self, seen: Sequence[np.ndarray], exits: Sequence[int]) -> np.ndarray:
        """Return the score of each sample at the last of these exits, float32 of shape `(batch_size,)`."""
        scaled = [self.scaled(logits, index) for logits, index in zip(seen, exits)]
        score = CRITERIA[self.criterion](scaled).astype(np.float32, copy=False)
        # NaN where logits are not finite, so that no sample leaves by them, whatever the criterion gives.
        return np.where(np.isfinite(seen[-1]).all(axis=-1), score, np.float32(np.nan))

    def replace(self, **kwargs: Any) -> "ExitSettings":
        """Return a copy with some fields replaced. Provenance and guarantee are dropped when the rule changes."""
        if unknown := sorted(set(kwargs) - {entry.name for entry in fields(self)}):
            raise TypeError(
                f"An exit configuration has no {unknown}; expected some of "
                f"{sorted(entry.name for entry in fields(self))}."
            )
        if kwargs.get("thresholds") is not None:
            kwargs["thresholds"] = [None if t is None else float(t) for t in kwargs["thresholds"]]
        if any(name in kwargs and kwargs[name] != getattr(self, name) for name in RULE):
            kwargs = {"search": None, "guarantee": None, "reference": None, "weights": None, **kwargs}
        return replace(self, **kwargs)

    def save_pretrained(self, save_directory: Any, filename: str = "exit_config.json") -> None:
        """Write the settings into a folder."""
        write_whole(Path(save_directory, filename), json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")


RULE = ("thresholds", "criterion", "temperatures", "fallback")


@dataclass(frozen=True)
class Step:
    """
    The plan for one exit.

    Args:
        runs (`bool`): Whether its head runs.
        limit (`float`, *optional*): The threshold, or `None` where no sample can leave.
    """

    runs: bool
    limit: np.float32 | None


def plan_steps(
    settings: ExitSettings, num_exits: int, max_exit: int | None = None, every_head: bool = False
) -> list[Step]:
    """Return the plan of [`~hf_scan.model.exit_rule.plan_exits`], which has the arguments explained."""
    last = num_exits - 1 if max_exit is None else max_exit
    if not 0 <= last < num_exits:
        raise ValueError(f"`max_exit` is {max_exit}; expected an exit from 0 to {num_exits - 1}, or None.")
    plan = []
    for index, threshold in enumerate(settings.resolve(num_exits)[: last + 1]):
        decides = threshold is not None and threshold < 1 and not (index == last and settings.fallback == "deepest")
        runs = index == last or (threshold is not None and (decides or settings.needs_history or every_head))
        plan.append(Step(runs, np.float32(threshold) if decides else None))
    return plan


def fall_back(
    settings: ExitSettings, seen: Sequence[np.ndarray], exits: Sequence[int], num_exits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return logits, exit and confidence of samples that left at no exit, from the logits of the heads that ran."""
    if settings.fallback == "ensemble":
        logits = mean_of(seen)
        return logits, np.full(len(logits), num_exits), settings.confidence(logits)
    if settings.fallback == "deepest":
        logits = seen[-1]
        return logits, np.full(len(logits), exits[-1]), settings.confidence(logits, exits[-1])
    confidences = np.stack([settings.confidence(*pair) for pair in zip(seen, exits)])
    best = confidences.argmax(axis=0)
    logits = np.stack(list(seen))[best, np.arange(len(best))]
    return logits, np.array(exits)[best], confidences.max(axis=0)


def apply_exit_rule(exit_logits: Sequence[np.ndarray], exit_config: Any) -> AdaptiveAnswer:
    """
    Apply the exit rule to the logits of all exits, as [`~hf_scan.apply_exit_rule`] does on tensors.

    Args:
        exit_logits (`Sequence[np.ndarray]`): One array of shape `(batch_size, num_labels)` per exit.
        exit_config ([`ExitSettings`] or [`~hf_scan.ExitConfig`]): The thresholds and the fallback.
    """
    settings = ExitSettings.of(exit_config)
    plan = plan_steps(settings, len(exit_logits))
    ran = [index for index, step in enumerate(plan) if step.runs]
    logits, exit_index, confidence = fall_back(settings, [exit_logits[i] for i in ran], ran, len(exit_logits))
    for position, index in reversed(list(enumerate(ran))):
        limit = plan[index].limit
        if limit is not None:
            exits = ran[: position + 1]
            leaves = settings.score([exit_logits[i] for i in exits], exits) > limit
            logits = np.where(leaves[:, None], exit_logits[index], logits)
            exit_index = np.where(leaves, index, exit_index)
            confidence = np.where(leaves, settings.confidence(exit_logits[index], index), confidence)
    return AdaptiveAnswer(logits, exit_index, confidence)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = [
    "CRITERIA",
    "FALLBACKS",
    "RULE",
    "AdaptiveAnswer",
    "ExitSettings",
    "Step",
    "apply_exit_rule",
    "confidence_of",
    "fall_back",
    "plan_steps",
]
