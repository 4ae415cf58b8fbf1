"""Checks of a model's tensors: finite, no dead layer, one type, and the ranks of its plan.

Tensors are given by name, from a model in memory or from the files of a folder that does not load, so that the damage
is named in both cases. Each tensor is read once, and none is copied.
"""

from __future__ import annotations

import re
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
from lowrank_pl.models.hf_quantized import SCALE_TYPE, Grid, grid_of_entry, packed_width, stored_shapes, unpack
from lowrank_pl.models.names import expert_number
from lowrank_pl.plans.plan import ModulePlan, RankPlan, count_kinds, pivoted_matrices
from lowrank_pl.plans.storage import INDEX_BYTES

__all__ = ["check_merged_ranks", "check_plan", "check_weights", "tensors_in", "tensors_of"]

Entry = int | dict[str, Any]
Tensors = Mapping[str, Tensor]
Entries = Mapping[str, Entry]
DAMAGED = "the folder is damaged or was edited: export it again"

_CODES = re.compile(r"(.*)_(?:packed|zeros)")
_ROWS = 4096
"""Rows that are looked at in one go."""

OVERSAMPLING = 5
"""Columns of a random sketch beyond the rank: without these, a badly conditioned sketch would amplify rounding."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters (tied ones once), the pivots, and the codes and zero points of ``model`` by name."""
    parameters = dict(model.named_parameters())
    stored = {name: buffer for name, buffer in model.named_buffers() if _is_stored(name, parameters)}
    return {**parameters, **stored}


