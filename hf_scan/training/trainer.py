# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ScanTrainer`]: Transformers' `Trainer` with the self-distillation loss and scores for every exit."""

import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from huggingface_hub import ModelCard
from timm.data import Mixup
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ..costs.measure import count_macs, describe_machine
from ..data.datasets import EpochCallback, SeededImages
from ..metrics.scan_accuracy.scan_accuracy import ScanAccuracy
from ..model.exit_config import EXIT_CONFIG_NAME
from ..model.exit_rule import exit_columns, label_set_ids
from ..model.image_processing_scan import create_image_processor
from ..model.modeling_scan import ScanForImageClassification
from ..model.problem_type import MULTI_LABEL
from ..model.provenance import join_trained_on
from ..reporting.model_card import create_model_card
from ..reporting.report import exit_report
from .checkpoints import CheckedTrainer
from .collation import check_distributions, collate_rows, rows_with_indices
from .hyperparameters import check_trial, default_objective
from .losses import SelfDistillationLoss, weights_per_exit
from .methods import gradient_equilibrium, separate_heads, survivor_weights
from .output_dirs import named_full_disk
from .training_args import ScanTrainingArguments


logger = logging.get_logger(__name__)


class ScanTrainer(CheckedTrainer):
    """
    A [`~transformers.Trainer`] that trains a [`ScanForImageClassification`] by self-distillation, with any launcher.

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
        `ValueError`: if an argument would be ignored, there are more or fewer weights than exits, or the teacher has
            another number of classes; before training, if rows hold no images or labels that fit.
        `FloatingPointError`: in training, if a term of the loss is not finite. The error names the term. The weights
            are those of the step before, but batch norm's running means include the batch.

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
        if getattr(getattr(model, "config", None), "backbone_source", None) == "custom" and args.save_strategy != "no":
            raise ValueError(
                f"The backbone is a {model.config.backbone}, a module of its own of which no checkpoint can be saved, "  # type: ignore[union-attr]
                f"and `save_strategy` is {args.save_strategy.value!r}; expected 'no'. Keep `model.state_dict()`."
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
        if isinstance(kwargs.get("train_dataset"), SeededImages):
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), EpochCallback(kwargs["train_dataset"])]
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self._label2id = self.model.config.label2id or {}
        if kwargs.get("data_collator") is None:
            self.data_collator = partial(collate_rows, label2id=self._label2id)
        # The loss is a mean over its batch: Trainer has to divide it when gradients are accumulated.
        self.model_accepts_loss_kwargs = False
        self._set_up(self.model)
        # At which step, and by which rule, the last evaluation scored weights that are still there.
        self._scored: tuple[int, dict[str, Any]] | None = None
        self._saw_distributions = False
        self.card: ModelCard | None = None  # what is pushed in place of one from the last evaluation
        self.teacher = self._prepare_teacher(teacher)

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """
        As [`~transformers.Trainer.hyperparameter_search`], with another default for the objective: Transformers' is
        the sum of all metrics, which here are accuracies, and which it minimises.

        Args:
            hp_space (`Callable`, *optional*):
                Returns the arguments of a trial; weights of exits as numbers or as lists of them.
            compute_objective (`Callable`, *optional*):
                Takes the metrics of an evaluation. Defaults to the evaluation loss with `direction="minimize"`, and to
                the mean accuracy of the exits with `direction="maximize"`.
            n_trials (`int`, *optional*, defaults to 20): Number of trials.
            direction (`str` or `list[str]`, *optional*, defaults to `"minimize"`): `"minimize"`, `"maximize"`, or one
                of them for each value that `compute_objective` returns.
            args, kwargs: As there.

        Returns:
            [`~transformers.trainer_utils.BestRun`]

        Raises:
            `ValueError`: if the objective of a direction is not known, or a trial changes an argument that is read
                before training, or one that changes the loss, whose values could then not be compared.
        """
        if compute_objective is None:
            compute_objective = default_objective(direction, self._scores_exits)
        return super().hyperparameter_search(hp_space, compute_objective, n_trials, direction, *args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        given = getattr(self, "hp_space", None)
        if self.hp_search_backend is None or trial is None or given is None:
            super()._hp_search_setup(trial)
            return

        def checked(trial: Any) -> dict[str, Any]:
            return check_trial(given(trial), self.compute_objective)

        self.hp_space = checked
        try:
            super()._hp_search_setup(trial)
        finally:
            self.hp_space = given

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super().call_model_init(*args, **kwargs)
        self._set_up(model)
        return model

    def _set_up(self, model: Any) -> None:
        """Create the loss, and require gradients of the parameters that get one."""
        args = self.args
        multi_label = model.config.problem_type == MULTI_LABEL
        single = ("mixup_alpha", "cutmix_alpha", "label_smoothing_factor", "survivor_weighting")
        if multi_label and (given := [name for name in single if getattr(args, name)]):
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in given)} is for one label an image, and the network's "
                f"`problem_type` is {MULTI_LABEL!r}. Leave it out."
            )
        self.distillation = replace(_create_loss(args), multi_label=multi_label)
        self._multi_label = multi_label
        self._mixup: Mixup | None = None
        if args.mixup_alpha or args.cutmix_alpha:
            self._mixup = Mixup(args.mixup_alpha, args.cutmix_alpha, label_smoothing=0.0, num_classes=model.num_labels)
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
            # Without a hint they are not used, and DDP would wait for their gradients.
            head.hint_projection.requires_grad_(weight > 0)

    def _forget_terms(self) -> None:
        # Sums since the last log, on the device: reading them at each step would wait for the device.
        self._term_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._term_steps = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_terms()
        self._check_row(self.train_dataset)
        if isinstance(self.model, ScanForImageClassification):
            self.trained_on = self.model.exit_config.trained_on
        return super().train(*args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Not in `train`: a resume that is refused must change nothing, and `model_init` replaces the model there.
        if isinstance(self.model, ScanForImageClassification):
            self.trained_on = join_trained_on(self.model.exit_config.trained_on, self.trained_on)
            # Training changes the weights that the thresholds were found for.
            self.model.exit_config = self.model.exit_config.replace(
                thresholds=None, temperatures=None, trained_on=self.trained_on
            )
        self.model.training_recorded = True
        balanced = gradient_equilibrium(self.model) if self.args.gradient_equilibrium else nullcontext()
        try:
            with balanced:
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.model.training_recorded = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not given and self.args.head_learning_rate is not None:
            separate_heads(optimizer, (model or self.model).exit_heads, self.args.head_learning_rate)
        return optimizer

    def _train_rows(self) -> Any:
        rows = self.train_dataset
        return rows_with_indices(rows, self._label2id) if isinstance(rows, list) else rows

    def _check_row(self, dataset: Any) -> None:
        """Raise an error that names types, unless the network can be trained on the first row of a dataset."""
        while isinstance(dataset, SeededImages):  # which draws
            dataset = dataset.rows
        own = isinstance(self.data_collator, partial) and self.data_collator.func is collate_rows
        has_rows = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) > 0
        if not own or not has_rows or self.args.remove_unused_columns or self.model is None:
            return
        with torch.random.fork_rng(devices=[]):  # a transform may draw, and a check changes no run
            row = dataset[0]
        batch = self.data_collator([row])
        if not isinstance(batch.get("labels"), torch.Tensor):
            found = row.get("labels", row.get("label"))
            raise TypeError(
                f"The dataset's first row has a label of type {type(found).__name__}; expected a class index under "
                "`labels` or `label`."
            )
        self._prepare_labels(batch["labels"])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # After a step, batch norm statistics differ between processes. Those of the first are saved, so they are the
        # ones to evaluate.
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
        labels = self._prepare_labels(inputs["labels"])
        if "stage_features" in images:
            self._check_stage_features(training=model.training)
        # timm mixes pairs of images and of classes: a batch of odd length, or with an ignored label, is not mixed.
        if self._mixup is not None and model.training and len(labels) % 2 == 0 and labels.min() >= 0:
            images["pixel_values"], labels = self._mixup(images["pixel_values"], labels)
        backbone_alone = model.training and self.state.global_step < self._steps(self.args.backbone_steps)
        if model.training and self.args.backbone_steps:
            self.model.exits_reached = set()  # a step that reached the deepest exit alone was meant to
        if backbone_alone:
            self.model.exit_heads.eval()  # or batch norm's running means would change
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
        weights = survivor_weights(outputs.exit_logits) if self.args.survivor_weighting else None
        terms = self.distillation(
            outputs.exit_logits, outputs.exit_features, labels, teacher_logits, self._distillation_scale(), weights
        )
        if backbone_alone:
            deepest = f"exit_{len(outputs.exit_logits) - 1}_label_loss"
            terms = {deepest: terms[deepest]}
        if model.training:
            for name, term in terms.items():
                self._term_sums[name] += term.detach()
            self._term_steps += 1
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def _prepare_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return class indices of shape `(batch_size,)`, or a distribution over the classes for each image."""
        distributions = labels.ndim == 2 and labels.is_floating_point() and labels.shape[1] == self.model.num_labels
        if self._multi_label or not distributions:
            prepared: torch.Tensor = self.model.prepare_labels(labels)
            return prepared
        if self._mixup is not None and self.model.training:
            raise ValueError(
                "`mixup_alpha` and `cutmix_alpha` mix class indices, and `labels` are distributions. Leave them out."
            )
        # To look at values waits for an accelerator, where the first ones stand for all.
        if labels.device.type == "cpu" or not self._saw_distributions:
            self._saw_distributions = True
            check_distributions(labels)
        return labels

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # After the backward pass has been queued, and before the optimizer changes a weight.
        sums = torch.stack(list(self._term_sums.values()))
        broken = ~sums.isfinite()
        if self.args.world_size > 1:  # all processes stop, as they share gradients
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
                "Features of a frozen backbone cannot be mixed, nor given to another teacher, as they are not images. "
                "Set `freeze_backbone`, and leave the teacher, `mixup_alpha` and `cutmix_alpha` at their defaults; or "
                "train on the images."
            )

    def _distillation_scale(self) -> float:
        steps = self._steps(self.args.distillation_warmup_steps)
        return min(1.0, self.state.global_step / steps) if steps and self.model.training else 1.0

    def _steps(self, given: float) -> float:
        """Return a number of steps, which may be given as a share of all of them."""
        return given * self.state.max_steps if 0 < given < 1 else given

    def _prepare_teacher(self, teacher: PreTrainedModel | None) -> PreTrainedModel | None:
        name = self.args.distillation_teacher
        if teacher is None and name not in ("deepest", "ensemble"):
            teacher = AutoModelForImageClassification.from_pretrained(name)
        if teacher is None:
            return None
        if teacher.config.num_labels != self.model.num_labels:
            raise ValueError(
                f"The teacher has {teacher.config.num_labels} classes and the network {self.model.num_labels}; "
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
            outputs = self.model.config.keys_to_ignore_at_inference
            ignore_keys = ["logits", *(name for name in outputs if name != "exit_logits")]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _reduce_exit_logits(self, exit_logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return classes and confidences, so that no logits are gathered from the processes and kept."""
        return exit_columns(exit_logits, self.model.exit_config)

    def _compute_exit_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        if self._multi_label:
            labels = label_set_ids(torch.from_numpy(labels > 0.5)).numpy()
        elif labels.ndim == 2:  # of shape (n, 1), or distributions
            labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(axis=1)
        counts = labels != -100  # as for the loss
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
            references=labels[counts],
            **adaptive,
        )

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        super().init_hf_repo(*args, **kwargs)
        ignored = Path(self.args.output_dir, ".gitignore")
        if self.is_world_process_zero() and not ignored.exists():
            # Checkpoints that Trainer pushes hold its arguments as a pickle, which nothing reads. The Hub ignores the
            # files that git would.
            ignored.parent.mkdir(parents=True, exist_ok=True)
            ignored.write_text(f"{TRAINING_ARGS_NAME}\n", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with named_full_disk(output_dir or self.args.output_dir, "what it holds may be incomplete"):
            super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            # A pickle that nothing reads and that would be pushed.
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(
        self, model_name: str | None = None, dataset: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        """
        Write the model card, `README.md`, into the output folder, with the results of the last evaluation, if there
        was one. Called by `push_to_hub`.

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
        # Trainer gives the name without its owner, which cannot be loaded.
        name = self.hub_model_id or self.args.hub_model_id or model_name or path.parent.name
        create_model_card(self.model, report, facts, model_name=name, **kwargs).save(path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies its own files only.
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
