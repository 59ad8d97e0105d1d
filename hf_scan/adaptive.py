# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""How to answer: [`ExitConfig`], the exit rule, and `predict_adaptive`, which really leaves the network early."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import ModelOutput, cached_file, logging


logger = logging.get_logger(__name__)

EXIT_CONFIG_NAME = "exit_config.json"


@strict
@dataclass
class ExitConfig:
    """
    How a network with early exits answers, as [`~transformers.GenerationConfig`] is how a language model generates.
    Saved beside the weights as `exit_config.json`.

    Args:
        thresholds (`list[float | None]`, *optional*):
            One per exit, from shallow to deep, each in [0, 1]. A sample leaves at the first exit whose confidence
            (the largest softmax probability) is above the exit's threshold, so 1.0 never lets go. `None` switches an
            exit off. The deepest exit's threshold may be left out: then every sample that reaches the end gets the
            fallback's answer.
        fallback (`str`, *optional*, defaults to `"ensemble"`):
            What answers a sample that no exit was confident about: `"ensemble"`, the mean of the logits of every
            classifier that ran, or `"deepest"`.
        search (`dict[str, Any]`, *optional*):
            How the thresholds were found: method, settings, data, and what they gave there.

    Raises:
        `ValueError`: if a threshold is not a number in [0, 1].
        `huggingface_hub.errors.StrictDataclassFieldValidationError`: if a field is of another type or kind.

    Example:

    ```python
    >>> from hf_scan import ExitConfig

    >>> ExitConfig(thresholds=[0.9, None, 0.8]).resolve(num_exits=3)
    [0.9, None, 0.8]
    ```
    """

    thresholds: list[float | int | None] | None = None
    fallback: Literal["ensemble", "deepest"] = "ensemble"
    search: dict[str, Any] | None = None

    # Not a `validate_*` method of a strict dataclass, whose error is no `ValueError`.
    def __post_init__(self) -> None:
        for threshold in self.thresholds or []:
            if threshold is not None and not 0 <= threshold <= 1:
                raise ValueError(
                    f"`thresholds` is {self.thresholds}; expected numbers in [0, 1], or None to switch an exit off."
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
        return [*self.thresholds, None][:num_exits]

    def runs_head(self, exit_index: int, num_exits: int) -> bool:
        """Whether an exit's head can matter: not where it is switched off, nor where nothing can leave and no
        ensemble wants its logits. The deepest head always runs."""
        threshold = self.resolve(num_exits)[exit_index]
        if exit_index == num_exits - 1:
            return True
        return threshold is not None and (threshold < 1 or self.fallback == "ensemble")

    def update(self, **kwargs: Any) -> "ExitConfig":
        """A copy with some fields replaced, validated anew."""
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
        """
        kwargs["_raise_exceptions_for_missing_entries"] = False
        file = cached_file(str(pretrained_model_name_or_path), filename, **kwargs)
        if file is None:
            return cls()
        try:
            values = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError(f"a {type(values).__name__} stands where an object is expected")
            return cls.from_dict(values)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ValueError(
                f"{filename} of {pretrained_model_name_or_path} is not a valid exit configuration: {error} Find "
                "thresholds anew with `hf_scan.calibrate`, or remove the file."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike[str], filename: str = EXIT_CONFIG_NAME) -> None:
        """Writes the configuration into a folder, which is made when missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / filename).write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")


@dataclass
class AdaptiveOutput(ModelOutput):
    """
    What [`~AdaptiveInferenceMixin.predict_adaptive`] returns.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Each sample's answer.
        exit_index (`torch.LongTensor` of shape `(batch_size,)`): The exit that gave it, from 0; `num_exits` where the
            ensemble did.
        confidence (`torch.FloatTensor` of shape `(batch_size,)`): The answer's largest softmax probability.
    """

    # Never None; a ModelOutput wants defaults.
    logits: torch.Tensor = None  # type: ignore[assignment]
    exit_index: torch.Tensor = None  # type: ignore[assignment]
    confidence: torch.Tensor = None  # type: ignore[assignment]


def confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """The largest softmax probability over the last dimension, in float32 whatever the logits are."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def apply_exit_rule(exit_logits: Sequence[torch.Tensor], exit_config: ExitConfig) -> AdaptiveOutput:
    """
    The exit rule on logits that are all known: the answers that [`~AdaptiveInferenceMixin.predict_adaptive`] gives
    without computing them all. For scoring and for search; it saves no time.

    Args:
        exit_logits (`Sequence[torch.Tensor]`): One tensor per exit of shape `(batch_size, num_labels)`.
        exit_config ([`ExitConfig`]): The thresholds and the fallback.

    Returns:
        [`AdaptiveOutput`]
    """
    num_exits = len(exit_logits)
    thresholds = exit_config.resolve(num_exits)
    ran = [index for index in range(num_exits) if exit_config.runs_head(index, num_exits)]
    if exit_config.fallback == "ensemble":
        logits, fallback_index = torch.stack([exit_logits[index] for index in ran]).mean(dim=0), num_exits
    else:
        logits, fallback_index = exit_logits[-1], num_exits - 1
    exit_index = torch.full(logits.shape[:1], fallback_index, device=logits.device)
    for index in reversed(ran):
        threshold = thresholds[index]
        if threshold is not None:
            leaves = confidence_of(exit_logits[index]) > threshold
            logits = torch.where(leaves[:, None], exit_logits[index], logits)
            exit_index = exit_index.masked_fill(leaves, index)
    return AdaptiveOutput(logits=logits, exit_index=exit_index, confidence=confidence_of(logits))


class AdaptiveInferenceMixin:
    """
    Gives `predict_adaptive` to a model that has `num_exits`, `run_stage(index, state)`, `run_exit(index, state)`,
    `select_rows(index, state, rows, batch_size)`, `check_pixel_values(pixel_values)` and an `exit_config`.
    """

    exit_config: ExitConfig

    @torch.inference_mode()
    def predict_adaptive(
        self, pixel_values: torch.Tensor, exit_config: ExitConfig | None = None, **kwargs: Any
    ) -> AdaptiveOutput:
        """
        Classifies a batch, each sample leaving the network at the first exit that is confident enough. The batch
        shrinks as samples leave: a stage is run for those that are still there and for no others, and a sample's
        answer does not depend on the others in its batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.
            exit_config ([`ExitConfig`], *optional*): Defaults to `model.exit_config`.
            kwargs: Fields of the exit configuration to override for this call, such as `thresholds=[0.9, 0.9]`.

        Returns:
            [`AdaptiveOutput`]

        Raises:
            `ValueError`: if the images are not what the network takes or hold NaN or infinite values, if there are no
                thresholds or the wrong number of them, or if the model is in training mode.

        Example:

        ```python
        >>> import torch
        >>> from hf_scan import ScanConfig, ScanForImageClassification

        >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
        >>> answer = model.predict_adaptive(torch.rand(4, 3, 32, 32), thresholds=[0.9, 0.9])
        >>> answer.logits.shape
        torch.Size([4, 10])
        ```
        """
        model: Any = self
        if model.training:
            raise ValueError(
                "predict_adaptive was called in training mode, where batch norm makes an answer depend on the rest of "
                "the batch. Call `model.eval()` first."
            )
        model.check_pixel_values(pixel_values, values=True)
        config = (exit_config or self.exit_config).update(**kwargs)
        num_exits: int = model.num_exits
        thresholds = config.resolve(num_exits)
        ensemble = config.fallback == "ensemble"

        answer: AdaptiveOutput | None = None  # filled as samples leave
        rows: torch.Tensor | None = None  # which samples are still there; None while all are
        total: torch.Tensor | None = None  # sum of the logits of the heads that ran
        heads_run = 0
        state: tuple[Any, ...] = (pixel_values,)
        for index, threshold in enumerate(thresholds):
            state = model.run_stage(index, state)
            if not config.runs_head(index, num_exits):
                continue
            logits = model.run_exit(index, state)
            heads_run += 1
            if ensemble:
                total = logits if total is None else total + logits
            if index == num_exits - 1 and not ensemble:
                return _answered(answer, rows, logits, index, confidence_of(logits), len(pixel_values))
            if threshold is None or threshold >= 1:
                continue

            confidence = confidence_of(logits)
            leaves = confidence > threshold
            leaving = int(leaves.sum())  # the exit's one transfer to the host
            if leaving == len(leaves):
                return _answered(answer, rows, logits, index, confidence, len(pixel_values))
            if leaving:
                order = leaves.argsort(descending=True, stable=True)
                gone, stay = order[:leaving], order[leaving:]
                gone_rows = gone if rows is None else rows[gone]
                answer = _answered(answer, gone_rows, logits[gone], index, confidence[gone], len(pixel_values))
                rows = stay if rows is None else rows[stay]
                state = model.select_rows(index, state, stay, len(leaves))
                total = total[stay] if total is not None else None

        assert total is not None  # the deepest head always runs
        logits = total / heads_run
        return _answered(answer, rows, logits, num_exits, confidence_of(logits), len(pixel_values))


def _answered(
    answer: AdaptiveOutput | None,
    rows: torch.Tensor | None,
    logits: torch.Tensor,
    index: int,
    confidence: torch.Tensor,
    batch_size: int,
) -> AdaptiveOutput:
    """Enters the answers of some rows of the batch; where nobody left before, they are the whole answer, uncopied."""
    if rows is None:
        exit_index = torch.full((batch_size,), index, device=logits.device)
        return AdaptiveOutput(logits=logits, exit_index=exit_index, confidence=confidence)
    if answer is None:
        answer = AdaptiveOutput(
            logits=logits.new_empty(batch_size, logits.shape[1]),
            exit_index=torch.empty(batch_size, dtype=torch.long, device=logits.device),
            confidence=confidence.new_empty(batch_size),
        )
    answer.logits[rows] = logits
    answer.exit_index[rows] = index
    answer.confidence[rows] = confidence
    return answer


__all__ = ["EXIT_CONFIG_NAME", "AdaptiveInferenceMixin", "AdaptiveOutput", "ExitConfig", "apply_exit_rule"]
