"""What a run needs, phase by phase: memory by part and process, disk, and time at measured speeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from lowrank_pl.costs.machine import Machine
from lowrank_pl.utils.formatting import duration, gigabytes, table

__all__ = ["Estimate", "Phase", "Speeds", "WorkKind", "hold_freed_memory"]

WorkKind = Literal["model", "float32", "float64", "svd", "disk"]
"""Multiply-adds of the model in its own type, of sums of moments in float32, of products and square roots in float64,
and of singular value decompositions (the square of a matrix's smaller side times its larger side); bytes to and from
disk."""


@dataclass(frozen=True)
class Speeds:
    """How fast this machine was when it was measured.

    Args:
        source: The machine in words.
        rates: Work a second, by kind.
    """

    source: str
    rates: Mapping[WorkKind, float]


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Args:
        name: Its name in tables.
        device: Bytes of device memory of one process, by what they hold at the same time.
        host: Bytes of main memory of one process, by what they hold at the same time.
        fresh: Bytes of main memory of a fresh process that this process starts and waits for.
        disk: Bytes that stay on disk, by what they hold; those of all processes.
        work: Work of one process by kind; bytes of ``disk`` are not counted again.
        waiting: Bytes of main memory of every other process, where the first process works alone; None where all work.
        scratch: Bytes on disk that are gone after the phase, by what they hold; those of all processes.
    """

    name: str
    device: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)
    fresh: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)
    work: Mapping[WorkKind, float] = field(default_factory=dict)
    waiting: float | None = None
    scratch: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, speeds: Speeds) -> float:
        """Return the time at ``speeds``, with no two kinds of work at the same time."""
        working = sum(amount / speeds.rates[kind] for kind, amount in self.work.items())
        return working + sum(self.disk.values()) / speeds.rates["disk"]


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Args:
        phases: The phases in their order.
        machine: The processes that share the work.
        notes: What is assumed or left out, in sentences.
    """

    phases: Sequence[Phase]
    machine: Machine
    notes: Sequence[str] = ()

    def device_bytes(self, phase: Phase) -> float:
        """Return the device memory of one process in ``phase``; 0 on a CPU, which has no memory of its own."""
        return 0.0 if self.machine.on_cpu else sum(phase.device.values())

    def host_bytes(self, phase: Phase) -> float:
        """Return the main memory of one process in ``phase``, that of its fresh process included."""
        device = sum(phase.device.values()) if self.machine.on_cpu else 0.0
        return device + sum(phase.host.values()) + sum(phase.fresh.values())

    def node_bytes(self, phase: Phase) -> float:
        """Return the main memory of all processes of one node in ``phase``."""
        others = self.machine.processes_of_a_node - 1
        own = self.host_bytes(phase)
        return own + others * (own if phase.waiting is None else phase.waiting)

    def disk_bytes(self) -> float:
        """Return the most bytes that are on disk: what phases leave there, and what one needs beside it."""
        left = [*accumulate(sum(phase.disk.values()) for phase in self.phases)]
        return max(so_far + sum(phase.scratch.values()) for so_far, phase in zip(left, self.phases, strict=True))

    def seconds(self, speeds: Speeds) -> float:
        """Return the time of all phases."""
        return sum(phase.seconds(speeds) for phase in self.phases)

    def peak(self, size: Callable[[Phase], float]) -> Phase:
        """Return the first phase of the greatest ``size``."""
        return max(self.phases, key=size)

    def figures(self, speeds: Speeds | None) -> dict[str, Any]:
        """Return everything as JSON values; no time without ``speeds``."""

        def timed(seconds: Callable[[Speeds], float]) -> dict[str, float]:
            return {} if speeds is None else {"seconds": seconds(speeds)}

        return {
            "total": {
                "device_memory": max(map(self.device_bytes, self.phases)),
                "memory": max(map(self.host_bytes, self.phases)),
                "node_memory": max(map(self.node_bytes, self.phases)),
                "disk": self.disk_bytes(),
                **timed(self.seconds),
            },
            "phases": [{**asdict(phase), **timed(phase.seconds)} for phase in self.phases],
            "machine": asdict(self.machine),
            "speeds": None if speeds is None else asdict(speeds),
            "notes": list(self.notes),
        }

    def phase_table(self, speeds: Speeds | None) -> str:
        """Return a table of memory and disk by phase, and of time where ``speeds`` are given."""
        several = self.machine.processes > 1
        columns: dict[str, list[str]] = {
            "phase": [phase.name for phase in self.phases],
            "GPU memory": [gigabytes(self.device_bytes(phase)) for phase in self.phases],
            "RAM": [gigabytes(self.host_bytes(phase)) for phase in self.phases],
            "RAM of a node": [gigabytes(self.node_bytes(phase)) if several else "-" for phase in self.phases],
            "disk": [gigabytes(sum(phase.disk.values()) + sum(phase.scratch.values())) for phase in self.phases],
            "time": ["-" if speeds is None else duration(phase.seconds(speeds)) for phase in self.phases],
        }
        shown = {head: cells for head, cells in columns.items() if set(cells) != {"-"}}
        return table([*shown], [*zip(*shown.values(), strict=True)], "simple")

    def part_table(self) -> str:
        """Return a table of what fills memory and disk; parts below a hundredth of their sum are left out."""
        rows = [(phase.name, *part) for phase in self.phases for part in self._parts(phase)]
        shown = [("" if n and row[0] == rows[n - 1][0] else row[0], *row[1:]) for n, row in enumerate(rows)]
        return table(("phase", "where", "what", "size"), shown, "simple", align=("left", "left", "left", "right"))

    def _parts(self, phase: Phase) -> Iterator[tuple[str, str, str]]:
        where = "RAM" if self.machine.on_cpu else "GPU"
        for place, held in (
            (where, phase.device),
            ("RAM", {**phase.host, **phase.fresh}),
            ("disk", {**phase.disk, **phase.scratch}),
        ):
            least = sum(held.values()) / 100
            yield from ((place, what, gigabytes(size)) for what, size in held.items() if size > least)


def hold_freed_memory(phases: Sequence[Phase]) -> list[Phase]:
    """Return the phases of a process on a CPU, each with the memory that earlier phases freed and the process keeps.

    Most tensors of a forward and backward pass are too small for the C library to give them back one by one: a process
    that was measured stayed at the most that it had held.

    >>> one, two = hold_freed_memory([Phase("one", {"x": 5.0}), Phase("two", {"y": 2.0}, waiting=1.0)])
    >>> two.host, two.waiting
    ({'freed before, not given back': 3.0}, 5.0)
    """
    found, most = [], 0.0
    for phase in phases:
        own = sum(phase.device.values()) + sum(phase.host.values())
        freed = {"freed before, not given back": most - own} if own < most else {}
        waiting = None if phase.waiting is None else max(phase.waiting, most)
        found.append(replace(phase, host={**phase.host, **freed}, waiting=waiting))
        most = max(most, own)
    return found
