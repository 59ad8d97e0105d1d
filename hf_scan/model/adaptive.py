# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""`predict_adaptive`: the engine that leaves the network early, for one batch."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from .exit_config import ExitConfig
from .exit_rule import AdaptiveOutput, ExitStep, fall_back, plan_exits
from .memory import within_memory
from .problem_type import LABEL_CONFIDENCE, for_problem
from .stages import StageState


OnError = Literal["raise", "skip"]
SKIPPED = -1  # the exit index of a sample that cannot be answered


class EarlyExitNetwork(Protocol):
    """What the engines need of a network."""

    config: Any
    exit_config: ExitConfig

    @property
    def num_exits(self) -> int: ...

    @property
    def num_labels(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def run_stage(self, index: int, state: StageState) -> StageState: ...

    def run_exit(self, index: int, state: StageState) -> torch.Tensor: ...

    def check_pixel_values(self, pixel_values: torch.Tensor) -> None: ...

    def warn_of_raw_pixels(self, mean: float) -> None: ...

    def has_training_modules(self) -> bool: ...


class AdaptiveInferenceMixin:
    """Adds `predict_adaptive` to an [`EarlyExitNetwork`]."""

    @torch.inference_mode()
    def predict_adaptive(
        self: EarlyExitNetwork,
        pixel_values: Any,
        exit_config: ExitConfig | None = None,
        max_exit: int | None = None,
        max_time_ms: float | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> AdaptiveOutput:
        """
        Classify a batch, each sample leaving the network at the first exit that is confident enough. The batch shrinks
        as samples leave: a stage is run for those that are still there and for no others, and a sample's answer does
        not depend on the others in its batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images, which are
                moved to the model's device and dtype. Also what an image processor returns, a NumPy array, a list of
                images of one size, or a pair of images and labels, whose labels are left out.
            exit_config ([`ExitConfig`], *optional*): Defaults to `model.exit_config`.
            max_exit (`int`, *optional*): The exit, from 0, at which whatever is left is answered by the fallback.
            max_time_ms (`float`, *optional*): Milliseconds after which every sample gets the fallback's answer from
                the exits that it has passed. No stage is begun that would end later, if it takes as long as the one
                before it; the first exit that is not switched off is always computed.
            on_error (`str`, *optional*, defaults to `"raise"`): `"skip"` answers the other samples where the pixels or
                the logits of some are not finite. These get NaN as logits and confidence, and -1 as exit.
            kwargs: Fields of the exit configuration to override for this call, such as `thresholds=[0.9, 0.9]`.

        Returns:
            [`AdaptiveOutput`]

        Raises:
            `TypeError`: if the images are no tensors, such as a PIL image that no processor prepared.
            `ValueError`: if the images are not what the network takes, if there are no thresholds or the wrong number
                of them, if `max_exit` or `max_time_ms` are out of range, if the model is in training mode, or, unless
                these are skipped, if pixels or logits are NaN or infinite. The error says of which samples.
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
        check_on_error(on_error)
        pixel_values = prepare_images(self, pixel_values)
        config = for_problem((exit_config or self.exit_config).replace(**kwargs), self.config.problem_type)
        plan = plan_exits(config, self.num_exits, max_exit, every_head=max_time_ms is not None)
        if max_time_ms is not None and not max_time_ms > 0:
            raise ValueError(f"`max_time_ms` is {max_time_ms}; expected a number of milliseconds above 0, or None.")
        if bad := non_finite_images(self, pixel_values):
            if on_error == "raise":
                raise ValueError(images_not_finite(bad))
            good = torch.tensor([row for row in range(len(pixel_values)) if row not in set(bad)], dtype=torch.long)
            answer = skipped_answer(self, len(pixel_values))
            if len(good):
                given = (config, max_exit, max_time_ms, on_error)
                rest = AdaptiveInferenceMixin.predict_adaptive(self, pixel_values[good], *given)
                write_answers(answer, rest, good.to(answer.logits.device))
            return answer
        batch_size = len(pixel_values)
        failed: list[int] = []

        def run(size: int) -> AdaptiveOutput:
            if batch_size == 1 and max_time_ms is None:
                return _run_single(self, config, plan, pixel_values, failed)
            images = pixel_values if size == batch_size else pixel_values[:size]
            return _run_batch(self, config, plan, images, max_time_ms, failed)

        answer = within_memory(run, batch_size)
        if failed and on_error == "raise":
            raise ValueError(logits_not_finite(failed))
        return answer


def _run_single(
    network: EarlyExitNetwork,
    config: ExitConfig,
    plan: list[ExitStep],
    pixel_values: torch.Tensor,
    failed: list[int],
) -> AdaptiveOutput:
    """Answer one image. It has no rows to keep account of, which at this size is a part of the time that counts."""
    state = StageState.from_images(pixel_values)
    seen: list[torch.Tensor] = []
    exits: list[int] = []
    needs_history = config.needs_history
    for index, (runs_head, threshold) in enumerate(plan):
        state = network.run_stage(index, state)
        if not runs_head:
            continue
        logits = network.run_exit(index, state)
        seen, exits = ([*seen, logits], [*exits, index]) if needs_history else ([logits], [index])
        if threshold is not None:
            score = config.score(seen, exits)
            if score.item() > threshold:
                exit_index = torch.full((1,), index, device=logits.device)
                return AdaptiveOutput(logits, exit_index, _confidence(config, logits, index, score))
    answer = fall_back(config, seen, exits, network.num_exits)
    mark_failed(answer, [0], failed)
    return answer


def _run_batch(
    network: EarlyExitNetwork,
    config: ExitConfig,
    plan: list[ExitStep],
    pixel_values: torch.Tensor,
    max_time_ms: float | None,
    failed: list[int],
) -> AdaptiveOutput:
    started = now = time.perf_counter()
    batch_size = len(pixel_values)
    answer: AdaptiveOutput | None = None  # filled as samples leave
    ids = torch.arange(batch_size, device=pixel_values.device)
    group: Group | None = Group(ids, StageState.from_images(pixel_values))
    for index in range(len(plan)):
        assert group is not None
        answers, group = advance(network, config, plan, index, group, failed)
        if max_time_ms is not None and pixel_values.device.type != "cpu":
            torch.accelerator.synchronize(pixel_values.device)  # or only the launches would be timed
        before, now = now, time.perf_counter()
        # The next stage is taken to need as long as this one did.
        late = max_time_ms is not None and 1000 * (2 * now - before - started) > max_time_ms
        if late and group is not None and group.seen:
            answers.append(answer_with_fallback(config, group, network.num_exits, failed))
            group = None
        for some in answers:
            assert some.ids is not None
            if answer is None and len(some.ids) == batch_size:
                return AdaptiveOutput(some.logits, some.exit_index, some.confidence)  # all at once, uncopied
            answer = skipped_answer(network, batch_size, some.logits) if answer is None else answer
            write_answers(answer, some, some.ids)
        if group is None:
            break
    assert answer is not None  # no sample stays after the last exit
    return answer


@dataclass
class Group:
    """
    Samples on their way through the network together.

    Args:
        ids (`torch.LongTensor` of shape `(n,)`): Which samples they are.
        state ([`StageState`]): What the last stage returned for them.
        seen (`list[torch.Tensor]`): Logits of the heads that ran, as far as they are still needed.
        exits (`list[int]`): Which exits these are.
    """

    ids: torch.Tensor
    state: StageState
    seen: list[torch.Tensor] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def numbers(self) -> list[int]:
        """Return the ids on the host."""
        numbers: list[int] = self.ids.tolist()
        return numbers

    def select(self, rows: torch.Tensor | list[int] | slice) -> "Group":
        """Return some of the samples."""
        return Group(self.ids[rows], self.state.select(rows), [logits[rows] for logits in self.seen], self.exits)

    @staticmethod
    def join(groups: Sequence["Group"]) -> "Group":
        """Return one group of the samples of several that are equally far."""
        seen = [torch.cat(logits) for logits in zip(*(group.seen for group in groups))]
        state = StageState.join([group.state for group in groups])
        return Group(torch.cat([group.ids for group in groups]), state, seen, groups[0].exits)


def advance(
    network: EarlyExitNetwork,
    exit_config: ExitConfig,
    plan: list[ExitStep],
    index: int,
    group: Group,
    failed: list[int],
) -> tuple[list[AdaptiveOutput], Group | None]:
    """
    Run one stage and its head for a group, and answer the samples whose score is above the threshold; behind the last
    exit, all.

    Args:
        network ([`EarlyExitNetwork`]): The network.
        exit_config ([`ExitConfig`]): Scores and fallback.
        plan (`list[ExitStep]`): From [`plan_exits`].
        index (`int`): Which stage.
        group ([`Group`]): The samples.
        failed (`list[int]`): Is extended by the ids of samples whose logits are not finite.

    Returns:
        `tuple[list[AdaptiveOutput], Group]`: the answers of the samples that leave, with their ids, and the samples
        that go on; `None` where none do.
    """
    runs_head, threshold = plan[index]
    state = network.run_stage(index, group.state)
    if not runs_head:
        return [], Group(group.ids, state, group.seen, group.exits)
    logits = network.run_exit(index, state)
    needs_history = exit_config.needs_history
    seen, exits = ([*group.seen, logits], [*group.exits, index]) if needs_history else ([logits], [index])
    answers: list[AdaptiveOutput] = []
    group = Group(group.ids, state, seen, exits)
    if threshold is not None:
        score = exit_config.score(seen, exits)
        leaves = score > threshold
        leaving = int(leaves.sum())  # the exit's one transfer to the host
        if leaving == len(group):
            return [_answer(exit_config, group, logits, index, score)], None
        if leaving:
            order = leaves.argsort(descending=True, stable=True)
            out, on = order[:leaving], order[leaving:]
            leavers = Group(group.ids[out], state)  # of whose state nothing is needed
            answers.append(_answer(exit_config, leavers, logits[out], index, score[out]))
            group = group.select(on)
    if index < len(plan) - 1:
        return answers, group
    return [*answers, answer_with_fallback(exit_config, group, network.num_exits, failed)], None


def answer_with_fallback(exit_config: ExitConfig, group: Group, num_exits: int, failed: list[int]) -> AdaptiveOutput:
    """Answer a group by the fallback. The ids of samples whose logits are not finite are added to `failed`."""
    answer = fall_back(exit_config, group.seen, group.exits, num_exits)
    answer.ids = group.ids
    mark_failed(answer, group.ids, failed)
    return answer


def _answer(
    exit_config: ExitConfig, group: Group, logits: torch.Tensor, index: int, score: torch.Tensor
) -> AdaptiveOutput:
    confidence = _confidence(exit_config, logits, index, score)
    return AdaptiveOutput(logits, torch.full_like(group.ids, index), confidence, group.ids)


def _confidence(exit_config: ExitConfig, logits: torch.Tensor, index: int, score: torch.Tensor) -> torch.Tensor:
    same = exit_config.criterion in ("confidence", LABEL_CONFIDENCE)
    return score if same else exit_config.confidence(logits, index)


def images_of(given: Any) -> torch.Tensor:
    """
    Return the images of what holds some: a tensor or a NumPy array, a dictionary with `pixel_values` as an image
    processor returns it, a pair of images and labels, or a list of images of one size.

    Raises:
        `TypeError`: if it is something else, such as a PIL image.
    """
    images = given["pixel_values"] if isinstance(given, Mapping) and "pixel_values" in given else given
    if isinstance(images, (tuple, list)):
        if len(images) == 2 and _is_array(images[0]) and _is_label(images[1]):
            images = images[0]
        elif len(images) == 1 and _is_array(images[0]) and images[0].ndim == 4:
            images = images[0]  # a row of columns, of which there is one
        elif images and all(map(_is_array, images)) and len({tuple(image.shape) for image in images}) == 1:
            images = torch.stack([torch.as_tensor(image) for image in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, torch.Tensor):
        held = f" of {sorted({type(image).__name__ for image in images})}" if isinstance(images, (tuple, list)) else ""
        raise TypeError(
            f"The images are a {type(images).__name__}{held}; expected a tensor (batch_size, num_channels, height, "
            "width), a dictionary with such `pixel_values`, a pair of images and labels, or a list of images of one "
            'size. Prepare images with the model\'s image processor: `processor(images, return_tensors="pt")`.'
        )
    return images


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _is_label(value: Any) -> bool:
    """Return whether something is no image: images have three dimensions or more."""
    return value.ndim < 3 if _is_array(value) else isinstance(value, (int, np.integer, str, list, tuple, Mapping))


def prepare_images(network: EarlyExitNetwork, given: Any) -> torch.Tensor:
    """Return the images of what holds some, checked, on the network's device and of its dtype."""
    images = images_of(given)
    network.check_pixel_values(images)
    # Asked first, so that the usual case calls nothing of PyTorch, which for one image is time that counts.
    if (images.device, images.dtype) != (network.device, network.dtype):
        images = images.to(network.device, network.dtype)
    return images


def skipped_answer(network: EarlyExitNetwork, batch_size: int, like: torch.Tensor | None = None) -> AdaptiveOutput:
    """Return the answer of samples that are skipped: NaN at exit -1; of the device and type of some logits."""
    device, dtype = (network.device, network.dtype) if like is None else (like.device, like.dtype)
    num_labels = network.num_labels if like is None else like.shape[1]
    return AdaptiveOutput(
        logits=torch.full((batch_size, num_labels), torch.nan, device=device, dtype=dtype),
        exit_index=torch.full((batch_size,), SKIPPED, device=device),
        confidence=torch.full((batch_size,), torch.nan, device=device),
    )


def write_answers(answer: AdaptiveOutput, some: AdaptiveOutput, rows: torch.Tensor) -> None:
    """Write the answers of some samples into those of the batch."""
    answer.logits[rows] = some.logits
    answer.exit_index[rows] = some.exit_index
    answer.confidence[rows] = some.confidence


def non_finite_images(network: EarlyExitNetwork, images: torch.Tensor) -> list[int]:
    """Return [`non_finite_rows`] of images, and have the network warn if the pixels cannot have been prepared."""
    total = images.sum(dtype=torch.float32).item()
    if math.isfinite(total):
        network.warn_of_raw_pixels(total / images.numel())
        return []
    return non_finite_rows(images)


def non_finite_rows(values: torch.Tensor) -> list[int]:
    """Return which rows hold NaN or infinite values. Where none does, it takes one pass and waits for one number."""
    if math.isfinite(values.sum(dtype=torch.float32).item()):
        return []
    rows: list[int] = values.flatten(1).isfinite().all(dim=1).logical_not().nonzero().flatten().tolist()
    return rows


def mark_failed(answer: AdaptiveOutput, ids: torch.Tensor | list[int], failed: list[int]) -> None:
    """
    Mark the samples whose logits are not finite as skipped, and add their ids to `failed`. Such logits leave at no
    exit, so that it is enough to look for them in the fallback's answers.
    """
    if rows := non_finite_rows(answer.logits):
        answer.logits[rows] = torch.nan
        answer.exit_index[rows] = SKIPPED
        answer.confidence[rows] = torch.nan
        failed += [int(ids[row]) for row in rows]


def images_not_finite(positions: Sequence[int], whole: str = "batch") -> str:
    """Return the error's text for images whose pixels are not finite."""
    return (
        f"`pixel_values` holds NaN or infinite values at {_listed(positions)} of the {whole}; expected finite ones. "
        'Check these images, or pass `on_error="skip"` to answer the others.'
    )


def logits_not_finite(positions: Sequence[int], whole: str = "batch") -> str:
    """Return the error's text for images whose logits are not finite."""
    return (
        f"The network gives logits that are not finite at {_listed(positions)} of the {whole}, though the images are. "
        'Check its weights; in float16, try bfloat16 or float32. `on_error="skip"` answers the others.'
    )


def _listed(positions: Sequence[int]) -> str:
    shown = ", ".join(map(str, positions[:10])) + (", ..." if len(positions) > 10 else "")
    return f"position{'s' if len(positions) > 1 else ''} {shown}"


def check_eval_mode(network: EarlyExitNetwork) -> None:
    """Raise a `ValueError` if the network, or any module of it alone, is in training mode."""
    if network.has_training_modules():
        raise ValueError(
            "Adaptive inference was asked for while the network or a module of it is in training mode, where batch "
            "norm makes an answer depend on the rest of the batch. Call `model.eval()` first."
        )


def check_on_error(on_error: str) -> None:
    """Raise a `ValueError` unless there is such a way of treating errors."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"`on_error` is {on_error!r}; expected 'raise' or 'skip'.")


__all__ = ["AdaptiveInferenceMixin", "EarlyExitNetwork"]
