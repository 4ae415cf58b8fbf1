"""Errors of the machine's limits are recognised however a library words them."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.utils.machine_limits import explain_limit


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError(28, "No space left on device"), "the disk is full (No"),
        (OSError(122, "Disk quota exceeded", "a.json"), "the disk is full at 'a.json'"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the disk is full"),
        (OSError(27, "File too large"), "a file may not become so large"),
        (MemoryError(), "memory ran out (MemoryError)"),
        (OSError(12, "Cannot allocate memory"), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory ran out"),
    ],
)
def test_limits_are_recognised(error, start):
    assert explain_limit(error).startswith(start)


@pytest.mark.parametrize("error", [KeyError("28"), OSError(13, "Permission denied"), RuntimeError("size of tensor")])
def test_other_errors_are_not(error):
    assert explain_limit(error) is None
