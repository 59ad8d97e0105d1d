# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""ONNX Runtime sessions for the graphs of an exported network, opened on first use."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from .manifest import ONNX_FOLDER, WEIGHTS_NAME, Manifest, check_weights_beside


class Sessions:
    """
    The sessions of an exported network, by file name. Thread-safe.

    Args:
        folder (`Path`): The export.
        manifest ([`Manifest`]): The manifest of the export, whose files have been checked.
        providers (`list[tuple[str, dict]]`): Execution providers with their options, in order of preference.
        options (`onnxruntime.SessionOptions`, *optional*): Options of every session.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, providers: list[tuple[str, dict[str, Any]]], options: Any = None
    ) -> None:
        self.folder, self.manifest = folder / ONNX_FOLDER, manifest
        self.providers, self.options = providers, options
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Any:
        session = self._opened.get(name)
        if session is None:
            with self._lock:
                if name not in self._opened:
                    self._opened[name] = self._open(name)
                session = self._opened[name]
        return session

    def open_all(self) -> None:
        """
        Open a session for every graph that the manifest names.

        Raises:
            `OSError`: if ONNX Runtime does not load one of them.
            `ValueError`: if one names weights outside of the folder.
        """
        for name in self.manifest.files:
            if name.endswith(".onnx"):
                self[name]

    def forget(self, name: str) -> None:
        """Close a session whose file has changed, so that it is opened again on its next use."""
        self._opened.pop(name, None)

    def _open(self, name: str) -> Any:
        if name not in self.manifest.files:
            raise OSError(f"{self.folder} holds no {name!r}. Export the network again.")
        options = self.options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
        if _SHARED_POOL:
            options.use_per_session_threads = False
        check_weights_beside(self.folder / name)
        try:
            return onnxruntime.InferenceSession(
                self.folder / name,
                options,
                providers=[one for one, _ in self.providers],
                provider_options=[settings for _, settings in self.providers],
            )
        except Exception as error:  # ONNX Runtime raises many types
            reason = str(error).strip().splitlines()[0][:300]
            raise OSError(
                f"ONNX Runtime does not load {self.folder / name} ({reason}). Weights must lie in {WEIGHTS_NAME!r} "
                "beside it. Export the network again."
            ) from error


_SHARED_POOL = False


def share_thread_pool(threads: int) -> None:
    """
    Make all engines that are loaded from now on share one thread pool, in place of one pool per session. Call it
    before the first session of the process: from then on *every* session, including those of other code, must set
    `SessionOptions.use_per_session_threads = False`. Engines set it themselves.

    Args:
        threads (`int`): The number of threads.

    Raises:
        `RuntimeError`: if this version of ONNX Runtime has no shared thread pool.
    """
    global _SHARED_POOL
    if not hasattr(onnxruntime, "set_global_thread_pool_sizes"):
        raise RuntimeError("This version of ONNX Runtime has no common thread pool; update it.")
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    _SHARED_POOL = True


def resolve_providers(
    provider: str, providers: Sequence[Any] | None, provider_options: dict[str, Any] | None
) -> list[tuple[str, dict[str, Any]]]:
    """
    Return execution providers with their options, in order of preference.

    Raises:
        `ValueError`: if one is not installed.
    """
    given = [(provider, provider_options or {})] if providers is None else list(providers)
    chosen = [(one, {}) if isinstance(one, str) else tuple(one) for one in given]
    available = onnxruntime.get_available_providers()
    for name, _ in chosen:
        if name not in available:
            raise ValueError(f"`provider` is {name!r}, which is not installed; expected one of {available}.")
    return chosen


__all__ = ["Sessions", "resolve_providers", "share_thread_pool"]
