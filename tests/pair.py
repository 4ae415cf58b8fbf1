"""Two real processes that work together over gloo, for tests."""

from __future__ import annotations

import torch
import torch.distributed
import torch.multiprocessing


def in_two_processes(function, folder, *args):
    """Run ``function(rank, folder, *args)`` in two processes of one group; an error in either fails the test."""
    torch.multiprocessing.spawn(_joined, (function, folder, *args), nprocs=2)


def _joined(rank, function, folder, *args):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        function(rank, folder, *args)
    finally:
        torch.distributed.destroy_process_group()
