"""Checks of a model's tensors: finite, no dead layer, one type, and the ranks of its plan.

Tensors are given by name, from a model in memory or from the files of a folder that does not load, so that the damage
is named in both cases. Each tensor is read once, and none is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_pl.export.health.diagnosis import Finding, first_few
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.storage import INDEX_BYTES

__all__ = ["check_merged_ranks", "check_plan", "check_weights", "tensors_in", "tensors_of"]

Entry = int | dict[str, Any]
Tensors = Mapping[str, Tensor]
Entries = Mapping[str, Entry]
DAMAGED = "the folder is damaged or was edited: export it again"

OVERSAMPLING = 5
"""Columns of a random sketch beyond the rank: without these, a badly conditioned sketch would amplify rounding."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters (tied ones once) and the pivots of ``model`` by name."""
    pivots = {name: buffer for name, buffer in model.named_buffers() if _is_pivots(name)}
    return {**dict(model.named_parameters()), **pivots}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in the weight files of ``folder`` by name, mapped into memory.

    Raises:
        SafetensorError: A file is damaged.
    """
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_weights(tensors: Tensors, entries: Entries, zero: Collection[str] = ()) -> list[Finding]:
    """Return the findings on values and types: NaN or infinity, layers that are zero, mixed types.

    Args:
        tensors: Tensors by name, as ``tensors_of`` returns them.
        entries: The config's entry of each low-rank module: its rank, or rank, storage and side.
        zero: Names of the modules that are zero in the base too.
    """
    # Tensors that a device_map keeps on disk are not checked.
    here = {name: tensor.detach() for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel()}
    bar = tqdm(here.items(), desc="weights", unit="tensor", leave=False, delay=2)
    ranges = {name: _range(tensor) for name, tensor in bar if tensor.is_floating_point()}
    return [_finite(ranges, len(tensors) - len(here)), _alive(ranges, entries, zero), _one_type(tensors, entries)]


def check_plan(plan: RankPlan, tensors: Tensors, entries: Entries) -> list[Finding]:
    """Return whether ranks, shapes, storage and counts of ``plan`` are those of the tensors.

    Args:
        plan: The plan of the model.
        tensors: Tensors of the model by name, as ``tensors_of`` returns them.
        entries: The config's entry of each low-rank module; empty if the factors were merged.
    """
    wrong: list[str] = [f"{name} is low-rank and not in the plan" for name in entries if name not in plan.modules]
    found: dict[str, ModulePlan] = {}
    for name, planned in plan.modules.items():
        try:
            found[name] = _stored_module(name, planned, entries, tensors)
        except ValueError as error:
            wrong.append(f"{name} {error}")
    wrong += [
        f"{name} has {_rank_and_shape(stored)}, but the plan has {_rank_and_shape(plan.modules[name])}"
        for name, stored in found.items()
        if (stored.rank, stored.shape) != (plan.modules[name].rank, plan.modules[name].shape)
    ]
    figures: dict[str, Any] = {"modules": len(plan.modules), "wrong": wrong}
    if wrong:
        return [Finding("plan", "broken", f"the plan is not this model's: {first_few(wrong)}", figures, DAMAGED)]
    merged = not entries and len(plan.dense_modules) < len(plan.modules)
    if merged:
        message = f"all {len(plan.modules)} modules have the planned shapes; factors were merged into dense weights"
        shapes = Finding("plan", "healthy", message, {**figures, "merged": True})
        return [shapes, _counts(plan, plan.model_parameters - plan.left_out, tensors)]
    stored = replace(plan, modules=found)
    return [_storage(plan, found, figures), _counts(plan, stored.kept_model_parameters, tensors)]


def check_merged_ranks(plan: RankPlan, tensors: Tensors) -> Finding:
    """Return whether the ranks of merged dense weights are at most the planned ones, up to rounding in their type.

    A random sketch with a few more columns than the rank spans such a matrix, so that the residual is rounding. Ranks
    that exceed the plan by a few are not noticed.
    """
    wrong = []
    for name, planned in tqdm(plan.modules.items(), desc="ranks", unit="module", leave=False, delay=2):
        weight = tensors[f"{name}.weight"].detach()
        if planned.rank is not None and _residual(weight.float(), planned.rank) > torch.finfo(weight.dtype).eps ** 0.5:
            wrong.append(f"{name} (rank {planned.rank})")
    if wrong:
        message = f"merged weights have more than the planned rank: {first_few(wrong)}"
        return Finding("merged ranks", "broken", message, {"wrong": wrong}, DAMAGED)
    return Finding("merged ranks", "healthy", "no merged weight has more than its planned rank")


def _range(tensor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value; both are NaN if any value is."""
    low, high = tensor.aminmax()
    return float(low), float(high)


