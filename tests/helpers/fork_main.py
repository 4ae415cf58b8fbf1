"""A server that forks processes which have done their imports; started by ``fork_server``, whose file says more.

    python -B fork_main.py SOCKET OWNER IMPORTS

It answers every request, a line of JSON, with two lines: the process's number at once, and its exit status at its end.
It imports nothing but what it is told to, and ends when the process called OWNER is gone.
"""

from __future__ import annotations

import json
import os
import runpy
import socketserver
import sys
import traceback
from contextlib import suppress
from pathlib import Path

# Of this server alone: libraries have read as they were imported where they are.
CACHES = {name: value for name, value in os.environ.items() if name in ("HF_HOME", "HF_MODULES_CACHE")}


class Request(socketserver.StreamRequestHandler):
    """One process, from its start to its end."""

    def handle(self) -> None:
        """Fork it, and say what became of it."""
        asked = json.loads(self.rfile.readline())
        child = os.fork()
        if child == 0:
            os._exit(_run(asked))
        # Whoever asked may be gone before the answer.
        with suppress(BrokenPipeError):
            self.wfile.write(b"%d\n" % child)
            self.wfile.write(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks one process for every connection, which forks the one that was asked for and waits for it."""

    max_children = 1000
    request_queue_size = 100

    def service_actions(self) -> None:
        """End together with the tests; called twice a second."""
        super().service_actions()
        try:
            os.kill(int(sys.argv[2]), 0)
        except ProcessLookupError:
            os._exit(0)


def _run(asked: dict) -> int:
    """Become what was asked for; return its exit status."""
    code: object = 1
    try:
        os.chdir(asked["cwd"])
        # Its parent is who asked for it, as it would be without this server.
        os.getppid = lambda: asked["parent"]
        os.environ.clear()
        os.environ.update(asked["environment"] | CACHES)
        for place, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(asked[place], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        kind, what, *arguments = asked["words"]
        sys.argv = [kind, *arguments]
        if kind == "-m":
            if not hasattr(sys.modules.get(what), "__path__"):
                sys.modules.pop(what, None)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    return code


if __name__ == "__main__":
    # Those who ask wait until the imports are done.
    with Server(sys.argv[1], Request) as server:
        Path(f"{sys.argv[1]}.pid").write_text(str(os.getpid()), encoding="utf-8")
        sys.path[0] = ""
        exec(sys.argv[3])
        server.serve_forever()
