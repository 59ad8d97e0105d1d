# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ScanTrainer`]: Transformers' `Trainer` with the self-distillation loss and scores for every exit."""

import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from timm.data import Mixup
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    default_data_collator,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ..costs.measure import count_macs, describe_machine
from ..data.datasets import EpochCallback, SeededImages
from ..metrics.scan_accuracy.scan_accuracy import ScanAccuracy
from ..model.exit_config import EXIT_CONFIG_NAME
from ..model.exit_rule import exit_columns
from ..model.image_processing_scan import create_image_processor
from ..model.modeling_scan import ScanForImageClassification
from ..model.provenance import join_trained_on
from ..reporting.model_card import create_model_card
from ..reporting.report import exit_report
from .checkpoints import CheckedTrainer
from .losses import SelfDistillationLoss, weights_per_exit
from .output_dirs import last_whole_checkpoint
from .training_args import ScanTrainingArguments


logger = logging.get_logger(__name__)


class ScanTrainer(CheckedTrainer):
    """
    Trains a [`ScanForImageClassification`] by self-distillation, under any launcher that `Trainer` knows.

    It logs every term of the loss for every exit, and evaluates with [`~hf_scan.metrics.ScanAccuracy`] unless given
    another `compute_metrics`; its `predict` then returns the classes and confidences of
    [`~hf_scan.model.exit_rule.exit_columns`]. Where no `processing_class` is given, the backbone's own
    preprocessing is saved with the model. Training drops the model's thresholds, which were found for other weights.

    Args:
        model ([`ScanForImageClassification`]): The network.
        args ([`ScanTrainingArguments`], *optional*): Defaults to `ScanTrainingArguments(output_dir="tmp_trainer")`.
        teacher ([`~transformers.PreTrainedModel`], *optional*):
            A trained classifier to distil from, in place of the one that `args.distillation_teacher` names.
        kwargs: As for [`~transformers.Trainer`].

    Raises:
        `TypeError`: if `args` are no [`ScanTrainingArguments`].
        `ValueError`: if an argument would be ignored, weights do not fit the network's exits, or the teacher knows
            another number of classes.
        `FloatingPointError`: in training, if a term of the loss is not finite. It names the term, and the weights are
            still those of the step before; running means of batch norm have seen the batch.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(8)]
    >>> args = ScanTrainingArguments(output_dir="runs/example", max_steps=1, save_strategy="no")
    >>> result = ScanTrainer(model, args, train_dataset=images).train()
    {'train_runtime': ...}
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: ScanTrainingArguments | None = None,
        *,
        processing_class: BaseImageProcessor | None = None,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or ScanTrainingArguments(output_dir="tmp_trainer")
        if not isinstance(args, ScanTrainingArguments):
            raise TypeError(
                f"`args` is a {type(args).__name__}; expected `ScanTrainingArguments`, which take the same and "
                "the weights of self-distillation."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("`compute_loss_func` would take the place of self-distillation. Use a plain `Trainer`.")
        if args.batch_eval_metrics and kwargs.get("compute_metrics") is None:
            raise ValueError(
                "`batch_eval_metrics` needs a `compute_metrics` that adds up batches; the exits' scores are computed "
                "from all of them. Pass your own, or leave `batch_eval_metrics` out."
            )
        if processing_class is None and isinstance(model, PreTrainedModel) and model.config.num_channels == 3:
            processing_class = create_image_processor(model)
        self._scores_exits = kwargs.get("compute_metrics") is None
        if self._scores_exits:
            kwargs["compute_metrics"] = self._compute_exit_metrics
            kwargs["preprocess_logits_for_metrics"] = self._reduce_exit_logits
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = collate_rows
        if isinstance(kwargs.get("train_dataset"), SeededImages):
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), EpochCallback(kwargs["train_dataset"])]
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        # The loss is a mean over its batch: Trainer has to divide it when gradients are accumulated.
        self.model_accepts_loss_kwargs = False
        self._set_up(self.model)
        # At which step, and by which rule, the last evaluation scored weights that are still there.
        self._scored: tuple[int, dict[str, Any]] | None = None
        self.card: ModelCard | None = None  # what is pushed in place of one from the last evaluation
        self.teacher = self._prepare_teacher(teacher)
        self._mixup: Mixup | None = None
        if args.mixup_alpha or args.cutmix_alpha:
            self._mixup = Mixup(
                args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0, num_classes=self.model.num_labels
            )

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().call_model_init(*args, **kwargs)
        self._set_up(model)
        return model

    def _set_up(self, model: Any) -> None:
        """Makes the loss, and has those parameters of the model want a gradient that get one."""
        args = self.args
        self.distillation = _create_loss(args)
        self._forget_terms()
        if args.freeze_backbone:
            model.freeze_backbone()
        elif model.backbone_frozen:
            logger.warning("The backbone is frozen and stays so. To train it, call `model.freeze_backbone(False)`.")
        loss, num_exits = self.distillation, model.num_exits
        label_weights = weights_per_exit("label_weight", loss.label_weight, num_exits, deepest=1.0)
        soft_label_weights = weights_per_exit("soft_label_weight", loss.soft_label_weight, num_exits)
        for index, weights in enumerate(zip(label_weights, soft_label_weights)):
            if not any(weights) and not (model.backbone_frozen and index == len(model.exit_heads)):
                raise ValueError(
                    f"`label_weight` and `soft_label_weight` are both 0 for exit {index}, which would learn nothing. "
                    "Give it a weight, or leave it out of the network's `exit_points`."
                )
        hint_weights = weights_per_exit("hint_weight", loss.hint_weight, num_exits)
        self._needs_hint = any(hint_weights)
        for head, weight in zip(model.exit_heads, hint_weights):
            # Without a hint nothing reads them, and DDP waits for the gradient of whatever wants one.
            head.hint_projection.requires_grad_(weight > 0)

    def _forget_terms(self) -> None:
        # Sums since the last log, on the device: reading them at each step would wait for it.
        self._term_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._term_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_terms()
        if isinstance(self.model, ScanForImageClassification):
            self.trained_on = self.model.exit_config.trained_on
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Not in `train`, since a resume that is refused changes nothing, and `model_init` makes another model there.
        if isinstance(self.model, ScanForImageClassification):
            self.trained_on = join_trained_on(self.model.exit_config.trained_on, self.trained_on)
            # Thresholds that were found for other weights do not survive training.
            self.model.exit_config = self.model.exit_config.replace(
                thresholds=None, temperatures=None, trained_on=self.trained_on
            )
        return super()._inner_training_loop(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Each process has its own batch norm statistics after a step, and the first one's are saved. What is scored
        # must be what is saved.
        if self.args.world_size > 1:
            for buffer in self.model.buffers():
                broadcast(buffer)
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        images = {name: inputs[name] for name in ("pixel_values", "stage_features") if name in inputs}
        labels = inputs["labels"]
        if labels.device.type == "cpu" and labels.ndim == 1:
            self.model.check_labels(labels)
        if "stage_features" in images:
            self._check_stage_features(training=model.training)
        # timm mixes in pairs, and classes: an odd last batch stays as it is, and one with a label that is ignored.
        if self._mixup is not None and model.training and len(labels) % 2 == 0 and labels.min() >= 0:
            images["pixel_values"], labels = self._mixup(images["pixel_values"], labels)
        try:
            outputs = model(**images, output_exit_features=self._needs_hint)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "A batch holds a single image whose map is a single pixel at one of the exits, and batch norm cannot "
                "be trained on it. Set `dataloader_drop_last`, or another batch size or larger images."
            ) from error
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.teacher(images["pixel_values"]).logits
        elif self.args.distillation_teacher == "ensemble":
            teacher_logits = outputs.ensemble_logits
        terms = self.distillation(
            outputs.exit_logits, outputs.exit_features, labels, teacher_logits, self._distillation_scale()
        )
        if model.training:
            for name, term in terms.items():
                self._term_sums[name] += term.detach()
            self._term_steps += 1
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # After the backward pass is under way, and before the optimizer moves a weight.
        sums = torch.stack(list(self._term_sums.values()))
        broken = ~sums.isfinite()
        if self.args.world_size > 1:  # all stop, or the others would go on with its gradients
            broken = self.accelerator.reduce(broken.float(), reduction="sum") > 0
        if broken.any():
            name = list(self._term_sums)[int(broken.nonzero()[0])]
            self._forget_terms()
            raise FloatingPointError(
                f"`{name}` is not finite at step {self.state.global_step + 1}; training stops with the weights of the "
                "step before (running means of batch norm may be spoilt). Lower the learning rate or the term's "
                "weight, or set `max_grad_norm`, and go on from the last checkpoint."
            )
        return loss

    def _check_stage_features(self, training: bool) -> None:
        if self._mixup is not None or self.teacher is not None or (training and not self.model.backbone_frozen):
            raise ValueError(
                "Features of a frozen backbone cannot be mixed, nor shown to another teacher: they are no images. Set "
                "`freeze_backbone`, and leave the teacher, `mixup_alpha` and `cutmix_alpha` at their defaults; or "
                "train on the images."
            )

    def _distillation_scale(self) -> float:
        steps = self.args.distillation_warmup_steps
        if 0 < steps < 1:
            steps *= self.state.max_steps
        return min(1.0, self.state.global_step / steps) if steps and self.model.training else 1.0

    def _prepare_teacher(self, teacher: PreTrainedModel | None) -> PreTrainedModel | None:
        name = self.args.distillation_teacher
        if teacher is None and name not in ("deepest", "ensemble"):
            teacher = AutoModelForImageClassification.from_pretrained(name)
        if teacher is None:
            return None
        if teacher.config.num_labels != self.model.num_labels:
            raise ValueError(
                f"The teacher knows {teacher.config.num_labels} classes and the network {self.model.num_labels}; "
                "expected the same. Choose a teacher that was trained on these classes."
            )
        return teacher.requires_grad_(False).eval().to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # All processes log together, after the same number of steps.
        if "loss" in logs and self._term_steps:
            means = torch.stack(list(self._term_sums.values())) / self._term_steps
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= {name: round(mean, 6) for name, mean in zip(self._term_sums, means.tolist())}
            self._term_sums.clear()
            self._term_steps = 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        if ignore_keys is None and self._scores_exits:
            ignore_keys = ["logits", "ensemble_logits", "exit_features", "attentions"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _reduce_exit_logits(self, exit_logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes and confidences are all that is gathered from the processes and kept."""
        return exit_columns(exit_logits, self.model.exit_config)

    def _compute_exit_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        counts = np.asarray(prediction.label_ids) != -100  # as for the loss
        predictions, confidences = (np.asarray(column)[counts] for column in prediction.predictions)
        exit_config = self.model.exit_config
        replaced = self.is_in_train and self.args.load_best_model_at_end  # by other weights, when training ends
        self._scored = None if replaced else (self.state.global_step, exit_config.rule)
        adaptive: dict[str, Any] = {"fallback": exit_config.fallback}
        if exit_config.thresholds is not None:
            adaptive["thresholds"] = exit_config.thresholds
            adaptive["costs"] = count_macs(self.model).relative(exit_config)
        return ScanAccuracy().compute(
            predictions=predictions,
            confidences=confidences,
            references=np.asarray(prediction.label_ids)[counts],
            **adaptive,
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}")
            last = last_whole_checkpoint(folder.parent)
            # It may have failed at something else: at a push, or at what another process did.
            if last == str(folder) or (isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error)):
                raise
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The checkpoint {folder} could not be written ({error}). Make space there or choose another "
                f"`output_dir`; training can be resumed from {last or 'nothing yet'}."
            ) from error

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        ignored = Path(self.args.output_dir, ".gitignore")
        if self.is_world_process_zero() and not ignored.exists():
            # What the Trainer pushes on the way holds its arguments as a pickle, which nobody reads. The Hub leaves
            # out what git would.
            ignored.parent.mkdir(parents=True, exist_ok=True)
            ignored.write_text(f"{TRAINING_ARGS_NAME}\n", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            # A pickle, which nobody reads and which would be pushed.
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(
        self, model_name: str | None = None, dataset: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        """
        Writes `README.md` into the output folder: the card of a network with early exits, with what the last
        evaluation measured, if there was one. Called by `push_to_hub`.

        Args:
            model_name (`str`, *optional*): The card's title. Defaults to the repository or the output folder.
            dataset (`str`, *optional*): What the network was trained on.
            kwargs: `language`, `license`, `tags`, `finetuned_from` and so on, for the card's metadata.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, "README.md")
        if self.card is not None:
            self.card.save(path)
            return
        scores = next((entry for entry in reversed(self.state.log_history) if "eval_exit_0_accuracy" in entry), None)
        report = None
        facts: dict[str, Any] = {
            "dataset": dataset if isinstance(dataset, str) else None,
            "splits": {
                name: len(rows)
                for name, rows in (("train", self.train_dataset), ("evaluation", self.eval_dataset))
                if hasattr(rows, "__len__") and not isinstance(rows, dict)
            },
            "evaluated_on": "evaluation",
            "seed": self.args.seed,
            "machine": describe_machine(self.args.device),
        }
        now = (self.state.global_step, self.model.exit_config.rule)
        if scores is not None and self._scored == now and scores["step"] == now[0]:
            report = exit_report(self.model, {name.removeprefix("eval_"): value for name, value in scores.items()})
        # Trainer gives the name without its owner, by which nobody can load it.
        name = self.hub_model_id or self.args.hub_model_id or model_name or path.parent.name
        create_model_card(self.model, report, facts, model_name=name, **kwargs).save(path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files it knows.
        exit_config = Path(checkpoint_folder, EXIT_CONFIG_NAME)
        if self.is_world_process_zero() and exit_config.is_file():
            shutil.copy(exit_config, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


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


def collate_rows(rows: list[Any]) -> dict[str, Any]:
    """Transformers' default collator, which also takes rows of [`StageFeatures`]."""
    if not isinstance(rows[0], Mapping) or "stage_features" not in rows[0]:
        return default_data_collator(rows)
    features = tuple(torch.stack(stage) for stage in zip(*(row["stage_features"] for row in rows)))
    return {"stage_features": features, "labels": torch.tensor([row["labels"] for row in rows])}
