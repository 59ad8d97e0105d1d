"""Processes that are forked to be killed, and the seed that everything random here comes from."""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


SEED = int(os.environ.get("CHAOS_SEED", time.time_ns() % 10**6))
RANDOM = random.Random(SEED)


def start(work: Callable[[], object], log: Path) -> int:
    """Run a function in a forked process, whose output goes into a file; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
    finally:
        os._exit(status)


def finish(child: int, log: Path) -> None:
    """Wait for a process, which has to end well."""
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), log.read_text()[-3000:]
    assert os.WEXITSTATUS(status) == 0, log.read_text()[-3000:]


def kill_after(child: int, seconds: float, log: Path) -> bool:
    """Kill a process after some time, unless it has ended, and well; whether it was killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFEXITED(status), log.read_text()[-3000:]
            assert os.WEXITSTATUS(status) == 0, log.read_text()[-3000:]
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True
