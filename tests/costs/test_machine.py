"""The processes and devices that options name."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.costs.machine import Machine, machine_of
from lowrank_pl.utils.environment import total_memory

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize(("devices", "count"), [("auto", 1), (-1, 1), (2, 2), ("2", 2), ([0, 1], 2), ("0, 1, 3", 3)])
def test_devices_are_counted_as_lightning_takes_them(devices, count):
    assert machine_of("cpu", devices) == Machine("cpu", count, memory=total_memory())


@no_gpu
def test_gpus_that_are_not_here_have_no_known_memory():
    expected = Machine("cuda", 64, nodes=8, sharded=True, memory=None, here=False)
    assert machine_of("cuda", "8", 8, sharded=True) == expected


@no_gpu
def test_auto_is_the_cpu_where_no_gpu_is_here():
    assert machine_of("auto", 1) == Machine("cpu", memory=total_memory())


def test_several_nodes_are_not_here():
    assert not machine_of("cpu", 1, nodes=2).here


@pytest.mark.parametrize(("memory", "expected"), [(2.0, False), (1.9, True), (None, True)])
def test_a_sharded_base_is_scored_from_main_memory_where_a_gpu_lacks_room_for_two(memory, expected):
    machine = Machine("cuda", 8, sharded=True, memory=memory)
    assert machine.scores_from_main_memory(1.0) == expected
    assert not Machine("cuda", 8, memory=memory).scores_from_main_memory(1.0)


@pytest.mark.parametrize("name", ["processes", "nodes"])
def test_a_machine_without_processes_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0: .*at least 1"):
        Machine(**{name: 0})
