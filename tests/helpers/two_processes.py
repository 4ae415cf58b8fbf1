"""Two processes that work together over gloo, for tests."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed

from tests.helpers.fork_server import OURS


def in_two_processes(function, folder, *args, count=2):
    """Run ``function(rank, folder, *args)`` in the processes of one group; an error in any of them fails the test."""
    call = base64.b64encode(pickle.dumps((function, folder, *args))).decode()
    code = f"from tests.helpers.two_processes import join; join({{}}, {count}, {call!r})"
    with TemporaryDirectory() as output:
        for code, printed in ended([["-c", code.format(rank)] for rank in range(count)], Path(output)):
            assert code == 0, printed[-3000:]


def ended(commands, output, *, environments=None, timeout=300):
    """Return exit status and stderr of every command, all of which run at the same time.

    Where one fails, the others get ten seconds to notice.
    """
    processes = []
    environments = environments or [{}] * len(commands)
    for number, (command, environment) in enumerate(zip(commands, environments, strict=True)):
        folder = output / f"process {number}"
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **environment}
        processes.append(OURS.start([sys.executable, *command], output=folder, env=environment))
    try:
        for process in processes:
            process.wait(timeout if all(other.poll() in (None, 0) for other in processes) else 10)
    finally:
        for process in processes:
            process.kill()
    return [(process.wait(), process.printed()[1]) for process in processes]


def torchrun_environments():
    """Return what ``torchrun`` tells each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{**_said_by_torchrun(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for rank in range(2)]


@contextmanager
def as_torchrun_says(rank, count=2):
    """Let Lightning take this process for number ``rank`` of ``count`` that ``torchrun`` has started."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in _said_by_torchrun(rank, count).items():
            patch.setenv(key, value)
        yield


def _said_by_torchrun(rank, count=2):
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "here"}
    return {key: str(value) for key, value in said.items()}


def join(rank, count, call):
    """Join the group as process number ``rank`` and do what ``in_two_processes`` asks for."""
    function, folder, *args = pickle.loads(base64.b64decode(call))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    try:
        function(rank, folder, *args)
    finally:
        torch.distributed.destroy_process_group()
