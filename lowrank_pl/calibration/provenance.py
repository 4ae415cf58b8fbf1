"""From a base model and calibration sequences to a factor store; nothing that a matching store holds is made again."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Targets, model_parameters

__all__ = ["base_notes", "describe_origin", "preparation_notes"]


def describe_origin(
    *,
    base: str,
    dtype: str,
    text: str,
    sequences: Tensor,
    settings: Decomposition,
    store: FactorStore,
    narrowed: Origin | None = None,
) -> dict[str, Any]:
    """Return what a plan must remember so that its factors can be found, or made again.

    Args:
        base: The base model's name; empty where it is not known, and then not in the result.
        dtype: Type that it was loaded in.
        text: The calibration text's name; likewise.
        sequences: ``[sequences, length]`` that were used of it.
        settings: How weights were decomposed.
        store: Where the factors lie.
        narrowed: What the base was before, where it was narrowed.
    """
    count, length = sequences.shape
    calibration = {"text": text, "length": length, "windows": count}
    return {
        **({"base": base} if base else {}),
        **({"narrowed": {"base": narrowed.base, "width": narrowed.width, "left": narrowed.widths}} if narrowed else {}),
        "dtype": dtype,
        **({"calibration": calibration} if text else {}),
        "decomposition": settings.identity(),
        "store": str(store.directory.resolve()),
    }


def base_notes(model: PreTrainedModel, targets: Targets) -> list[str]:
    """Return in a sentence what a narrowed base was before; nothing of any other."""
    before = Origin.of(model)
    if before is None:
        return []
    remaining = before.remaining(targets, model_parameters(model))
    return [
        f"the base was narrowed from {before.width:,} to {before.widths} hidden features of an MLP: {remaining} are "
        "left, and keep counts those that are gone"
    ]


def preparation_notes(targets: Targets, store: FactorStore) -> list[str]:
    """Return in sentences what was not targeted, and why, and which square roots needed the fallback."""
    notes = []
    for reason in dict.fromkeys(skipped.reason for skipped in targets.skipped):
        those = [skipped for skipped in targets.skipped if skipped.reason == reason]
        count = sum(skipped.parameters for skipped in those)
        notes.append(f"not targeted, {reason}: {len(those)} ({count:,} parameters), e.g. {those[0].name}")
    made = {target: store.notes(target.name) for target in targets.modules}
    eigen = [t.name for t, how in made.items() if "eigen" in (how.get("square_root"), how.get("output_root"))]
    if eigen:
        notes.append(f"square root by eigen-decomposition for {len(eigen)} modules, e.g. {eigen[0]}")
    short = [target.name for target, how in made.items() if int(how.get("tokens", sys.maxsize)) < target.shape[1]]
    if short:
        notes.append(f"fewer calibration tokens than inputs for {len(short)} modules, e.g. {short[0]}")
    return notes
