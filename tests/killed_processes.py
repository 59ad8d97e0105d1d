"""Work that is killed between two changes of a folder."""

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any


def killed_before(at: int, work: Callable[[], Any]) -> bool:
    """Run something in a process that is killed before its n-th call that changes a folder; whether it was killed."""
    child = os.fork()
    if child == 0:
        calls = itertools.count()

        def counted(call):
            def run(*args, **kwargs):
                if next(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return run

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
