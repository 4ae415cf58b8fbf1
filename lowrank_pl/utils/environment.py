"""The machine: processor, memory, devices, time, and the command line of this process."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "available_memory",
    "command_line",
    "describe_machine",
    "free_memory",
    "peak_memory",
    "pick_device",
    "reset_peak_memory",
    "resident_memory",
    "timed",
    "total_memory",
]

Outcome = TypeVar("Outcome")
_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CPU = Path("/proc/cpuinfo")
_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return processor, cores, threads, accelerator and the versions of Python and torch, as JSON values.

    >>> sorted(describe_machine())
    ['accelerator', 'cores', 'processor', 'python', 'threads', 'torch']
    """
    device = torch.device(device)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Return the peak memory of this process since the last reset, in bytes: on the GPU, or resident on the host."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _process_bytes("VmHWM")
    if peak is not None:
        return peak
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device | str = "cpu") -> bool:
    """Let ``peak_memory`` count from now on; return False where the system can only count from the process's start."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _processor() -> str:
    if _CPU.exists():
        for line in _CPU.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; its peak where the system does not report that."""
    resident = _process_bytes("VmRSS")
    return peak_memory() if resident is None else resident


def available_memory() -> int | None:
    """Return the main memory available without swapping, in bytes; None where the system does not report it.

    Within a container or a job of a cluster, no more than its limit has left.
    """
    free = _bytes_in(_MEMORY, "MemAvailable")
    left = [max(0, limit - used) for limit, used in _memory_limits()]
    return min([*left, *([] if free is None else [free])], default=None)


def total_memory() -> int | None:
    """Return the size of main memory in bytes, or the limit of this container or job if that is less.

    None where the system does not report it.
    """
    if not hasattr(os, "sysconf"):
        return None
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(limit for limit, _ in _memory_limits())])


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of every control group around this process that may limit its memory."""
    for line in _GROUPS_OF_PROCESS.read_text(encoding="utf-8").splitlines() if _GROUPS_OF_PROCESS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            # Of the first version, where a huge number is no limit.
            top, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container may show its own group as the top, under the path that the group has outside.
        own = top.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            limit, used = _number_in(folder / names[0]), _number_in(folder / names[1])
            if limit is not None and used is not None:
                # The system drops pages of files as soon as a process needs the memory.
                yield limit, used - _entry_of(folder / "memory.stat", names[2])


def _number_in(path: Path) -> int | None:
    """Return the number in a file; None if it holds a word, such as max, or can't be read."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _entry_of(path: Path, name: str) -> int:
    """Return the entry ``name`` of a file with an entry a line; 0 where there is none."""
    try:
        entries = dict(line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get(name, 0))


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Return the free memory of ``device`` in bytes; None where the system does not report it."""
    device = torch.device(device)
    if device.type != "cuda":
        return available_memory()
    # Memory of freed tensors, which torch's allocator keeps, is free for this process.
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def timed(action: Callable[[], Outcome], device: torch.device | str = "cpu") -> tuple[Outcome, float]:
    """Return the result of ``action`` and the seconds until ``device`` has finished it."""
    device = torch.device(device)
    _wait(device)
    began = time.perf_counter()
    outcome = action()
    _wait(device)
    return outcome, time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _process_bytes(name: str) -> int | None:
    """Return the entry ``name`` of this process's status, in bytes; None where there is no such entry."""
    return _bytes_in(_STATUS, name)


def _bytes_in(path: Path, name: str) -> int | None:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def command_line() -> str:
    """Return the command that started this process, for model cards and summaries."""
    # With `python -m lowrank_pl`, argv[0] is the path of __main__.py.
    program = Path(sys.argv[0]).name.replace("__main__.py", "lowrank")
    return shlex.join([program, *sys.argv[1:]])


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is ``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        ValueError: This machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise NotImplementedError("its tensors have no values")
        return device
    # The exception type depends on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} can't be used here ({str(error).splitlines()[0]}): give auto, cpu or cuda"
        ) from None
