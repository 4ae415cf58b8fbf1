"""What figures were measured on, and the memory that a piece of work took."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from lowrank_pl.utils import environment
from lowrank_pl.utils.environment import (
    available_memory,
    describe_machine,
    peak_memory,
    pick_device,
    reset_peak_memory,
    total_memory,
)

V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_the_description_says_what_this_is():
    found = describe_machine()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["accelerator"] is None
    assert found["processor"]


def test_the_peak_counts_from_the_last_reset_where_the_system_can():
    resets = reset_peak_memory()
    assert resets == Path("/proc/self/clear_refs").exists()
    before = peak_memory()
    block = torch.ones(50_000_000)  # 200 MB
    high = peak_memory()
    del block
    assert high >= before
    assert peak_memory() == pytest.approx(high, rel=0.02)
    if resets:
        assert high - before > 150e6
        assert reset_peak_memory()
        assert peak_memory() < high - 150e6


def test_without_a_mark_to_reset_the_peak_is_the_process_one(monkeypatch, tmp_path):
    monkeypatch.setattr("lowrank_pl.utils.environment._CLEAR", tmp_path / "absent" / "clear_refs")
    monkeypatch.setattr("lowrank_pl.utils.environment._STATUS", tmp_path / "absent")
    assert not reset_peak_memory()
    assert peak_memory() > 50e6


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_a_device_that_is_there_is_taken(asked):
    assert pick_device(asked).type in {"auto": ("cpu", "cuda"), "cpu": ("cpu",)}[asked]


@pytest.mark.parametrize("name", ["tpu9", "meta"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=name):
        pick_device(name)


@pytest.mark.parametrize(
    ("groups", "limits", "names", "found"),
    [
        ("0::/job/step\n", {"job/step": ("max", 70), "job": (100, 80)}, V2, (100, 50)),
        ("0::/job\n", {"job": (100, 120)}, V2, (100, 10)),
        ("0::/\n", {"": (90, 80)}, V2, (90, 40)),
        ("4:memory:/job\n0::/\n", {"memory/job": (100, 60), "memory": (2**63 - 4096, 10**12)}, V1, (100, 70)),
        # The path that the group has outside of the container.
        ("4:memory:/docker/1f\n", {"memory": (100, 60)}, V1, (100, 70)),
    ],
)
def test_a_container_or_job_has_no_more_memory_than_its_limit(monkeypatch, tmp_path, groups, limits, names, found):
    for group, (limit, used) in limits.items():
        folder = tmp_path / "root" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} 30\n")
    (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(environment, "_GROUPS", tmp_path / "root")
    monkeypatch.setattr(environment, "_GROUPS_OF_PROCESS", tmp_path / "groups")
    assert (total_memory(), available_memory()) == found
