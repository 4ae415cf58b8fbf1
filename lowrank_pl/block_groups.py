"""Blocks that are worked on together, as many as fit a memory budget; sizes in words such as ``8GB``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from lowrank_pl.targets import Target

__all__ = ["block_groups", "memory_size", "packed"]

_log = logging.getLogger(__name__)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def block_groups(targets: Sequence[Target], sizes: Mapping[Target, int], memory: float | None) -> list[list[Target]]:
    """Return ``targets`` in groups of as many consecutive blocks as fit ``memory``, but at least one.

    Args:
        targets: Those of a block follow each other.
        sizes: Bytes that each takes.
        memory: Bytes that a group may take; None is no limit.
    """
    blocks = [list(members) for _, members in groupby(targets, key=lambda target: target.block)]
    needed = [sum(sizes[target] for target in members) for members in blocks]
    if memory is not None and max(needed, default=0) > memory:
        text = "one block alone takes %.3g GB, more than the %.3g GB of the memory budget: going block by block"
        _log.warning(text, max(needed) / 1e9, memory / 1e9)
    return [[target for number in group for target in blocks[number]] for group in packed(needed, memory)]


def packed(sizes: Sequence[float], memory: float | None) -> list[list[int]]:
    """Return the places of ``sizes`` in groups that follow each other, as large as fit ``memory``, but at least one.

    >>> packed([2, 3, 1, 9, 1], 5)
    [[0, 1], [2], [3], [4]]
    """
    groups: list[list[int]] = []
    taken = 0.0
    for place, size in enumerate(sizes):
        if not groups or (memory is not None and taken + size > memory):
            groups.append([])
            taken = 0.0
        groups[-1].append(place)
        taken += size
    return groups


def memory_size(text: str) -> int:
    """Return how many bytes ``text`` names: a number with or without a unit, KB, MB, GB, TB or KiB, MiB, GiB.

    Raises:
        ValueError: It names none.

    >>> memory_size("8GB"), memory_size("1.5 GiB"), memory_size("4096")
    (8000000000, 1610612736, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Z]*)\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if not size:
        raise ValueError(
            f"{text!r} is no amount of memory: expected a positive number and a unit, such as 8GB or 512MiB"
        )
    return size
