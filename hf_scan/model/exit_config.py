# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ExitConfig`]: the thresholds, the criterion and the fallback, saved beside the weights."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from .exit_criteria import EXIT_CRITERIA, MEMORYLESS
from .hub_files import check_file_name, find_file


logger = logging.get_logger(__name__)


EXIT_CONFIG_NAME = "exit_config.json"

# The fields of an `ExitConfig` that say who leaves where, and with which answer.
RULE = ("thresholds", "criterion", "temperatures", "fallback")


@strict
@dataclass
class ExitConfig:
    """
    How a network with early exits answers, as [`~transformers.GenerationConfig`] is how a language model generates.
    Saved beside the weights as `exit_config.json`.

    Args:
        thresholds (`list[float | None]`, *optional*):
            One per exit, from shallow to deep, each in [0, 1]. A sample leaves at the first exit whose score is above
            the exit's threshold, so 1.0 never lets go. `None` switches an exit off. The deepest exit's threshold may
            be left out: then every sample that reaches the end gets the fallback's answer.
        criterion (`str` or `Callable`, *optional*, defaults to `"confidence"`):
            What the score is: `"confidence"` (the largest softmax probability), `"margin"` (that above the second
            largest), `"entropy"` (1 where it is 0, 0 where it is largest), `"patience"` (how many exits in a row say
            the same: (p - 1) / p leaves when p do), `"ensemble_confidence"` (of the mean of the logits so far), or a
            function of the list of logits so far that returns `(batch_size,)` scores. A function is not saved.
        temperatures (`list[float]`, *optional*):
            One per exit, by which its logits are divided before they are scored. The answer's logits stay as they are.
        fallback (`str`, *optional*, defaults to `"ensemble"`):
            What answers a sample that no exit was sure about: `"ensemble"`, the mean of the logits of every
            classifier that ran, `"deepest"`, or `"most_confident"`, the classifier of those whose largest softmax
            probability is largest.
        search (`dict[str, Any]`, *optional*):
            How the thresholds were found: method, settings, data, and what they gave there.
        guarantee (`dict[str, Any]`, *optional*):
            What is certified of the thresholds: [`~hf_scan.calibration.Certificate`] as a dictionary.
        reference (`dict[str, Any]`, *optional*):
            Where samples left and how sure they were when the thresholds were found, for [`~hf_scan.ExitMonitor`].
        trained_on, searched_on (`str`, *optional*):
            How many images the weights were trained on and the thresholds found on, and the digests of some, so that
            none are found on the former, and none certified on either.
        costs (`dict[str, Any]`, *optional*):
            What stages and heads cost on some machine: [`~hf_scan.costs.MeasuredCosts`] as a dictionary.

    Raises:
        `ValueError`: if a threshold is not a number in [0, 1], a temperature is not above 0, or there is no such
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

    # Not a `validate_*` method of a strict dataclass, whose error is no `ValueError`.
    def __post_init__(self) -> None:
        for threshold in self.thresholds or []:
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(
                    f"`thresholds` is {self.thresholds}; expected numbers in [0, 1], or None to switch an exit off."
                )
        if not callable(self.criterion) and self.criterion not in list(EXIT_CRITERIA):
            raise ValueError(
                f"`criterion` is {self.criterion!r}; expected one of {sorted(EXIT_CRITERIA)}, or a function of the "
                "logits so far."
            )
        for temperature in self.temperatures or []:
            if not 0 < temperature < float("inf"):
                raise ValueError(f"`temperatures` is {self.temperatures}; expected a number above 0 for each exit.")
        self._check_guarantee()

    @property
    def rule(self) -> dict[str, Any]:
        """The fields that say who leaves where, and with which answer."""
        return {name: getattr(self, name) for name in RULE}

    def _check_guarantee(self) -> None:
        if self.guarantee is not None and self.guarantee.get("rule") != self.rule:
            raise ValueError(
                f"The guarantee is of {self.guarantee.get('rule')}, and the exit configuration has {self.rule}. Set "
                "fields with `update`, which drops the guarantee, or certify anew with `hf_scan.certify_thresholds`."
            )

    def resolve(self, num_exits: int) -> list[float | int | None]:
        """
        The thresholds of a network with `num_exits` exits, one each.

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
        """Whether the logits of earlier exits matter once these have been passed."""
        return self.fallback != "deepest" or callable(self.criterion) or self.criterion not in MEMORYLESS

    def scaled(self, logits: torch.Tensor, exit_index: int) -> torch.Tensor:
        """An exit's logits divided by its temperature."""
        return logits if self.temperatures is None else logits / self.temperatures[exit_index]

    def score(self, seen: Sequence[torch.Tensor], exits: Sequence[int]) -> torch.Tensor:
        """
        How sure the last of some exits is of each sample, by the criterion.

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
            return EXIT_CRITERIA[self.criterion](scaled)
        score = self.criterion(scaled)
        expected = seen[-1].shape[:1]
        shape = getattr(score, "shape", type(score).__name__)
        if shape != expected or not score.isfinite().all():
            found = "scores not finite" if shape == expected else shape
            raise ValueError(
                f"The exit criterion {self.criterion!r} returned {found}; "
                f"expected a tensor of {tuple(expected)} finite scores, one for each sample."
            )
        return score.float()  # a threshold is compared with float32

    def update(self, **kwargs: Any) -> "ExitConfig":
        """
        A copy with some fields replaced, validated anew; itself where none are. What was found and certified of the
        rule goes when the rule changes.
        """
        if not kwargs:
            return self
        known = {entry.name for entry in fields(self)}
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(f"ExitConfig has no {unknown}; expected some of {sorted(known)}.")
        if kwargs.get("thresholds") is not None:
            # A tuple, an array or a tensor will do.
            try:
                kwargs["thresholds"] = [None if t is None else float(t) for t in kwargs["thresholds"]]
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"`thresholds` is {kwargs['thresholds']!r}; expected a number in [0, 1] or None for each exit."
                ) from error
        if any(name in kwargs and kwargs[name] != getattr(self, name) for name in RULE):
            kwargs = {"search": None, "guarantee": None, "reference": None, **kwargs}
        return replace(self, **kwargs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExitConfig":
        """Builds a configuration from a dictionary. Keys that a newer version wrote are left out with a warning."""
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(values) - known):
            logger.warning(f"The exit configuration holds {unknown}, unknown to this version of hf_scan and ignored.")
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], filename: str = EXIT_CONFIG_NAME, **kwargs: Any
    ) -> "ExitConfig":
        """
        Loads `exit_config.json` from a folder or from the Hub. A model that has none gets the defaults.

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
            json.dumps(values, allow_nan=False)  # which JSON does not know, and Python reads
            return cls.from_dict(values)
        except (TypeError, ValueError, RecursionError, StrictDataclassError) as error:
            raise ValueError(
                f"{filename} of {pretrained_model_name_or_path} is not a valid exit configuration: {error} Find "
                "thresholds anew with `hf_scan.calibrate`, or remove the file."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike[str], filename: str = EXIT_CONFIG_NAME) -> None:
        """
        Writes the configuration into a folder, which is made when missing.

        Raises:
            `ValueError`: if the criterion is a function, which no file holds.
        """
        self._check_savable()
        check_file_name(filename)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / filename).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """As [`~ExitConfig.save_pretrained`] writes it."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def push_to_hub(self, repo_id: str, filename: str = EXIT_CONFIG_NAME, **kwargs: Any) -> Any:
        """
        Adds the configuration to a repository on the Hub, in a commit of its own: for other thresholds of a model that
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
        """
        self._check_savable()
        check_file_name(filename)
        kwargs = {"commit_message": f"Upload {filename}", **kwargs}
        subfolder = kwargs.pop("subfolder", None)
        path = f"{subfolder}/{filename}" if subfolder else filename
        return HfApi().upload_file(
            path_or_fileobj=self.to_json().encode(), path_in_repo=path, repo_id=repo_id, **kwargs
        )

    def _check_savable(self) -> None:
        self._check_guarantee()
        if callable(self.criterion):
            raise ValueError(
                f"`criterion` is the function {self.criterion!r}, which cannot be saved. Set one by name, and pass "
                "the function to `predict_adaptive`."
            )


__all__ = ["EXIT_CONFIG_NAME", "RULE", "ExitConfig"]
