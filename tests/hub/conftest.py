"""The Hub of `server.py` for tests, and clients of it in processes of their own.

The client reads its environment once, when it is imported: a process speaks to one Hub, as one user, with one cache.
"""

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..forked import run_forked
from .server import HubServer, report


ROOT = Path(__file__).parent.parent.parent

# What of the environment would lead the client elsewhere, or make it somebody else.
LEADS_ASTRAY = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "XDG_")


class Hub(HubServer):
    """The server, and clients of it: `hub.run("import huggingface_hub ...", user="alice")`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._folders = 0

    def environment(self, user: str | None = "alice", cache: Path | None = None) -> dict[str, str]:
        """Of a client. `user` is a name of `tokens`, None for a stranger, or a token itself."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(LEADS_ASTRAY) and not name.lower().endswith("_proxy")
        }
        kept |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache or self.new_folder("home")),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # There is no such storage here. To upload folders its way, switch it on and set `hub.large = None`.
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        if user is not None:
            kept["HF_TOKEN"] = self.tokens.get(user, user)
        return kept

    def new_folder(self, name: str) -> Path:
        self._folders += 1
        folder = self.folder / f"{name}-{self._folders}"
        folder.mkdir(parents=True)
        return folder

    def run(
        self,
        code: str | Path,
        *arguments: object,
        user: str | None = "alice",
        cache: Path | None = None,
        expect_error: bool = False,
        timeout: float = 240,
        **env: str | None,
    ) -> Any:
        """Runs Python in a new process, with `arguments` in `sys.argv[1:]`.

        Args:
            code: A program, or a script (its path from the root of the repository).
            user: Who it is: a name of `tokens`, None for a stranger, or a token itself.
            cache: Its HF_HOME. By default a new one: a machine that has seen nothing.
            expect_error: Whether it has to fail.
            env: Further variables; None removes one.

        Returns:
            The process, or what it wrote to stderr if it had to fail.
        """
        environment = self.environment(user, cache)
        for name, value in env.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        program = textwrap.dedent(code) if isinstance(code, str) else ROOT / code
        done = run_forked(program, arguments, environment, self.folder, timeout)
        said = f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}\n{report(self.requests[-40:])}"
        assert (done.returncode != 0) == expect_error, said
        return done.stderr if expect_error else done


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with two users and nothing on it."""
    hub = Hub(tmp_path / "hub")
    hub.folder.mkdir()
    hub.start()
    yield hub
    hub.stop()
    assert not hub.errors, "\n".join(hub.errors)
    # Else the test would have shown nothing.
    unmet = [rule for rule in hub.rules if rule.hits == 0]
    assert not unmet, f"These never happened: {unmet}\n{report(hub.requests)}"
