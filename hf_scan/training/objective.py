# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What a step of [`ScanTrainer`] minimises: from a batch to the terms of the self-distillation loss."""

from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainerState
from transformers.utils import logging

from ..model.problem_type import MULTI_LABEL
from .collation import check_distributions
from .losses import SelfDistillationLoss, weights_per_exit
from .methods import survivor_weights
from .training_args import ScanTrainingArguments


logger = logging.get_logger(__name__)


FOR_ONE_LABEL = ("mixup_alpha", "cutmix_alpha", "label_smoothing_factor", "survivor_weighting")


class TrainingObjective:
    """
    The loss of a batch, by term: prepares labels, mixes images, asks the teacher and calls [`SelfDistillationLoss`].
    To create one requires gradients of those of the network's parameters that get one.

    Args:
        args ([`ScanTrainingArguments`]): The weights of the terms, and the ways of training.
        model ([`ScanForImageClassification`]): The network, as it is before a launcher wraps it.

    Raises:
        `ValueError`: if an argument is not for the network's labels, there are more or fewer weights than exits, or an
            exit would learn nothing.
    """

    def __init__(self, args: ScanTrainingArguments, model: Any) -> None:
        self.args, self.model = args, model
        self.multi_label = model.config.problem_type == MULTI_LABEL
        if self.multi_label:
            _check_for_several_labels(args)
        self.distillation = replace(_create_loss(args), multi_label=self.multi_label)
        self.mixup: Mixup | None = None
        if args.mixup_alpha or args.cutmix_alpha:
            self.mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0, num_classes=model.num_labels)
        if args.freeze_backbone:
            model.freeze_backbone()
        elif model.backbone_frozen:
            logger.warning("The backbone is frozen and stays so. To train it, call `model.freeze_backbone(False)`.")
        _check_every_exit_learns(self.distillation, model)
        hint_weights = weights_per_exit("hint_weight", self.distillation.hint_weight, model.num_exits)
        self.needs_hint = any(hint_weights)
        for head, weight in zip(model.exit_heads, hint_weights):
            # Without a hint they are not used, and DDP would wait for their gradients.
            head.hint_projection.requires_grad_(weight > 0)
        self._saw_distributions = False

    def __call__(
        self, network: nn.Module, inputs: dict[str, Any], state: TrainerState, teacher: PreTrainedModel | None = None
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """
        Compute the loss of a batch.

        Args:
            network (`nn.Module`): The network, or what a launcher wrapped it into.
            inputs (`dict[str, Any]`): `pixel_values` or `stage_features`, and `labels`.
            state (`TrainerState`): Its steps tell how far training is.
            teacher ([`~transformers.PreTrainedModel`], *optional*): Another network to distil from.

        Returns:
            `tuple[dict[str, torch.Tensor], Any]`: the terms, of which the loss is the sum, by name; and the network's
                outputs.
        """
        training = network.training
        images: dict[str, Any] = {name: inputs[name] for name in ("pixel_values", "stage_features") if name in inputs}
        labels = self.prepare_labels(inputs["labels"])
        if "stage_features" in images:
            self._check_takes_features(teacher, training)
        # timm mixes pairs of images and of classes: a batch of odd length, or with an ignored label, is not mixed.
        if self.mixup is not None and training and len(labels) % 2 == 0 and labels.min() >= 0:
            images["pixel_values"], labels = self.mixup(images["pixel_values"], labels)
        backbone_alone = training and state.global_step < _steps(self.args.backbone_steps, state)
        if training and self.args.backbone_steps:
            self.model.exits_reached = set()  # a step that reached the deepest exit alone was meant to
        if backbone_alone:
            self.model.exit_heads.eval()  # or batch norm's running means would change
        outputs = self._answer(network, images)
        terms = self.distillation(
            outputs.exit_logits,
            outputs.exit_features,
            labels,
            self._teacher_logits(teacher, images, outputs),
            self.distillation_scale(state),
            survivor_weights(outputs.exit_logits, joined=training) if self.args.survivor_weighting else None,
        )
        if backbone_alone:
            deepest = f"exit_{len(outputs.exit_logits) - 1}_label_loss"
            terms = {deepest: terms[deepest]}
        return terms, outputs

    def prepare_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return class indices of shape `(batch_size,)`, or a distribution over the classes for each image."""
        distributions = labels.ndim == 2 and labels.is_floating_point() and labels.shape[1] == self.model.num_labels
        if self.multi_label or not distributions:
            prepared: torch.Tensor = self.model.prepare_labels(labels)
            return prepared
        if self.mixup is not None and self.model.training:
            raise ValueError(
                "`mixup_alpha` and `cutmix_alpha` mix class indices, and `labels` are distributions. Leave them out."
            )
        # To look at values waits for an accelerator, where the first ones stand for all.
        if labels.device.type == "cpu" or not self._saw_distributions:
            self._saw_distributions = True
            check_distributions(labels)
        return labels

    def distillation_scale(self, state: TrainerState) -> float:
        """Return how much of the teacher counts at this step, from 0 to 1."""
        steps = _steps(self.args.distillation_warmup_steps or 0.0, state)
        return min(1.0, state.global_step / steps) if steps and self.model.training else 1.0

    def _check_takes_features(self, teacher: Any, training: bool) -> None:
        if self.mixup is not None or teacher is not None or (training and not self.model.backbone_frozen):
            raise ValueError(
                "Features of a frozen backbone cannot be mixed, nor given to another teacher, as they are not images. "
                "Set `freeze_backbone`, and leave the teacher, `mixup_alpha` and `cutmix_alpha` at their defaults; or "
                "train on the images."
            )

    def _answer(self, network: nn.Module, images: dict[str, Any]) -> Any:
        try:
            return network(**images, output_exit_features=self.needs_hint)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "A batch holds a single image whose map is a single pixel at one of the exits, and batch norm cannot "
                "be trained on it. Set `dataloader_drop_last`, or another batch size or larger images."
            ) from error

    def _teacher_logits(self, teacher: Any, images: dict[str, Any], outputs: Any) -> torch.Tensor | None:
        """Return the logits to distil from, or `None` for the deepest exit's."""
        if teacher is not None:
            with torch.no_grad():
                logits: torch.Tensor = teacher(images["pixel_values"]).logits
            return logits
        return outputs.ensemble_logits if self.args.distillation_teacher == "ensemble" else None


def load_teacher(args: ScanTrainingArguments, model: Any, given: PreTrainedModel | None) -> PreTrainedModel | None:
    """
    Return the teacher that is given or that the arguments name, frozen and on the device; `None` if it is the network
    itself.

    Raises:
        `ValueError`: if it has another number of classes.
    """
    name, teacher = args.distillation_teacher, given
    if teacher is None and name not in ("deepest", "ensemble"):
        teacher = AutoModelForImageClassification.from_pretrained(name)
    if teacher is None:
        return None
    if teacher.config.num_labels != model.num_labels:
        raise ValueError(
            f"The teacher has {teacher.config.num_labels} classes and the network {model.num_labels}; "
            "expected the same. Choose a teacher that was trained on these classes."
        )
    return teacher.requires_grad_(False).eval().to(args.device)


def _check_for_several_labels(args: ScanTrainingArguments) -> None:
    if given := [name for name in FOR_ONE_LABEL if getattr(args, name)]:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in given)} is for one label an image, and the network's "
            f"`problem_type` is {MULTI_LABEL!r}. Leave it out."
        )


