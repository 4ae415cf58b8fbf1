"""Fermi: one learned cutoff a module, with a gate that hardens while it learns."""

from __future__ import annotations

from typing import ClassVar

from lowrank_pl.methods.masks.cutoff import CutoffMask, CutoffMethod
from lowrank_pl.utils.checks import check_counts, check_numbers

__all__ = ["Fermi"]


class Fermi(CutoffMethod):
    """Fermi-Dirac gates (arXiv 2512.03062): ``1 / (1 + exp((j - cutoff) / T))`` with a temperature that falls.

    The temperature falls geometrically from ``temperature_start`` to ``temperature_end`` over ``anneal_steps`` and then
    stays. At first many components around the cutoff decide how it moves; in the end the gate is a hard step. This
    schedule is ours, because the paper's is not public.

    Args:
        temperature_start: Temperature at step 0.
        temperature_end: Temperature from ``anneal_steps`` on.
        anneal_steps: Optimizer steps between them; with 0 the last temperature holds from the start.
        relative: Count temperatures in break-even ranks of each module instead of components.
        top: As in ``CutoffMethod``.
        budget_weight: As in ``CutoffMethod``.

    Raises:
        ValueError: A setting outside its range, or a temperature that rises.
    """

    name: ClassVar[str] = "fermi"
    paper: ClassVar[str | None] = "2512.03062"

    def __init__(
        self,
        *,
        temperature_start: float = 0.1,
        temperature_end: float = 0.002,
        anneal_steps: int = 1000,
        relative: bool = True,
        top: float = 1.2,
        budget_weight: float = 100.0,
    ) -> None:
        super().__init__(top=top, budget_weight=budget_weight)
        check_numbers({"temperature_end": (temperature_end, 0)}, above=True)
        check_numbers({"temperature_start": (temperature_start, temperature_end)})
        check_counts({"anneal_steps": anneal_steps}, least=0)
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.anneal_steps, self.relative = anneal_steps, relative

    def temperature_at(self, step: int) -> float:
        """Return the temperature at ``step``."""
        done = min(1.0, step / self.anneal_steps) if self.anneal_steps else 1.0
        return float(self.temperature_start * (self.temperature_end / self.temperature_start) ** done)

    def slope_at(self, mask: CutoffMask, step: int) -> float:
        """Return the inverse of the temperature in components."""
        return 1 / (self.temperature_at(step) * (mask.even if self.relative else 1.0))
