"""Simulate replicas for `serving.py`, from measured times of stages and with the library's own scheduler."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_scan.model.stage_scheduler import StageScheduler


Times = Sequence[dict[int, float]]  # of each stage with its head: seconds by batch size


class Images(list[tuple[int, float, int]]):
    """A group of images: number, time of arrival and the stage at which each leaves."""

    def numbers(self) -> list[int]:
        return [number for number, _, _ in self]

    def select(self, rows: Any) -> "Images":
        return Images(self[rows] if isinstance(rows, slice) else [self[row] for row in rows])

    @staticmethod
    def join(groups: Sequence["Images"]) -> "Images":
        return Images(image for group in groups for image in group)


def seconds_of(times: dict[int, float], size: int) -> float:
    """Return the time of a batch, between the sizes that were measured."""
    return float(np.interp(size, list(times), list(times.values())))


@dataclass
class Replica:
    """
    One replica, which runs one batch at a time.

    Args:
        kind (`str`): `"refilled"` is the engine; `"static"` runs whole batches, whose images exit, and are answered
            together when the last has; `"plain"` does without exits.
        times: Of each stage; of `"plain"`, of the whole network as one.
        batch_size (`int`): Images of a batch.
        max_wait (`float`): Seconds for which an image waits for others.
    """

    kind: str
    times: Times
    batch_size: int
    max_wait: float
    free_at: float = 0.0
    in_flight: int = 0

    def __post_init__(self) -> None:
        stages = len(self.times) if self.kind == "refilled" else 1
        self.scheduler: StageScheduler[Images, tuple[int, float, int]] = StageScheduler(
            stages, self.batch_size, self._advance
        )

    def _advance(self, index: int, group: Images) -> tuple[Images, Images | None]:
        if self.kind == "refilled":
            self.free_at += seconds_of(self.times[index], len(group))
            stay = Images(image for image in group if image[2] > index)
            return Images(image for image in group if image[2] <= index), stay or None
        for stage, times in enumerate(self.times):
            if left := sum(depth >= stage for _, _, depth in group):
                self.free_at += seconds_of(times, left)
        return group, None

    def start(self, now: float) -> Images | None:
        """Run what is due, if anything is, until `free_at`; return the images that are answered then."""
        index = self.scheduler.next_stage(since=now - self.max_wait + 1e-9)
        if index is None:
            return None
        self.free_at = now
        return Images(self.scheduler.step(index))

    def due(self) -> float | None:
        """Return when something that waits is due."""
        oldest = self.scheduler.oldest()
        return None if oldest is None else oldest + self.max_wait


def simulate(
    make_replica: Callable[[], Replica], replicas: int, arrivals: np.ndarray, depths: np.ndarray, seed: int = 0
) -> np.ndarray:
    """
    Return the latency of each image, in seconds. An image goes to the less busy of two replicas chosen at random.

    Args:
        make_replica (`Callable`): Makes a replica.
        replicas (`int`): How many there are.
        arrivals (`np.ndarray`): When images arrive, in ascending order.
        depths (`np.ndarray`): The stages at which they leave.
        seed (`int`, *optional*, defaults to 0): Of the choice.
    """
    rng = random.Random(seed)
    all_replicas = [make_replica() for _ in range(replicas)]
    latencies = np.full(len(arrivals), np.nan)
    # Events: an image arrives (-1), a batch ends, or a replica looks whether something is due.
    events: list[tuple[float, int, int, Images | None]] = []
    count = 0

    def look(number: int, now: float) -> None:
        nonlocal count
        replica = all_replicas[number]
        if replica.free_at > now:
            return
        answered = replica.start(now)
        count += 1
        if answered is not None:
            heapq.heappush(events, (replica.free_at, count, number, answered))
        elif (due := replica.due()) is not None:
            heapq.heappush(events, (max(due, now), count, number, None))

    position = 0
    while events or position < len(arrivals):
        if position < len(arrivals) and (not events or arrivals[position] <= events[0][0]):
            now = float(arrivals[position])
            pair = [rng.randrange(replicas) for _ in range(2)]
            number = min(pair, key=lambda one: all_replicas[one].in_flight)
            replica = all_replicas[number]
            replica.in_flight += 1
            replica.scheduler.put(Images([(position, now, int(depths[position]))]), now)
            position += 1
        else:
            now, _, number, answered = heapq.heappop(events)
            for image, arrived, _ in answered or ():
                latencies[image] = now - arrived
            all_replicas[number].in_flight -= len(answered or ())
        look(number, now)
    return latencies


def poisson(rate: float, count: int, seed: int, bursts: bool = False) -> np.ndarray:
    """
    Return times of arrival.

    Args:
        rate (`float`): Images a second.
        count (`int`): How many images.
        seed (`int`): Of the times.
        bursts (`bool`, *optional*, defaults to `False`): Whether the rate is three times as high for a tenth of each
            second, and lower for the rest.
    """
    rng = np.random.default_rng(seed)
    times = rng.exponential(1 / rate, count).cumsum()
    if not bursts:
        return times
    # The share of the mean rate that has passed by each moment of a second.
    moments, passed = np.array([0.0, 0.1, 1.0]), np.array([0.0, 0.3, 1.0])
    return np.floor(times) + np.interp(times % 1, passed, moments)


def summary(latencies: np.ndarray, arrivals: np.ndarray) -> dict[str, float]:
    """Return percentiles in milliseconds, and throughput."""
    p50, p95, p99 = (float(np.percentile(1000 * latencies, q)) for q in (50, 95, 99))
    ends = arrivals + latencies
    return {"p50": p50, "p95": p95, "p99": p99, "throughput": len(arrivals) / float(ends.max() - arrivals[0])}
