# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Export networks to ONNX, and run them with NumPy and ONNX Runtime, without PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .engine import EngineOutput, ORTScanForImageClassification, share_thread_pool
    from .export import export_onnx
    from .numpy_rule import AdaptiveAnswer, ExitSettings, apply_exit_rule

# Imported lazily: the export needs PyTorch, the engine does not.
_IMPORTED_WHEN_USED = {
    "AdaptiveAnswer": ".numpy_rule",
    "EngineOutput": ".engine",
    "ExitSettings": ".numpy_rule",
    "ORTScanForImageClassification": ".engine",
    "apply_exit_rule": ".numpy_rule",
    "export_onnx": ".export",
    "share_thread_pool": ".engine",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        return getattr(import_module(_IMPORTED_WHEN_USED[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaptiveAnswer",
    "EngineOutput",
    "ExitSettings",
    "ORTScanForImageClassification",
    "apply_exit_rule",
    "export_onnx",
    "share_thread_pool",
]
