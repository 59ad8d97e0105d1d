# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ExitConfig`]: the thresholds, the criterion and the fallback, saved beside the weights."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from .exit_criteria import EXIT_CRITERIA, MEMORYLESS, confidence_of, label_confidence_of
from .hub_files import check_file_name, find_file
from .named_errors import LONGEST_REASON, named_push_errors, write_whole
from .problem_type import LABEL_CONFIDENCE


logger = logging.get_logger(__name__)


EXIT_CONFIG_NAME = "exit_config.json"

# The fields of an `ExitConfig` that decide where a sample exits, and with which answer. All others are provenance.
RULE = ("thresholds", "criterion", "temperatures", "fallback")
PROVENANCE = ("search", "guarantee", "reference", "weights", "trained_on", "searched_on", "costs")
# Provenance that does not hold for another rule.
FOUND_FOR_THE_RULE = ("search", "guarantee", "reference", "weights")

# Temperatures beyond these would make scores that are all alike, or not finite in half precision.
SMALLEST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-3, 1e3


def _check_thresholds(thresholds: list[float | int | None] | None) -> None:
    for threshold in thresholds or []:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(
                f"`thresholds` is {thresholds}; expected numbers in [0, 1], or None to switch an exit off."
            )


def _check_criterion(criterion: object) -> None:
    if not callable(criterion) and criterion not in list(EXIT_CRITERIA):
        raise ValueError(
            f"`criterion` is {criterion!r}; expected one of {sorted(EXIT_CRITERIA)}, or a function of the logits so "
            "far."
        )


def _check_temperatures(temperatures: list[float | int] | None) -> None:
    for temperature in temperatures or []:
        if not SMALLEST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE:
            raise ValueError(
                f"`temperatures` is {temperatures}; expected a number above 0 for each exit, from "
                f"{SMALLEST_TEMPERATURE} to {LARGEST_TEMPERATURE:.0f}."
            )


def _check_reference(reference: dict[str, Any] | None) -> None:
    if reference is None:
        return
    counts = reference.get("counts")
    rows = counts if isinstance(counts, list) and all(isinstance(row, list) for row in counts) else []
    numbers = [number for row in rows for number in row]
    alike = len({len(row) for row in rows}) == 1 and all(
        isinstance(number, (int, float)) and 0 <= number < float("inf") for number in numbers
    )
    if not alike or not sum(numbers) > 0:
        raise ValueError(
            "`reference` does not hold the `counts` that `calibrate` writes, a row of numbers for each exit. Find the "
            "thresholds anew, or leave `reference` out."
        )


def _check_guarantee(guarantee: dict[str, Any], rule: dict[str, Any]) -> None:
    if guarantee.get("rule") != rule:
        raise ValueError(
            f"The guarantee is of {guarantee.get('rule')}, and the exit configuration has {rule}. Set fields with "
            "`replace`, which drops the guarantee, or certify anew with `hf_scan.certify_thresholds`."
        )


_CHECKS: dict[str, Callable[[Any], None]] = {
    "thresholds": _check_thresholds,
    "criterion": _check_criterion,
    "temperatures": _check_temperatures,
    "reference": _check_reference,
}


def _as_list(name: str, values: Any) -> list[float | None]:
    """Return the numbers of a tuple, an array or a tensor."""
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        kind = "a number in [0, 1] or None" if name == "thresholds" else "a number above 0"
        raise ValueError(f"`{name}` is {values!r}; expected {kind} for each exit.") from error


def _take_arrays(cls: Any) -> Any:
    """Have a strict dataclass take tuples, arrays and tensors for its lists of numbers too."""
    set_checked = cls.__setattr__

    def set_field(self: Any, name: str, value: Any) -> None:
        if name in ("thresholds", "temperatures") and (isinstance(value, tuple) or hasattr(value, "tolist")):
            value = _as_list(name, value)
        set_checked(self, name, value)

    cls.__setattr__ = set_field
    return cls


