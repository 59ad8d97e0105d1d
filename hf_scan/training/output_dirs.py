# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Replace output folders as a whole, lock them, and check their disk."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..model import named_errors


logger = logging.get_logger(__name__)


@contextmanager
def replaced_folder(path: str | Path, keep: Sequence[str] = ()) -> Iterator[Path]:
    """
    Create a new folder to write into, which replaces `path` when the block ends without an error. After an error in
    the block, `path` is unchanged.

    Args:
        path (`str` or `Path`): The folder to make or to replace. Its parents are made when missing.
        keep (`Sequence[str]`, *optional*): Patterns of entries of the old folder to carry over, such as
            `"checkpoint-*"`, where the new one has none of that name.

    Yields:
        `Path`: the folder to write into, beside `path`.

    Raises:
        `OSError`: as [`check_replaceable`], or if the disk is full.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_scan.training.output_dirs import replaced_folder

    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with replaced_folder(Path(parent, "run")) as folder:
    ...         _ = (folder / "metrics.json").write_text("{}")
    ...     [entry.name for entry in Path(parent, "run").iterdir()]
    ['metrics.json']
    ```
    """
    path = check_replaceable(path, keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that replacing it is a rename.
    workshop = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    new, old = workshop / "new", workshop / "old"
    new.mkdir()  # with default permissions; a temporary folder is private
    try:
        with named_full_disk(path, "what was there has not changed"):
            yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
        _carry_over(old, path, keep)
    except BaseException:  # also an interrupt between two renames
        if old.exists() and not path.exists():
            old.rename(path)
        elif old.exists():  # the new folder is in its place
            _carry_over(old, path, keep)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            workshop.rmdir()
        raise
    shutil.rmtree(workshop)


@contextmanager
def named_full_disk(path: str | Path, outcome: str) -> Iterator[None]:
    """
    Name the path, the outcome and a remedy in the error of a full disk, as
    [`~hf_scan.model.named_errors.named_full_disk`] does, and the checkpoint to resume a run from.

    Args:
        path (`str` or `Path`): The file or the folder of a run that is written.
        outcome (`str`): What the error says of it.

    Raises:
        `OSError`: if the disk is full, or a quota is used up. Other errors are left as they are.
    """
    try:
        yield
    except Exception:
        last = last_whole_checkpoint(path)
        with named_errors.named_full_disk(path, outcome, f", and resume the run from {last}" if last else ""):
            raise


def check_space(folder: str | Path, needed: float, what: str, instead: str) -> None:
    """
    Raise an error if files would not fit on a disk. Call it before long work.

    Args:
        folder (`str` or `Path`): Where it would be written. It need not be there.
        needed (`float`): Bytes.
        what (`str`): What takes them, as the beginning of a sentence in the plural.
        instead (`str`): What else to do, in the imperative.

    Raises:
        `OSError`: if there is not enough space.
    """
    path = Path(folder).resolve()
    there = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed > 0.9 * free:
        raise OSError(f"{what} take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left. {instead}")


def lock_output_folder(path: str | Path, keep: Sequence[str] = ()) -> FileLock:
    """
    Lock an output folder against a second run, and mend what a killed one left between two renames.

    Args:
        path (`str` or `Path`): The folder, which need not be there.
        keep (`Sequence[str]`, *optional*): As for [`replaced_folder`].

    Returns:
        [`~filelock.FileLock`]: held until it is released or collected, or the process ends, however it does. Its file
        stays beside the folder.

    Raises:
        `FileExistsError`: if another run holds the folder.
        `OSError`: as [`check_replaceable`].

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_scan.training.output_dirs import lock_output_folder

    >>> with tempfile.TemporaryDirectory() as parent, lock_output_folder(Path(parent, "run")) as lock:
    ...     lock.is_locked
    True
    ```
    """
    path = Path(path).resolve()
    check_replaceable(path, ["*"])
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock", timeout=0, is_singleton=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(
            f"Another run writes to {path}, and one of the two would be lost. Wait for it, or choose another path."
        ) from error
    _mend(path, keep)
    check_replaceable(path, keep)
    return lock


def _carry_over(old: Path, path: Path, keep: Sequence[str]) -> None:
    for pattern in keep:
        for entry in old.glob(pattern):
            if not (path / entry.name).exists():
                entry.rename(path / entry.name)


def _mend(path: Path, keep: Sequence[str]) -> None:
    """Finish or undo what [`replaced_folder`] was doing when its process was killed."""
    for workshop in path.parent.glob(f".{path.name}-*"):
        named = re.fullmatch(r"-[a-z0-9_]{8}", workshop.name.removeprefix(f".{path.name}"))
        if not named or not workshop.is_dir() or not {entry.name for entry in workshop.iterdir()} <= {"new", "old"}:
            continue
        old = workshop / "old"
        if old.exists() and not path.exists():
            logger.warning(f"A run was killed while it replaced {path}; the folder is there again as it was.")
            old.rename(path)
        elif old.exists():
            _carry_over(old, path, keep)
        shutil.rmtree(workshop)


def last_whole_checkpoint(path: str | Path) -> str | None:
    """
    Return the last checkpoint of a run that was written to its end, to resume from. A process that is killed, or a
    disk that is full, can leave one that was not.

    Args:
        path (`str` or `Path`): The `output_dir` of a `Trainer`.

    Returns:
        `str`, *optional*: its folder, if there is one.
    """
    found: list[tuple[int, int, str]] = []
    for folder in Path(path).glob("checkpoint-*"):
        state = folder / TRAINER_STATE_NAME  # which is written last
        with suppress(OSError, ValueError, KeyError, TypeError):
            step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
            found.append((state.stat().st_mtime_ns, step, str(folder)))
    return max(found)[2] if found else None


def _holds_model(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in ("scan", "timm_wrapper")


def check_replaceable(path: str | Path, keep: Sequence[str] = ()) -> Path:
    """
    Refuse to replace what is not a run's own folder. Call it before long work.

    Args:
        path (`str` or `Path`): The folder to replace.
        keep (`Sequence[str]`, *optional*): As for [`replaced_folder`].

    Returns:
        `Path`: the absolute path.

    Raises:
        `NotADirectoryError`: if `path` is a file.
        `PermissionError`: if it cannot be written beside `path`, or `path` is a mount point.
        `FileExistsError`: if `path` is the working folder or one around it, or holds more than what is kept
            and no `config.json` of a SCAN model or a plain backbone.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder to replace, or nothing. Choose another path.")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or path.is_mount():
        raise PermissionError(
            f"{path} cannot be replaced: {parent} is no folder that can be written to, or {path} is a mount point. "
            "Choose another path."
        )
    if Path.cwd().is_relative_to(path):
        raise FileExistsError(f"{path} holds the working folder and would be replaced. Choose another path.")
    kept = {entry for pattern in keep for entry in path.glob(pattern)}
    if path.is_dir() and set(path.iterdir()) - kept and not _holds_model(path):
        raise FileExistsError(
            f"{path} holds files but no model, and would be replaced as a whole. Choose another path, or empty it."
        )
    return path
