# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Modules for `evaluate`, used directly or by `evaluate.load` with the path of their folder, also offline."""

from .scan_accuracy.scan_accuracy import ScanAccuracy


__all__ = ["ScanAccuracy"]
