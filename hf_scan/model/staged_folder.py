# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Write the files of a checkpoint beside the old ones and rename them, so that a killed save mixes no checkpoints."""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .weight_files import folder_state


# A folder of files that are being written, and, by its new name, of files that are complete and being moved.
WRITING, COMPLETE = ".saving-", ".saved-"
PLAN = ".plan.json"
ABANDONED_AFTER, IDLE_AFTER = 3600, 2  # seconds
WEIGHTS = {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME}
SHARD = re.compile(r"(model|pytorch_model)(\.[\w-]+)?-\d{5}-of-\d{5}\.(safetensors|bin)")


@contextmanager
def staged(folder: str | os.PathLike[str], removed: list[str]) -> Iterator[Path]:
    """
    Yield a folder to write a checkpoint into, and move its files into `folder` when all are written. If the process is
    killed before, the old checkpoint is unchanged; if it is killed while files are moved, [`finish`] moves the rest.

    Args:
        folder (`str` or `Path`): The folder of the checkpoint, which is created if it is missing.
        removed (`list[str]`): Names of files to remove from it. The caller may add to the list meanwhile.

    Raises:
        `OSError`: if the files cannot be written. Nothing in `folder` has changed then.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    finish(target)
    _remove_abandoned(target)
    writing = Path(tempfile.mkdtemp(prefix=WRITING, dir=target))
    try:
        try:
            yield writing
            names = {path.name for path in writing.iterdir()}
            plan = {"removed": sorted({*removed, *_obsolete(target, names)})}
            (writing / PLAN).write_text(json.dumps(plan), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The checkpoint could not be written to {target} ({error}); what is there has not changed. Make "
                "room, or choose another folder."
            ) from error
        complete = writing.with_name(writing.name.replace(WRITING, COMPLETE))
        writing.rename(complete)  # from here on, it is finished even if this process is killed
        _move(complete)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def finish(folder: str | os.PathLike[str]) -> None:
    """
    Move the files that a killed process had written and not yet moved, and wait for a process that is moving some.

    Raises:
        `OSError`: if the folder cannot be written to.
    """
    for complete in sorted(Path(folder).glob(f"{COMPLETE}*"), key=_changed):
        while complete.exists():
            if time.time() - _changed(complete) > IDLE_AFTER:
                try:
                    _move(complete)
                except OSError as error:
                    raise OSError(
                        f"Saving into {folder} was interrupted, and cannot be completed ({error}). Move the files of "
                        f"{complete.name} there, or save again."
                    ) from error
            time.sleep(0.05)


def settled_state(folder: str | os.PathLike[str]) -> tuple[tuple[str, int, int, int], ...]:
    """Return the [`folder_state`] of a folder into which no files are being moved, once it is so."""
    while True:
        finish(folder)
        state = folder_state(folder)
        if not any(Path(folder).glob(f"{COMPLETE}*")):
            return state


def _move(complete: Path) -> None:
    with suppress(FileNotFoundError):  # another process has finished it
        removed = json.loads((complete / PLAN).read_text(encoding="utf-8"))["removed"]
        for name in removed:
            if Path(name).name == name:
                (complete.parent / name).unlink(missing_ok=True)
    for path in sorted((path for path in _entries(complete) if path.name != PLAN), key=_order):
        with suppress(FileNotFoundError):
            os.replace(path, complete.parent / path.name)
    shutil.rmtree(complete, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return list(folder.iterdir())
    return []


def _order(path: Path) -> tuple[bool, str]:
    """Sort the index of weights to the end, and the exit configuration before all weights."""
    return (path.name.endswith(".index.json"), path.name)


def _obsolete(target: Path, names: set[str]) -> set[str]:
    """Return the weights in a folder that new ones replace under other names. Other variants of them stay."""
    whole = [name for name in names if name in WEIGHTS or ((match := SHARD.fullmatch(name)) and match[2] is None)]
    if not whole:
        return set()
    there = {path.name for path in target.iterdir() if path.is_file()}
    return {
        name for name in there if name in WEIGHTS or ((match := SHARD.fullmatch(name)) and match[2] is None)
    } - names


def _remove_abandoned(target: Path) -> None:
    for writing in target.glob(f"{WRITING}*"):
        if time.time() - _changed(writing) > ABANDONED_AFTER:
            shutil.rmtree(writing, ignore_errors=True)


def _changed(path: Path) -> float:
    """Return when something was last written into, renamed or removed."""
    with suppress(FileNotFoundError):
        return path.stat().st_ctime
    return time.time()


__all__ = ["finish", "settled_state", "staged"]
