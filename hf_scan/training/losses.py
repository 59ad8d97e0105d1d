# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The self-distillation loss of early exits: labels, a teacher's logits and the deepest exit's feature."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SelfDistillationLoss:
    """
    A callable that computes the training loss of SCAN. For each early exit i, with the deepest exit C as a teacher
    that gets no gradient,

        label_weight * CE(q_i, y) + soft_label_weight * T^2 * KL(q_C || q_i) + hint_weight * ||F_i - F_C||^2

    and CE(q_C, y) for the deepest, summed over the exits. The probabilities in the second term are softened by the
    temperature T. All terms are means over the batch, so that their balance does not depend on its size.

    Source: Zhang et al., "Be Your Own Teacher", ICCV 2019, equations 1 to 4, and the SCAN authors' published code,
    whose hint weight of 5e-7 on the sum over a batch of 128 is 6.4e-5 on the mean.

    Args:
        label_weight (`float` or `Sequence[float]`, *optional*, defaults to 0.5):
            Weight of the labels at the early exits: one for all of them, or one each. A last one more is the deepest
            exit's, which is 1 otherwise.
        soft_label_weight (`float` or `Sequence[float]`, *optional*, defaults to 0.5):
            Weight of the teacher's softened probabilities, likewise; 0 at the deepest exit unless given.
        hint_weight (`float` or `Sequence[float]`, *optional*, defaults to 6.4e-5):
            Weight of the deepest exit's feature; likewise.
        temperature (`float`, *optional*, defaults to 3.0): T.
        scale_by_temperature (`bool`, *optional*, defaults to `True`): Whether the second term has the factor T^2.
        label_smoothing (`float`, *optional*, defaults to 0.0): Smoothing of the labels, at every exit.
        multi_label (`bool`, *optional*, defaults to `False`):
            Whether an image has several labels. CE is then the binary cross-entropy and KL that of each label's two
            probabilities, both as means over the labels, as in Yang et al., "Multi-Label Knowledge Distillation", ICCV
            2023 (equation 3).

    Raises:
        `ValueError`: if a weight is negative or not finite, or the temperature or the smoothing are out of range.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan.training.losses import SelfDistillationLoss

    >>> logits = torch.zeros(2, 10)
    >>> terms = SelfDistillationLoss()([logits, logits], [torch.ones(2, 64), torch.ones(2, 64)], torch.tensor([3, 7]))
    >>> sorted(terms)
    ['exit_0_hint_loss', 'exit_0_label_loss', 'exit_0_soft_label_loss', 'exit_1_label_loss']
    ```
    """

    label_weight: float | Sequence[float] = 0.5
    soft_label_weight: float | Sequence[float] = 0.5
    hint_weight: float | Sequence[float] = 6.4e-5
    temperature: float = 3.0
    scale_by_temperature: bool = True
    label_smoothing: float = 0.0
    multi_label: bool = False

    def __post_init__(self) -> None:
        for name in ("label_weight", "soft_label_weight", "hint_weight"):
            weights = getattr(self, name)
            for weight in weights if isinstance(weights, Sequence) else [weights]:
                if not 0 <= weight < math.inf:
                    raise ValueError(f"`{name}` is {weights}; expected numbers of at least 0.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` is {self.temperature}; expected a number above 0.")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` is {self.label_smoothing}; expected a number from 0 to 1.")

    def __call__(
        self,
        exit_logits: Sequence[torch.Tensor],
        exit_features: Sequence[torch.Tensor] | None,
        labels: torch.Tensor,
        teacher_logits: torch.Tensor | None = None,
        distillation_scale: float = 1.0,
        sample_weights: Sequence[torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Return the weighted terms of the loss by name; their sum is the loss. A term whose weight is 0 is left out.

        Args:
            exit_logits (`Sequence[torch.Tensor]`): One of shape `(batch_size, num_labels)` per exit.
            exit_features (`Sequence[torch.Tensor]`, *optional*):
                One of shape `(batch_size, feature_size)` per exit. Not needed where all hint weights are 0.
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`):
                Class indices, or a probability for each class or label.
            teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`, *optional*):
                Defaults to those of the deepest exit. They get no gradient.
            distillation_scale (`float`, *optional*, defaults to 1.0):
                Factor of the soft-label and hint terms, for a warm-up.
            sample_weights (`Sequence[torch.Tensor]`, *optional*):
                One of shape `(batch_size,)` per exit, of mean 1 over the whole batch, of which this may be one
                process's part: factors of the samples' label and soft-label terms. For one label an image.

        Raises:
            `ValueError`: if there are more or fewer weights than exits.
        """
        num_exits = len(exit_logits)
        label_weights = weights_per_exit("label_weight", self.label_weight, num_exits, deepest=1.0)
        soft_label_weights = weights_per_exit("soft_label_weight", self.soft_label_weight, num_exits)
        hint_weights = weights_per_exit("hint_weight", self.hint_weight, num_exits)
        teacher = exit_logits[-1] if teacher_logits is None else teacher_logits
        teacher = teacher.detach() / self.temperature
        scale = distillation_scale * (self.temperature**2 if self.scale_by_temperature else 1.0)

        weights: Sequence[torch.Tensor | None] = sample_weights or [None] * num_exits

        terms: dict[str, torch.Tensor] = {}
        for index, logits in enumerate(exit_logits):
            if label_weights[index]:
                label_loss = self._cross_entropy(logits, labels, weights[index])
                terms[f"exit_{index}_label_loss"] = label_weights[index] * label_loss
            if soft_label_weights[index]:
                divergence = self._divergence(logits / self.temperature, teacher, weights[index])
                terms[f"exit_{index}_soft_label_loss"] = soft_label_weights[index] * scale * divergence
            if hint_weights[index] and exit_features is not None:
                distance = (exit_features[index] - exit_features[-1].detach()).square().sum(dim=-1).mean()
                terms[f"exit_{index}_hint_loss"] = hint_weights[index] * distillation_scale * distance
        return terms

    def _cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weights is not None:
            each = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
            # Labels that cross-entropy ignores, with a loss of 0, count in no mean.
            return (weights * each).sum() / ((labels >= 0).sum() if labels.ndim == 1 else len(labels))
        if not self.multi_label:
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        smoothed = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smoothed.to(logits.dtype))

    def _divergence(
        self, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        if weights is not None:
            each = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
            return (weights * each.sum(dim=-1)).mean()
        if not self.multi_label:
            softened = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
            return F.kl_div(*softened, reduction="batchmean", log_target=True)
        target = teacher.sigmoid()
        cross_entropy = F.binary_cross_entropy_with_logits(student, target)
        return cross_entropy - F.binary_cross_entropy_with_logits(teacher, target)


def weights_per_exit(name: str, weights: float | Sequence[float], num_exits: int, deepest: float = 0.0) -> list[float]:
    """
    Return one weight for each exit.

    Args:
        name (`str`): Their name in an error.
        weights (`float` or `Sequence[float]`): One for all early exits, or one each, or one more for the deepest.
        num_exits (`int`): Number of exits.
        deepest (`float`, *optional*, defaults to 0.0): The deepest exit's weight, unless `weights` has one.
    """
    given = list(weights) if isinstance(weights, Sequence) else [weights]
    if len(given) == 1:
        given = given * (num_exits - 1)
    if len(given) == num_exits - 1:
        given = [*given, deepest]
    if len(given) != num_exits:
        raise ValueError(
            f"`{name}` is {weights}, {len(given)} weights; the network has {num_exits} exits. Give one weight for all "
            f"early exits, {num_exits - 1} for them, or {num_exits} with the deepest exit's."
        )
    return given