def _is_stored(name: str, parameters: Mapping[str, Tensor]) -> bool:
    """Tell whether a buffer holds pivots, or codes or zero points of a parameter, which are its scales."""
    found = _CODES.fullmatch(name)
    return _is_pivots(name) or (found is not None and found[1] in parameters)


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
        entries: The config's entry of each compressed module (``lowrank_pl.models.hf_format.LowRankConfig``).
        zero: Names of the modules that are zero in the base too.
    """
    entries, _ = _without_dropped(entries)
    # Tensors that a device_map keeps on disk are not checked.
    here = {name: tensor.detach() for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel()}
    bar = tqdm(here.items(), desc="weights", unit="tensor", leave=False, delay=2)
    ranges = {name: _range(tensor) for name, tensor in bar if tensor.is_floating_point()}
    empty = {name for name, values in ranges.items() if values == (0.0, 0.0)}
    for name, entry in entries.items():
        empty |= {
            part for part in _parts(name, entry) if part in here and _only_zeros(here, part, grid_of_entry(entry))
        }
    return [_finite(ranges, len(tensors) - len(here)), _alive(empty, entries, zero), _one_type(tensors, entries)]


def check_plan(plan: RankPlan, tensors: Tensors, entries: Entries) -> list[Finding]:
    """Return whether ranks, shapes, storage, bits and counts of ``plan`` are those of the tensors.

    Args:
        plan: The plan of the model.
        tensors: Tensors of the model by name, as ``tensors_of`` returns them.
        entries: The config's entry of each compressed module; empty if they were merged.
    """
    is_merged = not entries
    entries, gone = _without_dropped(entries)
    every = {
        name: module for name, module in (*plan.modules.items(), *plan.embeddings.items()) if not module.is_dropped
    }
    layers = {*plan.stored_layers, *plan.embeddings}
    wrong: list[str] = [f"{name} is dropped, but not in the plan" for name in gone - {*plan.dropped_experts}]
    wrong += [f"{name} is dropped in the plan only" for name in plan.dropped_experts if name not in gone]
    wrong += [
        f"{name} is {'low-rank' if _rank(entry) else 'rounded'} and not in the plan"
        for name, entry in entries.items()
        if name not in layers
    ]
    found: dict[str, ModulePlan] = {}
    # Merged experts are stored as their family stores them: fused, or under other names. Their numbers are counted.
    fused = {name for name in layers if is_merged and expert_number(name) is not None} - _matrices_of(tensors)
    for name, planned in every.items():
        if fused.issuperset(planned.layers or (name,)):
            continue
        try:
            read = _stored_stack if planned.layers else _stored_module
            found[name] = read(name, planned, None if is_merged else entries, tensors)
        except ValueError as error:
            wrong.append(f"{name} {error}")
    wrong += [
        f"{name} has {_described(stored)}, but the plan has {_described(every[name])}"
        for name, stored in found.items()
        if (stored.rank, stored.shape, stored.grid) != (every[name].rank, every[name].shape, every[name].grid)
    ]
    figures: dict[str, Any] = {"modules": len(plan.modules), "wrong": wrong}
    figures |= {"dropped_experts": len(gone)} if gone else {}
    if wrong:
        return [Finding("plan", "broken", f"the plan is not this model's: {first_few(wrong)}", figures, DAMAGED)]
    per = plan.bytes_per_parameter
    merged = is_merged and (len(plan.dense_modules) < len(plan.modules) or plan.is_rounded)
    if merged:
        which = f"{len(found)} modules, without those of experts," if fused else f"all {len(plan.modules)} modules"
        message = f"{which} have the planned shapes; factors were merged into dense weights"
        shapes = Finding("plan", "healthy", message, {**figures, "merged": True})
        expected = plan.model_parameters - plan.left_out
        return [shapes, _counts(per, (expected, expected * per), (0, 0), tensors)]
    stored = replace(plan, modules={name: found.get(name, planned) for name, planned in plan.modules.items()})
    # Pivots may be on the other side than plans assume, which has other groups.
    rounded = {name: entry for name, entry in entries.items() if grid_of_entry(entry) is not None}
    more = sum(_bytes(found[name], entry) - found[name].bytes(per) for name, entry in rounded.items())
    outside = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in rounded}
    inside = {name: tensor for name, tensor in tensors.items() if name not in outside}
    numbers = sum(found[name].numbers(per) for name in rounded)
    numbers += sum(tensor.numel() for name, tensor in inside.items() if name.endswith(".bias"))
    size = sum(_stored_bytes(name, tensor, inside) for name, tensor in inside.items())
    expected = stored.kept_model_parameters
    return [_storage(plan, found, figures), _counts(per, (expected, stored.bytes + more), (numbers, size), outside)]


def _without_dropped(entries: Entries) -> tuple[dict[str, Entry], set[str]]:
    """Return the entries of modules that are there, and the names of the experts that are dropped."""
    gone = {name for name, entry in entries.items() if not isinstance(entry, int) and entry.get("dropped")}
    return {name: entry for name, entry in entries.items() if name not in gone}, gone


def check_merged_ranks(plan: RankPlan, tensors: Tensors) -> Finding:
    """Return whether the ranks of merged dense weights are at most the planned ones, up to rounding in their type.

    A random sketch with a few more columns than the rank spans such a matrix, so that the residual is rounding. Ranks
    that exceed the plan by a few are not noticed.
    """
    wrong = []
    # Those of experts may be fused, or have other names.
    found = {name: planned for name, planned in plan.modules.items() if f"{name}.weight" in tensors}
    for name, planned in tqdm(found.items(), desc="ranks", unit="module", leave=False, delay=2):
        weight = tensors[f"{name}.weight"].detach()
        if planned.rank is not None and _residual(weight.float(), planned.rank) > torch.finfo(weight.dtype).eps ** 0.5:
            wrong.append(f"{name} (rank {planned.rank})")
    if wrong:
        message = f"merged weights have more than the planned rank: {first_few(wrong)}"
        return Finding("merged ranks", "broken", message, {"wrong": wrong}, DAMAGED)
    which = "" if len(found) == len(plan.modules) else f" of the {len(found)} that are stored under their own names"
    return Finding("merged ranks", "healthy", f"no merged weight{which} has more than its planned rank")


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


def _only_zeros(tensors: Tensors, part: str, grid: Grid | None) -> bool:
    """Tell whether all codes of a rounded matrix stand for zero; False if it is not rounded."""
    packed, zeros, scales = (tensors.get(name) for name in (f"{part}_packed", f"{part}_zeros", part))
    if grid is None or packed is None or scales is None or (grid.has_zeros and zeros is None):
        return False
    if packed.ndim != 2 or scales.ndim != 2:
        return False
    # A row may have a few columns more, which are not needed to judge it.
    columns = next((count for count in range(1, 8 * packed.shape[1]) if _fits(grid, count, packed, scales)), 0)
    size = grid.group or columns
    for start in range(0, len(packed) if columns else 0, _ROWS):
        rows = slice(start, start + _ROWS)
        codes = unpack(packed[rows], grid.bits, columns)
        if zeros is None:
            same = codes == 128
        else:
            offset = unpack(zeros[rows], grid.bits, scales.shape[1])
            same = codes == offset.repeat_interleave(size, 1)[:, :columns]
        if not same.all():
            return False
    return columns > 0


def _fits(grid: Grid, columns: int, packed: Tensor, scales: Tensor) -> bool:
    return packed_width(columns, grid.bits) == packed.shape[1] and grid.groups(columns) == scales.shape[1]


def _alive(zero: Collection[str], entries: Entries, rightly: Collection[str]) -> Finding:
    judged = {name: entry for name, entry in entries.items() if name not in rightly}
    parts = {part: _decides_the_layer(part, entry) for name, entry in judged.items() for part in _parts(name, entry)}
    dead = [part for part, whole in parts.items() if whole and part in zero]
    suspect = [part for part, whole in parts.items() if not whole and part in zero]
    bits = count_kinds(grid for grid in map(grid_of_entry, entries.values()) if grid is not None)
    figures = {"modules": len(entries), "zero": dead, "zero_coefficients": suspect, "zero_in_base": [*rightly]}
    figures |= {"bits": bits} if bits else {}
    kind = "low-rank or rounded" if bits else "low-rank"
    rounded = "".join(f"; {count} with {what}" for what, count in bits.items())
    if dead:
        message = f"{first_few(dead)} holds only zeros, so that the layer outputs only its bias"
        return Finding("factors", "broken", message, figures, DAMAGED)
    if suspect:
        # A healthy model has zero coefficients if all rows but the pivots are zero.
        message = f"the coefficients {first_few(suspect)} are all zero"
        return Finding("factors", "warning", message, figures, "check whether the base has as many dead channels")
    if rightly:
        message = f"{first_few([*rightly])} is zero, as in the base; none of {len(judged)} other {kind} modules is"
        message += rounded
        return Finding("factors", "healthy", message, figures)
    return Finding("factors", "healthy", f"none of {len(entries)} {kind} modules is zero{rounded}", figures)


def _one_type(tensors: Tensors, entries: Entries) -> Finding:
    # Files have scales in a type of their own.
    scales = {
        part for name, entry in entries.items() if grid_of_entry(entry) is not None for part in _parts(name, entry)
    }
    scales = {name for name in scales if name in tensors and tensors[name].dtype == SCALE_TYPE}
    judged = {name: tensor for name, tensor in tensors.items() if name not in scales and tensor.is_floating_point()}
    kinds = Counter(_type(tensor) for tensor in judged.values())
    mixed = [
        name
        for name, entry in entries.items()
        if len({_type(judged[part]) for part in (*_parts(name, entry), f"{name}.bias") if part in judged}) > 1
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
    low_rank = [name for name, module in plan.modules.items() if module.rank]
    other = [name for name in low_rank if found[name].storage != plan.modules[name].storage]
    if other:
        modules = first_few([f"{name} is stored {found[name].storage}" for name in other])
        message = f"{modules}, unlike in the plan, so that the plan's counts are wrong"
        advice = "save the plan that lowrank_pl.factors.compression.deployed_plan returns"
        return Finding("plan", "warning", message, {**figures, "stored_otherwise": other}, advice)
    what = "ranks, shapes, storage and bits" if plan.is_rounded else "ranks, shapes and storage"
    message = f"{what} of all {len(plan.modules) - len(plan.dropped_modules)} modules are as planned"
    if plan.dropped_modules:
        message += f", and {len(plan.dropped_experts)} experts are dropped"
    return Finding("plan", "healthy", message, {**figures, "stored_otherwise": []})


def _counts(per: int, expected: tuple[int, int], counted: tuple[int, int], tensors: Tensors) -> Finding:
    """Return whether a model has the planned parameters, and as many bytes as these take in the plan's type.

    Args:
        per: Bytes of a number that is not rounded.
        expected: Parameters and bytes by the plan.
        counted: Parameters and bytes of rounded layers.
        tensors: All other tensors.
    """
    # As in plans, indices count as the parameters that take as many bytes.
    numbers = counted[0] + sum(
        -(-tensor.numel() * INDEX_BYTES // per) if _is_pivots(name) else tensor.numel()
        for name, tensor in tensors.items()
    )
    size = counted[1] + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    planned, planned_size = expected
    figures = {"parameters": numbers, "planned_parameters": planned, "bytes": size, "planned_bytes": planned_size}
    if numbers != planned:
        message = f"the tensors have {numbers:,} parameters, the plan {planned:,}: it is for another model"
        return Finding("counts", "broken", message, figures, DAMAGED)
    if size != planned_size:
        message = f"the tensors take {size:,} bytes, but the plan {planned_size:,}"
        return Finding("counts", "warning", message, figures, "check the type in which they were saved")
    return Finding("counts", "healthy", f"{numbers:,} parameters and {size:,} bytes, as planned", figures)


def _matrices_of(tensors: Tensors) -> set[str]:
    """Return the names of the modules that have a weight."""
    return {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}


def _stored_bytes(name: str, tensor: Tensor, others: Tensors) -> int:
    """Return the bytes of a rounded layer's tensor on disk, where scales have a type of their own."""
    return tensor.numel() * (SCALE_TYPE.itemsize if f"{name}_packed" in others else tensor.element_size())


