"""What a refit does to a plan: whether it may begin, and which plan is for the refitted factors."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.identity import model_fingerprint
from lowrank_pl.models.targets import Targets
from lowrank_pl.plans.component_order import ComponentOrder
from lowrank_pl.plans.plan import ModulePlan, RankPlan

__all__ = ["APPLIED", "NO_GAIN", "UNCHANGED", "UNPAIRED", "check_belongs", "refitted_plan"]

APPLIED = "applied"
"""What is noted beside the factors of a module that was refitted; the others say why one was not."""


NO_GAIN = "no gain on held-back text"


UNCHANGED = "inputs as in the dense model"


UNPAIRED = "not called once for every token"


_log = logging.getLogger(__name__)


def check_belongs(plan: RankPlan, factors: FactorStore, model: PreTrainedModel, targets: Targets) -> None:
    """Check that plan, factors, model and targets belong together, which hours later would be late to find out.

    Raises:
        ValueError: They don't, or the factors are refitted already.
    """
    differ = [key for key, value in plan.fingerprint.items() if factors.fingerprint.get(key) != value]
    if differ:
        raise ValueError(
            f"the plan was drawn for other factors than those in {factors.directory}: {', '.join(differ)} differ. "
            "Allocate again on this store, or name the store that the plan came from"
        )
    if "refit" in factors.fingerprint:
        raise ValueError(f"the factors in {factors.directory} are refitted already: give those they were made from")
    ours = model_fingerprint(model)
    differ = [key for key, value in ours.items() if factors.fingerprint.get(key, value) != value]
    if differ:
        raise ValueError(
            f"the factors in {factors.directory} were made from another model ({' and '.join(differ)} differ): load "
            "the base that they were made from, in the same dtype"
        )
    shapes = {target.name: target.shape for target in targets.modules}
    for name, entry in plan.modules.items():
        if shapes.get(name) != entry.shape:
            raise ValueError(
                f"the plan gives {name} the shape {entry.shape}, the targets {shapes.get(name, 'none')}: find the "
                "targets that the plan was drawn for"
            )


def refitted_plan(plan: RankPlan, made: FactorStore, *, fitted: int, held: int) -> RankPlan:
    """Return ``plan`` for the refitted factors, which have its ranks and no other components.

    Its order is cut likewise, so that smaller sizes follow from it and larger ones don't.

    Args:
        plan: What was refitted.
        made: The refitted factors, with what was noted beside them.
        fitted: Sequences that were fitted to.
        held: Sequences that choices were made on.
    """
    low_rank = {name: module for name, module in plan.modules.items() if module.rank is not None}
    noted = {name: made.notes(name) for name in low_rank}
    order = plan.order
    if order is not None:
        scores = {
            name: _kept_scores(order.scores[name], module, renewed=noted[name]["refit"] == APPLIED)
            for name, module in low_rank.items()
            if name in order.scores
        }
        order = ComponentOrder({**order.scores, **scores})
    said = _report(noted, fitted, held)
    for note in said:
        _log.info("refit: %s", note)
    return replace(
        plan,
        modules={name: replace(module, indices=None) for name, module in plan.modules.items()},
        origin={**plan.origin, "store": str(made.directory.resolve())},
        fingerprint=made.fingerprint,
        notes=(*plan.notes, *said),
        order=order,
    )


def _kept_scores(scores: Tensor, module: ModulePlan, *, renewed: bool) -> Tensor:
    """Return the scores of the components that a module keeps, which are its first ones now.

    Args:
        scores: Of all its components, or of the first ones.
        module: What the plan keeps.
        renewed: Whether they are new ones, in the order of their importance.
    """
    whole = torch.cat([scores, scores.new_full((min(module.shape) - len(scores),), -math.inf)])
    kept = whole[: module.rank] if module.indices is None else whole[list(module.indices)]
    return kept.sort(descending=True).values if renewed else kept


def _report(noted: Mapping[str, Mapping[str, str]], fitted: int, held: int) -> list[str]:
    """Return in sentences what became of the low-rank modules, from what was noted beside their factors."""
    applied = {name: found for name, found in noted.items() if found["refit"] == APPLIED}
    said = [f"refitted {len(applied)} of {len(noted)} modules to {fitted + held} sequences, chosen on {held} of them"]
    if applied:
        gain = sum(float(found["gain"]) for found in applied.values()) / len(applied)
        said[0] += f", where their errors are {gain:.1%} lower on average"
        said.append(f"parts of the inputs' error made up for: {_counts(applied, 'drift')}")
        with_stream = {name: found for name, found in applied.items() if "stream" in found}
        if with_stream:
            said.append(f"parts of the stream's error made up for: {_counts(with_stream, 'stream')}")
        without = len(applied) - len(with_stream)
        said.append(f"not added to a stream, whose error they can't make up for: {without} of the refitted modules")
    for why in (NO_GAIN, UNCHANGED, UNPAIRED):
        those = [name for name, found in noted.items() if found["refit"] == why]
        if those:
            said.append(f"not refitted, {why}: {len(those)}, e.g. {those[0]}")
    return said


def _counts(noted: Mapping[str, Mapping[str, str]], part: str) -> str:
    found = Counter(float(entry[part]) for entry in noted.values())
    return ", ".join(f"{value:g} in {count}" for value, count in sorted(found.items()))
