# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Watch whether images in use still exit where they did when thresholds were found: [`ExitMonitor`]."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import binomtest, chi2_contingency
from transformers.utils import logging

from ..model.exit_config import ExitConfig
from ..model.exit_rule import AdaptiveOutput, answers_of


if TYPE_CHECKING:
    from ..model.modeling_scan import ScanForImageClassification


logger = logging.get_logger(__name__)

# The least expected count in each cell of the chi-squared test, in the smaller sample too.
LEAST_IN_CELL = 5


@dataclass(frozen=True)
class Drift:
    """
    A comparison of images in use with those that thresholds were found on.

    Args:
        distance (`float`): Total variation distance of the two distributions over exits and confidences: the share of
            images that would have to exit elsewhere or with another confidence. Between two samples of the same
            distribution it is not 0, but shrinks with their size.
        p_value (`float`): The p-value of the chi-squared test under H0: both samples have the same distribution. It
            holds for one test; repeated ones give small values by chance.
        n (`int`): Number of images since the last reset.
    """

    distance: float
    p_value: float
    n: int


@dataclass(frozen=True)
class Disagreement:
    """
    An estimate of how often the adaptive answer differs from the deepest exit's, by shadow sampling.

    Args:
        rate (`float`): The rate in [0, 1]; NaN while there are no samples.
        low (`float`): Lower end of its exact binomial 95 % confidence interval.
        high (`float`): Upper end of it.
        n (`int`): Number of images that were also run to the end.
    """

    rate: float
    low: float
    high: float
    n: int


