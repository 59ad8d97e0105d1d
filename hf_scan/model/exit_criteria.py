# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""How sure an exit is: a score for each sample, from the logits that it and the exits before it gave."""

from collections.abc import Callable, Sequence

import torch


# Takes the logits of the exits that ran, shallow to deep, each `(batch_size, num_labels)` and divided by its
# temperature; gives scores `(batch_size,)`, larger where the answer is surer. A sample leaves when its score is above
# the exit's threshold.
ExitCriterion = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """The largest softmax probability over the last dimension, in float32 whatever the logits are."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def confidence(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest softmax probability: SCAN's criterion (Zhang et al., NeurIPS 2019)."""
    return confidence_of(seen[-1])


def margin(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far the largest softmax probability is above the second."""
    first, second = seen[-1].float().softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def entropy(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """One minus the entropy of the softmax over that of a guess: 1 is certain, 0 knows nothing (as in BranchyNet)."""
    log_probabilities = seen[-1].float().log_softmax(dim=-1)
    certainty = (log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return (1 + certainty / torch.tensor(float(seen[-1].shape[-1])).log().to(certainty)).clamp(0, 1)


def patience(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    With n the number of the last exits in a row that say the same class, n / (n + 1). So a threshold of (p - 1) / p
    leaves as soon as p exits agree (PABEE: Zhou et al., "BERT Loses Patience", NeurIPS 2020).
    """
    predictions = torch.stack([logits.argmax(dim=-1) for logits in reversed(seen)])
    agreeing = (predictions == predictions[0]).cumprod(dim=0).sum(dim=0).float()
    return agreeing / (agreeing + 1)


def ensemble_confidence(seen: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest softmax probability of the mean of all logits so far."""
    return confidence_of(torch.stack(list(seen)).mean(dim=0))


EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
    "patience": patience,
    "ensemble_confidence": ensemble_confidence,
}
# Those that look at the exit's own logits only.
MEMORYLESS = frozenset({"confidence", "margin", "entropy"})


__all__ = ["EXIT_CRITERIA", "MEMORYLESS", "ExitCriterion", "confidence_of"]
