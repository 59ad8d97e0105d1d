# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""How to answer: [`ExitConfig`], the exit rule, and `predict_adaptive`, which really leaves the network early."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import HfApi
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import ModelOutput, logging

from .exit_criteria import EXIT_CRITERIA, MEMORYLESS, confidence_of
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

    def runs_head(self, exit_index: int, num_exits: int) -> bool:
        """Whether an exit's head can matter: not where it is switched off, nor where nothing can leave and no later
        decision wants its logits. The deepest head always runs."""
        return plan_exits(self, num_exits)[exit_index][0]

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


@dataclass
class AdaptiveOutput(ModelOutput):
    """
    What [`~AdaptiveInferenceMixin.predict_adaptive`] returns.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): Each sample's answer.
        exit_index (`torch.LongTensor` of shape `(batch_size,)`): The exit that gave it, from 0; `num_exits` where the
            ensemble did.
        confidence (`torch.FloatTensor` of shape `(batch_size,)`): The answer's largest softmax probability, at its
            exit's temperature.
        ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Which images these are, where they come from a
            stream.
    """

    # Never None; a ModelOutput wants defaults.
    logits: torch.Tensor = None  # type: ignore[assignment]
    exit_index: torch.Tensor = None  # type: ignore[assignment]
    confidence: torch.Tensor = None  # type: ignore[assignment]
    ids: torch.Tensor | None = None


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
    plan = plan_exits(exit_config, num_exits)
    ran = [index for index, (runs, _) in enumerate(plan) if runs]
    logits, exit_index, confidence = fall_back(exit_config, [exit_logits[index] for index in ran], ran, num_exits)
    for position, index in reversed(list(enumerate(ran))):
        limit = plan[index][1]
        if limit is not None:
            exits = ran[: position + 1]
            leaves = exit_config.score([exit_logits[i] for i in exits], exits) > limit
            logits = torch.where(leaves[:, None], exit_logits[index], logits)
            exit_index = exit_index.masked_fill(leaves, index)
            confidence = torch.where(leaves, confidence_of(exit_config.scaled(exit_logits[index], index)), confidence)
    return AdaptiveOutput(logits=logits, exit_index=exit_index, confidence=confidence)


