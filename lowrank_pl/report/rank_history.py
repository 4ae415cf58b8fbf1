"""How ranks change while they are learned: kept fractions by module type and by block, over the steps of a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_pl.models.names import block_and_kind, expert_number
from lowrank_pl.utils.figures import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Kept", "RankHistory", "kept_by_group"]

MOST = 512
"""Points of a history at most: it is stored in every checkpoint, and a figure shows no more."""


@dataclass(frozen=True)
class Kept:
    """Kept fractions of groups of modules at one step, weighted by parameters.

    Args:
        kinds: Kept fraction by module type.
        blocks: Kept fraction by block: ``000``, ``001``, ...; ``other`` for modules outside the blocks.
        shares: Each module type's share of all kept parameters.
        experts: Of module types with experts, the least and the greatest kept fraction of one expert's module.
    """

    kinds: dict[str, float]
    blocks: dict[str, float]
    shares: dict[str, float]
    experts: dict[str, tuple[float, float]] = field(default_factory=dict)


def kept_by_group(sizes: Mapping[str, int], ratios: Sequence[float]) -> Kept:
    """Return the kept fractions by module type and by block.

    Args:
        sizes: Dense parameters by name of the module.
        ratios: Kept fraction of each module, in the same order; above 1 counts as dense.

    Example:
        >>> kept = kept_by_group({"h.0.up": 30, "h.0.down": 10, "h.1.up": 30}, [0.5, 2.0, 0.1])
        >>> kept.kinds["up"], kept.blocks, round(kept.shares["down"], 3)
        (0.3, {'000': 0.625, '001': 0.1}, 0.357)
    """
    kept: dict[str, dict[str, float]] = {"kinds": defaultdict(float), "blocks": defaultdict(float)}
    dense: dict[str, dict[str, int]] = {"kinds": defaultdict(int), "blocks": defaultdict(int)}
    experts: dict[str, list[float]] = {}
    for (name, size), ratio in zip(sizes.items(), ratios, strict=True):
        block, kind = block_and_kind(name)
        if expert_number(name) is not None:
            experts.setdefault(kind, []).append(min(ratio, 1.0))
        for axis, group in (("kinds", kind), ("blocks", "other" if block is None else f"{block:03d}")):
            kept[axis][group] += size * min(ratio, 1.0)
            dense[axis][group] += size
    everything = sum(kept["kinds"].values())
    fractions = {axis: {group: kept[axis][group] / dense[axis][group] for group in dense[axis]} for axis in dense}
    shares = {kind: part / everything if everything else 0.0 for kind, part in kept["kinds"].items()}
    ends = {kind: (min(found), max(found)) for kind, found in experts.items()}
    return Kept(fractions["kinds"], dict(sorted(fractions["blocks"].items())), shares, ends)


class RankHistory:
    """Kept fractions over the steps of a run, as plain data for checkpoints and as a figure.

    Beyond ``MOST`` points every second one is dropped.

    Example:
        >>> history = RankHistory()
        >>> for step in (0, 10):
        ...     history.add(step, kept_by_group({"h.0.up": 30, "h.1.up": 30}, [0.5, 0.7]))
        >>> again = RankHistory()
        >>> again.load_state_dict(history.state_dict())
        >>> again.steps, again.rows["blocks"]["001"]
        ([0, 10], [0.7, 0.7])
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: dict[str, dict[str, list[float]]] = {"kinds": {}, "blocks": {}}

    def add(self, step: int, kept: Kept) -> None:
        """Append ``kept`` after ``step`` optimizer steps, unless that step or a later one is recorded already."""
        if self.steps and step <= self.steps[-1]:
            return
        self.steps.append(step)
        for axis, values in {"kinds": kept.kinds, "blocks": kept.blocks}.items():
            for group, value in values.items():
                self.rows[axis].setdefault(group, []).append(value)
        if len(self.steps) > MOST:
            self.steps = self.steps[::2]
            self.rows = {
                axis: {group: values[::2] for group, values in rows.items()} for axis, rows in self.rows.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain data."""
        return {"steps": list(self.steps), **{axis: dict(rows) for axis, rows in self.rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the history that ``state_dict`` returned."""
        self.steps = list(state["steps"])
        self.rows = {
            axis: {group: list(values) for group, values in state[axis].items()} for axis in ("kinds", "blocks")
        }

    def figure(self) -> Figure:
        """Return two heat maps: module types over steps, and blocks over steps.

        Colours cover the range of the data, since ranks change little compared with their possible range. The colours
        of ``rank_map`` are fixed instead, since those figures are compared.

        Raises:
            ValueError: The history is empty.
        """
        from matplotlib.figure import Figure

        if not self.steps:
            raise ValueError("the history has no point: expected at least one")
        panels = {"module type": self.rows["kinds"], "block": self.rows["blocks"]}
        heights = [min(4.0, max(1.2, 0.25 * len(rows))) for rows in panels.values()]
        figure = Figure(figsize=(9.0, 1.6 + sum(heights)), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True, height_ratios=heights)
        low, high = self._range()
        for axis, height, (name, rows) in zip(axes, heights, panels.items(), strict=True):
            mesh = axis.pcolormesh(
                self._edges(), np.arange(len(rows) + 1), np.array([*rows.values()]), cmap="viridis", vmin=low, vmax=high
            )
            labels = [group.lstrip("0") or "0" if group.isdecimal() else group for group in rows]
            every = math.ceil(len(rows) * 0.2 / height)
            axis.set_yticks(np.arange(len(rows))[::every] + 0.5, list(map(plain, labels[::every])), fontsize=9)
            axis.set_ylabel(name)
            axis.tick_params(axis="y", length=0)
            axis.spines[:].set_visible(False)
            axis.invert_yaxis()
        axes[-1].set_xlabel("optimizer steps")
        axes[-1].locator_params(axis="x", integer=True)
        axes[0].set_title("kept fraction while the ranks were learned (soft masks)", pad=8)
        figure.colorbar(mesh, ax=list(axes), label="kept fraction", pad=0.02, aspect=30)
        return figure

    def _range(self) -> tuple[float, float]:
        """Return the smallest and the largest fraction, at least 0.1 apart, so that noise is not amplified."""
        values = [value for rows in self.rows.values() for row in rows.values() for value in row]
        middle, half = (min(values) + max(values)) / 2, max(0.05, (max(values) - min(values)) / 2)
        return middle - half, middle + half

    def _edges(self) -> Any:
        """Return the edges of the columns, halfway between steps."""
        steps = np.array(self.steps, dtype=float)
        if len(steps) == 1:
            return np.array([steps[0] - 0.5, steps[0] + 0.5])
        middle = (steps[1:] + steps[:-1]) / 2
        return np.concatenate([[steps[0]], middle, [steps[-1]]])
