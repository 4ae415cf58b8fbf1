"""The processes and the devices that a run is spread over, as a command's options name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowrank_pl.models.offload import too_large
from lowrank_pl.utils.checks import check_counts
from lowrank_pl.utils.environment import total_memory

__all__ = ["Machine", "machine_of"]


@dataclass(frozen=True)
class Machine:
    """The processes of a run, one a device.

    Args:
        device: ``cpu`` or ``cuda``.
        processes: How many, on all nodes together.
        nodes: How many nodes they are spread over.
        sharded: Whether the frozen weights are spread over the processes (FSDP2) instead of held whole by each.
        memory: Bytes of a device's memory (main memory for a CPU); None where it is not known.
        here: Whether the processes run on this machine, so that its speed and its free memory count.

    Raises:
        ValueError: No process or no node.
    """

    device: str = "cpu"
    processes: int = 1
    nodes: int = 1
    sharded: bool = False
    memory: float | None = None
    here: bool = True

    def __post_init__(self) -> None:
        check_counts({"processes": self.processes, "nodes": self.nodes})

    @property
    def on_cpu(self) -> bool:
        """Whether the device computes in main memory."""
        return self.device == "cpu"

    @property
    def processes_of_a_node(self) -> int:
        """Processes that share the main memory of one node."""
        return -(-self.processes // self.nodes)

    def scores_from_main_memory(self, weights: float) -> bool:
        """Return whether a sharded run on a base of ``weights`` bytes scores its models from main memory.

        A device of unknown memory counts as too small.
        """
        return self.sharded and not self.on_cpu and (self.memory is None or too_large(weights, self.memory))

    def describe(self) -> str:
        """Return the processes in words.

        >>> Machine("cuda", 16, nodes=2, sharded=True, here=False).describe()
        '16 processes on 2 nodes, one a GPU, weights sharded'
        """
        count = "one process" if self.processes == 1 else f"{self.processes} processes"
        nodes = "" if self.nodes == 1 else f" on {self.nodes} nodes"
        where = " on the CPU" if self.on_cpu else " on a GPU" if self.processes == 1 else ", one a GPU"
        return f"{count}{nodes}{where}{', weights sharded' if self.sharded else ''}"


def machine_of(
    device: str, devices: int | str | Sequence[int] = 1, nodes: int = 1, *, sharded: bool = False
) -> Machine:
    """Return the machine that the options of a command name, whether or not it is this one.

    Args:
        device: ``cpu``, ``cuda``, ``gpu`` or ``auto``, with or without a number. ``auto`` is a GPU where one is here.
        devices: How many devices a node has, or which, as Lightning takes them.
        nodes: How many nodes.
        sharded: Whether frozen weights are spread over all processes.

    Raises:
        ValueError: No process or no node.
    """
    gpus = torch.cuda.device_count()
    on_gpu = device.startswith(("cuda", "gpu")) or (device == "auto" and gpus > 0)
    if devices in ("auto", -1, "-1"):
        count = max(1, gpus) if on_gpu else 1
    elif isinstance(devices, str) and not devices.strip().isdecimal():
        count = len([one for one in devices.strip("[] ").split(",") if one.strip()])
    else:
        count = int(devices) if isinstance(devices, (int, str)) else len(devices)
    here = nodes == 1 and (not on_gpu or count <= gpus)
    if on_gpu:
        memory = float(torch.cuda.get_device_properties(0).total_memory) if here else None
    else:
        memory = total_memory() if here else None
    return Machine("cuda" if on_gpu else "cpu", count * nodes, nodes, sharded, memory, here)
