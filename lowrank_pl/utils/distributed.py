"""Processes that work together: shares of the work, sums over all, and who goes first. Alone, each does everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

__all__ = [
    "LostProcessError",
    "barrier",
    "broadcast_from_first",
    "cooperating",
    "explain_lost_process",
    "is_first",
    "my_balanced_share",
    "my_share",
    "one_process_at_a_time",
    "sum_across_processes",
    "total_across_processes",
    "world_size",
]

Item = TypeVar("Item")


_COOPERATING = ContextVar("cooperating", default=False)


@contextmanager
def cooperating() -> Iterator[None]:
    """Let all processes of ``torch.distributed`` share the work that is asked for inside the block.

    All of them have to run the block with the same arguments. Outside of one, or where ``torch.distributed`` is not
    initialised, a process is alone: the first one may measure or export something while the others wait.

    Example:
        >>> with cooperating():
        ...     my_share("abc")
        ['a', 'b', 'c']
    """
    token = _COOPERATING.set(True)
    try:
        yield
    finally:
        _COOPERATING.reset(token)


def world_size() -> int:
    """Return how many processes share the work."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed and _COOPERATING.get() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Tell whether this is the process that speaks, claims and decides for all."""
    return _rank() == 0


def my_share(items: Sequence[Item]) -> list[Item]:
    """Return those of ``items`` that are this process's to work on; every one goes to exactly one process."""
    return list(items[_rank() :: world_size()])


def my_balanced_share(items: Sequence[Item], costs: Sequence[float]) -> list[Item]:
    """Return this process's share of ``items``, in order, so that all processes have about the same cost.

    The most expensive item that is left goes to the process that has least to do (Graham's rule: at most a third more
    than the best there is).

    Args:
        items: The same on all processes.
        costs: What each takes, in any unit.
    """
    loads = [0.0] * world_size()
    mine = set()
    for place in sorted(range(len(items)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        loads[least] += costs[place]
        if least == _rank():
            mine.add(place)
    return [item for place, item in enumerate(items) if place in mine]


def sum_across_processes(numbers: Tensor) -> None:
    """Replace ``numbers``, of the same shape on all processes, by their sum over all, added in float64."""
    if world_size() == 1:
        return
    # NCCL sends from a GPU only, gloo is surest from the CPU.
    nccl = torch.distributed.get_backend() == "nccl"
    added = numbers.to("cuda" if nccl else "cpu", torch.float64)
    torch.distributed.all_reduce(added)
    numbers.copy_(added)


def total_across_processes(number: int) -> int:
    """Return the sum of ``number`` over all processes."""
    numbers = torch.tensor(number)
    sum_across_processes(numbers)
    return int(numbers)


def broadcast_from_first(make: Callable[[], Item]) -> Item:
    """Return what ``make`` returns on the first process; the others don't call it."""
    if world_size() == 1:
        return make()
    made: list[Item | None] = [_alone(make) if is_first() else None]
    torch.distributed.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def _alone(make: Callable[[], Item]) -> Item:
    """Return what ``make`` returns while this process waits for no other: they all wait for this one."""
    token = _COOPERATING.set(False)
    try:
        return make()
    finally:
        _COOPERATING.reset(token)


def barrier() -> None:
    """Return when all processes have come here."""
    if world_size() > 1:
        torch.distributed.barrier()


class LostProcessError(RuntimeError):
    """Another process of the job is gone, without which this one can't go on."""


@contextmanager
def explain_lost_process(advice: Callable[[], str]) -> Iterator[None]:
    """Turn the errors by which a process notices that another one is gone into one that says so.

    Args:
        advice: Says how to go on.

    Raises:
        LostProcessError: A message could not be sent to, or received from, another process.
    """
    try:
        yield
    except RuntimeError as error:
        # Errors of gloo have no type of their own; the path of its source begins each.
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        said = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise LostProcessError(
            f"another process of this run has ended or can't be reached ({said}): see what it said last; {advice()}"
        ) from error


@contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """Let the first process run the block before the others do, so that they find what it creates."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        # After an error as well: the others run into the same one and say so, instead of waiting for a process that
        # is gone.
        if is_first():
            barrier()