def fall_back(
    exit_config: ExitConfig, seen: Sequence[torch.Tensor], exits: Sequence[int], num_exits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, exit and confidence of samples that no exit was sure about, from the logits of those that ran."""
    if exit_config.fallback == "ensemble":
        logits = torch.stack(list(seen)).mean(dim=0)
        return logits, torch.full(logits.shape[:1], num_exits, device=logits.device), confidence_of(logits)
    if exit_config.fallback == "deepest":
        logits, last = seen[-1], exits[-1]
        exit_index = torch.full(logits.shape[:1], last, device=logits.device)
        return logits, exit_index, confidence_of(exit_config.scaled(logits, last))
    confidences = torch.stack([confidence_of(exit_config.scaled(*pair)) for pair in zip(seen, exits)])
    best = confidences.argmax(dim=0)
    logits = torch.stack(list(seen))[best, torch.arange(len(best), device=best.device)]
    return logits, torch.tensor(exits, device=best.device)[best], confidences.amax(dim=0)


class AdaptiveInferenceMixin:
    """
    Gives `predict_adaptive` to a model that has `num_exits`, `run_stage(index, state)`, `run_exit(index, state)`,
    `select_rows(index, state, rows, batch_size)`, `check_pixel_values(pixel_values)` and an `exit_config`.
    """

    exit_config: ExitConfig

    @torch.inference_mode()
    def predict_adaptive(
        self,
        pixel_values: torch.Tensor,
        exit_config: ExitConfig | None = None,
        max_exit: int | None = None,
        max_time_ms: float | None = None,
        **kwargs: Any,
    ) -> AdaptiveOutput:
        """
        Classifies a batch, each sample leaving the network at the first exit that is confident enough. The batch
        shrinks as samples leave: a stage is run for those that are still there and for no others, and a sample's
        answer does not depend on the others in its batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.
            exit_config ([`ExitConfig`], *optional*): Defaults to `model.exit_config`.
            max_exit (`int`, *optional*): The exit, from 0, at which whatever is left is answered by the fallback.
            max_time_ms (`float`, *optional*): Milliseconds after which every sample gets the fallback's answer from
                the exits that it has passed. No stage is begun that would end later, if it takes as long as the one
                before it; the first exit that is not switched off is always computed.
            kwargs: Fields of the exit configuration to override for this call, such as `thresholds=[0.9, 0.9]`.

        Returns:
            [`AdaptiveOutput`]

        Raises:
            `ValueError`: if the images are not what the network takes or hold NaN or infinite values, if there are no
                thresholds or the wrong number of them, if `max_exit` or `max_time_ms` are out of range, if the model
                is in training mode, or if what it answers is not finite.
            `RuntimeError`: (on an accelerator `torch.OutOfMemoryError`) if memory does not suffice for the batch. It
                names a batch size that fits.

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
        check_eval_mode(self)
        model: Any = self
        model.check_pixel_values(pixel_values, values=True)
        config = (exit_config or self.exit_config).update(**kwargs)
        plan = plan_exits(config, model.num_exits, max_exit, every_head=max_time_ms is not None)
        if max_time_ms is not None and not max_time_ms > 0:
            raise ValueError(f"`max_time_ms` is {max_time_ms}; expected a number of milliseconds above 0, or None.")
        batch_size = len(pixel_values)

        def run(size: int) -> AdaptiveOutput:
            if batch_size == 1 and max_time_ms is None:
                return _run_single(model, config, plan, pixel_values)
            images = pixel_values if size == batch_size else pixel_values[:size]
            return _run_stages(model, config, plan, images, max_time_ms)

        return within_memory(run, batch_size)


def _run_single(
    model: Any, config: ExitConfig, plan: list[tuple[bool, float | None]], pixel_values: torch.Tensor
) -> AdaptiveOutput:
    """One image has no rows to keep account of, which at this size is a part of the time that counts."""
    state: tuple[Any, ...] = (pixel_values,)
    seen: list[torch.Tensor] = []
    exits: list[int] = []
    earlier = config.needs_history
    for index, (runs, limit) in enumerate(plan):
        state = model.run_stage(index, state)
        if not runs:
            continue
        logits = model.run_exit(index, state)
        seen, exits = ([*seen, logits], [*exits, index]) if earlier else ([logits], [index])
        if limit is not None:
            score = config.score(seen, exits)
            if score.item() > limit:
                exit_index = torch.full((1,), index, device=logits.device)
                return AdaptiveOutput(logits, exit_index, _confidence(config, logits, index, score))
    return AdaptiveOutput(*_answered(fall_back(config, seen, exits, model.num_exits)))


def _run_stages(
    model: Any,
    config: ExitConfig,
    plan: list[tuple[bool, float | None]],
    pixel_values: torch.Tensor,
    max_time_ms: float | None,
) -> AdaptiveOutput:
    started = now = time.perf_counter()
    batch_size = len(pixel_values)
    answer: AdaptiveOutput | None = None  # filled as samples leave
    group = Group(torch.arange(batch_size, device=pixel_values.device), (pixel_values,))
    for index in range(len(plan)):
        gone, rest = advance(model, config, plan, index, group)
        if max_time_ms is not None and pixel_values.device.type != "cpu":
            torch.accelerator.synchronize(pixel_values.device)  # or only the launches would be timed
        before, now = now, time.perf_counter()
        # The next stage is taken to need as long as this one did.
        if max_time_ms is not None and rest is not None and 1000 * (2 * now - before - started) > max_time_ms:
            late, rest = give_up(config, rest, model.num_exits)
            gone += late
        for answers in gone:
            answer = _entered(answer, answers, batch_size)
        if rest is None:
            break
        group = rest
    assert answer is not None  # the last exit lets nobody stay
    return answer


Result = TypeVar("Result")


def within_memory(run: Callable[[int], Result], batch_size: int) -> Result:
    """
    Runs something for a batch. If memory does not suffice, finds out by halving for how many samples it does, and says
    so.

    Args:
        run (`Callable[[int], Result]`): Runs it for the first samples of the batch, as many as it is given.
        batch_size (`int`): How many there are.

    Raises:
        `RuntimeError` or `MemoryError`: of the kind that was raised, with what was raised and the size that fits.
    """
    try:
        return run(batch_size)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        kind, message = type(error), str(error)
    # Not in the handler, where the traceback keeps what has been computed.
    size = batch_size // 2
    while size:
        try:
            run(size)
            break
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        size //= 2
    fits = f"{size} fit; use batches of at most that size" if size else "not even one fits"
    raise kind(f"Memory does not suffice for a batch of {batch_size}: {fits}. ({message})")


def _is_out_of_memory(error: Exception) -> bool:
    # An accelerator's has a class of its own; PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def check_eval_mode(model: Any) -> None:
    """Raises a `ValueError` in training mode."""
    if model.training:
        raise ValueError(
            "Adaptive inference was asked for in training mode, where batch norm makes an answer depend on the rest "
            "of the batch. Call `model.eval()` first."
        )


def plan_exits(
    exit_config: ExitConfig, num_exits: int, max_exit: int | None = None, every_head: bool = False
) -> list[tuple[bool, float | None]]:
    """
    For each exit that can be reached, whether its head runs, and the score above which a sample leaves there, if any
    can.

    Args:
        exit_config ([`ExitConfig`]): The thresholds and the fallback.
        num_exits (`int`): How many exits the network has.
        max_exit (`int`, *optional*): The exit at which everything that is left is answered by the fallback.
        every_head (`bool`, *optional*, defaults to `False`): Whether to run heads that nothing can leave at, so that
            there is an answer at any time. Exits that are switched off stay off.
    """
    last = num_exits - 1 if max_exit is None else max_exit
    if not 0 <= last < num_exits:
        raise ValueError(f"`max_exit` is {max_exit}; expected an exit from 0 to {num_exits - 1}, or None.")
    plan: list[tuple[bool, float | None]] = []
    # Scores are float32. Rounded to it, a threshold compares with them alike as a tensor and as a number.
    for index, threshold in enumerate(exit_config.resolve(num_exits)[: last + 1]):
        decides = threshold is not None and threshold < 1 and not (index == last and exit_config.fallback == "deepest")
        runs = index == last or (threshold is not None and (decides or exit_config.needs_history or every_head))
        plan.append((runs, _as_float32(threshold) if decides else None))
    return plan


@functools.lru_cache(maxsize=1024)
def _as_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


@dataclass
class Group:
    """
    Samples on their way through the network together.

    Args:
        rows (`torch.LongTensor` of shape `(n,)`): Which samples they are.
        state (`tuple`): What the last stage returned for them.
        seen (`list[torch.Tensor]`): Logits of the heads that ran, as far as they are still needed.
        exits (`list[int]`): Of which exits these are.
    """

    rows: torch.Tensor
    state: tuple[Any, ...]
    seen: list[torch.Tensor] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)