def _check_every_exit_learns(loss: SelfDistillationLoss, model: Any) -> None:
    label_weights = weights_per_exit("label_weight", loss.label_weight, model.num_exits, deepest=1.0)
    soft_label_weights = weights_per_exit("soft_label_weight", loss.soft_label_weight, model.num_exits)
    for index, weights in enumerate(zip(label_weights, soft_label_weights)):
        if not any(weights) and not (model.backbone_frozen and index == len(model.exit_heads)):
            raise ValueError(
                f"`label_weight` and `soft_label_weight` are both 0 for exit {index}, which would learn nothing. "
                "Give it a weight, or leave it out of the network's `exit_points`."
            )


def _create_loss(args: ScanTrainingArguments) -> SelfDistillationLoss:
    settings = (args.label_weight, args.soft_label_weight, args.hint_weight)
    label_weight, soft_label_weight, hint_weight = (weights or [] for weights in settings)
    return SelfDistillationLoss(
        label_weight=label_weight,
        soft_label_weight=soft_label_weight,
        hint_weight=hint_weight,
        temperature=float(args.distillation_temperature or 1.0),
        scale_by_temperature=bool(args.scale_by_temperature),
        label_smoothing=args.label_smoothing_factor,
    )


def _steps(given: float, state: TrainerState) -> float:
    """Return a number of steps, which may be given as a share of all of them."""
    return given * state.max_steps if 0 < given < 1 else given


__all__ = ["TrainingObjective", "load_teacher"]