def _stored_module(name: str, planned: ModulePlan, entries: Entries | None, tensors: Tensors) -> ModulePlan:
    """Return the rank, the shape, the storage and the bits of a module, from its tensors; no entries: it was merged.

    Raises:
        ValueError: A part is missing, or the parts do not match; the message continues the module's name.
    """
    entry = None if entries is None else entries.get(name)
    parts = [tensors.get(part) for part in ((f"{name}.weight",) if entry is None else _parts(name, entry))]
    shapes = [tuple(part.shape) for part in parts if part is not None]
    if len(shapes) < len(parts) or any(len(shape) != 2 for shape in shapes):
        raise ValueError("is missing or not a matrix")
    if entry is None:
        rows, columns = shapes[0]
        # The weight of GPT-2's Conv1D is stored transposed.
        shape = planned.shape if shapes[0] == planned.shape[::-1] else (rows, columns)
        return ModulePlan(shape) if entries is not None else replace(planned, shape=shape)
    rank, side = _rank(entry), _side(entry)
    if grid_of_entry(entry) is not None:
        return _rounded_module(name, planned.shape, entry, tensors)
    (rows, inner), (outer, columns) = shapes
    if rank is None or not inner == outer == rank:
        raise ValueError(f"has parts of shapes {list(shapes[0])} and {list(shapes[1])}, which do not match rank {rank}")
    shape = (rows + rank if side == "out" else rows, columns + rank if side == "in" else columns)
    return ModulePlan(shape, rank, storage="factored" if side is None else "pivoted")


