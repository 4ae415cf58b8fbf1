"""The exact Lagrangian choice of one size for every part of a model, where each size has its bytes and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sizes", "choose_sizes"]


@dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes that one part of a model may have.

    Args:
        bytes: Bytes of each size, in any order.
        losses: Loss in nats at each size.
    """

    bytes: NDArray[np.int64]
    losses: NDArray[np.float64]

    def hull(self) -> NDArray[np.int64]:
        """Return the indices of the sizes on the lower convex hull of loss over bytes, from the smallest to the best.

        >>> Sizes(np.array([8, 1, 4, 2]), np.array([0.0, 9.0, 5.0, 2.0])).hull().tolist()
        [1, 3, 0]
        """
        hull: list[int] = []
        for point in np.lexsort((self.losses, self.bytes)):
            if hull and self.losses[point] >= self.losses[hull[-1]]:
                continue
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-1], point):
                hull.pop()
            hull.append(int(point))
        return np.array(hull)

    def _slope(self, low: int, high: int) -> float:
        """Return the nats that each byte saves between two sizes."""
        return float((self.losses[low] - self.losses[high]) / (self.bytes[high] - self.bytes[low]))

    def slopes(self, hull: NDArray[np.int64]) -> list[float]:
        """Return the nats that each byte saves at every step along ``hull``; they fall."""
        return [self._slope(low, high) for low, high in pairwise(hull)]


def choose_sizes(parts: Mapping[str, Sizes], limit: int) -> dict[str, int]:
    """Return the index of the size of each part, with the least total loss in at most ``limit`` bytes.

    All parts start at their smallest size and take the steps along their hulls that save the most nats a byte. This
    minimises the loss plus a multiplier times the bytes, so no other choice of as many bytes loses less, up to the last
    steps: a step that no longer fits closes its part, and smaller steps of others fill the rest.

    Args:
        parts: The sizes of each part.
        limit: Bytes of all parts together.

    Raises:
        ValueError: The smallest sizes take more than ``limit``.

    >>> sizes = Sizes(np.array([1, 2, 4]), np.array([9.0, 2.0, 0.0]))
    >>> choose_sizes({"a": sizes, "b": sizes}, 6)
    {'a': 2, 'b': 1}
    """
    hulls = {name: sizes.hull() for name, sizes in parts.items()}
    taken = dict.fromkeys(parts, 0)
    rest = limit - sum(int(parts[name].bytes[hull[0]]) for name, hull in hulls.items())
    if rest < 0:
        raise ValueError(f"the smallest sizes take {limit - rest:,} bytes, and {limit:,} are allowed")
    steps = sorted(
        (-slope, order, place, name)
        for order, (name, hull) in enumerate(hulls.items())
        for place, slope in enumerate(parts[name].slopes(hull))
    )
    closed: set[str] = set()
    for _, _, place, name in steps:
        if name in closed:
            continue
        sizes, hull = parts[name], hulls[name]
        more = int(sizes.bytes[hull[place + 1]] - sizes.bytes[hull[place]])
        if more > rest:
            closed.add(name)
            continue
        taken[name], rest = place + 1, rest - more
    return {name: int(hulls[name][place]) for name, place in taken.items()}
