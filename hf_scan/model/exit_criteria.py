# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Exit criteria: a score for each sample, from the logits of an exit and of those before it."""

from collections.abc import Callable, Sequence

import torch

from .problem_type import LABEL_CONFIDENCE


# Takes the logits of the exits that ran, shallow to deep, each `(batch_size, num_labels)` and divided by its
# temperature; returns scores `(batch_size,)`, larger where the answer is more certain. A sample leaves when its score
# is above the exit's threshold.
ExitCriterion = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """Return the largest softmax probability over the last dimension, in float32 for logits of any type."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def label_confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """
    Return the smallest max(p, 1 - p) over the labels, with p each label's sigmoid probability, in float32 for logits
    of any type: how certain the least certain label is.
    """
    return logits.float().abs().amin(dim=-1).sigmoid()


def confidence(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest softmax probability: SCAN's criterion (Zhang et al., NeurIPS 2019)."""
    return confidence_of(seen[-1])


def margin(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the difference between the largest and the second largest softmax probability."""
    first, second = seen[-1].float().softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def entropy(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return 1 - H / log(num_labels), with H the entropy of the softmax: 1 for a certain answer, 0 for a uniform one
    (BranchyNet: Teerapittayanon et al., ICPR 2016, has the same order).
    """
    log_probabilities = seen[-1].float().log_softmax(dim=-1)
    certainty = (log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return (1 + certainty / torch.tensor(float(seen[-1].shape[-1])).log().to(certainty)).clamp(0, 1)


def patience(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return n / (n + 1), with n the number of consecutive exits up to this one that predict the same class. At a
    threshold of (p - 1) / p a sample leaves as soon as p exits agree (PABEE: Zhou et al., "BERT Loses Patience",
    NeurIPS 2020).
    """
    predictions = torch.stack([logits.argmax(dim=-1) for logits in reversed(seen)])
    agreeing = (predictions == predictions[0]).cumprod(dim=0).sum(dim=0).float()
    return agreeing / (agreeing + 1)


def ensemble_confidence(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest softmax probability of the mean of all logits so far."""
    return confidence_of(torch.stack(list(seen)).mean(dim=0))


def label_confidence(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Return the smallest max(p, 1 - p) over the labels, for several labels an image. Where probabilities are calibrated,
    all labels of an answer are right with at most this probability, whether or not they depend on each other (the
    Fréchet bound: an intersection is no more probable than the least probable of its events).
    """
    return label_confidence_of(seen[-1])


EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "patience": patience,
    "ensemble_confidence": ensemble_confidence,
    "label_confidence": label_confidence,
}
# Criteria that read the exit's own logits only.
MEMORYLESS = frozenset({"confidence", "margin", "entropy", LABEL_CONFIDENCE})


__all__ = [
    "EXIT_CRITERIA",
    "MEMORYLESS",
    "ExitCriterion",
    "confidence_of",
    "label_confidence_of",
]
