"""Processes in a fraction of the time: each is forked from a server that has done the imports and nothing else.

Most of what a test's process does is import: 5 to 10 s, where its work takes one. What a forked process sees is what a
new one would. A test gets a new process where it is about imports or about the program as a user starts it, and where
it has changed what libraries read as they are imported.

All workers of pytest-xdist share the servers, each of which starts when it is first asked.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from tests.helpers import ROOT

__all__ = ["FRESH", "OURS", "STRANGER", "ForkServer", "Forked", "fork_fresh_processes", "new_processes", "serving"]

_FOLDER = "LOWRANK_TEST_SERVERS"
_MAIN = str(Path(__file__).with_name("fork_main.py"))
_READ_BY_IMPORTS = ("HF_", "TRANSFORMERS_", "TORCH_", "OMP_", "MKL_", "PYTHON", "PATH", "HOME")


class Forked:
    """A process that a server has forked, to be used like a ``subprocess.Popen`` that writes to files.

    Args:
        server: The socket of the server.
        command: As for ``ForkServer.run``.
        environment: Its whole environment.
        output: Folder for the files ``out`` and ``err``, which hold what it writes.
        cwd: The folder that it works in.
    """

    def __init__(
        self, server: Path, command: Sequence[str], environment: Mapping[str, str], output: Path, cwd: Path | None
    ) -> None:
        self.returncode: int | None = None
        self._places = [output / name for name in ("out", "err")]
        out, err = map(str, self._places)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        self._answers = self._connection.makefile("rw")
        words = [word for word in command[1:] if word != "-B"]
        asked = {"words": words, "cwd": str(Path(cwd or "").resolve()), "environment": {**environment}}
        asked["parent"] = os.getpid()
        print(json.dumps({**asked, "out": out, "err": err}), file=self._answers, flush=True)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        with suppress(TimeoutError):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status once the process has ended.

        Raises:
            TimeoutError: It has not after ``timeout`` seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        self.send_signal(signal.SIGKILL)

    def printed(self) -> list[str]:
        """Return what the process wrote to stdout and to stderr."""
        return [place.read_text(encoding="utf-8", errors="replace") for place in self._places]


class ForkServer:
    """A server of processes.

    Args:
        name: What its socket is called.
        imports: Python code that it runs first.
    """

    def __init__(self, name: str, imports: str) -> None:
        self._name, self._imports = name, imports

    def start(
        self,
        command: Sequence[str],
        *,
        output: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Forked:
        """Return the process that runs ``python -B -c TEXT ...`` or ``python -m MODULE ...``, just started."""
        return Forked(self._socket(), command, {**(env or os.environ)}, output, cwd)

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        capture_output: bool = False,
        timeout: float | None = None,
        **options: Any,
    ) -> Any:
        """Return what ``subprocess.run`` would for ``python -B -c TEXT ...`` or ``python -m MODULE ...``."""
        if _read_by_imports(env or os.environ) != _read_by_imports(os.environ):
            options |= {"env": env, "cwd": cwd, "capture_output": capture_output, "timeout": timeout}
            return subprocess.run(command, **options)
        with TemporaryDirectory() as folder:
            process = self.start(command, output=Path(folder), env=env, cwd=cwd)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            printed = process.printed()
        if not capture_output:
            for number, text in zip((1, 2), printed, strict=True):
                os.write(number, text.encode())
        return subprocess.CompletedProcess(command, code, *printed)

    def _socket(self) -> Path:
        """Return the server's socket; the first of all tests to ask starts the server."""
        folder = Path(os.environ[_FOLDER])
        place = folder / self._name
        with (folder / f"{self._name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                command = [sys.executable, "-B", _MAIN, str(place), os.environ[f"{_FOLDER}_OWNER"], self._imports]
                # Nobody's caches: what a test leaves there, no other run finds.
                own = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
                nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1)]
                # Nobody waits for it: the one that starts it may be gone before the tests are over.
                os.posix_spawn(sys.executable, command, {**os.environ, **own}, file_actions=nothing, setsid=True)
                while not place.with_suffix(".pid").exists():
                    time.sleep(0.01)
        return place


def _read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(_READ_BY_IMPORTS)}


@contextmanager
def serving() -> Iterator[None]:
    """Let the servers be used inside the block; where one outside has them already, these are used."""
    if _FOLDER in os.environ:
        yield
        return
    with TemporaryDirectory() as folder:
        os.environ |= {_FOLDER: folder, f"{_FOLDER}_OWNER": str(os.getpid())}
        try:
            yield
        finally:
            del os.environ[_FOLDER], os.environ[f"{_FOLDER}_OWNER"]
            for place in Path(folder).glob("*.pid"):
                os.kill(int(place.read_text(encoding="utf-8")), signal.SIGTERM)


STRANGER = ForkServer(
    "stranger", "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"
)
"""Its processes know nothing of this package."""
OURS = ForkServer(
    "ours",
    f"import sys; sys.path.append({str(ROOT)!r})\n"
    "import lightning.pytorch, lowrank_pl.cli.fit, matplotlib.pyplot, pytest, torch.distributed.tensor\n"
    "from transformers import LlamaForCausalLM\n"
    "from tests.helpers.fork_server import fork_fresh_processes\n"
    "fork_fresh_processes()",
)
"""Its processes have imported this package."""

FRESH = {"lowrank_pl.export.reload": STRANGER, "lowrank_pl.report.finish": OURS}
"""The modules that start a process which is new for a reason, and what such a process knows."""


def fork_fresh_processes() -> None:
    """Let the processes that check and score exports be forked from now on."""
    for module, server in FRESH.items():
        import_module(module).subprocess = SimpleNamespace(run=server.run)  # type: ignore[attr-defined]


@contextmanager
def new_processes() -> Iterator[None]:
    """Let exports be checked and scored by new processes inside the block."""
    for module in FRESH:
        import_module(module).subprocess = subprocess  # type: ignore[attr-defined]
    try:
        yield
    finally:
        fork_fresh_processes()
