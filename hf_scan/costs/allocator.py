# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Settings of glibc's allocator, which decide whether the memory of a batch is there for the next one."""

import ctypes
import os
import platform


# Bytes that are kept, and below which memory comes from the heap rather than from a mapping of its own.
KEPT = 1_000_000_000
LARGEST_FROM_HEAP = 32 * 1024 * 1024  # the most that every version of glibc accepts
VARIABLES = {"MALLOC_TRIM_THRESHOLD_": str(KEPT), "MALLOC_MMAP_THRESHOLD_": str(KEPT)}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

_kept = False


def keep_freed_memory() -> bool:
    """
    Have glibc keep the memory that a batch frees for the next one. Otherwise it goes back to the system and is mapped
    and cleared again, for large batches at each layer. It holds for this process; in a service, set the environment
    variables of [`allocator_hint`] instead.

    Returns:
        `bool`: whether it does now, which other C libraries than glibc cannot.

    Source: the manual page mallopt(3).
    """
    global _kept
    if not _has_glibc():
        return False
    libc = ctypes.CDLL(None)
    _kept = bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP))
    return _kept


def allocator_hint() -> str | None:
    """Return which settings of the environment would keep memory between batches, or `None` where it is kept."""
    if _kept or not _has_glibc() or all(name in os.environ for name in VARIABLES):
        return None
    settings = " ".join(f"{name}={value}" for name, value in VARIABLES.items())
    return (
        "glibc gives the memory of each batch back to the system, which slows large batches down and makes times "
        f"vary. Start the process with {settings}, or call `hf_scan.costs.keep_freed_memory()` first."
    )


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


__all__ = ["allocator_hint", "keep_freed_memory"]