def _stored_stack(name: str, planned: ModulePlan, entries: Entries | None, tensors: Tensors) -> ModulePlan:
    """Return rank and shape of layers that share a right factor as one module; otherwise as ``_stored_module``."""
    owner, *others = planned.layers
    one = ModulePlan(planned.layer_shape)
    ours = {layer: (entries or {}).get(layer) for layer in planned.layers}
    if all(entry is None for entry in ours.values()):
        for layer in planned.layers:
            if _stored_module(layer, one, entries, tensors).shape != planned.layer_shape:
                raise ValueError(f"has {layer} of another shape than {list(planned.layer_shape)}")
        return planned if entries is None else replace(planned, rank=None, indices=None)
    rank = ours[owner]
    wanted = {"rank": rank, "storage": "shared", "right": owner}
    if not isinstance(rank, int) or any(ours[layer] != wanted for layer in others):
        raise ValueError(f"has layers that do not share the right factor of {owner}")
    parts = [f"{owner}.right", *(f"{layer}.weight" for layer in planned.layers)]
    shapes = [tuple(tensors[part].shape) if part in tensors else () for part in parts]
    rows, columns = planned.layer_shape
    if shapes != [(rank, columns), *[(rows, rank)] * len(planned.layers)]:
        raise ValueError(f"has parts of shapes {shapes[0]}, {shapes[1]} and more, which do not match rank {rank}")
    return ModulePlan(planned.shape, rank, layers=planned.layers)


