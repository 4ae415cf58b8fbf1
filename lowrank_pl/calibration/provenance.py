"""What a plan remembers of its base, its text and its factors."""

from __future__ import annotations

import json
import sys
from typing import Any

from lowrank_pl.calibration.experts import Reached
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Targets, model_parameters

__all__ = ["base_notes", "describe_origin", "preparation_notes"]


def describe_origin(subject: Subject, settings: Decomposition, store: FactorStore) -> dict[str, Any]:
    """Return what a plan remembers, so that its factors can be found or made again.

    Args:
        subject: The model and its sequences. A base or a calibration text without a name is left out.
        settings: How weights were decomposed.
        store: Where the factors lie.
    """
    base, calibration, pruned = subject.base, subject.calibration, Origin.of(subject.model)
    count, length = subject.sequences.shape
    origin: dict[str, Any] = {}
    if base is not None:
        origin["base"] = base.name
    if pruned is not None:
        origin["narrowed"] = {"base": pruned.base, "width": pruned.width, "left": pruned.widths}
        if pruned.method:
            origin["narrowed"] |= {"method": pruned.method, "described": pruned.described}
    origin["dtype"] = base.dtype if base is not None else str(subject.model.dtype).removeprefix("torch.")
    if calibration is not None:
        # Plans from before the word "sequences" call their number "windows".
        origin["calibration"] = {"text": calibration.text, "length": length, "windows": count}
    origin["decomposition"] = settings.identity()
    origin["store"] = str(store.directory.resolve())
    return origin


def base_notes(subject: Subject) -> list[str]:
    """Return a sentence about what a pruned base was before pruning; nothing for any other base."""
    before = Origin.of(subject.model)
    if before is None:
        return []
    remaining = before.remaining(subject.targets, model_parameters(subject.model))
    how = f" by {before.method}" if before.method else ""
    return [
        f"the base was pruned{how} to {before.described}: {remaining} are left, and keep counts those that were pruned"
    ]


def preparation_notes(targets: Targets, store: FactorStore) -> list[str]:
    """Return sentences about modules that were not targeted, and about what factors rest on.

    The latter are square roots that needed the fallback, and calibration text that is short for a module or an expert.
    """
    notes = []
    for reason in dict.fromkeys(skipped.reason for skipped in targets.skipped):
        those = [skipped for skipped in targets.skipped if skipped.reason == reason]
        count = sum(skipped.parameters for skipped in those)
        notes.append(f"not targeted, {reason}: {len(those)} ({count:,} parameters), e.g. {those[0].name}")
    for matrix in targets.embeddings:
        what = "embeddings" if matrix.head is None else "the head" if matrix.embedding is None else "embeddings"
        tied = f", tied to {matrix.head}" if matrix.embedding and matrix.head else ""
        count = matrix.shape[0] * matrix.shape[1]
        notes.append(f"targeted too, stored dense or as two factors: {what} {matrix.name}{tied} ({count:,} parameters)")
    made = {target: store.notes(target.name) for target in targets.modules if not target.stack}
    for stack in targets.stacks:
        found = store.notes(stack)
        layers = targets.among([stack])
        counts = json.loads(found.get("rows_of_layers", "[]")) or [None] * len(layers)
        for target, seen in zip(layers, counts, strict=True):
            made[target] = found if seen is None else {**found, "rows": str(seen)}
    eigen = [t.name for t, how in made.items() if "eigen" in (how.get("square_root"), how.get("output_root"))]
    if eigen:
        notes.append(f"square root by eigen-decomposition for {len(eigen)} modules, e.g. {eigen[0]}")
    rows = {target: int(how["rows"]) for target, how in made.items() if "rows" in how}
    short = [
        target.name
        for target, how in made.items()
        if target not in rows and int(how.get("tokens", sys.maxsize)) < target.shape[1]
    ]
    if short:
        notes.append(f"fewer calibration tokens than inputs for {len(short)} modules, e.g. {short[0]}")
    return notes + Reached.of(rows).sentences()