class ExitMonitor:
    """
    A monitor that answers images as `predict_adaptive` does and counts exits and confidences, for comparison with
    those when the thresholds were found. It needs no labels. When the model's exit configuration changes, counting
    starts anew with the new reference.

    It is a collector of `prometheus_client`: `prometheus_client.REGISTRY.register(monitor)`.

    Args:
        model ([`ScanForImageClassification`]): With an exit configuration that [`calibrate`] made.
        shadow_every (`int`, *optional*): Run one of so many images to the end as well, to compare its answer with the
            deepest exit's. Defaults to none.

    Raises:
        `ValueError`: if the exit configuration holds no reference or one of another network, or `shadow_every` is
            below 1.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ExitMonitor, ScanConfig, ScanForImageClassification, calibrate

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2)).eval()
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(64)]
    >>> model.exit_config = calibrate(model, images, max_accuracy_drop=0.5)
    >>> monitor = ExitMonitor(model, shadow_every=4)
    >>> answer = monitor.predict(torch.rand(8, 3, 32, 32))
    >>> monitor.drift().n, monitor.disagreement().n
    (8, 2)
    ```
    """

    def __init__(self, model: "ScanForImageClassification", shadow_every: int | None = None) -> None:
        if shadow_every is not None and shadow_every < 1:
            raise ValueError(f"`shadow_every` is {shadow_every}; expected a whole number of at least 1, or None.")
        self.model = model
        self.shadow_every = shadow_every
        self._lock = threading.Lock()  # servers answer in several threads
        self._rule: dict[str, Any] = {}
        self._seen: list[list[float]] = []
        self._follow(model.exit_config)

    def _follow(self, config: ExitConfig) -> None:
        """Take the reference of an exit configuration, and start counting anew if it or the rule has changed."""
        with self._lock:
            seen = config.reference or {}
            if self._rule and config.rule == self._rule and seen.get("counts") == self._seen:
                return
            reference = _reference_of(config, self.model.num_exits)
            if self._rule:
                logger.warning("The exit configuration has changed; `ExitMonitor` counts anew, against its reference.")
            self._rule, self._seen = config.rule, seen["counts"]
            self.reference = reference
            self._count_anew()

    def _count_anew(self) -> None:
        self.counts = np.zeros_like(self.reference)
        self._confidence_sums = np.zeros(len(self.reference))
        self._shadowed = self._disagreeing = 0

    def reset(self) -> None:
        """Start counting anew."""
        with self._lock:
            self._count_anew()

    def predict(self, pixel_values: torch.Tensor) -> AdaptiveOutput:
        """
        Answer images by [`~AdaptiveInferenceMixin.predict_adaptive`], and count the answers.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): The images.

        Returns:
            [`AdaptiveOutput`]

        Raises:
            `ValueError`: if the model's exit configuration was replaced by one without a reference.
        """
        self._follow(self.model.exit_config)
        answers = self.model.predict_adaptive(pixel_values.to(self.model.device, self.model.dtype))
        self.update(answers, pixel_values)
        return answers

    def update(self, answers: AdaptiveOutput, pixel_values: torch.Tensor | None = None) -> None:
        """
        Count answers that were given elsewhere, such as in a stream. Samples that were skipped are left out.

        Args:
            answers ([`AdaptiveOutput`]): Answers by the model's own exit configuration. If this has changed, counting
                starts anew.
            pixel_values (`torch.Tensor`, *optional*): Their images, in the order of the answers, for shadow sampling.

        Raises:
            `ValueError`: as [`~ExitMonitor.predict`].
        """
        self._follow(self.model.exit_config)
        counts = count_answers(answers, self.model.num_exits, self.reference.shape[1])
        answered = (answers.exit_index >= 0).cpu()
        sums = np.bincount(
            answers.exit_index.cpu()[answered].numpy(),
            weights=answers.confidence.cpu()[answered].double().numpy(),
            minlength=len(self.reference),
        )
        with self._lock:
            first = int(self.counts.sum())
            self.counts = self.counts + counts
            self._confidence_sums = self._confidence_sums + sums
        if self.shadow_every is None or pixel_values is None:
            return
        rows = answered.nonzero().flatten()[-first % self.shadow_every :: self.shadow_every]
        if len(rows):
            images = pixel_values[rows.to(pixel_values.device)].to(self.model.device, self.model.dtype)
            with torch.inference_mode():
                deepest = answers_of(self.model.backbone(images), self.model.exit_config).cpu()
            differs = int((deepest != answers_of(answers.logits, self.model.exit_config).cpu()[rows]).sum())
            with self._lock:
                self._shadowed += len(rows)
                self._disagreeing += differs

    @property
    def exit_shares(self) -> list[float]:
        """Return the share of images that each exit answered and, last, the ensemble, since the last reset."""
        counts = self.counts
        return (counts.sum(axis=1) / max(1, counts.sum())).tolist()

    @property
    def exit_shares_at_calibration(self) -> list[float]:
        """Return the same shares when the thresholds were found."""
        return (self.reference.sum(axis=1) / self.reference.sum()).tolist()

    def drift(self) -> Drift:
        """Compare the images since the last reset with those that the thresholds were found on."""
        counts = self.counts
        n = int(counts.sum())
        if n == 0:
            return Drift(distance=0.0, p_value=1.0, n=0)
        both = np.stack([self.reference.ravel(), counts.ravel()])
        shares = both / both.sum(axis=1, keepdims=True)
        cells = _merged_cells(both)
        p_value = float(chi2_contingency(cells).pvalue) if cells.shape[1] > 1 else 1.0
        return Drift(distance=float(abs(shares[0] - shares[1]).sum() / 2), p_value=p_value, n=n)

    def disagreement(self) -> Disagreement:
        """Return the disagreement that shadow sampling has found since the last reset."""
        with self._lock:
            differing, n = self._disagreeing, self._shadowed
        if n == 0:
            return Disagreement(rate=float("nan"), low=0.0, high=1.0, n=0)
        interval = binomtest(differing, n).proportion_ci(0.95, method="exact")
        return Disagreement(differing / n, float(interval.low), float(interval.high), n)

    def collect(self) -> Iterator[Any]:
        """Yield the metrics for `prometheus_client`. Exits are labelled from 0; the last label is the ensemble's."""
        try:
            from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
        except ImportError as error:
            raise ImportError("Metrics need prometheus_client; `pip install prometheus_client`.") from error
        names = [str(index) for index in range(len(self.reference))]
        answers = CounterMetricFamily("hf_scan_answers", "Images answered at an exit", labels=["exit"])
        confidence = HistogramMetricFamily("hf_scan_confidence", "Confidence of the answers", labels=["exit"])
        share = GaugeMetricFamily("hf_scan_calibration_exit_share", "Share answered at calibration", labels=["exit"])
        with self._lock:
            counts, sums, differing = self.counts, self._confidence_sums, self._disagreeing
        edges = np.linspace(0, 1, counts.shape[1] + 1)[1:]
        for name, row, total, expected in zip(names, counts, sums, self.exit_shares_at_calibration):
            answers.add_metric([name], int(row.sum()))
            buckets = [(f"{edge:g}", int(count)) for edge, count in zip(edges, row.cumsum())]
            confidence.add_metric([name], [*buckets, ("+Inf", int(row.sum()))], float(total))
            share.add_metric([name], expected)
        yield from (answers, confidence, share)
        drift, shadow = self.drift(), self.disagreement()
        yield GaugeMetricFamily("hf_scan_drift_distance", "Total variation from calibration", value=drift.distance)
        yield GaugeMetricFamily("hf_scan_drift_p_value", "Chi-squared test against calibration", value=drift.p_value)
        yield CounterMetricFamily("hf_scan_shadow_samples", "Images also run to the end", value=shadow.n)
        yield CounterMetricFamily("hf_scan_shadow_disagreements", "Of those, answered otherwise", value=differing)


