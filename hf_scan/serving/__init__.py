# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Answer many callers at once, each image as soon as it leaves the network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .async_engine import AsyncEngine
    from .requests import Answer, DeadlineExceeded, EngineClosed, QueueFull

# Imported lazily: the engine needs neither PyTorch nor a web server.
_IMPORTED_WHEN_USED = {
    "Answer": ".requests",
    "AsyncEngine": ".async_engine",
    "DeadlineExceeded": ".requests",
    "EngineClosed": ".requests",
    "QueueFull": ".requests",
}


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        return getattr(import_module(_IMPORTED_WHEN_USED[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Answer", "AsyncEngine", "DeadlineExceeded", "EngineClosed", "QueueFull"]
