"""The environment that makes plain networks fastest, too. A process reads it when it starts."""

import os
import sys


# glibc keeps the memory that a batch takes for the next one, and PyTorch's compiler lays weights out beforehand.
TUNING = {
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "TORCHINDUCTOR_FREEZING": "1",
}


def restart_tuned() -> None:
    """Start this process anew with the environment, unless it has it. Call it before anything else is imported."""
    if any(os.environ.get(name) != value for name, value in TUNING.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNING})