def _reference_of(config: ExitConfig, num_exits: int) -> np.ndarray:
    """Return the counts of a reference, `(num_exits + 1, bins)`."""
    if config.reference is None:
        raise ValueError(
            "The exit configuration has no `reference` to compare with. Find thresholds with `calibrate`, which "
            "records one."
        )
    reference = np.array(config.reference["counts"])
    if len(reference) != num_exits + 1:
        raise ValueError(
            f"`reference` has {len(reference)} rows of `counts`, and the network has {num_exits} exits; expected "
            f"{num_exits + 1} rows, one for each exit and one for the last answer. Find the thresholds anew with "
            "`calibrate`."
        )
    return reference


def count_answers(answers: AdaptiveOutput, num_exits: int, bins: int) -> np.ndarray:
    """
    Count how many answers each exit gave with which confidence.

    Args:
        answers ([`AdaptiveOutput`]): The answers.
        num_exits (`int`): Number of exits of the network.
        bins (`int`): Number of bins of equal width over [0, 1].

    Returns:
        `np.ndarray` of shape `(num_exits + 1, bins)`: the last row is the ensemble's.
    """
    answered = (answers.exit_index >= 0).cpu()  # others were skipped
    bin_index = (answers.confidence.float().cpu()[answered] * bins).long().clamp(max=bins - 1)
    cells = answers.exit_index.cpu()[answered] * bins + bin_index
    return cells.bincount(minlength=(num_exits + 1) * bins).reshape(num_exits + 1, bins).numpy()


def _merged_cells(both: np.ndarray) -> np.ndarray:
    """Merge neighbouring cells, `(2, cells)`, until the expected count of each is large enough for the test."""
    smaller_share = both.sum(axis=1).min() / both.sum()
    merged: list[np.ndarray] = []
    current = np.zeros(2, dtype=both.dtype)
    for cell in both.T:
        current = current + cell
        if current.sum() * smaller_share >= LEAST_IN_CELL:
            merged.append(current)
            current = np.zeros(2, dtype=both.dtype)
    if not merged:
        return current[:, None]
    merged[-1] = merged[-1] + current
    return np.stack(merged, axis=1)


__all__ = ["Disagreement", "Drift", "ExitMonitor", "count_answers"]
