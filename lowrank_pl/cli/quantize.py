"""``lowrank quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.cli.plan_parts import PlanParts, finish_plan
from lowrank_pl.methods.quantize.settings import Rounding
from lowrank_pl.utils.files import check_output_files

if TYPE_CHECKING:
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["quantize"]


def quantize(
    plan: Path,
    *,
    settings: Flat[Rounding] = Rounding(),
    output: Path = Path("quantized.json"),
    parts: Flat[PlanParts] = PlanParts(),
    device: str = "auto",
    json: Path | None = None,
) -> RankPlan:
    """Round the matrices of a plan to a few bits, by what errors cost in the metric of its factors.

    Dense modules of the plan are rounded too, and so are embeddings and head. A budget in bytes, in which ranks and
    bits are chosen together, is `lowrank allocate --keep_bytes`. A killed run goes on at the module it was at.

    Args:
        plan: A plan written by ``lowrank allocate``, ``lowrank refit`` or ``lowrank fit``.
        settings: How to round.
        output: File of the plan for the rounded matrices; ``lowrank export`` takes it like any other.
        parts: Where base and factors are, if they are not where the plan says.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The plan for the rounded matrices.
    """
    from lowrank_pl.methods.quantize import quantizing
    from lowrank_pl.plans.plan import RankPlan

    check_output_files(output, json)
    # A plan may be replaced by the one that is made from it, but not by figures.
    check_output_files(json, inputs=[plan])
    given = RankPlan.load(plan)
    parts.check_outputs(given, output, json)
    quantizing.check_roundable(given)
    subject = parts.subject_of(given, plan, device)
    rounded, factors = quantizing.quantize(
        given, parts.factors_of(given, subject.model, subject.tokenizer), subject, settings=settings
    )
    finish_plan(rounded, factors, output, json)
    return rounded