@_take_arrays
@strict
@dataclass
class ExitConfig:
    """
    A rule by which a network with early exits answers, as [`~transformers.GenerationConfig`] is for a language model,
    and the provenance of that rule. It is saved beside the weights as `exit_config.json`. An invalid value is refused
    when it is given, also in an assignment.

    Args:
        thresholds (`list[float | None]`, *optional*):
            One per exit, from shallow to deep, each in [0, 1]. A sample exits at the first exit whose score is above
            the exit's threshold; at 1.0 no sample exits. `None` disables the exit. The deepest exit's threshold may be
            left out: then every sample that reaches the end gets the fallback's answer.
        criterion (`str` or `Callable`, *optional*, defaults to `"confidence"`):
            The score: `"confidence"` (the largest softmax probability), `"margin"` (its distance from the second
            largest), `"entropy"` (one minus the normalised entropy), `"patience"` (how many exits in a row
            predict the same class: (p - 1) / p lets a sample exit when p do), `"ensemble_confidence"` (the confidence
            of the mean of the logits so far), `"label_confidence"` (how certain the least certain label is, for
            networks that give several labels an image, which take no other), or a function of the list of logits so
            far that returns `(batch_size,)` scores. A function is not saved.
        temperatures (`list[float]`, *optional*):
            One per exit, each in [0.001, 1000], by which its logits are divided before they are scored. The answer's
            logits stay as they are.
        fallback (`str`, *optional*, defaults to `"ensemble"`):
            The answer to a sample that exits nowhere: `"ensemble"`, the mean of the logits of every classifier that
            ran, `"deepest"`, or `"most_confident"`, the classifier of those whose largest softmax probability (with
            several labels, label confidence) is largest.
        search (`dict[str, Any]`, *optional*):
            Provenance: how the thresholds were found: method, settings, data, and results there.
        guarantee (`dict[str, Any]`, *optional*):
            Provenance: what is certified of the rule, [`~hf_scan.calibration.Certificate`] as a dictionary.
        reference (`dict[str, Any]`, *optional*):
            Provenance: where samples exited and how confident they were when the thresholds were found, for
            [`~hf_scan.ExitMonitor`].
        trained_on, searched_on (`str`, *optional*):
            Provenance: the number of images that the weights were trained on and the thresholds found on, with digests
            of some, so that no thresholds are found on the former, and none certified on either.
        costs (`dict[str, Any]`, *optional*):
            Provenance: the costs of stages and heads on a machine, [`~hf_scan.costs.MeasuredCosts`] as a dictionary.
        weights (`str`, *optional*):
            Provenance: [`~ScanForImageClassification.fingerprint`] of the weights that the thresholds were found for.
            Saving fills it in. Thresholds are neither saved beside other weights nor loaded with them.

    Raises:
        `ValueError`: if a threshold is not a number in [0, 1], a temperature is out of range, or there is no such
            criterion.
        `huggingface_hub.errors.StrictDataclassFieldValidationError`: if a field is of another type or kind.

    Example:

    ```python
    >>> from hf_scan import ExitConfig

    >>> ExitConfig(thresholds=[0.9, None, 0.8]).resolve(num_exits=3)
    [0.9, None, 0.8]
    ```
    """

    thresholds: list[float | int | None] | None = None
    criterion: Any = "confidence"  # a name or an `ExitCriterion`
    temperatures: list[float | int] | None = None
    fallback: Literal["ensemble", "deepest", "most_confident"] = "ensemble"
    search: dict[str, Any] | None = None
    guarantee: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    trained_on: str | None = None
    searched_on: str | None = None
    costs: dict[str, Any] | None = None
    weights: str | None = field(default=None, compare=False)  # so that a copy that was saved equals what it is of

    # Not `validate_*` methods of a strict dataclass, whose errors are no `ValueError`, and which miss assignments.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            _CHECKS[name](value)
        # The rule is set before the guarantee, in the order of the fields, and before or after it by an assignment.
        guarantee = value if name == "guarantee" else vars(self).get("guarantee")
        if guarantee is not None and name in (*RULE, "guarantee"):
            _check_guarantee(guarantee, {**self.rule, **({name: value} if name in RULE else {})})
        super().__setattr__(name, value)

    @property
    def rule(self) -> dict[str, Any]:
        """Return the fields that decide where a sample exits, and with which answer."""
        # Copies, so that a guarantee which holds the rule does not change with it.
        values = {name: getattr(self, name) for name in RULE}
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Return the fields that say where the rule comes from, and what is known of it."""
        return {name: getattr(self, name) for name in PROVENANCE}

    def resolve(self, num_exits: int) -> list[float | int | None]:
        """
        Return the thresholds of a network with `num_exits` exits, one each.

        Raises:
            `ValueError`: if there are none, or not as many as exits.
        """
        if self.thresholds is None:
            raise ValueError(
                "There are no thresholds to exit by. Pass `thresholds=[...]`, or find some with "
                "`hf_scan.calibrate(model, search_split)` and set `model.exit_config`."
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
        """Return whether the rule needs the logits of earlier exits."""
        return self.fallback != "deepest" or callable(self.criterion) or self.criterion not in MEMORYLESS

    def scaled(self, logits: torch.Tensor, exit_index: int) -> torch.Tensor:
        """Return an exit's logits divided by its temperature."""
        return logits if self.temperatures is None else logits / self.temperatures[exit_index]

    def confidence(self, logits: torch.Tensor, exit_index: int | None = None) -> torch.Tensor:
        """
        Return how confident an answer is, by one class or by all labels as the criterion is.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, num_labels)`): The answer.
            exit_index (`int`, *optional*): The exit that gave it, whose temperature is used.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`.
        """
        scaled = logits if exit_index is None else self.scaled(logits, exit_index)
        return label_confidence_of(scaled) if self.criterion == LABEL_CONFIDENCE else confidence_of(scaled)

    def score(self, seen: Sequence[torch.Tensor], exits: Sequence[int]) -> torch.Tensor:
        """
        Return the score of the last of some exits for each sample, by the criterion.

        Args:
            seen (`Sequence[torch.Tensor]`): Logits of the exits that ran, each `(batch_size, num_labels)`; the last
                one only where the criterion looks at no other.
            exits (`Sequence[int]`): Which exits these are.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`.

        Raises:
            `ValueError`: if a function that was given as criterion returns anything else, or scores that are not
                finite.
        """
        scaled = [self.scaled(logits, index) for logits, index in zip(seen, exits)]
        if not callable(self.criterion):
            # NaN, so that no sample leaves by logits that are not finite, whatever the criterion makes of them.
            return EXIT_CRITERIA[self.criterion](scaled) + 0 * seen[-1].sum(dim=-1, dtype=torch.float32)
        score = self.criterion(scaled)
        expected = seen[-1].shape[:1]
        shape = getattr(score, "shape", type(score).__name__)
        if shape != expected or not score.isfinite().all():
            found = "scores not finite" if shape == expected else shape
            raise ValueError(
                f"The exit criterion {self.criterion!r} returned {found}; "
                f"expected a tensor of {tuple(expected)} finite scores, one for each sample."
            )
        scores: torch.Tensor = score.float()  # a threshold is compared with float32
        return scores

    def replace(self, **kwargs: Any) -> "ExitConfig":
        """
        Return a copy with some fields replaced, as [`dataclasses.replace`]. Where the rule changes, the copy drops
        what was found, measured or certified for the former rule: `search`, `guarantee`, `reference` and `weights`.

        Args:
            kwargs: Fields of [`ExitConfig`]. `thresholds` and `temperatures` may be tuples, arrays or tensors, `costs`
                what [`~hf_scan.measure_costs`] returned.

        Returns:
            [`ExitConfig`]: validated; itself where nothing is given.

        Raises:
            `TypeError`: if there is no such field.
            `ValueError`: if a value is invalid, as in [`ExitConfig`].

        Example:

        ```python
        >>> from hf_scan import ExitConfig

        >>> ExitConfig(thresholds=[0.9, 0.8]).replace(fallback="deepest").thresholds
        [0.9, 0.8]
        ```
        """
        if not kwargs:
            return self
        known = {entry.name for entry in fields(self)}
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(f"ExitConfig has no {unknown}; expected some of {sorted(known)}.")
        for name in ("thresholds", "temperatures"):
            if kwargs.get(name) is not None:
                kwargs[name] = _as_list(name, kwargs[name])
        if hasattr(kwargs.get("costs"), "to_dict"):
            kwargs["costs"] = kwargs["costs"].to_dict()
        if any(name in kwargs and kwargs[name] != getattr(self, name) for name in RULE):
            kwargs = {**dict.fromkeys(FOUND_FOR_THE_RULE), **kwargs}
        return replace(self, **kwargs)

    def update(self, **kwargs: Any) -> "ExitConfig":
        """Deprecated: call [`~ExitConfig.replace`], which this is."""
        warnings.warn(
            "`ExitConfig.update` is deprecated and will be removed in the next release, because it returns a copy "
            "where `GenerationConfig.update` changes itself; call `replace` instead.",
            FutureWarning,
            stacklevel=2,
        )
        return self.replace(**kwargs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExitConfig":
        """Build a configuration from a dictionary. Keys that a newer version wrote are left out with a warning."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            logger.warning(f"The exit configuration holds {unknown}, unknown to this version of hf_scan and ignored.")
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], filename: str = EXIT_CONFIG_NAME, **kwargs: Any
    ) -> "ExitConfig":
        """
        Load `exit_config.json` from a folder or from the Hub. A model that has none gets the defaults.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, or a repository on the Hub.
            filename (`str`, *optional*, defaults to `"exit_config.json"`): Another operating point's file.
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only` and so on, as everywhere.

        Raises:
            `ValueError`: if the file is not JSON, or its values are out of range.
            `OSError`: if there is no file of another name, or it cannot be known whether there is one: the Hub does
                not answer, or not with what it has. A damaged file is taken out of the cache again.
        """
        file = find_file(pretrained_model_name_or_path, filename, **kwargs)
        if file is None:
            if filename != EXIT_CONFIG_NAME:
                raise OSError(
                    f"{pretrained_model_name_or_path} has no {filename!r}. Correct the name, or leave it out for "
                    f"{EXIT_CONFIG_NAME!r}."
                )
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError(f"a {type(values).__name__} stands where an object is expected")
            for name, value in values.items():
                _check_json(name, value)
            return cls.from_dict(values)
        except (TypeError, ValueError, RecursionError, StrictDataclassError) as error:
            reason = str(error)[:LONGEST_REASON]
            raise ValueError(
                f"{filename} of {pretrained_model_name_or_path} is not a valid exit configuration: {reason} Find "
                "thresholds anew with `hf_scan.calibrate`, or remove the file."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike[str], filename: str = EXIT_CONFIG_NAME) -> None:
        """
        Write the configuration into a folder, which is made when missing.

        Raises:
            `ValueError`: if the criterion is a function, which no file holds.
            `OSError`: if the file cannot be written. The old one has not changed then.
        """
        self.check_savable()
        check_file_name(filename)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / filename, self.to_json())

    def to_json(self) -> str:
        """Return the text that [`~ExitConfig.save_pretrained`] writes."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def push_to_hub(self, repo_id: str, filename: str = EXIT_CONFIG_NAME, **kwargs: Any) -> Any:
        """
        Add the configuration to a repository on the Hub, in a commit of its own: for other thresholds of a model that
        is there, or, under another name, for another operating point.

        Args:
            repo_id (`str`): The repository, which exists.
            filename (`str`, *optional*, defaults to `"exit_config.json"`): The file.
            kwargs: `subfolder`, and `revision`, `token`, `create_pr`, `commit_message` and so on, as for
                [`~huggingface_hub.HfApi.upload_file`].

        Returns:
            [`~huggingface_hub.CommitInfo`]

        Raises:
            `ValueError`: if the criterion is a function, which no file holds.
            `OSError`: if the Hub cannot be reached, or refuses.
        """
        self.check_savable()
        check_file_name(filename)
        kwargs = {"commit_message": f"Upload {filename}", **kwargs}
        subfolder = kwargs.pop("subfolder", None)
        path = f"{subfolder}/{filename}" if subfolder else filename
        with named_push_errors(repo_id):
            return HfApi().upload_file(
                path_or_fileobj=self.to_json().encode(), path_in_repo=path, repo_id=repo_id, **kwargs
            )

    def check_savable(self) -> None:
        """Raise a `ValueError` if the criterion is a function, or the guarantee of another rule."""
        if self.guarantee is not None:
            _check_guarantee(self.guarantee, self.rule)  # a list of thresholds may have been changed in place
        if callable(self.criterion):
            raise ValueError(
                f"`criterion` is the function {self.criterion!r}, which cannot be saved. Set one by name, and pass "
                "the function to `predict_adaptive`."
            )


def _check_json(name: str, value: Any) -> None:
    """Refuse NaN and infinity, which JSON does not know and Python reads: they could not be saved again."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"`{name}` holds NaN or an infinite number; expected finite ones.") from error


def as_exit_config(value: object) -> ExitConfig:
    """Return an exit configuration, of a dictionary too. Raise a `TypeError` for anything else."""
    if isinstance(value, ExitConfig):
        return value
    if isinstance(value, dict):
        return ExitConfig().replace(**value)
    raise TypeError(
        f"`exit_config` is a {type(value).__name__}; expected an `ExitConfig`, or a dictionary of its fields such as "
        "{'thresholds': [0.9, 0.9]}."
    )


__all__ = ["EXIT_CONFIG_NAME", "PROVENANCE", "RULE", "ExitConfig", "as_exit_config"]