def _rounded_module(name: str, shape: tuple[int, int], entry: Entry, tensors: Tensors) -> ModulePlan:
    """Return a rounded module of ``shape``; its tensors alone do not tell the shape."""
    grid = grid_of_entry(entry)
    assert grid is not None
    made = ModulePlan(shape, _rank(entry), storage="factored" if _side(entry) is None else "pivoted", grid=grid)
    for part, (rows, columns) in zip(_parts(name, entry), _matrices(made, entry), strict=True):
        for tensor, shape in stored_shapes(part, rows, columns, grid).items():
            found = list(tensors[tensor].shape) if tensor in tensors else "absent"
            if found != list(shape):
                raise ValueError(
                    f"has {tensor.rpartition('.')[2]} {found}, expected {list(shape)} for {_described(made)}"
                )
    return made


def _matrices(module: ModulePlan, entry: Entry) -> list[tuple[int, int]]:
    """Return ``(rows, columns)`` of each matrix of a module as it is stored."""
    side: Any = _side(entry)
    return module.matrices if side is None or module.rank is None else pivoted_matrices(module.shape, module.rank, side)


def _bytes(module: ModulePlan, entry: Entry) -> int:
    """Return the bytes of a rounded module as it is stored."""
    assert module.grid is not None
    pivots = 0 if _side(entry) is None else (module.rank or 0) * INDEX_BYTES
    return sum(module.grid.bytes(*sizes) for sizes in _matrices(module, entry)) + pivots


def _residual(weight: Tensor, rank: int) -> float:
    """Return the relative norm of ``weight`` outside the span of a random sketch of rank ``rank``."""
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(weight.shape[1], rank + OVERSAMPLING, generator=generator).to(weight)
    basis = torch.linalg.qr(weight @ sketch).Q
    norm = weight.norm()
    return float((weight - basis @ (basis.T @ weight)).norm() / norm) if norm > 0 else 0.0


def _rank(entry: Entry) -> int | None:
    """Return the rank of an entry; None if the module is rounded and not of low rank."""
    return entry if isinstance(entry, int) else entry.get("rank")


def _side(entry: Entry) -> str | None:
    return None if isinstance(entry, int) else entry.get("side")


def _parts(name: str, entry: Entry) -> tuple[str, ...]:
    """Return the names of the matrices of a compressed module; those of a rounded one are its scales."""
    alone = _rank(entry) is None or (isinstance(entry, dict) and "right" in entry)
    return (f"{name}.weight",) if alone else (f"{name}.weight", f"{name}.right")


def _decides_the_layer(part: str, entry: Entry) -> bool:
    """Tell whether the whole weight is zero if ``part`` is; coefficients of pivoted storage alone may be zero."""
    side = _side(entry)
    return side is None or part.endswith(".right" if side == "out" else ".weight")


def _is_pivots(name: str) -> bool:
    return name.endswith(".pivots")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _described(module: ModulePlan) -> str:
    bits = "" if module.grid is None else f" and {next(iter(count_kinds([module.grid])))}"
    return f"{'no low rank' if module.rank is None else f'rank {module.rank}'} and shape {list(module.shape)}{bits}"
