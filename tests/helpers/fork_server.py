"""Fresh processes in a fraction of the time: each is forked from one that has done the imports and nothing else.

Exports are checked, and then scored, by processes of their own, which spend most of their time on imports. What a
forked one sees is what a new one would. Where a test has changed what libraries read as they are imported, it gets a
new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STRANGER = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"
"""What a process that knows nothing of this package imports to load an export."""
OURS = "import lowrank_pl.report.finish; from transformers import LlamaForCausalLM"

_SERVER = """
import json, os, runpy, sys, traceback
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(asked["cwd"])
            os.environ.clear()
            os.environ.update(asked["environment"])
            for place, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(asked[place], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            kind, what, *arguments = asked["words"]
            sys.argv = [kind, *arguments]
            if kind == "-m":
                sys.modules.pop(what, None)
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            else:
                exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_READ_BY_IMPORTS = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "PYTHON", "PATH", "HOME")


class ForkServer:
    """A process that forks; it starts when it is first asked.

    Args:
        imports: Python code that it runs first.
    """

    def __init__(self, imports: str) -> None:
        self._code = imports + _SERVER
        self._server: subprocess.Popen[str] | None = None
        self._owner, self._read = 0, dict[str, str]()

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        capture_output: bool = False,
        **options: Any,
    ) -> Any:
        """Return what ``subprocess.run`` would for ``python -B -c TEXT ...`` or ``python -m MODULE ...``."""
        environment = dict(env or os.environ)
        read = {key: value for key, value in environment.items() if key.startswith(_READ_BY_IMPORTS)}
        # One whose parent was killed at work has an answer left for nobody.
        if self._server is None or self._owner != os.getpid():
            self._read, self._owner = read, os.getpid()
            self._server = subprocess.Popen(
                [sys.executable, "-B", "-c", self._code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment,
            )  # fmt: skip
        if read != self._read:
            return subprocess.run(command, env=env, cwd=cwd, capture_output=capture_output, **options)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with TemporaryDirectory() as folder:
            places = {name: str(Path(folder, name)) for name in ("out", "err")}
            words = [word for word in command[1:] if word != "-B"]
            asked = {"words": words, "cwd": str(Path(cwd or "").resolve()), "environment": environment, **places}
            print(json.dumps(asked), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            said = [Path(place).read_text(encoding="utf-8") for place in places.values()]
        if not capture_output:
            for number, text in zip((1, 2), said, strict=True):
                os.write(number, text.encode())
        return subprocess.CompletedProcess(command, code, *said)

    def stop(self) -> None:
        """End the process."""
        if self._server is not None:
            with self._server:
                pass
