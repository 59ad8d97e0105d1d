# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Full batches to the end: samples that stay wait in front of the next stage until they fill a batch again."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from .adaptive import AdaptiveInferenceMixin, Answers, Group, advance, check_eval_mode
from .exit_config import ExitConfig
from .exit_rule import AdaptiveOutput, plan_exits
from .memory import within_memory


class AdaptiveStreamMixin(AdaptiveInferenceMixin):
    """Adds `predict_adaptive_stream` to a model that also has `join_states(index, states)`."""

    def predict_adaptive_stream(
        self,
        batches: Any,
        batch_size: int = 64,
        exit_config: ExitConfig | None = None,
        ordered: bool = False,
        max_exit: int | None = None,
        **kwargs: Any,
    ) -> Iterator[AdaptiveOutput]:
        """
        Classifies a stream of images. Where [`~AdaptiveInferenceMixin.predict_adaptive`] goes on with what is left of
        a batch, here those that stay wait in front of the next stage until they fill a batch, so that every stage runs
        full batches until the stream ends. Every sample gets the answer that it gets alone.

        In front of each stage there are less than two batches at any time, and less than `batch_size` images besides
        what the stream gives at once. With `ordered`, answers wait for those of earlier images too; an answer is as
        large as its logits.

        Args:
            batches (`Iterable` or `Dataset`):
                Batches of images, `(n, num_channels, height, width)` or dictionaries with such `pixel_values`, of any
                n, such as a `DataLoader` gives; or a dataset whose rows have `pixel_values`, which several processes
                share. (Of batches, each process answers those that it is given.) All images have the same size.
            batch_size (`int`, *optional*, defaults to 64): Samples with which a stage is run.
            exit_config ([`ExitConfig`], *optional*): Defaults to `model.exit_config`.
            ordered (`bool`, *optional*, defaults to `False`): Whether answers come in the order of the images rather
                than as they are ready.
            max_exit (`int`, *optional*): As in [`~AdaptiveInferenceMixin.predict_adaptive`].
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
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; expected a whole number of at least 1.")
        model: Any = self
        config = (exit_config or self.exit_config).replace(**kwargs)
        plan = plan_exits(config, model.num_exits, max_exit)

        def run(index: int, group: Group) -> tuple[list[Answers], Group | None]:
            count = len(group.rows)
            with torch.inference_mode():
                return within_memory(
                    lambda size: advance(
                        model, config, plan, index, group if size == count else _part(model, index, group, slice(size))
                    ),
                    count,
                )

        arrived: deque[int] = deque()  # which samples came, in their order
        note = arrived.extend if ordered else None
        answers = _flow(model, _numbered(batches, batch_size), batch_size, len(plan), run, note)
        return _in_order(answers, arrived) if ordered else answers


def _flow(
    model: Any,
    numbered: Iterable[tuple[torch.Tensor, torch.Tensor]],
    batch_size: int,
    num_stages: int,
    run: Callable[[int, Group], tuple[list[Answers], Group | None]],
    note: Callable[[list[int]], None] | None,
) -> Iterator[AdaptiveOutput]:
    """Answers as they are ready. Of each batch that comes in, the positions are noted by whoever wants them."""
    queues = [_Queue(model, index, batch_size) for index in range(num_stages)]

    def run_stage(index: int) -> Iterator[AdaptiveOutput]:
        gone, stay = run(index, queues[index].take())
        if stay is not None:
            queues[index + 1].put(stay)
        yield from map(_output, gone)

    def run_full_batches() -> Iterator[AdaptiveOutput]:
        # From the deepest on, so that room is made before anything is put there.
        while full := [index for index, queue in enumerate(queues) if len(queue) >= batch_size]:
            yield from run_stage(full[-1])

    error: Exception | None = None
    source = iter(numbered)
    shape: torch.Size | None = None
    while True:
        try:
            rows, images = next(source)
            if len(images) == 0:
                continue
            shape = shape or images.shape[1:]
            if images.shape[1:] != shape:
                raise ValueError(
                    f"The stream gave images of {tuple(images.shape[1:])} after some of {tuple(shape)}; expected one "
                    "size. Prepare all with the model's image processor."
                )
            model.check_pixel_values(images, values=True)
        except StopIteration:
            break
        except Exception as raised:  # whatever the stream's own code says; first, what came before it
            error = raised
            break
        if note is not None:
            note(rows.tolist())
        queues[0].put(Group(rows.to(model.device), (images.to(model.device),)))
        yield from run_full_batches()
    for index in range(num_stages):
        while len(queues[index]):
            yield from run_stage(index)
            yield from run_full_batches()
    if error is not None:
        raise error


class _Queue:
    """Groups that wait in front of a stage, and come out as one of at most a batch's size."""

    def __init__(self, model: Any, index: int, batch_size: int) -> None:
        self.model, self.index, self.batch_size = model, index, batch_size
        self.groups: list[Group] = []

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self.groups)

    def put(self, group: Group) -> None:
        self.groups.append(group)

    def take(self) -> Group:
        taken, count = [], 0
        while self.groups and count < self.batch_size:
            group = self.groups.pop(0)
            room = self.batch_size - count
            if len(group.rows) > room:
                self.groups.insert(0, _part(self.model, self.index, group, slice(room, None)))
                group = _part(self.model, self.index, group, slice(room))
            taken.append(group)
            count += len(group.rows)
        return taken[0] if len(taken) == 1 else self._joined(taken)

    def _joined(self, groups: list[Group]) -> Group:
        states = [group.state for group in groups]
        if self.index == 0:
            state: tuple[Any, ...] = (torch.cat([images for (images,) in states]),)
        else:
            state = self.model.join_states(self.index - 1, states)
        seen = [torch.cat(logits) for logits in zip(*(group.seen for group in groups))]
        return Group(torch.cat([group.rows for group in groups]), state, seen, groups[0].exits)


