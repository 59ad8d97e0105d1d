# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""
Write an export beside the old one and rename its entries, so that a killed process leaves the old one or the new one.

As `model/staged_folder.py` does for checkpoints, for folders in folders and without Transformers.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..model.named_errors import named_full_disk


# A folder into which an export is being written, and, by its new name, one that is complete and being moved.
WRITING, COMPLETE = ".exporting-", ".exported-"
PLAN, NEW, OLD = "plan.json", "new", "old"
ABANDONED_AFTER, IDLE_AFTER = 24 * 3600, 2  # seconds


@contextmanager
def staged_export(target: Path, removed: Callable[[str], bool]) -> Iterator[Path]:
    """
    Yield the path of a folder to create, whose entries are moved into `target` when the block ends without an error.
    If the process is killed before, the old entries are unchanged; if it is killed meanwhile, [`finish`] moves the
    rest.

    Args:
        target (`Path`): The folder of the export, which is created if it is missing.
        removed (`Callable[[str], bool]`): Whether an old entry of that name is removed which the new ones lack.

    Raises:
        `OSError`: if the disk is full. Nothing in `target` has changed then, as after any error in the block.
    """
    there = target.exists()
    target.mkdir(parents=True, exist_ok=True)
    finish(target)
    writing = Path(tempfile.mkdtemp(prefix=WRITING, dir=target))
    try:
        with named_full_disk(target, "what was there has not changed"):
            yield writing / NEW
            (writing / OLD).mkdir()
            names = [name for name in old_entries(target) if removed(name) and not (writing / NEW / name).exists()]
            (writing / PLAN).write_text(json.dumps(names), encoding="utf-8")
        complete = writing.with_name(writing.name.replace(WRITING, COMPLETE))
        writing.rename(complete)  # from here on, it is finished even if this process is killed
        _move(complete)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        if not there:
            with suppress(OSError):  # unless it holds the export
                target.rmdir()


def finish(folder: Path) -> None:
    """
    Move what a killed process had written and not yet moved, and wait for a process that is moving it.

    Raises:
        `OSError`: if the folder cannot be written to.
    """
    for writing in folder.glob(f"{WRITING}*"):
        if time.time() - _changed(writing) > ABANDONED_AFTER:
            shutil.rmtree(writing, ignore_errors=True)
    for complete in sorted(folder.glob(f"{COMPLETE}*"), key=_changed):
        while complete.exists():
            if time.time() - _changed(complete) > IDLE_AFTER:
                _move(complete)
            else:
                time.sleep(0.05)


def old_entries(folder: Path) -> list[str]:
    """Return the names of a folder's entries, without those of an export that is being written."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith((WRITING, COMPLETE)))


def _move(complete: Path) -> None:
    target, new, old = complete.parent, complete / NEW, complete / OLD
    with suppress(FileNotFoundError):  # another process has finished it
        for name in json.loads((complete / PLAN).read_text(encoding="utf-8")):
            with suppress(FileNotFoundError):
                os.rename(target / name, old / name)
        for entry in sorted(new.iterdir()):
            with suppress(FileNotFoundError):
                if entry.is_dir() and (target / entry.name).exists():  # which a rename does not replace
                    os.rename(target / entry.name, old / entry.name)
                os.replace(entry, target / entry.name)
    shutil.rmtree(complete, ignore_errors=True)


def _changed(path: Path) -> float:
    """Return when something was last written into, renamed or removed."""
    with suppress(FileNotFoundError):
        return path.stat().st_ctime
    return time.time()


__all__ = ["finish", "old_entries", "staged_export"]
