"""A Jupyter kernel, forked from a process that has done its imports: ``python fork_kernel.py CONNECTION_FILE``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    from tests.helpers.fork_server import OURS

    with TemporaryDirectory() as output:
        kernel = OURS.start([sys.executable, "-m", "ipykernel_launcher", "-f", sys.argv[1]], output=Path(output))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda got, _: kernel.send_signal(got))
        sys.exit(kernel.wait())