def _part(model: Any, index: int, group: Group, rows: slice) -> Group:
    """Some of a group that waits in front of a stage."""
    if index == 0:
        state: tuple[Any, ...] = (group.state[0][rows],)
    else:
        state = model.select_rows(index - 1, group.state, rows, len(group.rows))
    return Group(group.rows[rows], state, [logits[rows] for logits in group.seen], group.exits)


def _numbered(batches: Any, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images with their positions, from whatever was given."""
    if isinstance(batches, torch.Tensor):
        batches = [batches]
    if hasattr(batches, "__getitem__") and hasattr(batches, "__len__") and not isinstance(batches, (list, tuple)):
        yield from _shared(batches, batch_size)
        return
    start = 0
    for batch in batches:
        images = batch["pixel_values"] if isinstance(batch, Mapping) else batch
        yield torch.arange(start, start + len(images)), images
        start += len(images)


def _shared(dataset: Any, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A dataset's images with their indices; of several processes, each gets its own part, and none twice."""
    world, rank = 1, 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    starts = range(rank * batch_size, len(dataset), world * batch_size)
    parts = [list(range(start, min(start + batch_size, len(dataset)))) for start in starts]
    loader = DataLoader(
        dataset, batch_sampler=parts, collate_fn=lambda rows: torch.stack([row["pixel_values"] for row in rows])
    )
    for indices, images in zip(parts, loader):
        yield torch.tensor(indices), images


def _output(answers: Answers) -> AdaptiveOutput:
    rows, logits, exit_index, confidence = answers
    if isinstance(exit_index, int):
        exit_index = torch.full_like(rows, exit_index)
    return AdaptiveOutput(logits=logits, exit_index=exit_index, confidence=confidence, ids=rows)


def _in_order(answers: Iterable[AdaptiveOutput], arrived: deque[int]) -> Iterator[AdaptiveOutput]:
    """Holds answers back until those of earlier images are there."""
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
