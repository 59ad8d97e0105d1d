# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Export networks to ONNX, and run them with NumPy and ONNX Runtime or OpenVINO, without PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..extras import require_extra


if TYPE_CHECKING:
    from .engine import EngineOutput, ExportedScan
    from .export import export_onnx
    from .numpy_rule import AdaptiveAnswer, ExitSettings, apply_exit_rule
    from .onnx_runtime import ORTScanForImageClassification, share_thread_pool, threaded_options
    from .openvino_runtime import OVScanForImageClassification

# Imported lazily: the export needs PyTorch and each engine its own runtime.
_IMPORTED_WHEN_USED = {
    "AdaptiveAnswer": ".numpy_rule",
    "EngineOutput": ".engine",
    "ExitSettings": ".numpy_rule",
    "ExportedScan": ".engine",
    "ORTScanForImageClassification": ".onnx_runtime",
    "OVScanForImageClassification": ".openvino_runtime",
    "apply_exit_rule": ".numpy_rule",
    "export_onnx": ".export",
    "share_thread_pool": ".onnx_runtime",
    "threaded_options": ".onnx_runtime",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        try:
            return getattr(import_module(_IMPORTED_WHEN_USED[name], __name__), name)
        except ImportError:
            require_extra("openvino" if name.startswith("OV") else "onnx", f"`hf_scan.runtime.{name}`")
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaptiveAnswer",
    "EngineOutput",
    "ExitSettings",
    "ExportedScan",
    "ORTScanForImageClassification",
    "OVScanForImageClassification",
    "apply_exit_rule",
    "export_onnx",
    "share_thread_pool",
    "threaded_options",
]
