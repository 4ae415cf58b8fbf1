"""What a run will need, phase by phase: memory, disk, tokens, multiply-adds, and time at given speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lowrank_pl.utils.formatting import duration, gigabytes, table

__all__ = ["Estimate", "Phase", "Speeds", "WorkKind", "held_on_to"]

WorkKind = Literal["forward", "float32", "double", "svd"]
"""Multiply-adds of the model in its own type; of moments in float32; of products and square roots in float64; of
singular value decompositions, each counted as the square of a matrix's smaller side times its larger one."""


@dataclass(frozen=True)
class Speeds:
    """How fast a machine is.

    Args:
        source: Where the figures come from, to be shown.
        multiply_adds: A second, by kind of work.
        disk: Bytes a second to the disk of the caches, and from it.
        link: Bytes a second that a process sends to the others, and receives meanwhile.
    """

    source: str
    multiply_adds: Mapping[WorkKind, float]
    disk: float
    link: float = float("inf")


@dataclass(frozen=True)
class Phase:
    """One stretch of a run.

    Args:
        name: What it is called in tables.
        device: Bytes of device memory of one process by what they hold, all at the same time.
        host: Bytes of main memory of one process, likewise.
        beside: Bytes of main memory of a fresh process that it waits for.
        disk: Bytes that it leaves on disk, by what they hold.
        tokens: Tokens that go through the model, of all processes together.
        work: Multiply-adds of one process by kind.
        read: Bytes that a process reads from disk.
        sent: Bytes that a process sends to others; it receives as many.
    """

    name: str
    device: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    work: Mapping[WorkKind, float] = field(default_factory=dict)
    read: float = 0.0
    sent: float = 0.0

    def seconds(self, speeds: Speeds) -> float:
        """Return how long it takes at ``speeds``, nothing of it at the same time as anything else."""
        computing = sum(amount / speeds.multiply_adds[kind] for kind, amount in self.work.items())
        return computing + (sum(self.disk.values()) + self.read) / speeds.disk + self.sent / speeds.link


@dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Args:
        phases: In their order.
        unified: Whether the device's memory is main memory, as that of a CPU is.
        notes: What is assumed or left out, in sentences.
    """

    phases: Sequence[Phase]
    unified: bool
    notes: Sequence[str] = ()

    def device_bytes(self, phase: Phase) -> float:
        """Return the device memory of a process in ``phase``; 0 on a CPU, which has none of its own."""
        return 0.0 if self.unified else sum(phase.device.values())

    def host_bytes(self, phase: Phase) -> float:
        """Return the main memory of a process in ``phase``, and of the fresh one that it waits for."""
        device = sum(phase.device.values()) if self.unified else 0.0
        return sum(phase.host.values()) + device + sum(phase.beside.values())

    def totals(self) -> dict[str, float]:
        """Return the greatest memory of any phase and the sums of disk and tokens; bytes."""
        return {
            "device_memory": max(map(self.device_bytes, self.phases)),
            "memory": max(map(self.host_bytes, self.phases)),
            "disk": sum(sum(phase.disk.values()) for phase in self.phases),
            "tokens": sum(phase.tokens for phase in self.phases),
            "multiply_adds": sum(sum(phase.work.values()) for phase in self.phases),
            "read": sum(phase.read for phase in self.phases),
            "sent": sum(phase.sent for phase in self.phases),
        }

    def figures(self, speeds: Speeds) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "total": {**self.totals(), "seconds": sum(phase.seconds(speeds) for phase in self.phases)},
            "phases": [{**asdict(phase), "seconds": phase.seconds(speeds)} for phase in self.phases],
            "speeds": asdict(speeds),
            "notes": list(self.notes),
        }

    def text(self, speeds: Speeds) -> str:
        """Return tables of the phases and of what fills the memory of each, for a terminal."""
        parts = [self._phases(speeds), self._parts()]
        parts.append("\n".join([f"speeds: {speeds.source}", *self.notes]))
        return "\n\n".join(parts)

    def _phases(self, speeds: Speeds) -> str:
        total = self.totals()
        columns: dict[str, list[str]] = {
            "phase": [*(phase.name for phase in self.phases), "most, or sum"],
            "GPU memory": _sizes(*map(self.device_bytes, self.phases), total["device_memory"]),
            "RAM": _sizes(*map(self.host_bytes, self.phases), total["memory"]),
            "on disk": _sizes(*(sum(phase.disk.values()) for phase in self.phases), total["disk"]),
            "read": _sizes(*(phase.read for phase in self.phases), total["read"]),
            "sent": _sizes(*(phase.sent for phase in self.phases), total["sent"]),
            "tokens": [_count(count) for count in (*(phase.tokens for phase in self.phases), total["tokens"])],
            "multiply-adds": [f"{sum(phase.work.values()):.1e}" for phase in self.phases]
            + [f"{total['multiply_adds']:.1e}"],
            "time": [duration(phase.seconds(speeds)) for phase in self.phases]
            + [duration(sum(phase.seconds(speeds) for phase in self.phases))],
        }
        # A CPU has no memory of its own, and a process alone sends nothing.
        shown = {head: cells for head, cells in columns.items() if set(cells) != {"-"}}
        return table([*shown], [*zip(*shown.values(), strict=True)], "simple")

    def _parts(self) -> str:
        """Return what fills memory and disk in each phase; what is less than a hundredth of its sum is left out."""
        rows = []
        for phase in self.phases:
            host = {**phase.host, **phase.beside}
            for place, held in (("device", phase.device), ("RAM", host), ("disk", phase.disk)):
                where = "RAM" if place == "device" and self.unified else "GPU" if place == "device" else place
                least = sum(held.values()) / 100
                rows += [(phase.name, where, what, gigabytes(size)) for what, size in held.items() if size > least]
        shown = [("" if n and row[0] == rows[n - 1][0] else row[0], *row[1:]) for n, row in enumerate(rows)]
        return table(("phase", "where", "what", "size"), shown, "simple", align=("left", "left", "left", "right"))


def held_on_to(phases: Sequence[Phase]) -> list[Phase]:
    """Return the phases of a process on a CPU, each with what those before it freed and the C library still holds.

    Most tensors of a forward and backward pass are too small to be given back one by one: a process that was measured
    stayed at the most that it had come to (docs/scaling.md).

    >>> one, two = held_on_to([Phase("one", {"x": 5.0}), Phase("two", {"y": 2.0})])
    >>> one.host, two.host
    ({}, {'freed before, not given back': 3.0})
    """
    found, most = [], 0.0
    for phase in phases:
        own = sum(phase.device.values()) + sum(phase.host.values())
        free = {"freed before, not given back": most - own} if own < most else {}
        found.append(replace(phase, host={**phase.host, **free}))
        most = max(most, own)
    return found


def _sizes(*sizes: float) -> list[str]:
    return [gigabytes(size) for size in sizes]


def _count(count: float) -> str:
    return f"{count:,.0f}" if count else "-"
