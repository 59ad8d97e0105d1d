# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""`predict_adaptive_stream`: the engine for a stream of images, in which every stage runs full batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from .adaptive import (
    AdaptiveInferenceMixin,
    EarlyExitNetwork,
    Group,
    OnError,
    advance,
    check_eval_mode,
    check_on_error,
    images_not_finite,
    images_of,
    logits_not_finite,
    non_finite_images,
    prepare_images,
    skipped_answer,
)
from .exit_config import ExitConfig
from .exit_rule import AdaptiveOutput, plan_exits
from .memory import within_memory
from .problem_type import for_problem
from .stage_scheduler import StageScheduler
from .stages import StageState


logger = logging.get_logger(__name__)


class AdaptiveStreamMixin(AdaptiveInferenceMixin):
    """Adds `predict_adaptive_stream` to an [`EarlyExitNetwork`]."""

    def predict_adaptive_stream(
        self: EarlyExitNetwork,
        batches: Any,
        batch_size: int = 64,
        exit_config: ExitConfig | None = None,
        ordered: bool = False,
        max_exit: int | None = None,
        on_error: OnError = "raise",
        **kwargs: Any,
    ) -> Iterator[AdaptiveOutput]:
        """
        Classify a stream of images. Where [`~AdaptiveInferenceMixin.predict_adaptive`] goes on with what is left of a
        batch, here samples that stay wait in front of the next stage until they fill a batch, so that every stage runs
        full batches until the stream ends. Every sample gets the answer that it gets alone.

        In front of each stage there are less than two batches at any time, and less than `batch_size` images besides
        what the stream gives at once. With `ordered`, answers wait for those of earlier images too; an answer is as
        large as its logits.

        Args:
            batches (`Iterable` or `Dataset`):
                Batches of images, `(n, num_channels, height, width)` or dictionaries with such `pixel_values`, of any
                n, such as a `DataLoader` gives; pairs of images and labels, whose labels are left out; or a dataset
                whose rows have `pixel_values`, which several processes share. (Of batches, each process answers those
                that it is given.) All images have the same size.
            batch_size (`int`, *optional*, defaults to 64): Samples with which a stage is run.
            exit_config ([`ExitConfig`], *optional*): Defaults to `model.exit_config`.
            ordered (`bool`, *optional*, defaults to `False`): Whether answers come in the order of the images rather
                than as they are ready.
            max_exit (`int`, *optional*): As in [`~AdaptiveInferenceMixin.predict_adaptive`].
            on_error (`str`, *optional*, defaults to `"raise"`): What to do about images whose pixels or logits are not
                finite. `"raise"` reads no further, answers the others that were read, and raises an error that names
                the positions; `"skip"` warns, gives them NaN as logits and confidence and -1 as exit, and goes on.
            kwargs: Fields of the exit configuration to override.

        Yields:
            [`AdaptiveOutput`]: some answers, with `ids`: the position in the stream, or in the dataset, of each.

        Raises:
            `ValueError`: as [`~AdaptiveInferenceMixin.predict_adaptive`], if `batch_size` is below 1, or images differ
                in size. An error of the stream itself is raised when all that came before it is answered.
            `RuntimeError`: if memory does not suffice for `batch_size`. It names a size that fits.

        Example:

        ```python
        >>> import torch
        >>> from hf_scan import ScanConfig, ScanForImageClassification

        >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
        >>> batches = (torch.rand(5, 3, 32, 32) for _ in range(4))
        >>> answers = list(model.predict_adaptive_stream(batches, batch_size=8, thresholds=[0.2, 0.2]))
        >>> sorted(torch.cat([answer.ids for answer in answers]).tolist()) == list(range(20))
        True
        ```
        """
        check_eval_mode(self)
        check_on_error(on_error)
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; expected a whole number of at least 1.")
        config = for_problem((exit_config or self.exit_config).replace(**kwargs), self.config.problem_type)
        plan = plan_exits(config, self.num_exits, max_exit)
        failed: list[int] = []

        def run(index: int, group: Group) -> tuple[list[AdaptiveOutput], Group | None]:
            def run_some(size: int) -> tuple[list[AdaptiveOutput], Group | None]:
                some = group if size == len(group) else group.select(slice(size))
                return advance(self, config, plan, index, some, failed)

            with torch.inference_mode():
                return within_memory(run_some, len(group))

        arrived: deque[int] = deque()  # which samples came, in their order
        note = arrived.extend if ordered else None
        stream = _Stream(self, batch_size, len(plan), run, failed, on_error == "skip", note)
        answers = stream.answers(numbered_batches(batches, batch_size))
        return _in_order(answers, arrived) if ordered else answers