# Rows, logits, exit and confidence of samples that leave.
Answers = tuple[torch.Tensor, torch.Tensor, int | torch.Tensor, torch.Tensor]


def advance(
    model: Any, exit_config: ExitConfig, plan: list[tuple[bool, float | None]], index: int, group: Group
) -> tuple[list[Answers], Group | None]:
    """
    Runs one stage for a group, and its head, and lets go who is sure enough; behind the last exit, everybody.

    Args:
        model ([`AdaptiveInferenceMixin`]): The network.
        exit_config ([`ExitConfig`]): Scores and fallback.
        plan (`list[tuple[bool, float | None]]`): From [`plan_exits`].
        index (`int`): Which stage.
        group ([`Group`]): Who takes part.

    Returns:
        `tuple[list, Group]`: the answers of those that leave, and those that go on; `None` where nobody does.
    """
    runs, limit = plan[index]
    state = model.run_stage(index, group.state)
    if not runs:
        return [], Group(group.rows, state, group.seen, group.exits)
    logits = model.run_exit(index, state)
    earlier = exit_config.needs_history
    seen, exits = ([*group.seen, logits], [*group.exits, index]) if earlier else ([logits], [index])
    gone: list[Answers] = []
    stay = Group(group.rows, state, seen, exits)
    if limit is not None:
        score = exit_config.score(seen, exits)
        leaves = score > limit
        leaving = int(leaves.sum())  # the exit's one transfer to the host
        if leaving == len(leaves):
            return [(group.rows, logits, index, _confidence(exit_config, logits, index, score))], None
        if leaving:
            order = leaves.argsort(descending=True, stable=True)
            out, on = order[:leaving], order[leaving:]
            confidence = _confidence(exit_config, logits[out], index, score[out])
            gone.append((group.rows[out], logits[out], index, confidence))
            state = model.select_rows(index, state, on, len(leaves))
            stay = Group(group.rows[on], state, [values[on] for values in seen], exits)
    if index < len(plan) - 1:
        return gone, stay
    rest, _ = give_up(exit_config, stay, model.num_exits)
    return gone + rest, None


def give_up(exit_config: ExitConfig, group: Group, num_exits: int) -> tuple[list[Answers], Group | None]:
    """Answers those that would go on with the fallback, unless no head has run for them yet."""
    if not group.seen:
        return [], group
    return [(group.rows, *_answered(fall_back(exit_config, group.seen, group.exits, num_exits)))], None


def _answered(
    answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits that are not finite leave at no exit, so that it is enough to look for them here."""
    if not math.isfinite(answer[2].sum().item()):
        raise ValueError(
            "The network gives logits that are not finite, though the images are. Check its weights; in float16, try "
            "bfloat16 or float32."
        )
    return answer


def _confidence(exit_config: ExitConfig, logits: torch.Tensor, index: int, score: torch.Tensor) -> torch.Tensor:
    return score if exit_config.criterion == "confidence" else confidence_of(exit_config.scaled(logits, index))


def _entered(answer: AdaptiveOutput | None, gone: Answers, batch_size: int) -> AdaptiveOutput:
    """Enters the answers of those that leave. Where the whole batch leaves together, they are the output, uncopied."""
    rows, logits, exit_index, confidence = gone
    if answer is None:
        if len(rows) == batch_size:
            if isinstance(exit_index, int):
                exit_index = torch.full((batch_size,), exit_index, device=logits.device)
            return AdaptiveOutput(logits=logits, exit_index=exit_index, confidence=confidence)
        answer = AdaptiveOutput(
            logits=logits.new_empty(batch_size, logits.shape[1]),
            exit_index=torch.empty(batch_size, dtype=torch.long, device=logits.device),
            confidence=confidence.new_empty(batch_size),
        )
    answer.logits[rows] = logits
    answer.exit_index[rows] = exit_index
    answer.confidence[rows] = confidence
    return answer


__all__ = ["EXIT_CONFIG_NAME", "AdaptiveInferenceMixin", "AdaptiveOutput", "ExitConfig", "apply_exit_rule"]
