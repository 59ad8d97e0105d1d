# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Decide which stage runs next, and for which samples: [`StageScheduler`]. Needs no PyTorch."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar


class SampleGroup(Protocol):
    """Samples that are equally far, as the engines keep them."""

    def __len__(self) -> int: ...

    def numbers(self) -> list[int]:
        """Return the numbers by which the samples are known."""

    def select(self, rows: Any) -> Any:
        """Return some of the samples, by a slice or a list of their positions."""

    @staticmethod
    def join(groups: Sequence[Any]) -> Any:
        """Return one group of the samples of several."""


GroupT = TypeVar("GroupT", bound=SampleGroup)
AnswerT = TypeVar("AnswerT")


class StageScheduler(Generic[GroupT, AnswerT]):
    """
    The queues in front of the stages, and the one definition of what a stream runs next. A stage runs when a batch
    waits in front of it. When several do, the deepest is the first, so that queues stay short: less than a batch stays
    in front of each stage but the first.

    Args:
        num_stages (`int`): Stages that can be reached.
        batch_size (`int`): Samples with which a stage is run.
        advance (`Callable`): Runs a stage, by its index, for a group; returns the answers of the samples that leave,
            and the group of those that go on, or `None`.

    Example:

    ```python
    >>> from hf_scan.model.stage_scheduler import StageScheduler

    >>> class Numbers(list):
    ...     numbers = list.copy
    ...     def select(self, rows):
    ...         return Numbers(self[rows] if isinstance(rows, slice) else [self[row] for row in rows])
    ...     @staticmethod
    ...     def join(groups):
    ...         return Numbers(sum(groups, []))
    >>> def advance(index, group):  # stage 0 answers even numbers, stage 1 all
    ...     stay = Numbers(n for n in group if n % 2 and index == 0)
    ...     return [(index, n) for n in group if n not in stay], stay or None
    >>> scheduler = StageScheduler(num_stages=2, batch_size=4, advance=advance)
    >>> scheduler.put(Numbers(range(6)))
    >>> list(scheduler.run())
    [(0, 0), (0, 2)]
    >>> list(scheduler.run(all_that_wait=True))
    [(0, 4), (1, 1), (1, 3), (1, 5)]
    ```
    """

    def __init__(
        self,
        num_stages: int,
        batch_size: int,
        advance: Callable[[int, GroupT], tuple[Sequence[AnswerT], GroupT | None]],
    ) -> None:
        self.batch_size, self.advance = batch_size, advance
        self.queues: list[StageQueue[GroupT]] = [StageQueue() for _ in range(num_stages)]

    def __len__(self) -> int:
        return sum(map(len, self.queues))

    def put(self, group: GroupT, since: float = 0.0) -> None:
        """
        Let a group wait in front of the first stage.

        Args:
            group: The samples.
            since (`float`, *optional*): When they arrived, by which [`~StageScheduler.next_stage`] may be asked.
        """
        self.queues[0].put(group, since)

    def next_stage(self, all_that_wait: bool = False, since: float | None = None) -> int | None:
        """
        Return the stage to run next: the deepest with a full batch; without any, the deepest in front of which a
        sample waits that arrived early enough; or `None`.

        Args:
            all_that_wait (`bool`, *optional*, defaults to `False`): Whether no more samples come, so that waiting is
                over. Then it is the first stage, what stays of which joins what waits deeper.
            since (`float`, *optional*): Samples that arrived at this time or before have waited enough.
        """
        for index in reversed(range(len(self.queues))):
            if len(self.queues[index]) >= self.batch_size:
                return index
        if all_that_wait:
            return next((index for index, queue in enumerate(self.queues) if len(queue)), None)
        if since is not None:
            # The first stage would let the others starve under load; `benchmarks/serving.py` simulates it.
            for index in reversed(range(len(self.queues))):
                if len(self.queues[index]) and self.queues[index].oldest <= since:
                    return index
        return None

    def step(self, index: int) -> Sequence[AnswerT]:
        """
        Run a stage for at most a batch of those that wait in front of it, and return the answers of the samples that
        leave. The others wait in front of the next stage, since the first of them arrived: an image waits for others
        once, and not anew in front of each stage.

        Args:
            index (`int`): Which stage, from [`~StageScheduler.next_stage`].
        """
        since = self.queues[index].oldest
        answers, stay = self.advance(index, self.queues[index].take(self.batch_size))
        if stay is not None:
            self.queues[index + 1].put(stay, since)
        return answers

    def run(self, all_that_wait: bool = False) -> Iterator[AnswerT]:
        """
        Run stages until none has a full batch, and yield the answers.

        Args:
            all_that_wait (`bool`, *optional*, defaults to `False`): Whether to go on until nothing waits.
        """
        while (index := self.next_stage(all_that_wait)) is not None:
            yield from self.step(index)

    def oldest(self) -> float | None:
        """Return when the first of the samples that wait arrived, or `None`."""
        return min((queue.oldest for queue in self.queues if len(queue)), default=None)

    def remove(self, numbers: Collection[int]) -> list[int]:
        """Remove samples that need no answer any more, wherever they wait, and return those that were found."""
        return [number for queue in self.queues for number in queue.remove(numbers)]


class StageQueue(Generic[GroupT]):
    """Groups that wait in front of a stage, in order of arrival, and leave as one of at most a batch."""

    def __init__(self) -> None:
        self._groups: deque[tuple[GroupT, float]] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def oldest(self) -> float:
        """When the first of the samples arrived."""
        return self._groups[0][1]

    def put(self, group: GroupT, since: float) -> None:
        """Add a group of samples that arrived at a time."""
        self._groups.append((group, since))
        self._count += len(group)

    def take(self, at_most: int) -> GroupT:
        """Remove the oldest samples, at most so many, and return them as one group. There must be some."""
        taken: list[GroupT] = []
        room = at_most
        while self._groups and room:
            group, since = self._groups.popleft()
            if len(group) > room:
                self._groups.appendleft((group.select(slice(room, None)), since))
                group = group.select(slice(room))
            taken.append(group)
            room -= len(group)
        self._count -= at_most - room
        return taken[0] if len(taken) == 1 else taken[0].join(taken)

    def remove(self, numbers: Collection[int]) -> list[int]:
        """Remove samples by their numbers, and return those that were here."""
        removed: list[int] = []
        kept: deque[tuple[GroupT, float]] = deque()
        for group, since in self._groups:
            here = group.numbers()
            rows = [row for row, number in enumerate(here) if number not in numbers]
            if len(rows) < len(here):
                removed += [number for number in here if number in numbers]
                if not rows:
                    continue
                group = group.select(rows)
            kept.append((group, since))
        self._groups = kept
        self._count -= len(removed)
        return removed


__all__ = ["SampleGroup", "StageQueue", "StageScheduler"]