class _Stream:
    """
    Feeds a stream to a [`StageScheduler`]. What cannot be answered is skipped or raised when the rest is answered.

    Args:
        network ([`EarlyExitNetwork`]): The network.
        batch_size (`int`): Samples with which a stage is run.
        num_stages (`int`): Stages that can be reached.
        run (`Callable`): Runs a stage for a group: [`advance`].
        failed (`list[int]`): To which `run` adds the ids of samples whose logits are not finite.
        skip (`bool`): Whether samples that cannot be answered are skipped.
        note (`Callable`, *optional*): Is told the ids of each batch that arrives.
    """

    def __init__(
        self,
        network: EarlyExitNetwork,
        batch_size: int,
        num_stages: int,
        run: Callable[[int, Group], tuple[list[AdaptiveOutput], Group | None]],
        failed: list[int],
        skip: bool,
        note: Callable[[list[int]], None] | None,
    ) -> None:
        self.network, self.run = network, run
        self.failed, self.skip, self.note = failed, skip, note
        self.scheduler: StageScheduler[Group, AdaptiveOutput] = StageScheduler(num_stages, batch_size, self._advance)
        self.error: Exception | None = None  # is raised when all that was read before it is answered

    def answers(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[AdaptiveOutput]:
        shape: torch.Size | None = None
        while self.error is None:
            try:
                ids, images = next(batches)
                if len(images) == 0:
                    continue
                shape = shape or images.shape[1:]
                images = self._prepare(images, shape)
            except StopIteration:
                break
            except Exception as error:  # whatever the stream's own code raises
                self.error = error
                break
            yield from self._put(ids, images)
            yield from self.scheduler.run()
        yield from self.scheduler.run(all_that_wait=True)
        if self.error is not None:
            raise self.error

    def _prepare(self, images: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if images.shape[1:] != shape:
            raise ValueError(
                f"The stream gave images of {tuple(images.shape[1:])} after some of {tuple(shape)}; expected one "
                "size. Prepare all with the model's image processor."
            )
        return prepare_images(self.network, images)

    def _put(self, ids: torch.Tensor, images: torch.Tensor) -> Iterator[AdaptiveOutput]:
        """Put images into the first queue, without those whose pixels are not finite."""
        if bad := non_finite_images(self.network, images):
            good = [row for row in range(len(images)) if row not in set(bad)]
            text = images_not_finite(ids[bad].tolist(), "stream")
            if self.skip:
                logger.warning(text)
                self._note(ids)
                yield self._skipped(ids[bad])
            else:
                self.error = ValueError(text)
                self._note(ids[good])
            ids, images = ids[good], images[good]
        else:
            self._note(ids)
        if len(images):
            self.scheduler.put(Group(ids.to(images.device), StageState.from_images(images)))

    def _note(self, ids: torch.Tensor) -> None:
        if self.note is not None:
            self.note(ids.tolist())

    def _skipped(self, ids: torch.Tensor) -> AdaptiveOutput:
        answer = skipped_answer(self.network, len(ids))
        answer.ids = ids.to(answer.logits.device)
        return answer

    def _advance(self, index: int, group: Group) -> tuple[list[AdaptiveOutput], Group | None]:
        answers, stay = self.run(index, group)
        if self.failed:
            text = logits_not_finite(self.failed, "stream")
            if self.skip:
                logger.warning(text)
            else:
                self.error = self.error or ValueError(text)
            self.failed.clear()
        return answers, stay


def numbered_batches(batches: Any, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield positions and images of whatever was given."""
    if isinstance(batches, torch.Tensor):
        batches = [batches]
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, (list, tuple)):
        yield from sharded_batches(batches, batch_size)
        return
    start = 0
    for batch in batches:
        images = images_of(batch)
        yield torch.arange(start, start + len(images)), images
        start += len(images)


def sharded_batches(dataset: Any, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a dataset's images with their indices; of several processes, each gets its own part, and none twice."""
    world, rank = 1, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    starts = range(rank * batch_size, len(dataset), world * batch_size)
    parts = [list(range(start, min(start + batch_size, len(dataset)))) for start in starts]
    loader = DataLoader(
        dataset, batch_sampler=parts, collate_fn=lambda rows: torch.stack([_image_of(row) for row in rows])
    )
    for indices, images in zip(parts, loader):
        yield torch.tensor(indices), images


def _image_of(row: Any) -> torch.Tensor:
    """Return the image of a dataset's row, which may be a column of several or the only one."""
    return images_of(row[0] if isinstance(row, tuple) and len(row) == 1 else row)


def _in_order(answers: Iterable[AdaptiveOutput], arrived: deque[int]) -> Iterator[AdaptiveOutput]:
    """Hold answers back until those of earlier images are there."""
    waiting: dict[int, tuple[AdaptiveOutput, int]] = {}
    for answer in answers:
        assert answer.ids is not None
        waiting.update((row, (answer, position)) for position, row in enumerate(answer.ids.tolist()))
        ready = []
        while arrived and arrived[0] in waiting:
            ready.append(waiting.pop(arrived.popleft()))
        if ready:
            names = ready[0][0].keys()
            yield AdaptiveOutput(**{name: torch.stack([held[name][i] for held, i in ready]) for name in names})


__all__ = ["AdaptiveStreamMixin"]
