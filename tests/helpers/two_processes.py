"""Two real processes that work together over gloo, for tests."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed
import torch.multiprocessing


def in_two_processes(function, folder, *args):
    """Run ``function(rank, folder, *args)`` in two processes of one group; an error in either fails the test."""
    torch.multiprocessing.spawn(_joined, (function, folder, *args), nprocs=2)


@contextmanager
def as_torchrun_says(rank):
    """Let Lightning take this process for number ``rank`` of two that ``torchrun`` has started."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "here"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in said.items():
            patch.setenv(key, str(value))
        yield


def _joined(rank, function, folder, *args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        function(rank, folder, *args)
    finally:
        torch.distributed.destroy_process_group()
