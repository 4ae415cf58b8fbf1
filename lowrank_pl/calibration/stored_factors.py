"""The factors that a plan was made for: those on disk, or the same ones built again."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.text.settings import Calibration

__all__ = ["stored_factors"]

_log = logging.getLogger(__name__)


def stored_factors(
    plan: RankPlan,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    directory: Path | None = None,
    flag: str = "--store",
) -> FactorStore:
    """Return the factors that ``plan`` was made for: those on disk, or built again in the cache.

    Args:
        plan: The plan.
        model: Its dense base.
        tokenizer: The base's tokenizer.
        directory: Folder of the factors; by default the one that the plan names.
        flag: The flag that sets ``directory``, for errors.

    Raises:
        ValueError: The factors are gone, and the plan does not say how to build them.
    """
    place = directory or Path(plan.origin.get("store", ""))
    if directory is not None or (plan.origin.get("store") and (place / "manifest.json").exists()):
        return FactorStore.existing(place)
    if "rounding" in plan.fingerprint:
        raise ValueError(
            f"the rounded matrices at {place} are gone: round the plan that they came from again with `lowrank "
            f"quantize` or `lowrank allocate --keep_bytes`, or name their folder with {flag}"
        )
    if "heal" in plan.fingerprint:
        raise ValueError(
            f"the healed factors at {place} are gone, and only training makes them again: heal the plan that they came "
            f"from with `lowrank heal`, name their folder with {flag}, or use the model beside this plan"
        )
    if "refit" in plan.fingerprint:
        raise ValueError(
            f"the refitted factors at {place} are gone: refit the plan that they came from again with `lowrank "
            f"refit`, or name their folder with {flag}"
        )
    if "correction" in plan.fingerprint:
        raise ValueError(
            f"the corrected factors at {place} are gone, and only the whole correction makes them again: "
            f"allocate anew with `lowrank allocate --method {plan.method}`, or name their folder with {flag}"
        )
    if "calibration" not in plan.origin:
        raise ValueError(f"the plan does not say what its factors were made from: name their folder with {flag}")
    _log.warning("the factors at %s are gone: building them again from the plan's origin", place)
    origin = plan.origin["calibration"]
    calibration = Calibration(origin["text"], origin["length"], origin["windows"])
    constraints = Constraints(include=plan.layers, shared_experts=plan.shares_experts)
    subject = Subject(model, tokenizer, calibration.tokens(tokenizer), constraints)
    settings = Decomposition.of_fingerprint(plan.origin["decomposition"])
    return build_factors(subject, settings=settings, batch_size=plan.fingerprint.get("batch_size", 1))
