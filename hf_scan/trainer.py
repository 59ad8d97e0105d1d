# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ScanTrainer`]: Transformers' `Trainer` with the self-distillation loss and scores for every exit."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer
from transformers.image_processing_utils import BaseImageProcessor

from .adaptive import EXIT_CONFIG_NAME, ExitConfig
from .calibration.exit_table import exit_columns
from .costs import count_macs
from .data import create_image_processor
from .losses import SelfDistillationLoss
from .metrics import ScanAccuracy
from .modeling_scan import ScanForImageClassification
from .training_args import ScanTrainingArguments


class ScanTrainer(Trainer):
    """
    Trains a [`ScanForImageClassification`] by self-distillation, under any launcher that `Trainer` knows.

    It logs every term of the loss for every exit, and evaluates with [`~hf_scan.metrics.ScanAccuracy`] unless given
    another `compute_metrics`; its `predict` then returns the classes and confidences of
    [`~hf_scan.calibration.exit_table.exit_columns`]. Where no `processing_class` is given, the backbone's own
    preprocessing is saved with the model. Training drops the model's thresholds, which were found for other weights.

    Args:
        model ([`ScanForImageClassification`]): The network.
        args ([`ScanTrainingArguments`], *optional*): Defaults to `ScanTrainingArguments(output_dir="tmp_trainer")`.
        kwargs: As for [`~transformers.Trainer`].

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
        **kwargs: Any,
    ) -> None:
        args = args or ScanTrainingArguments(output_dir="tmp_trainer")
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
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        # The loss is a mean over its batch: Trainer has to divide it when gradients are accumulated.
        self.model_accepts_loss_kwargs = False
        self.distillation = SelfDistillationLoss(
            label_weight=args.label_weight,
            soft_label_weight=args.soft_label_weight,
            hint_weight=args.hint_weight,
            temperature=args.distillation_temperature,
            label_smoothing=args.label_smoothing_factor,
        )
        # Sums since the last log, on the device: reading them at each step would wait for it.
        self._term_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._term_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Thresholds that were found for other weights do not survive training.
        if isinstance(self.model, ScanForImageClassification):
            self.model.exit_config = ExitConfig(fallback=self.model.exit_config.fallback)
        return super().train(*args, **kwargs)

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
        outputs = model(pixel_values=inputs["pixel_values"], output_exit_features=True)
        labels = inputs["labels"]
        if labels.device.type == "cpu":
            self.model.check_labels(labels)
        terms = self.distillation(outputs.exit_logits, outputs.exit_features, labels)
        if model.training:
            for name, term in terms.items():
                self._term_sums[name] += term.detach()
            self._term_steps += 1
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

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
            ignore_keys = ["logits", "ensemble_logits", "exit_features"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _reduce_exit_logits(self, exit_logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes and confidences are all that is gathered from the processes and kept."""
        return exit_columns(exit_logits, self.model.exit_config)

    def _compute_exit_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, confidences = prediction.predictions
        exit_config = self.model.exit_config
        adaptive = {}
        if exit_config.thresholds is not None:
            adaptive = {
                "thresholds": exit_config.thresholds,
                "fallback": exit_config.fallback,
                "costs": count_macs(self.model).relative(exit_config),
            }
        return ScanAccuracy().compute(
            predictions=predictions, confidences=confidences, references=prediction.label_ids, **adaptive
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files it knows.
        exit_config = Path(checkpoint_folder, EXIT_CONFIG_NAME)
        if self.is_world_process_zero() and exit_config.is_file():
            shutil.copy(exit_config, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