def _finite(ranges: Mapping[str, tuple[float, float]], away: int) -> Finding:
    bad = [name for name, (low, high) in ranges.items() if not (abs(low) < torch.inf and abs(high) < torch.inf)]
    figures = {"tensors": len(ranges), "not_finite": bad, "not_in_memory": away}
    if bad:
        return Finding("weights", "broken", f"NaN or infinity in {first_few(bad)}", figures, DAMAGED)
    if away:
        message = f"{away} tensors are kept on disk by a device_map and were not checked"
        return Finding("weights", "warning", message, figures, "load the model without one")
    return Finding("weights", "healthy", f"all {len(ranges)} tensors are finite", figures)


def _alive(ranges: Mapping[str, tuple[float, float]], entries: Entries, rightly: Collection[str]) -> Finding:
    zero = {name for name, values in ranges.items() if values == (0.0, 0.0)}
    judged = {name: entry for name, entry in entries.items() if name not in rightly}
    parts = {part: _decides_the_layer(part, entry) for name, entry in judged.items() for part in _parts(name)}
    dead = [part for part, whole in parts.items() if whole and part in zero]
    suspect = [part for part, whole in parts.items() if not whole and part in zero]
    figures = {"modules": len(entries), "zero": dead, "zero_coefficients": suspect, "zero_in_base": [*rightly]}
    if dead:
        message = f"{first_few(dead)} holds only zeros, so that the layer outputs only its bias"
        return Finding("factors", "broken", message, figures, DAMAGED)
    if suspect:
        # A healthy model has zero coefficients if all rows but the pivots are zero.
        message = f"the coefficients {first_few(suspect)} are all zero"
        return Finding("factors", "warning", message, figures, "check whether the base has as many dead channels")
    if rightly:
        message = f"{first_few([*rightly])} is zero, as in the base; none of {len(judged)} other low-rank modules is"
        return Finding("factors", "healthy", message, figures)
    return Finding("factors", "healthy", f"none of {len(entries)} low-rank modules is zero", figures)


def _one_type(tensors: Tensors, entries: Entries) -> Finding:
    kinds = Counter(_type(tensor) for tensor in tensors.values() if tensor.is_floating_point())
    mixed = [
        name
        for name in entries
        if len({_type(tensors[part]) for part in (*_parts(name), f"{name}.bias") if part in tensors}) > 1
    ]
    figures = {"types": dict(kinds), "mixed": mixed}
    if mixed:
        return Finding("types", "broken", f"the parts of {first_few(mixed)} have different types", figures, DAMAGED)
    if len(kinds) > 1:
        counted = ", ".join(f"{count} in {kind}" for kind, count in kinds.most_common())
        advice = "check whether the base has several types too"
        return Finding("types", "warning", f"tensors have several types ({counted})", figures, advice)
    return Finding("types", "healthy", f"all tensors are {next(iter(kinds), 'absent')}", figures)


