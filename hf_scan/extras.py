# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Name the extra that a module needs, where its packages are not installed: [`require_extra`]."""

import sys
from importlib.util import find_spec


# What each extra of `pyproject.toml` brings, by the names that are imported.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("accelerate", "datasets", "evaluate"),
    "calibrate": ("pygad", "scipy"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "plot": ("matplotlib",),
    "ray": ("ray",),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "demo": ("gradio", "matplotlib"),
}


def require_extra(extra: str, user: str) -> None:
    """
    Check that the packages of an extra are installed. They are looked up, and not imported.

    Args:
        extra (`str`): One of [`EXTRAS`].
        user (`str`): What needs it, which begins the message.

    Raises:
        `ImportError`: if a package is missing, with the command that installs it.

    Example:

    ```python
    >>> from hf_scan.extras import require_extra

    >>> require_extra("train", "Training")
    ```
    """
    missing = [name for name in EXTRAS[extra] if not _is_installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f"{user} needs {' and '.join(missing)}, which {verb} not installed. `pip install 'hf_scan[{extra}]'`."
        )


def _is_installed(name: str) -> bool:
    # A loaded module without a specification makes `find_spec` raise, and None stands for one that may not be loaded.
    return sys.modules[name] is not None if name in sys.modules else find_spec(name) is not None


__all__ = ["EXTRAS", "require_extra"]
