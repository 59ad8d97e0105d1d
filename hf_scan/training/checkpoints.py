# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that a run can be resumed from: whole, unchanged, and of the same run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..data.digests import some_digests
from ..model.exit_config import ExitConfig
from ..model.provenance import join_trained_on, unknown_images
from .output_dirs import last_whole_checkpoint


logger = logging.get_logger(__name__)


RECORD_NAME = "checkpoint.json"
# The files that `Trainer` resumes from. Others in the folder, such as a card or thresholds, may change.
RESUMED_FROM = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.distcp"),
    TRAINER_STATE_NAME,
)
# Without these, `Trainer` goes on with another optimizer or other random numbers, and says nothing.
NEEDED = ("optimizer*", "scheduler.pt", "rng_state*.pth")


class CheckedTrainer(Trainer):
    """
    A `Trainer` whose checkpoints hold `checkpoint.json`: the SHA-256 of each file that a run is resumed from, the
    train split and the seed. A resume checks them. `trained_on` is what the weights have been trained on, those of
    earlier runs included: set it before `train` for a model that does not hold it itself.
    """

    trained_on: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the last whole one in `args.output_dir`.

        Raises:
            `OSError`: if a file of the checkpoint is missing or has changed since it was written.
            `ValueError`: if there is no checkpoint, or it is of a run with other train images or another seed.
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
            self.trained_on = read_trained_on(folder)
        self.trained_on = join_trained_on(self.trained_on, split)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _train_split(self) -> str | None:
        """Return the digests of some train images, or a word where these cannot be known."""
        rows = self.train_dataset
        if rows is None:
            return None
        size = f"{len(rows)} images" if hasattr(rows, "__len__") else "images"
        return some_digests(rows) or unknown_images(f"{size} of a {type(rows).__name__}")

    def _record_of_run(self, split: str | None) -> dict[str, Any]:
        return {"train_split": split, "seed": self.args.seed, "data_seed": self.args.data_seed}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        PartialState().wait_for_everyone()  # each process writes its random state
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save and folder.is_dir():
            record = {**self._record_of_run(self._train_split()), "trained_on": self.trained_on}
            write_record(folder, record)


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
