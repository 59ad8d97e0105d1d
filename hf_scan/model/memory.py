# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Find the largest batch that fits into memory when one does not."""

from collections.abc import Callable
from typing import TypeVar

import torch


Result = TypeVar("Result")


def within_memory(run: Callable[[int], Result], batch_size: int) -> Result:
    """
    Run something for a batch. If memory does not suffice, find the largest number of samples that fits, by halving,
    and raise an error that names it.

    Args:
        run (`Callable[[int], Result]`): Runs it for the first samples of the batch, as many as it is given.
        batch_size (`int`): How many there are.

    Raises:
        `RuntimeError` or `MemoryError`: of the kind that was raised, with what was raised and the size that fits.
    """
    try:
        return run(batch_size)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        kind, message = type(error), str(error)
    # Not in the handler, where the traceback keeps what has been computed.
    size = batch_size // 2
    while size:
        try:
            run(size)
            break
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
        size //= 2
    fits = f"{size} fit; use batches of at most that size" if size else "not even one fits"
    raise kind(f"Memory does not suffice for a batch of {batch_size}: {fits}. ({message})")


def _is_out_of_memory(error: Exception) -> bool:
    # An accelerator's has a class of its own; PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


__all__ = ["Result", "within_memory"]
