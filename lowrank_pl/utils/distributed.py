"""Cooperating processes: shares of the work, sums over all processes, and order. A process alone does all the work."""

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
    "gather_from_all",
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
    """Let all processes of ``torch.distributed`` share the work inside the block.

    All processes have to run the block with the same arguments. Outside the block, and where ``torch.distributed`` is
    not initialised, each process works alone: the first process may then measure or export something while the others
    wait.

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
    """Return the number of processes that share the work; 1 outside ``cooperating``."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed and _COOPERATING.get() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Tell whether this is the process that logs, locks and decides for all."""
    return _rank() == 0


def my_share(items: Sequence[Item]) -> list[Item]:
    """Return this process's share of ``items``; each item belongs to exactly one process."""
    return list(items[_rank() :: world_size()])


def my_balanced_share(items: Sequence[Item], costs: Sequence[float]) -> list[Item]:
    """Return this process's share of ``items``, in order, such that all shares cost about the same.

    The most expensive remaining item goes to the process with the lowest load (Graham's rule: the highest load is at
    most a third above the optimum).

    Args:
        items: The items, the same on all processes.
        costs: Cost of each item, in any unit.
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
    """Replace ``numbers`` by their sum over all processes, added in float64; all have the same shape."""
    if world_size() == 1:
        return
    # NCCL sends from GPUs only; gloo is most reliable from the CPU.
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
    """Return what ``make`` returns on the first process; the other processes do not call it."""
    if world_size() == 1:
        return make()
    made: list[Item | None] = [_alone(make) if is_first() else None]
    torch.distributed.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def gather_from_all(item: Item) -> list[Item]:
    """Return the ``item`` of every process, in the order of the processes."""
    if world_size() == 1:
        return [item]
    found: list[Item | None] = [None] * world_size()
    torch.distributed.all_gather_object(found, item)
    return found  # type: ignore[return-value]


def _alone(make: Callable[[], Item]) -> Item:
    """Return what ``make`` returns while this process waits for no other: they all wait for this one."""
    token = _COOPERATING.set(False)
    try:
        return make()
    finally:
        _COOPERATING.reset(token)


def barrier() -> None:
    """Return once all processes have reached this call."""
    if world_size() > 1:
        torch.distributed.barrier()


class LostProcessError(RuntimeError):
    """Another process of the run has ended or cannot be reached, so this one cannot go on.

    Args:
        cause: What was seen of it.
        advice: What the user can do.
    """

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(
            f"another process of this run has ended or can't be reached ({cause}): see its last message; {advice}"
        )


@contextmanager
def explain_lost_process(advice: Callable[[], str]) -> Iterator[None]:
    """Turn the communication errors that follow from a lost process into a ``LostProcessError``.

    Args:
        advice: Returns what the user can do, for the message.

    Raises:
        LostProcessError: A message could not be sent to, or received from, another process.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo has no exception type of its own; each message begins with the path of its source file.
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        cause = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise LostProcessError(cause, advice()) from error


@contextmanager
def one_process_at_a_time() -> Iterator[None]:
    """Let the first process run the block before the others, so that they find what it creates."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        # After an error too: the other processes then meet the same error, instead of waiting for a lost process.
        if is_first():
            barrier()
