# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Run an export with ONNX Runtime: [`ORTScanForImageClassification`]."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from .engine import ExportedScan
from .manifest import WEIGHTS_NAME, Manifest, check_weights_beside
from .sessions import Sessions, available_cores


class ORTSessions(Sessions):
    """
    Sessions of ONNX Runtime.

    Args:
        folder (`Path`): The export.
        manifest ([`Manifest`]): The manifest of the export, whose files have been checked.
        providers (`list[tuple[str, dict]]`): Execution providers with their options, in order of preference.
        options (`onnxruntime.SessionOptions`, *optional*): Options of every session. Defaults to [`threaded_options`]
            with a thread for each core.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, providers: list[tuple[str, dict[str, Any]]], options: Any = None
    ) -> None:
        super().__init__(folder, manifest)
        self.providers = providers
        self.options = threaded_options(available_cores()) if options is None else options

    @property
    def threads(self) -> int:
        """Number of threads of each session: one per core, unless the options name another."""
        return _SHARED_POOL or self.options.intra_op_num_threads or available_cores()

    def _open(self, name: str) -> Any:
        if _SHARED_POOL:
            self.options.use_per_session_threads = False
        check_weights_beside(self.folder / name)
        try:
            return onnxruntime.InferenceSession(
                self.folder / name,
                self.options,
                providers=[one for one, _ in self.providers],
                provider_options=[settings for _, settings in self.providers],
            )
        except Exception as error:  # ONNX Runtime raises many types
            reason = str(error).strip().splitlines()[0][:300]
            raise OSError(
                f"ONNX Runtime does not load {self.folder / name} ({reason}). Weights must lie in {WEIGHTS_NAME!r} "
                "beside it. Export the network again."
            ) from error


class ORTScanForImageClassification(ExportedScan):
    """
    An exported network with early exits, run by ONNX Runtime: [`~ScanForImageClassification.predict_adaptive`] without
    PyTorch. [`~ORTScanForImageClassification.from_pretrained`] loads one.

    NumPy arrays give NumPy arrays and PyTorch tensors give tensors, so that an engine can be used in place of a
    model, as [`ExportedScan`] says.

    A single image runs `adaptive.onnx`, larger batches run stage by stage. Each session has its own thread pool,
    unless [`share_thread_pool`] makes them share one.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan import ScanConfig, ScanForImageClassification
    >>> from hf_scan.runtime import ORTScanForImageClassification

    >>> model = ScanForImageClassification(ScanConfig(backbone="cifar_resnet20", num_labels=10)).eval()
    >>> model.export_onnx("exported")
    >>> engine = ORTScanForImageClassification.from_pretrained("exported")
    >>> answer = engine.predict_adaptive(np.zeros((4, 3, 32, 32), np.float32), thresholds=[0.9, 0.9])
    >>> answer.logits.shape
    (4, 10)
    ```
    """

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        export: bool = False,
        provider: str = "CPUExecutionProvider",
        providers: Sequence[Any] | None = None,
        provider_options: dict[str, Any] | None = None,
        session_options: Any = None,
        subfolder: str = "",
        exit_config: Any = None,
        **kwargs: Any,
    ) -> "ORTScanForImageClassification":
        """
        Load an exported network, with the arguments of Optimum's `ORTModel`.

        Args:
            model_id (`str` or `Path`): A folder that `model.export_onnx` made, or a repository on the Hub.
            export (`bool`, *optional*, defaults to `False`): Whether it is a PyTorch checkpoint to export first.
            provider (`str`, *optional*, defaults to `"CPUExecutionProvider"`): The execution provider.
            providers (`Sequence`, *optional*): Several providers in order of preference, in place of `provider`.
            provider_options (`dict`, *optional*): Options of `provider`.
            session_options (`onnxruntime.SessionOptions`, *optional*): Options of every session, such as the threads.
                Defaults to [`~hf_scan.runtime.threaded_options`] with a thread for each core: ONNX Runtime's own
                threads spin while they wait, and those of one stage would take the cores from the next.
            subfolder (`str`, *optional*): A folder in it, such as `"int8"`.
            exit_config (*optional*): Used instead of the folder's `exit_config.json`.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` for the Hub, and, with `export=True`, the
                arguments of [`~hf_scan.runtime.export_onnx`].

        Raises:
            `OSError`: if there is no export, or a file of it is missing or is not what the manifest describes.
            `ValueError`: if a file names something outside of the folder, or a provider is unknown.
        """
        chosen = resolve_providers(provider, providers, provider_options)

        def sessions(folder: Path, manifest: Manifest) -> Sessions:
            return ORTSessions(folder, manifest, chosen, session_options)

        engine: ORTScanForImageClassification = cls._load(
            model_id, sessions, export, subfolder=subfolder, exit_config=exit_config, **kwargs
        )
        return engine


def threaded_options(threads: int) -> Any:
    """
    Return options for sessions of so many threads, which sleep while they wait. ONNX Runtime's own spin, which costs
    milliseconds wherever there is other work on the cores.

    Args:
        threads (`int`): Threads of each session.

    Returns:
        `onnxruntime.SessionOptions`, for `session_options` of [`ORTScanForImageClassification.from_pretrained`].
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


# The number of threads that all sessions share, or 0 where each has its own.
_SHARED_POOL = 0


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
    _SHARED_POOL = threads


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


__all__ = [
    "ORTScanForImageClassification",
    "ORTSessions",
    "resolve_providers",
    "share_thread_pool",
    "threaded_options",
]
