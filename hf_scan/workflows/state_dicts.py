# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Weights of trained classifiers in files of others."""

from pathlib import Path

import torch
from timm.models import load_state_dict


def read_weights(weights: str | Path, name: str) -> dict[str, torch.Tensor]:
    """
    Read a state dictionary from a file, without running code in it.

    Args:
        weights (`str` or `Path`): A `.safetensors` or `.pth` file.
        name (`str`): The model, for messages.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it holds no weights.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; expected the weights of {name!r}.")
    try:
        values: dict[str, torch.Tensor] = load_state_dict(str(path), use_ema=False, device="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip files and safetensors, which have many kinds
        raise ValueError(
            f"{path} cannot be read as weights ({str(error).splitlines()[0] if str(error) else error!r}); expected a "
            "state dictionary in a .safetensors or .pth file."
        ) from error
    return values


__all__ = ["read_weights"]
