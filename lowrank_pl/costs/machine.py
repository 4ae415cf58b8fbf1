"""What the commands do, from their options: the work that ``--dry_run`` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lowrank_pl.costs.probe import MEMORY
from lowrank_pl.costs.workload import Machine
from lowrank_pl.utils.environment import total_memory

__all__ = ["DryRun", "machine_of"]

DryRun = bool | Literal["h100"]
"""Whether to make one; with speeds measured here, or with those assumed for a machine that is not at hand."""


def machine_of(
    device: str, devices: Any = 1, nodes: int = 1, *, speeds: DryRun = True, sharded: bool = False
) -> Machine:
    """Return what a run is spread over, as its options say.

    Args:
        device: ``cpu``, ``cuda``, ``gpu`` or ``auto``, with or without a number. With speeds that are assumed it is a
            GPU in any case.
        devices: How many, or which, as Lightning takes them.
        nodes: Machines.
        speeds: As in ``dry_run``.
        sharded: Whether frozen weights are spread over all.

    Raises:
        ValueError: No number of devices.
    """
    there = torch.cuda.device_count()
    on_gpu = speeds is not True or device.startswith(("cuda", "gpu")) or (device == "auto" and there > 0)
    if on_gpu and speeds is True and not there:
        raise ValueError(
            f"device {device!r} can't be measured here, where there is no GPU: give --dry_run h100 for speeds that are "
            "assumed, or cpu"
        )
    if devices in ("auto", -1, "-1"):
        count = max(1, there) if on_gpu and speeds is True else 1
    elif isinstance(devices, str) and not devices.strip().isdecimal():
        count = len([one for one in devices.strip("[] ").split(",") if one.strip()])
    else:
        count = len(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else int(devices)
    memory: float | None = total_memory()
    if on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory if speeds is True else MEMORY[str(speeds)]
    return Machine("cuda" if on_gpu else "cpu", count * nodes, sharded, memory)
