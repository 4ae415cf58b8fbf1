"""A command of ``lowrank`` that kills itself right before the N-th change that it makes to files.

    python -m tests.faults.dying N RECORD WORD ...

The changes are counted in the main thread and in the current folder. An odd N tears the file that is being written:
half of it is left, as if the signal had come in the middle of the write. RECORD gets one line for every change.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from lowrank_pl.cli.app import main

CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "fsync",
}  # fmt: skip
"""Names of audit events; ``open`` counts if it is for writing."""


class Killer:
    """Counts changes as an audit hook, and ends the process at one of them.

    Args:
        kill_at: The number of the fatal change; 0 for none.
        record: File for one line for every change.
    """

    def __init__(self, kill_at: int, record: Path) -> None:
        self.home, self.main = str(Path.cwd()), threading.main_thread()
        self.kill_at, self.count = kill_at, 0
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        # The file that was opened last, where the file may be cut, and how many bytes it had before.
        self.written: tuple[str, int] | None = None

    def __call__(self, event: str, given: tuple) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or threading.current_thread() is not self.main:
            return
        path = given[0]
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        path = os.path.join(self.home, os.fsdecode(path))  # noqa: PTH118
        # Locks have no content.
        if not path.startswith(f"{self.home}/") or path.endswith(".lock"):
            return
        self.count += 1
        os.write(self.record, f"{event} {os.path.relpath(path, self.home)}\n".encode())
        if self.count == self.kill_at:
            if self.count % 2:
                self.tear()
            os.kill(os.getpid(), signal.SIGKILL)
        if writes:
            kept = Path(path).stat().st_size if given[2] & os.O_APPEND and Path(path).exists() else 0
            self.written = (path, kept)
        elif event == "os.rename":
            self.written = None

    def tear(self) -> None:
        """Cut in half what was written to the file that was opened last, unless it has got its name."""
        if self.written is not None and Path(self.written[0]).exists():
            path, kept = self.written
            os.truncate(path, (Path(path).stat().st_size + kept) // 2)


if __name__ == "__main__":
    kill_at, record, *words = sys.argv[1:]
    killer, fsync = Killer(int(kill_at), Path(record)), os.fsync

    def audited(handle: int) -> None:
        sys.audit("fsync", handle)
        fsync(handle)

    os.fsync = audited
    sys.addaudithook(killer)
    main(words)