def _storage(plan: RankPlan, found: Mapping[str, ModulePlan], figures: Mapping[str, Any]) -> Finding:
    """Return whether modules are stored as planned; their ranks and shapes are."""
    low_rank = [name for name, module in plan.modules.items() if module.rank is not None]
    other = [name for name in low_rank if found[name].storage != plan.modules[name].storage]
    if other:
        modules = first_few([f"{name} is stored {found[name].storage}" for name in other])
        message = f"{modules}, unlike in the plan, so that the plan's counts are wrong"
        advice = "save the plan that lowrank_pl.factors.compression.deployed_plan returns"
        return Finding("plan", "warning", message, {**figures, "stored_otherwise": other}, advice)
    message = f"ranks, shapes and storage of all {len(plan.modules)} modules are as planned"
    return Finding("plan", "healthy", message, {**figures, "stored_otherwise": []})


def _counts(plan: RankPlan, expected: int, tensors: Tensors) -> Finding:
    """Return whether the tensors have ``expected`` parameters, and as many bytes as these take in the plan's type."""
    per = plan.bytes_per_parameter
    # As in plans, indices count as the parameters that take as many bytes.
    numbers = sum(
        -(-tensor.numel() * INDEX_BYTES // per) if _is_pivots(name) else tensor.numel()
        for name, tensor in tensors.items()
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    figures = {"parameters": numbers, "planned_parameters": expected, "bytes": size, "planned_bytes": expected * per}
    if numbers != expected:
        message = f"the tensors have {numbers:,} parameters, the plan {expected:,}: it is for another model"
        return Finding("counts", "broken", message, figures, DAMAGED)
    if size != expected * per:
        message = f"the tensors take {size:,} bytes, but the plan {expected * per:,}"
        return Finding("counts", "warning", message, figures, "check the type in which they were saved")
    return Finding("counts", "healthy", f"{numbers:,} parameters and {size:,} bytes, as planned", figures)


def _stored_module(name: str, planned: ModulePlan, entries: Entries, tensors: Tensors) -> ModulePlan:
    """Return the rank, the shape and the storage of a module, from its tensors.

    Raises:
        ValueError: A part is missing, or the parts do not match; the message continues the module's name.
    """
    parts = [tensors.get(part) for part in (_parts(name) if name in entries else _parts(name)[:1])]
    shapes = [tuple(part.shape) for part in parts if part is not None]
    if len(shapes) < len(parts) or any(len(shape) != 2 for shape in shapes):
        raise ValueError("is missing or not a matrix")
    if name not in entries:
        rows, columns = shapes[0]
        # The weight of GPT-2's Conv1D is stored transposed.
        shape = planned.shape if shapes[0] == planned.shape[::-1] else (rows, columns)
        merged = not entries and planned.rank is not None
        return replace(planned, shape=shape) if merged else ModulePlan(shape)
    entry = entries[name]
    rank, side = (entry, None) if isinstance(entry, int) else (entry["rank"], entry["side"])
    (rows, inner), (outer, columns) = shapes
    if not inner == outer == rank:
        raise ValueError(f"has parts of shapes {list(shapes[0])} and {list(shapes[1])}, which do not match rank {rank}")
    shape = (rows + rank if side == "out" else rows, columns + rank if side == "in" else columns)
    return ModulePlan(shape, rank, storage="factored" if side is None else "pivoted")


def _residual(weight: Tensor, rank: int) -> float:
    """Return the relative norm of ``weight`` outside the span of a random sketch of rank ``rank``."""
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ sketch).Q
    norm = weight.norm()
    return float((weight - basis @ (basis.T @ weight)).norm() / norm) if norm > 0 else 0.0


def _parts(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.right"


def _decides_the_layer(part: str, entry: Entry) -> bool:
    """Tell whether the whole weight is zero if ``part`` is; coefficients of pivoted storage alone may be zero."""
    if isinstance(entry, int):
        return True
    return part.endswith(".right" if entry["side"] == "out" else ".weight")


def _is_pivots(name: str) -> bool:
    return name.endswith(".pivots")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rank_and_shape(module: ModulePlan) -> str:
    return f"{'no low rank' if module.rank is None else f'rank {module.rank}'} and shape {list(module.shape)}"
