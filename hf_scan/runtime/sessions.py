# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Sessions for the graphs of an exported network, opened on first use, whatever runtime runs them."""

import os
import threading
from pathlib import Path
from typing import Any

from .manifest import ONNX_FOLDER, Manifest


class Sessions:
    """
    The sessions of an exported network, by file name. Thread-safe. A session has ONNX Runtime's call:
    `session.run(None, arrays_by_name)` returns the list of outputs, and several threads may call it at a time.

    Args:
        folder (`Path`): The export.
        manifest ([`Manifest`]): The manifest of the export, whose files have been checked.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder / ONNX_FOLDER, manifest
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        session = self._opened.get(name)
        if session is None:
            with self._lock:
                if name not in self._opened:
                    if name not in self.manifest.files:
                        raise OSError(f"{self.folder} holds no {name!r}. Export the network again.")
                    self._opened[name] = self._open(name)
                session = self._opened[name]
        return session

    @property
    def threads(self) -> int:
        """Number of threads that a session computes with."""
        raise NotImplementedError

    def open_all(self) -> None:
        """
        Open a session for every graph that the manifest names.

        Raises:
            `OSError`: if the runtime does not load one of them.
            `ValueError`: if one names weights outside of the folder.
        """
        for name in self.manifest.files:
            if name.endswith(".onnx"):
                self[name]

    def forget(self, name: str) -> None:
        """Close a session whose file has changed, so that it is opened again on its next use."""
        self._opened.pop(name, None)

    def _open(self, name: str) -> Any:
        raise NotImplementedError


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["Sessions", "available_cores"]
