"""What `benchmarks/adaptive.py` compares with besides the plain network: a cascade of two, and the `earlyon` package.

Both get the same weights, the same threshold search on the same images, and channels_last.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_scan import ExitConfig, ScanForImageClassification
from hf_scan.calibration import exact_frontier
from hf_scan.model.exit_criteria import confidence_of


Answer = Callable[[torch.Tensor], torch.Tensor]  # images to logits, a batch at a time


def cascade(small: nn.Module, large: nn.Module, threshold: float) -> Answer:
    """Two stock models: the large one answers what the small one is not sure about."""

    def answer(images: torch.Tensor) -> torch.Tensor:
        logits = small(images)
        unsure = (confidence_of(logits) <= threshold).nonzero().squeeze(1)
        if len(unsure) == len(images):
            return large(images)
        if len(unsure):
            logits[unsure] = large(images[unsure])
        return logits

    return answer


def cascade_threshold(
    small: torch.Tensor, large: torch.Tensor, labels: torch.Tensor, costs: Sequence[float], drop: float
) -> float | None:
    """
    By the search that finds the exits' thresholds: the one whose cascade costs least, of those that lose at most so
    many points.

    Args:
        small, large (`torch.Tensor` of shape `(n, num_labels)`): Logits of both networks.
        labels (`torch.Tensor` of shape `(n,)`): The classes.
        costs (`Sequence[float]`): Of both networks.
        drop (`float`): Points of accuracy below the large network's.
    """
    both = (small, large)
    confidences = np.stack([confidence_of(logits).numpy() for logits in both], axis=1)
    correct = np.stack([(logits.argmax(-1) == labels).numpy() for logits in both], axis=1)
    frontier = exact_frontier(confidences, correct, np.cumsum(costs))
    fits = np.flatnonzero(frontier.accuracy >= correct[:, 1].mean() - drop / 100 - 1e-9)
    return float(frontier.thresholds[fits[0], 0]) if len(fits) else None


class _LogitsOfHead(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        return self.head(feature)[1]


def earlyon(model: ScanForImageClassification, exit_config: ExitConfig) -> Answer | None:
    """The same backbone and heads in `earlyon`'s wrapper, or `None` where it is not installed. Its fallback is the
    deepest classifier, and a batch leaves together or not at all."""
    try:
        from earlyon.core.types import EarlyExitConfig, ExitPoint
        from earlyon.core.wrappers import EarlyExitWrapper
    except ImportError:
        return None
    exits = [ExitPoint(f"exit_{index}", stage.name, stage.channels) for index, stage in enumerate(model.stages[:-1])]
    thresholds = exit_config.resolve(model.num_exits)[:-1]
    size = model.config.image_size
    assert size is not None
    wrapper: Any = EarlyExitWrapper(
        model.backbone,
        {point.name: _LogitsOfHead(head) for point, head in zip(exits, model.exit_heads)},
        nn.Identity(),
        EarlyExitConfig(
            backbone="custom",
            num_classes=model.num_labels,
            exit_points=exits,
            confidence_thresholds=[1.0 if threshold is None else threshold for threshold in thresholds],
            enabled_exits=[threshold is not None and threshold < 1 for threshold in thresholds],
        ),
        input_shape=(1, model.config.num_channels, size, size),
    ).eval()

    def answer(images: torch.Tensor) -> torch.Tensor:
        if len(images) == 1:
            return wrapper(images, mode="inference").prediction
        return wrapper.forward_inference_batched(images).predictions

    return answer
