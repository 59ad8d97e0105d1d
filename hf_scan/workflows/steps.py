# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Steps of a long run, each done once: what finished before an interruption is not done again."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..model.named_errors import write_whole
from .time_left import TimeLeft


class Steps:
    """
    The steps of a run, in their order. A record of each lies in a folder, with all settings that it and the steps
    before it depend on; a step whose record has the same settings is not repeated. A step that was interrupted finds
    what it left in a folder of its name, unless its settings have changed since.

    Args:
        folder (`str` or `Path`): Where records, and what steps make, are kept.
        count (`int`): How many steps there will be, for the progress.
        left ([`~hf_scan.workflows.time_left.TimeLeft`], *optional*): The time that each step is expected to take, by
            its name. It is printed as a step starts, and corrected when it ends.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_scan.workflows.steps import Steps

    >>> folder = tempfile.mkdtemp()
    >>> for _ in range(2):
    ...     found = Steps(folder, 1).run("double", "Doubling", {"number": 4}, lambda: {"doubled": 8})
    [1/1] Doubling
    [1/1] Doubling: done before
    >>> found
    {'doubled': 8}
    ```
    """

    def __init__(self, folder: str | Path, count: int, left: TimeLeft | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.count = count
        self.number = 0
        self.settings: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.left = left

    def run(
        self,
        name: str,
        title: str,
        settings: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        made: Path | None = None,
    ) -> dict[str, Any]:
        """
        Do a step, unless it has been done.

        Args:
            name (`str`): Of its record.
            title (`str`): What it does, for people.
            settings (`dict[str, Any]`): What its result depends on, besides the settings of the steps before.
            work (`Callable`): Does it, and returns a result for JSON.
            made (`Path`, *optional*): What it leaves for the steps behind it, without which it is done again.

        Returns:
            `dict[str, Any]`: the result, of now or of before.
        """
        self.number += 1
        self.settings = json.loads(json.dumps({**self.settings, name: settings}))
        file = self.folder / f"{name}.json"
        record = _read(file)
        if record.get("settings") == self.settings and "result" in record and (made is None or made.exists()):
            print(f"[{self.number}/{self.count}] {title}: done before", flush=True)
            self.seconds[name] = record["seconds"]
            if self.left is not None:
                self.left.skip(name)
            result: dict[str, Any] = record["result"]
            return result
        self.announce(title)
        if record.get("settings") != self.settings:  # else it goes on from what it left
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self._write(file, {"settings": self.settings})
        start = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - start
        if self.left is not None:
            self.left.finish(name, self.seconds[name])
        self._write(file, {"settings": self.settings, "seconds": self.seconds[name], "result": result})
        return result

    def announce(self, title: str) -> None:
        """Print which step starts, and the time that is left where it is known."""
        left = "" if self.left is None else f" ({self.left})"
        print(f"[{self.number}/{self.count}] {title}{left}", flush=True)

    @staticmethod
    def _write(file: Path, record: dict[str, Any]) -> None:
        write_whole(file, json.dumps(record, indent=2) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


__all__ = ["Steps"]
