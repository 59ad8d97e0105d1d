# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Self-distillation: every early exit learns from the labels, from the deepest exit's answer and from its feature."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SelfDistillationLoss:
    """
    The training loss of SCAN: for each early exit i, with the deepest exit C as a teacher that gets no gradient,

        label_weight * CE(q_i, y) + soft_label_weight * T^2 * KL(q_C || q_i) + hint_weight * ||F_i - F_C||^2

    and CE(q_C, y) for the deepest, summed over the exits. The probabilities in the second term are softened by the
    temperature T. All terms are means over the batch, so that their balance does not depend on its size.

    Source: Zhang et al., "Be Your Own Teacher", ICCV 2019, equations 1 to 4, and the SCAN authors' published code,
    whose hint weight of 5e-7 on the sum over a batch of 128 is 6.4e-5 on the mean.

    Args:
        label_weight (`float`, *optional*, defaults to 0.5): Weight of the labels at the early exits.
        soft_label_weight (`float`, *optional*, defaults to 0.5): Weight of the deepest exit's answer.
        hint_weight (`float`, *optional*, defaults to 6.4e-5): Weight of the deepest exit's feature.
        temperature (`float`, *optional*, defaults to 3.0): T.
        label_smoothing (`float`, *optional*, defaults to 0.0): Smoothing of the labels, at every exit.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan.losses import SelfDistillationLoss

    >>> logits = torch.zeros(2, 10)
    >>> terms = SelfDistillationLoss()([logits, logits], [torch.ones(2, 64), torch.ones(2, 64)], torch.tensor([3, 7]))
    >>> sorted(terms)
    ['exit_0_hint_loss', 'exit_0_label_loss', 'exit_0_soft_label_loss', 'exit_1_label_loss']
    ```
    """

    label_weight: float = 0.5
    soft_label_weight: float = 0.5
    hint_weight: float = 6.4e-5
    temperature: float = 3.0
    label_smoothing: float = 0.0

    def __call__(
        self, exit_logits: Sequence[torch.Tensor], exit_features: Sequence[torch.Tensor], labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        The weighted terms of the loss by name; their sum is the loss. A term whose weight is 0 is left out.

        Args:
            exit_logits (`Sequence[torch.Tensor]`): One of shape `(batch_size, num_labels)` per exit.
            exit_features (`Sequence[torch.Tensor]`): One of shape `(batch_size, feature_size)` per exit.
            labels (`torch.LongTensor` of shape `(batch_size,)`): Class indices.
        """
        *early_logits, deepest_logits = exit_logits
        teacher = (deepest_logits.detach() / self.temperature).log_softmax(dim=-1)
        hint = exit_features[-1].detach()
        terms: dict[str, torch.Tensor] = {}
        for index, logits in enumerate(early_logits):
            if self.label_weight:
                terms[f"exit_{index}_label_loss"] = self.label_weight * self._cross_entropy(logits, labels)
            if self.soft_label_weight:
                student = (logits / self.temperature).log_softmax(dim=-1)
                divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
                terms[f"exit_{index}_soft_label_loss"] = self.soft_label_weight * self.temperature**2 * divergence
            if self.hint_weight:
                distance = (exit_features[index] - hint).square().sum(dim=-1).mean()
                terms[f"exit_{index}_hint_loss"] = self.hint_weight * distance
        terms[f"exit_{len(early_logits)}_label_loss"] = self._cross_entropy(deepest_logits, labels)
        return terms

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
