"""The plan of a refit: the check before it, and the plan of the refitted factors."""

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
from lowrank_pl.plans.plan import TRAINED, ModulePlan, RankPlan

__all__ = [
    "APPLIED",
    "EMBEDDED",
    "NO_DERIVATIVE",
    "NO_GAIN",
    "UNCHANGED",
    "UNPAIRED",
    "UNROUTED",
    "check_belongs",
    "refitted_plan",
]

APPLIED = "applied"
"""Note on the factors of a refitted module; the other constants say why a module was not refitted."""


NO_GAIN = "no gain on held-back text"


NO_DERIVATIVE = "an operation has no derivative"


UNCHANGED = "inputs as in the dense model"


EMBEDDED = "embeddings and heads stay as they are"
UNPAIRED = "not called once for every token"


UNROUTED = "no token of the text was routed to the expert"


_log = logging.getLogger(__name__)


def check_belongs(plan: RankPlan, factors: FactorStore, model: PreTrainedModel, targets: Targets) -> None:
    """Check that plan, factors, model and targets belong together, so that a mismatch fails now, not hours into a run.

    Raises:
        ValueError: They do not belong together, or the factors are refitted already.
    """
    factors.check_plan(plan)
    if "refit" in factors.fingerprint:
        raise ValueError(f"the factors in {factors.directory} are refitted already: give those they were made from")
    if "rounding" in factors.fingerprint:
        raise ValueError(
            f"the matrices in {factors.directory} are rounded to a few bits: refit the plan before rounding, then round"
        )
    if "heal" in factors.fingerprint:
        raise ValueError(
            f"the factors in {factors.directory} were healed, which a refit would undo: refit first, then heal"
        )
    ours = model_fingerprint(model)
    differ = [key for key, value in ours.items() if factors.fingerprint.get(key, value) != value]
    if differ:
        raise ValueError(
            f"the factors in {factors.directory} were made from another model ({' and '.join(differ)} differ): load "
            "the base that they were made from, in the same dtype"
        )
    shapes = targets.shapes
    for name, entry in plan.modules.items():
        if shapes.get(name) != entry.shape:
            raise ValueError(
                f"the plan gives {name} the shape {entry.shape}, the targets {shapes.get(name, 'none')}: find the "
                "targets that the plan was made for"
            )


def refitted_plan(plan: RankPlan, made: FactorStore, *, fitted: int, held: int) -> RankPlan:
    """Return ``plan`` for the refitted factors, which hold exactly the components that it keeps.

    The component order is reduced to these components, so smaller sizes follow from it and larger ones do not.

    Args:
        plan: The plan before the refit.
        made: The refitted factors, with the notes stored beside them.
        fitted: Number of sequences that the factors were fitted to.
        held: Number of held-back sequences that choices were made on.
    """
    low_rank = {name: module for name, module in plan.modules.items() if module.rank}
    noted = {name: made.notes(name) for name in low_rank}
    order = plan.order
    if order is not None:
        scores = {
            name: _kept_scores(order.scores[name], module, renewed=_is_renewed(module, noted[name]))
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


def _is_renewed(module: ModulePlan, noted: Mapping[str, str]) -> bool:
    """Tell whether a refit made new components; those of a right factor that layers share are the old ones."""
    return noted["refit"] == APPLIED and not module.layers


def _kept_scores(scores: Tensor, module: ModulePlan, *, renewed: bool) -> Tensor:
    """Return the scores of the components that a module keeps; in the refitted factors these come first.

    Args:
        scores: Scores of all components of the module, or of the first ones.
        module: The module's plan.
        renewed: Whether the refit made new components, which are sorted by importance.
    """
    whole = torch.cat([scores, scores.new_full((min(module.shape) - len(scores),), -math.inf)])
    kept = whole[: module.rank] if module.indices is None else whole[list(module.indices)]
    return kept.sort(descending=True).values if renewed else kept


def _report(noted: Mapping[str, Mapping[str, str]], fitted: int, held: int) -> list[str]:
    """Return a report on the low-rank modules in sentences, from the notes stored beside their factors."""
    applied = {name: found for name, found in noted.items() if found["refit"] == APPLIED}
    said = [f"refitted {len(applied)} of {len(noted)} modules to {fitted + held} sequences, chosen on {held} of them"]
    if applied:
        gain = sum(float(found["gain"]) for found in applied.values()) / len(applied)
        said[0] += f", where their errors are {gain:.1%} lower on average"
        said.append(f"compensated fractions of the inputs' error: {_counts(applied, 'drift')}")
        with_stream = {name: found for name, found in applied.items() if "stream" in found}
        if with_stream:
            said.append(f"compensated fractions of the stream's error: {_counts(with_stream, 'stream')}")
        without = len(applied) - len(with_stream)
        said.append(f"not added to a stream, so that no stream error is compensated: {without} of the refitted modules")
    for why in (NO_GAIN, UNCHANGED, UNPAIRED, UNROUTED, EMBEDDED):
        those = [name for name, found in noted.items() if found["refit"] == why]
        if those:
            said.append(f"not refitted, {why}: {len(those)}, e.g. {those[0]}")
    return said + _report_on_blocks(noted)


def _report_on_blocks(noted: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a report on the joint refit of blocks in sentences; none without one."""
    # All modules of a block have the same notes on it.
    blocks = {int(found["block"]): found for found in noted.values() if "joint" in found}
    said = []
    for method, opening in (
        ("gauss_newton", "fitted jointly by Gauss-Newton"),
        ("adamw", f"{TRAINED}: gradient descent (AdamW) fitted"),
    ):
        gains = [float(found["joint_gain"]) for found in blocks.values() if found["joint"] == method]
        if gains:
            said.append(
                f"{opening}: the factors of {len(gains)} of {len(blocks)} blocks, whose outputs' errors on held-back "
                f"text are {sum(gains) / len(gains):.1%} lower on average"
            )
    for why in (NO_GAIN, NO_DERIVATIVE):
        those = [number for number, found in blocks.items() if found["joint"] == why]
        if those:
            said.append(f"blocks not fitted jointly, {why}: {len(those)} of {len(blocks)}, e.g. block {those[0]}")
    return said


def _counts(noted: Mapping[str, Mapping[str, str]], part: str) -> str:
    found = Counter(float(entry[part]) for entry in noted.values())
    return ", ".join(f"{value:g} in {count}" for value, count in sorted(found.items()))
