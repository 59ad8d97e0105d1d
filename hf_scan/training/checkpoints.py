# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints whose files, train split and seed are checked when a run is resumed."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy, TrainOutput
from transformers.utils import logging

from ..data.digests import some_digests
from ..model.exit_config import ExitConfig
from ..model.named_errors import named_push_errors, reason_of
from ..model.provenance import join_trained_on, unknown_images
from .ema import TRAINED_WEIGHTS_NAME, EmaCallback
from .output_dirs import check_space, last_whole_checkpoint
from .precision import float32_strided_depthwise


logger = logging.get_logger(__name__)


RECORD_NAME = "checkpoint.json"
# The files that `Trainer` resumes from. Others in the folder, such as a card or thresholds, may change.
RESUMED_FROM = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.distcp"),
    TRAINER_STATE_NAME,
)
# Without these, `Trainer` continues with a new optimizer or other random numbers, without a warning.
NEEDED = ("optimizer*", "scheduler.pt", "rng_state*.pth")


class CheckedTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose checkpoints hold `checkpoint.json`: the SHA-256 of each file that a run is
    resumed from, the train split and the seed, all checked at a resume. `trained_on` names the images that the weights
    have been trained on, including earlier runs: set it before `train` for a model that does not hold it.
    """

    trained_on: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, as [`~transformers.Trainer.train`] does.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the last whole one in `args.output_dir`.

        Raises:
            `OSError`: if a file of the checkpoint is missing or has changed since it was written; if the disk has no
                space for the run's checkpoints, or they cannot be written.
            `ValueError`: if there is no checkpoint, or it is of a run with other train images or another seed, or with
                averages of weights that this one does not have.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no checkpoint that was written to its end. Name another folder, or "
                    "leave `resume_from_checkpoint` out to start anew."
                )
        resume_from_checkpoint = resume_from_checkpoint or None
        split = self._train_split()
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                _check_parts(folder)
            _check_record(folder, self._record_of_run(split))
            _read_state(folder)
            self._check_averages(folder)
            self.trained_on = read_trained_on(folder)
        if self.args.should_save and self.model is not None:  # a search makes each trial's model later
            self._check_space()
        self.trained_on = join_trained_on(self.trained_on, split)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            state = _read_state(Path(checkpoint))
            if self._is_done(state):
                # Where the last step does not end an epoch, `Trainer` would train another one.
                return self._end_as(state)
        with float32_strided_depthwise(self.model):
            return super()._inner_training_loop(*args, **kwargs)

    def _is_done(self, state: TrainerState) -> bool:
        """Return whether a run has no step left to train."""
        if self.args.max_steps > 0:
            return state.global_step >= self.args.max_steps
        return (state.epoch or 0) >= self.args.num_train_epochs

    def _end_as(self, state: TrainerState) -> TrainOutput:
        """End a run that was resumed behind its last step. Its weights have been loaded."""
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {"train_loss": 0.0, "epoch": state.epoch})

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository that is pushed to, before training."""
        with named_push_errors(self._name_on_the_hub()):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        Push the output folder, as [`~transformers.Trainer.push_to_hub`] does.

        Raises:
            `OSError`: if the Hub cannot be reached, or refuses. The output folder is as it was.
        """
        with named_push_errors(self._name_on_the_hub()):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        before = list(getattr(getattr(self, "push_in_progress", None), "jobs", []))
        super()._push_from_checkpoint(checkpoint_folder)
        # Trainer pushes in the background, and does not look at how that ends.
        for job in getattr(getattr(self, "push_in_progress", None), "jobs", []):
            if job not in before:
                job.add_done_callback(partial(_warn_of_failed_push, self._name_on_the_hub()))

    def _name_on_the_hub(self) -> str:
        return str(
            getattr(self, "hub_model_id", None) or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _named_part(resume_from_checkpoint, "weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _named_part(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _named_part(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _averages(self) -> list[EmaCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EmaCallback)]

    def _check_averages(self, folder: Path) -> None:
        if not self._averages() and (folder / TRAINED_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"The checkpoint {folder} holds averages of weights, of a run with `EmaCallback`, and training would "
                "go on from these. Pass `callbacks=[EmaCallback(...)]` to resume; or load the averages with "
                "`from_pretrained` and start a new run."
            )
        for callback in self._averages():
            callback.resumed_from = folder

    def _train_split(self) -> str | None:
        """Return the digests of some train images, or a description where these cannot be known."""
        rows = self._train_rows()
        if rows is None:
            return None
        size = f"{len(rows)} images" if hasattr(rows, "__len__") else "images"
        return some_digests(rows) or unknown_images(f"{size} of a {type(rows).__name__}")

    def _train_rows(self) -> Any:
        """Return the train images, as their digests are taken."""
        return self.train_dataset

    def _record_of_run(self, split: str | None) -> dict[str, Any]:
        return {"train_split": split, "seed": self.args.seed, "data_seed": self.args.data_seed}

    def _check_space(self) -> None:
        """Refuse a run whose checkpoints do not fit on the disk, by what they take at least."""
        count = _num_checkpoints(self.args, self.train_dataset)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        states = 2 if "adam" in str(self.args.optim) and not self.args.save_only_model else 0
        check_space(
            self.args.output_dir,
            count * ((1 + len(self._averages())) * weights + 4 * states * trained),
            f"The {count} checkpoints that are kept of this run",
            "Make space there, set `save_total_limit`, save more seldom, or choose another `output_dir`.",
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            # It may have failed at something else: at a push, or at what another process did.
            writer = ("PytorchStreamWriter", "inline_container")  # how PyTorch's errors name it
            elsewhere = isinstance(error, RuntimeError) and not any(name in str(error) for name in writer)
            if elsewhere or last_whole_checkpoint(folder.parent) == str(folder):
                raise
            raise self._removed(folder, error) from error
        PartialState().wait_for_everyone()  # each process writes its random state
        if not self.args.should_save or not folder.is_dir():
            return
        try:
            for callback in self._averages():
                callback.save(folder, self.state.global_step)
            write_record(folder, {**self._record_of_run(self._train_split()), "trained_on": self.trained_on})
        except (OSError, SafetensorError) as error:
            raise self._removed(folder, error) from error

    def _removed(self, folder: Path, error: Exception) -> OSError:
        """Remove a checkpoint that could not be written, and return the error that says so."""
        if self.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        last = last_whole_checkpoint(folder.parent)
        return OSError(
            f"The checkpoint {folder} could not be written ({error}). Make space there or choose another "
            f"`output_dir`; training can be resumed from {last or 'nothing yet'}."
        )


def _warn_of_failed_push(repo_id: str, job: Future[Any]) -> None:
    if job.cancelled():
        return
    try:
        with named_push_errors(repo_id):
            job.result()
    except Exception as error:  # training is worth more than a push
        logger.warning(f"{error} Training goes on.")


def _num_checkpoints(args: TrainingArguments, dataset: Any) -> int:
    """Return how many checkpoints a run has on the disk at once, or fewer where it cannot be known."""
    if args.save_strategy == SaveStrategy.NO or (args.max_steps <= 0 and not hasattr(dataset, "__len__")):
        return 0
    steps = args.max_steps
    if steps <= 0:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(args.num_train_epochs * max(1, len(dataset) // batch))
    count = 1
    if args.save_strategy == SaveStrategy.STEPS:
        count = math.ceil(steps / args.save_steps) if args.save_steps >= 1 else math.ceil(1 / args.save_steps)
    elif args.save_strategy == SaveStrategy.EPOCH and args.max_steps <= 0:
        count = math.ceil(args.num_train_epochs)
    limit = args.save_total_limit
    return count if not limit or limit < 0 else min(count, limit + 1)  # the oldest is removed last


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `checkpoint.json`, with the digests of the files in the folder."""
    files = {name: _digest(folder / name) for name in _files(folder)}
    (folder / RECORD_NAME).write_text(json.dumps({**record, "files": files}, indent=2) + "\n", encoding="utf-8")


