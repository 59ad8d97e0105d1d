# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Count what an engine does, for Prometheus: [`EngineMetrics`]."""

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any


# Upper ends of the latency histogram's buckets, in seconds.
LATENCY_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OUTCOMES = ("answered", "failed", "cancelled", "refused")


class EngineMetrics:
    """
    Counts of an [`AsyncEngine`]: it is a collector of `prometheus_client`, as in
    `prometheus_client.REGISTRY.register(engine.metrics)`. Thread-safe.

    Args:
        num_stages (`int`): Number of stages.
        batch_size (`int`): Samples with which a stage is run, by which a batch's fill is counted.
    """

    def __init__(self, num_stages: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self._waiting = [0] * num_stages
        self._batches, self._images = [0] * num_stages, [0] * num_stages
        self._latencies: dict[int, list[int]] = {}  # by exit, a count for each bucket and one beyond
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def note_outcome(self, outcome: str, count: int = 1) -> None:
        """Count requests that ended: one of `OUTCOMES`."""
        with self._lock:
            self._outcomes[outcome] += count

    def note_batch(self, index: int, size: int) -> None:
        """Count a stage that ran for `size` samples."""
        with self._lock:
            self._batches[index] += 1
            self._images[index] += size

    def note_waiting(self, waiting: list[int]) -> None:
        """Note how many samples wait in front of each stage."""
        with self._lock:
            self._waiting = waiting

    def note_latencies(self, answered: Iterable[tuple[int, float]]) -> None:
        """Count answers: the exit of each, and the seconds from its request."""
        with self._lock:
            for exit_index, seconds in answered:
                if exit_index not in self._latencies:
                    self._latencies[exit_index] = [0] * (len(LATENCY_EDGES) + 1)
                self._latencies[exit_index][bisect_left(LATENCY_EDGES, seconds)] += 1
                self._seconds[exit_index] += seconds

    def snapshot(self) -> dict[str, Any]:
        """
        Return the counts: `requests` by outcome, and by stage how many images are `waiting`, and how many `batches`
        and `images` were run; `fill` is the mean share of a batch that was filled.
        """
        with self._lock:
            pairs = zip(self._images, self._batches)
            return {
                "requests": {outcome: self._outcomes[outcome] for outcome in OUTCOMES},
                "answers_by_exit": {index: sum(counts) for index, counts in sorted(self._latencies.items())},
                "waiting": list(self._waiting),
                "batches": list(self._batches),
                "images": list(self._images),
                "fill": [images / (batches * self.batch_size) if batches else 0.0 for images, batches in pairs],
            }

    def collect(self) -> Iterator[Any]:
        """Yield the metrics for `prometheus_client`. Stages and exits are labelled from 0."""
        try:
            from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
        except ImportError as error:
            raise ImportError("Metrics need prometheus_client; `pip install 'hf_scan[serve]'`.") from error
        found = self.snapshot()
        requests = CounterMetricFamily("hf_scan_requests", "Requests that ended, by outcome", labels=["outcome"])
        for outcome, count in found["requests"].items():
            requests.add_metric([outcome], count)
        waiting = GaugeMetricFamily("hf_scan_queue_length", "Images that wait in front of a stage", labels=["stage"])
        batches = CounterMetricFamily("hf_scan_batches", "Batches that a stage ran", labels=["stage"])
        images = CounterMetricFamily("hf_scan_batch_images", "Images in these batches", labels=["stage"])
        fill = GaugeMetricFamily("hf_scan_batch_fill", "Mean share of a batch that was filled", labels=["stage"])
        for name, family in (("waiting", waiting), ("batches", batches), ("images", images), ("fill", fill)):
            for stage, value in enumerate(found[name]):
                family.add_metric([str(stage)], value)
        latency = HistogramMetricFamily("hf_scan_latency_seconds", "From request to answer, by exit", labels=["exit"])
        with self._lock:
            copied = [(index, list(counts), self._seconds[index]) for index, counts in sorted(self._latencies.items())]
        for index, counts, total in copied:
            edges = [*(f"{edge:g}" for edge in LATENCY_EDGES), "+Inf"]
            sums = [sum(counts[: position + 1]) for position in range(len(counts))]
            latency.add_metric([str(index)], list(zip(edges, sums)), total)
        yield from (requests, waiting, batches, images, fill, latency)


__all__ = ["LATENCY_EDGES", "OUTCOMES", "EngineMetrics"]
