"""Python in processes of its own, which need not import PyTorch anew: half of the time that most of them took."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path


# What reads nothing of the environment that tests change, as the Hub's client and all that imports it do.
PRELOADED = ["torch", "torchvision", "scipy.optimize", "sklearn", "pandas", "pyarrow", "matplotlib", "PIL.Image"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, *PRELOADED])


def run_forked(
    code: str | Path, arguments: Sequence[object], env: Mapping[str, str], cwd: str | Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """
    Run a program or a script, as `subprocess.run` would with the interpreter, of whose modules some are there already.

    Args:
        code: A program, or a script's path.
        arguments: `sys.argv[1:]`.
        env: The environment.
        cwd: Where it runs.
        timeout: Seconds after which it is killed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in ("stdout", "stderr")]
        given = (code, [str(argument) for argument in arguments], dict(env), str(cwd), files)
        process = FORKS.Process(target=_child, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(str(code), timeout, *(file.read_bytes() for file in files))
        said = [file.read_text() for file in files]
        return subprocess.CompletedProcess([str(code), *given[1]], process.exitcode, *said)


def _child(code: str | Path, arguments: list[str], env: dict[str, str], cwd: str, files: list[Path]) -> None:
    for stream, file in ((1, files[0]), (2, files[1])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [cwd if isinstance(code, str) else str(code.parent), *paths, *sys.path]
    sys.argv[:] = ["-c" if isinstance(code, str) else str(code), *arguments]
    status = 0
    try:
        if isinstance(code, str):
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(str(code), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
