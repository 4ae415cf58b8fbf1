"""``lowrank refit``."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.cli.plan_parts import PlanParts, finish_plan
from lowrank_pl.methods.refit.settings import Refit
from lowrank_pl.utils.files import check_output_files

if TYPE_CHECKING:
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["refit"]

_log = logging.getLogger(__name__)


def refit(
    plan: Path,
    *,
    output: Path = Path("refitted.json"),
    text: str | None = None,
    settings: Refit = Refit(),
    parts: Flat[PlanParts] = PlanParts(),
    device: str = "auto",
    json: Path | None = None,
) -> RankPlan:
    """Refit a plan's factors in closed form, block by block, to the compressed model's own inputs.

    Every choice is made module by module on sequences that are held back. What does not help there is not applied. A
    killed run goes on at the block it was in.

    Args:
        plan: A plan written by ``lowrank allocate`` or ``lowrank fit``.
        output: File of the plan for the refitted factors; ``lowrank export`` takes it like any other.
        text: Calibration text; by default the plan's own.
        settings: How to refit, such as --settings.sequences 256; more sequences make better factors, and take longer.
        parts: Where base and factors are, if they are not where the plan says.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The plan for the refitted factors.
    """
    from lowrank_pl.methods.refit import refitting
    from lowrank_pl.plans.plan import RankPlan
    from lowrank_pl.text.sources import text_files

    # A plan may be replaced by the one that is made from it, but not by figures.
    check_output_files(output, json, inputs=text_files(text) if text else [])
    check_output_files(json, inputs=[plan])
    given = RankPlan.load(plan)
    parts.check_outputs(given, output, json)
    subject = parts.subject_of(given, plan, device)
    own = subject.calibration
    assert own is not None
    used = replace(own, text=text or own.text, sequences=settings.sequences)
    _log.info("refit: %d sequences of %d tokens of %r", used.sequences, used.length, used.text)
    refitted, factors = refitting.refit(
        given,
        parts.factors_of(given, subject.model, subject.tokenizer),
        subject,
        sequences=used.tokens(subject.tokenizer),
        settings=settings,
    )
    finish_plan(refitted, factors, output, json)
    return refitted