def read_trained_on(folder: str | Path) -> str | None:
    """
    Return what the weights in a folder were trained on, as `exit_config.json` or `checkpoint.json` there says; `None`
    where neither does.
    """
    trained_on = ExitConfig.from_pretrained(folder).trained_on if Path(folder).is_dir() else None
    return trained_on or _read_record(Path(folder)).get("trained_on")


def _check_parts(folder: Path) -> None:
    missing = [name for name in NEEDED if not any(folder.glob(name))] if folder.is_dir() else []
    if missing:
        raise OSError(
            f"The checkpoint {folder} has no {missing[0]!r}, without which training would go on as another run. "
            "Resume from another checkpoint, or load its weights with `from_pretrained` and start a new run. (With "
            "`save_only_model`, checkpoints are not for resuming.)"
        )


def _read_state(folder: Path) -> TrainerState:
    try:
        return TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError) as error:
        raise OSError(
            f"{TRAINER_STATE_NAME!r} of the checkpoint {folder} cannot be read ({reason_of(error)}). Resume from "
            "another checkpoint."
        ) from error


@contextmanager
def _named_part(folder: str | None, what: str) -> Iterator[None]:
    """Name the checkpoint and its part in an error, where no record could show that a file is damaged."""
    try:
        yield
    except Exception as error:  # of pickle, zip files, safetensors and shapes, which have many kinds
        if folder is None:
            raise
        raise OSError(
            f"{what} of the checkpoint {folder} cannot be loaded ({reason_of(error)}): a file is damaged, or of "
            "another network or optimizer. Resume from another checkpoint."
        ) from error


def _check_record(folder: Path, run: dict[str, Any]) -> None:
    record = _read_record(folder)
    if not record:
        logger.warning(
            f"{folder} has no {RECORD_NAME!r}, so that neither its files nor the train images of its run can be "
            "checked against this one."
        )
        return
    for name, digest in record["files"].items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            what = "has changed since it was written" if (folder / name).is_file() else "is missing"
            raise OSError(
                f"{name!r} of the checkpoint {folder} {what}, so that training would go on with other weights than it "
                "ended with. Resume from another checkpoint."
            )
    for name, value in run.items():
        if record.get(name) != value:
            what = "train images" if name == "train_split" else f"`{name}`: {record.get(name)} instead of {value}"
            raise ValueError(
                f"The checkpoint {folder} is of a run with other {what}, so that what these weights were trained on "
                "would be mixed. Resume with the dataset, split, holdout and seed of that run; or, to train its "
                "weights further, load them with `from_pretrained` and start a new run."
            )


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_NAME
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["files"], dict):
            raise TypeError("`files` is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{file} cannot be read ({error!r}). Resume from another checkpoint.") from error
    return record


def _files(folder: Path) -> list[str]:
    found = {file for pattern in RESUMED_FROM for file in folder.rglob(pattern) if file.is_file()}
    return sorted(str(file.relative_to(folder)) for file in found)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


__all__ = ["CheckedTrainer", "read_trained_on"]
