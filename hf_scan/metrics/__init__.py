# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Modules for `evaluate`, used directly or by `evaluate.load` with the path of their folder, also offline."""

from ..extras import require_extra


try:
    from .scan_accuracy.scan_accuracy import ScanAccuracy
except ImportError:
    require_extra("train", "`hf_scan.metrics`")
    raise


__all__ = ["ScanAccuracy"]
