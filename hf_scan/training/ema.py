# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""[`EmaCallback`]: evaluate and save an exponential moving average of the weights."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


TRAINED_WEIGHTS_NAME = "trained_weights.safetensors"


class EmaCallback(TrainerCallback):
    """
    A callback that keeps an exponential moving average of the weights and of batch norm's statistics, by
    [`timm.utils.ModelEmaV3`]. The network holds the averages whenever it is evaluated or saved, and when training has
    ended; the optimizer goes on with the weights that it trains. A checkpoint holds the averages as its model, and
    beside it the trained weights in `trained_weights.safetensors`, from which a run is resumed.

    Works with any `Trainer` whose processes each hold the whole network. Give it as the last of the callbacks.

    Args:
        decay (`float`, *optional*, defaults to 0.9999): The share of the average that a step keeps, in [0, 1).
        use_warmup (`bool`, *optional*, defaults to `True`): Whether the share grows to `decay` as
            `1 - (1 + step) ** (-2 / 3)`, so that short runs forget the initial weights.

    Raises:
        `ValueError`: if `decay` is out of range; when training starts, if weights are sharded, or checkpoints are
            written at other times than those of a `Trainer`.
        `OSError`: when training is resumed, if the checkpoint does not hold the trained weights.

    Example:

    ```python
    >>> import torch
    >>> from hf_scan import EmaCallback, ScanConfig, ScanForImageClassification, ScanTrainer, ScanTrainingArguments

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=2))
    >>> images = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 2} for index in range(8)]
    >>> args = ScanTrainingArguments(output_dir="runs/example", max_steps=2, save_strategy="no")
    >>> result = ScanTrainer(model, args, train_dataset=images, callbacks=[EmaCallback(decay=0.999)]).train()
    {'train_runtime': ...}
    ```
    """

    def __init__(self, decay: float = 0.9999, use_warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` is {decay}; expected a number of at least 0 and below 1.")
        self.decay = decay
        self.use_warmup = use_warmup
        self.resumed_from: str | os.PathLike[str] | None = None  # set by a trainer that knows it
        self._average: ModelEmaV3 | None = None  # while the model holds it, the weights that are trained
        self._exchanged = False
        self._saved_step: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Start an average at the weights there are, or go on with that of a checkpoint."""
        if args.fsdp or args.deepspeed:
            raise ValueError("`EmaCallback` needs all weights in each process. Leave it out with FSDP and DeepSpeed.")
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "`enable_jit_checkpoint` would write checkpoints without the averages of `EmaCallback`. Leave one out."
            )
        self._average = ModelEmaV3(model, self.decay, use_warmup=self.use_warmup)
        self._exchanged, self._saved_step = False, None
        if state.global_step > 0:
            _load_trained_weights(model, self._folder_resumed_from(args, state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Put the weights that are trained back into the network."""
        if self._exchanged:
            self._exchange(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Average, and put the averages into the network where it is evaluated or saved next."""
        assert self._average is not None
        self._average.update(model, step=state.global_step)
        self.on_epoch_end(args, state, control, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Put the averages into the network where it is evaluated or saved next."""
        if not self._exchanged and (control.should_evaluate or control.should_save):
            self._exchange(model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Write the weights that are trained into the checkpoint, unless the trainer has done so."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir() and self._saved_step != state.global_step:
            self.save(folder, state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Check that the averages were evaluated."""
        if state.global_step > 0:
            self._check_exchanged()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        """Leave the averages in the network, or the best ones if these have been loaded."""
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._average is not None and not self._exchanged and not best:
            self._exchange(model)
        self._average, self._exchanged = None, False

    def save(self, folder: str | os.PathLike[str], step: int) -> None:
        """Write the weights that are trained into a checkpoint's folder, while the network holds the averages."""
        self._check_exchanged()
        assert self._average is not None
        weights = {name: tensor.contiguous() for name, tensor in self._average.module.state_dict().items()}
        save_file(weights, Path(folder, TRAINED_WEIGHTS_NAME))
        self._saved_step = step

    def _folder_resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        for folder in (self.resumed_from, args.resume_from_checkpoint):
            if folder is not None and Path(folder).is_dir():
                return Path(folder)
        return Path(args.output_dir, f"checkpoint-{state.global_step}")

    def _check_exchanged(self) -> None:
        if self._average is not None and not self._exchanged:
            raise RuntimeError(
                "A callback behind `EmaCallback` asked for an evaluation or a checkpoint, for which the averages were "
                "not in place. Give `EmaCallback` as the last of `callbacks`."
            )

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        """Exchange the network's tensors and the average's in place, as the optimizer holds the former."""
        assert self._average is not None
        for here, there in zip(model.state_dict().values(), self._average.module.state_dict().values()):
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)
        self._exchanged = not self._exchanged


def _load_trained_weights(model: nn.Module, folder: Path) -> None:
    file = folder / TRAINED_WEIGHTS_NAME
    try:
        model.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise OSError(
            f"The weights that were trained, beside the averages of `EmaCallback`, cannot be read from {file} "
            f"({error}). Resume from a checkpoint of a run with `EmaCallback`, or leave it out."
        ) from error


__all__ = ["TRAINED_WEIGHTS_NAME", "EmaCallback"]
