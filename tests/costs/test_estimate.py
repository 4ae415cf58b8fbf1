"""Sums, peaks and tables of phases."""

from __future__ import annotations

import pytest

from lowrank_pl.costs.estimate import Estimate, Phase, Speeds, hold_freed_memory
from lowrank_pl.costs.machine import Machine

SPEEDS = Speeds("nowhere", {"model": 2.0, "disk": 4.0})
PHASES = [
    Phase("first", {"x": 5e9}, {"y": 1e9}, disk={"z": 8e9}, work={"model": 4.0, "disk": 8.0}),
    Phase("second", {"x": 3e9}, {"y": 2e9}, {"w": 4e9}, waiting=1e9),
]


def test_time_is_that_of_all_work_and_of_the_disk():
    assert Phase("p", disk={"z": 8.0}, work={"model": 4.0, "disk": 8.0}).seconds(SPEEDS) == 2 + 2 + 2


def test_a_gpu_has_memory_of_its_own():
    found = Estimate(PHASES, Machine("cuda"))
    assert [found.device_bytes(phase) for phase in PHASES] == [5e9, 3e9]
    assert [found.host_bytes(phase) for phase in PHASES] == [1e9, 6e9]


def test_a_cpu_computes_in_main_memory():
    found = Estimate(PHASES, Machine("cpu"))
    assert [found.device_bytes(phase) for phase in PHASES] == [0, 0]
    assert [found.host_bytes(phase) for phase in PHASES] == [6e9, 9e9]


def test_a_node_holds_what_works_and_what_waits():
    found = Estimate(PHASES, Machine("cuda", 4, nodes=2))
    assert [found.node_bytes(phase) for phase in PHASES] == [2 * 1e9, 6e9 + 1e9]


def test_peaks_and_totals_of_the_figures():
    found = Estimate(PHASES, Machine("cuda", 2))
    assert found.peak(found.host_bytes).name == "second"
    total = found.figures(SPEEDS)["total"]
    assert total == {
        "device_memory": 5e9, "memory": 6e9, "node_memory": 7e9, "disk": 8e9, "seconds": 4 + 8e9 / 4,
    }  # fmt: skip


def test_what_a_phase_needs_on_disk_for_a_while_stands_beside_what_is_left_by_then():
    phases = [Phase("a", disk={"x": 1.0}, scratch={"y": 9.0}), Phase("b", disk={"x": 5.0}, scratch={"y": 3.0})]
    assert Estimate(phases, Machine()).disk_bytes() == 10
    assert Estimate(phases[::-1], Machine()).disk_bytes() == 15


def test_no_time_is_told_without_speeds():
    found = Estimate(PHASES, Machine("cuda"))
    assert "time" in found.phase_table(SPEEDS)
    assert "time" not in found.phase_table(None)
    assert "seconds" not in found.figures(None)["total"]


def test_small_parts_are_left_out_of_the_table():
    found = Estimate([Phase("p", {"large": 99.5e9, "small": 0.5e9})], Machine("cuda"))
    assert "large" in found.part_table()
    assert "small" not in found.part_table()


def test_a_cpu_keeps_freed_memory():
    first, then = hold_freed_memory([Phase("a", {"x": 2.0}, {"y": 3.0}), Phase("b", {"x": 1.0}, waiting=0.5)])
    assert first.host == {"y": 3.0}
    assert then.host == {"freed before, not given back": pytest.approx(4.0)}
    assert then.waiting == 5.0
