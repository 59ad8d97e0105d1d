# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""How to answer: [`ExitConfig`], the exit rule, and `predict_adaptive`, which really leaves the network early."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import logging

from .exit_config import ExitConfig
from .exit_criteria import confidence_of
from .exit_rule import AdaptiveOutput, fall_back, plan_exits
from .memory import within_memory


logger = logging.get_logger(__name__)


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
        config = (exit_config or self.exit_config).replace(**kwargs)
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


def check_eval_mode(model: Any) -> None:
    """Raises a `ValueError` in training mode."""
    if model.training:
        raise ValueError(
            "Adaptive inference was asked for in training mode, where batch norm makes an answer depend on the rest "
            "of the batch. Call `model.eval()` first."
        )


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


__all__ = ["AdaptiveInferenceMixin"]
