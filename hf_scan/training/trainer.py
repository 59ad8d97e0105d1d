# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`ScanTrainer`]: Transformers' `Trainer` with the self-distillation loss and scores for every exit."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from huggingface_hub import ModelCard
from torch import nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ..data.datasets import EpochCallback, SeededImages
from ..model.exit_config import EXIT_CONFIG_NAME
from ..model.exit_rule import exit_columns
from ..model.image_processing_scan import create_image_processor
from ..model.modeling_scan import ScanForImageClassification
from ..model.provenance import join_trained_on
from .checkpoints import CheckedTrainer
from .collation import check_first_row, collate_rows, rows_with_indices
from .hyperparameters import check_trial, default_objective
from .losses import SelfDistillationLoss
from .methods import gradient_equilibrium, separate_heads
from .objective import TrainingObjective, load_teacher
from .output_dirs import named_full_disk
from .run_card import card_of_run
from .scores import exit_scores
from .term_sums import TermSums
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
        _check_arguments(model, args, kwargs)
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
        self._terms = TermSums(self.accelerator)
        self._set_up(self.model)
        # At which step, and by which rule, the last evaluation scored weights that are still there.
        self._scored: tuple[int, dict[str, Any]] | None = None
        self.card: ModelCard | None = None  # what is pushed in place of one from the last evaluation
        self.teacher = load_teacher(args, self.model, teacher)

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
        self.training_objective = TrainingObjective(self.args, model)

    @property
    def distillation(self) -> SelfDistillationLoss:
        """The loss, as a function of logits and labels."""
        return self.training_objective.distillation

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._terms.clear()
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
        if own and has_rows and not self.args.remove_unused_columns and self.model is not None:
            self.training_objective.prepare_labels(check_first_row(dataset, self.data_collator))

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
        terms, outputs = self.training_objective(model, inputs, self.state, self.teacher)
        if model.training:
            self._terms.add(terms)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # After the backward pass has been queued, and before the optimizer changes a weight.
        self._terms.check_finite(step=self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # All processes log together, after the same number of steps.
        if "loss" in logs and self._terms.steps:
            logs |= self._terms.take_means()
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
        replaced = self.is_in_train and self.args.load_best_model_at_end  # by other weights, when training ends
        self._scored = None if replaced else (self.state.global_step, self.model.exit_config.rule)
        return exit_scores(prediction, self.model)

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
        # Trainer gives the name without its owner, which cannot be loaded.
        name = self.hub_model_id or self.args.hub_model_id or model_name or path.parent.name
        splits = {"train": self.train_dataset, "evaluation": self.eval_dataset}
        dataset = dataset if isinstance(dataset, str) else None
        card_of_run(self.model, self.args, splits, self._last_scores(), name, dataset, **kwargs).save(path)

    def _last_scores(self) -> dict[str, float] | None:
        """Return what the last evaluation logged, if it scored these weights by this rule."""
        scores = next((entry for entry in reversed(self.state.log_history) if "eval_exit_0_accuracy" in entry), None)
        now = (self.state.global_step, self.model.exit_config.rule)
        return scores if scores is not None and self._scored == now and scores["step"] == now[0] else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies its own files only.
        exit_config = Path(checkpoint_folder, EXIT_CONFIG_NAME)
        if self.is_world_process_zero() and exit_config.is_file():
            shutil.copy(exit_config, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)


def _check_arguments(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if not isinstance(args, ScanTrainingArguments):
        raise TypeError(
            f"`args` is a {type(args).__name__}; expected `ScanTrainingArguments`, which take the same and "
            "the weights of self-distillation."
        )
    if getattr(getattr(model, "config", None), "backbone_source", None) == "custom" and args.save_strategy != "no":
        raise ValueError(
            f"The backbone is a {model.config.backbone}, a module of its own of which no checkpoint can be saved, "
            f"and `save_strategy` is {args.save_strategy.value!r}; expected 'no'. Keep `model.state_dict()`."
        )
    if kwargs.get("compute_loss_func") is not None:
        raise ValueError("`compute_loss_func` would take the place of self-distillation. Use a plain `Trainer`.")
    if args.batch_eval_metrics and kwargs.get("compute_metrics") is None:
        raise ValueError(
            "`batch_eval_metrics` needs a `compute_metrics` that adds up batches; the exits' scores are computed "
            "from all of them. Pass your own, or leave `batch_eval_metrics` out."
        )


__all__ = ["ScanTrainer"]
