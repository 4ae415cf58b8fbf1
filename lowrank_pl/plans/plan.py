"""The rank plan: every method produces one, and every export consumes one."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_pl.models.hf_layers import Side
from lowrank_pl.models.hf_quantized import SCALE_TYPE, Grid
from lowrank_pl.plans.component_order import ComponentOrder
from lowrank_pl.plans.storage import INDEX_BYTES, Form, Storage, StorageChoice
from lowrank_pl.utils.checks import check_choices
from lowrank_pl.utils.files import atomic_write, canonical_json, sha256_of
from lowrank_pl.utils.formatting import percent
from lowrank_pl.utils.json_files import SEAL, break_seal, checked_json, json_digest

__all__ = [
    "BYTE_BUDGET",
    "HEALED",
    "SCHEMA",
    "TRAINED",
    "ZERO",
    "ModulePlan",
    "RankPlan",
    "count_kinds",
    "pivoted_matrices",
    "training_of",
]

_log = logging.getLogger(__name__)

SCHEMA = 4
"""Version of the JSON format. Since 2, a module may be stored pivoted, since 3 it may be rounded to a few bits, and
since 4 layers may share a right factor and an expert may be dropped. Plans are written in the lowest version that has
what they hold, 2 or higher; plans of version 1 are still read."""

BYTE_BUDGET = "bytes"
"""Key of a plan's origin: the bytes that were asked for, where these and not parameters were."""

ZERO = "all zeros in the base too"
"""Note on a module whose factors may be zero."""

HEALED = "healed: "
"""How the note of a plan begins whose model was trained after the compression."""

TRAINED = "trained factors"
"""How the note of a plan begins some of whose factors were trained by gradient descent in a refit."""


@dataclass(frozen=True)
class ModulePlan:
    """The plan of one linear layer.

    Args:
        shape: ``(out, in)`` of the layer's weight.
        rank: Number of kept components; ``None`` leaves the layer dense, and 0 is for the matrices of an expert that is
            dropped: it is not run, and other experts take its tokens.
        indices: Indices of the kept components, ascending; ``None`` stands for the first ``rank`` ones.
        storage: Form in which a low-rank layer is stored; without meaning if the layer is dense or dropped.
        grid: The numbers that the stored matrices are rounded to; None leaves them as they are.
        layers: Names of several linear layers of one shape, whose weights are the rows of this one, in this order: they
            share the right factor, and each has its rows of the left one. Empty for a layer by itself.
    """

    shape: tuple[int, int]
    rank: int | None = None
    indices: tuple[int, ...] | None = None
    storage: Form = "factored"
    grid: Grid | None = None
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or not all(type(size) is int and size > 0 for size in self.shape):
            raise ValueError(f"the shape {self.shape} was given: expected two positive whole numbers, out and in")
        if self.is_dropped:
            if self.indices is not None or self.storage != "factored" or self.grid is not None:
                raise ValueError(
                    "a dropped module was given indices, a storage or bits: it has no matrix, leave them out"
                )
            return
        if self.rank is not None and not 1 <= self.rank <= min(self.shape):
            raise ValueError(f"a rank of {self.rank} was given for shape {self.shape}: expected 1..{min(self.shape)}")
        if self.indices is not None:
            _check_indices(self.indices, self.rank, self.shape)
        check_choices({"storage": (self.storage, Form)})
        if self.storage == "pivoted" and self.rank == min(self.shape):
            raise ValueError(
                f"rank {self.rank} is full for shape {self.shape}: store it factored or dense, not pivoted"
            )
        if self.layers:
            self._check_layers()

    def _check_layers(self) -> None:
        count = len(self.layers)
        if count < 2 or len(set(self.layers)) < count or self.shape[0] % count:
            raise ValueError(
                f"{count} layers with the rows of shape {self.shape} were given: expected two or more different layers "
                "with equal numbers of rows"
            )
        if self.storage != "factored" or self.grid is not None:
            raise ValueError(
                f"{self.layers[0]} and others share a right factor, which is stored factored and without bits: leave "
                "storage and bits out"
            )

    @classmethod
    def of_highest(
        cls, shape: tuple[int, int], rank: int | None, scores: Tensor, *, storage: Form = "factored"
    ) -> ModulePlan:
        """Return the plan that keeps the ``rank`` components with the highest scores; among equals, the first ones.

        Args:
            shape: ``(out, in)`` of the module.
            rank: Number of kept components; ``None`` is dense, 0 is dropped.
            scores: ``[components]``, at most ``min(out, in)``; components without a score come last.
            storage: Form in which the module is stored.

        >>> ModulePlan.of_highest((8, 8), 2, torch.tensor([3.0, 1.0, 2.0])).indices
        (0, 2)
        """
        if not rank:
            return cls(shape, rank)
        padded = torch.cat([scores, scores.new_full((min(shape) - len(scores),), -math.inf)])
        best = padded.argsort(descending=True, stable=True)[:rank].sort().values.tolist()
        return cls(shape, rank, None if best[-1] == rank - 1 else tuple(best), storage)

    @property
    def is_dropped(self) -> bool:
        """Whether the module has no matrix, because its expert is dropped."""
        return self.rank == 0

    @property
    def layer_shape(self) -> tuple[int, int]:
        """``(out, in)`` of each of the ``layers``, or of the layer itself."""
        return self.shape[0] // (len(self.layers) or 1), self.shape[1]

    @property
    def is_prefix(self) -> bool:
        """Whether the kept components are the first ones; true for dense modules."""
        return self.indices is None or self.indices == tuple(range(len(self.indices)))

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def parameters(self) -> int:
        """Stored parameters, without the indices of pivots."""
        if self.rank is None:
            return self.dense_parameters
        return self.rank * (sum(self.shape) - (self.rank if self.storage == "pivoted" else 0))

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """``(rows, columns)`` of each stored matrix; pivots are on the shorter side, or else rows."""
        if self.rank is None:
            return [self.shape]
        if self.is_dropped:
            return []
        if self.storage == "factored":
            return [(self.shape[0], self.rank), (self.rank, self.shape[1])]
        return pivoted_matrices(self.shape, self.rank, "out" if self.shape[0] <= self.shape[1] else "in")

    def bytes(self, bytes_per_parameter: int) -> int:
        """Return the bytes of the stored matrices on disk, with the indices of pivots.

        Args:
            bytes_per_parameter: Bytes of a number that is not rounded.
        """
        if self.grid is None:
            return self.numbers(bytes_per_parameter) * bytes_per_parameter
        pivots = self.rank if self.rank is not None and self.storage == "pivoted" else 0
        return sum(self.grid.bytes(*sizes) for sizes in self.matrices) + pivots * INDEX_BYTES

    def memory(self, bytes_per_parameter: int) -> int:
        """Return the bytes of the stored matrices in memory, where scales have the type of the model.

        Args:
            bytes_per_parameter: Bytes of a number that is not rounded.
        """
        size = self.bytes(bytes_per_parameter)
        if self.grid is None:
            return size
        scales = sum(rows * self.grid.groups(columns) for rows, columns in self.matrices)
        return size + scales * (bytes_per_parameter - SCALE_TYPE.itemsize)

    def numbers(self, bytes_per_parameter: int) -> int:
        """Return the stored parameters, where each pivot's index counts as the numbers that take as many bytes."""
        if self.rank is None:
            return self.dense_parameters
        return Storage(self.storage, bytes_per_parameter).cost(self.shape, self.rank)


def pivoted_matrices(shape: tuple[int, int], rank: int, side: Side) -> list[tuple[int, int]]:
    """Return ``(rows, columns)`` of both matrices of a pivoted layer whose pivots are on ``side``."""
    outputs, inputs = shape
    if side == "out":
        return [(outputs - rank, rank), (rank, inputs)]
    return [(outputs, rank), (rank, inputs - rank)]


def count_kinds(grids: Iterable[Grid | None]) -> dict[str, int]:
    """Return how often each kind of numbers occurs, as in ``RankPlan.bits``.

    >>> count_kinds([Grid(8), Grid(4, 32), Grid(4, 32)])
    {'4 bits in groups of 32': 2, '8 bits': 1}
    """
    return dict(Counter(_kind_of_numbers(grid) for grid in grids).most_common())


def training_of(notes: Iterable[str]) -> str:
    """Return what the ``notes`` of a plan say about training after the compression; empty if they say nothing."""
    found = [note for note in notes if note.startswith((HEALED, TRAINED))]
    return "; ".join(note.removeprefix(HEALED) for note in found)


def _kind_of_numbers(grid: Grid | None) -> str:
    if grid is None:
        return "as they are"
    return f"{grid.bits} bits" + ("" if grid.group is None else f" in groups of {grid.group}")


def _check_indices(indices: tuple[int, ...], rank: int | None, shape: tuple[int, int]) -> None:
    whole = all(type(index) is int for index in indices)
    ascending = whole and all(a < b for a, b in pairwise(indices))
    if len(indices) != rank or not ascending or indices[0] < 0 or indices[-1] >= min(shape):
        raise ValueError(
            f"component indices {indices[:4]}... do not fit rank {rank} and shape {shape}: "
            f"expected {rank} ascending numbers below {min(shape)}"
        )


@dataclass(frozen=True)
class RankPlan:
    """The ranks of every targeted module of one model, with the counts that follow from them.

    Args:
        method: Name of the method that made the plan, as in ``lowrank allocate --method``, or of the mask.
        keep: Fraction of the targeted parameters that was requested.
        modules: The plan of each targeted module by name, in the model's order. Embeddings and a head that are targets
            come last; tied ones are one module. Layers of experts that share a right factor are one module, too, which
            has their name without the number of the expert.
        model_parameters: Parameters of the whole dense model, tied ones counted once, ``left_out`` included.
        bytes_per_parameter: Bytes of one stored number.
        origin: What is needed to build the factors again: base, text, settings, store.
        fingerprint: Hashes of what the factors were made from.
        notes: What was skipped, left dense, clamped or scaled, in words.
        order: Order in which components are removed as the model shrinks, if the method knows one. Other sizes of the
            plan follow from it (``lowrank_pl.plans.resize``).
        multiple_of: Every rank is a multiple of this, at other sizes too.
        floors: Least kept fraction by glob on module names, at other sizes too.
        storage: Choice of the form in which modules are stored, at other sizes too.
        left_out: Parameters that width pruning has removed from the modules; all fractions count them as removed.
        embeddings: Embeddings and heads that are no targets and are rounded to a few bits, by name, as dense modules;
            tied ones once.
        embedded: Names of those ``modules`` that are embeddings or a head: they are stored as two factors in any case.
        alike_experts: Whether the experts of a block have equal ranks, at other sizes too.

    Example:
        >>> plan = RankPlan(method="hand", keep=0.5, model_parameters=300,
        ...                 modules={"a": ModulePlan((10, 10), 2), "b": ModulePlan((10, 10))})
        >>> plan.keep_targeted, round(plan.keep_model, 2)
        (0.7, 0.8)
        >>> RankPlan.from_json(plan.to_json()) == plan
        True
    """

    method: str
    keep: float
    modules: Mapping[str, ModulePlan]
    model_parameters: int
    bytes_per_parameter: int = 4
    origin: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    order: ComponentOrder | None = None
    multiple_of: int = 1
    floors: Mapping[str, float] = field(default_factory=dict)
    storage: StorageChoice = "factored"
    left_out: int = 0
    embeddings: Mapping[str, ModulePlan] = field(default_factory=dict)
    embedded: tuple[str, ...] = ()
    alike_experts: bool = False

    @property
    def targeted_parameters(self) -> int:
        """Parameters of the targeted modules of the dense model, with those that width pruning has removed."""
        return sum(module.dense_parameters for module in self.modules.values()) + self.left_out

    @property
    def kept_parameters(self) -> int:
        """Parameters of the targeted modules under the plan, with the indices of pivots (``ModulePlan.numbers``)."""
        return sum(module.numbers(self.bytes_per_parameter) for module in self.modules.values())

    @property
    def keep_targeted(self) -> float:
        """Kept fraction of the targeted modules' parameters."""
        return self.kept_parameters / self.targeted_parameters

    @property
    def kept_model_parameters(self) -> int:
        """Parameters of the whole model under the plan."""
        return self.model_parameters - self.targeted_parameters + self.kept_parameters

    @property
    def keep_model(self) -> float:
        """Kept fraction of the whole model's parameters, embeddings and norms included."""
        return self.kept_model_parameters / self.model_parameters

    @property
    def bytes(self) -> int:
        """Bytes of the whole compressed model's parameters on disk."""
        return self._sum(ModulePlan.bytes)

    @property
    def memory(self) -> int:
        """Bytes of the whole compressed model's parameters in memory: scales have the type of the model there."""
        return self._sum(ModulePlan.memory)

    def _sum(self, size: Callable[[ModulePlan, int], int]) -> int:
        stored = [*self.modules.values(), *self.embeddings.values()]
        others = self.model_parameters - self.targeted_parameters
        others -= sum(module.dense_parameters for module in self.embeddings.values())
        return sum(size(module, self.bytes_per_parameter) for module in stored) + others * self.bytes_per_parameter

    @property
    def keep_bytes(self) -> float:
        """Kept fraction of the whole model's bytes."""
        return self.bytes / self.dense_bytes

    @property
    def is_rounded(self) -> bool:
        """Whether any matrix is rounded to a few bits."""
        return any(module.grid is not None for module in (*self.modules.values(), *self.embeddings.values()))

    @property
    def bits(self) -> dict[str, int]:
        """How many targeted modules have each kind of numbers: ``8 bits``, ``4 bits in groups of 32``, ``as they are``.

        Kinds with the most modules come first. Dropped modules have no numbers.
        """
        return count_kinds(module.grid for module in self.modules.values() if not module.is_dropped)

    @property
    def widths(self) -> list[int]:
        """The bits that any matrix is rounded to, ascending; empty if none is."""
        grids = [module.grid for module in (*self.modules.values(), *self.embeddings.values())]
        return sorted({grid.bits for grid in grids if grid is not None})

    @property
    def dense_bytes(self) -> int:
        """Bytes of the whole dense model's parameters."""
        return self.model_parameters * self.bytes_per_parameter

    @property
    def dense_modules(self) -> list[str]:
        """Names of the targeted modules that stay dense."""
        return [name for name, module in self.modules.items() if module.rank is None]

    @property
    def dropped_modules(self) -> list[str]:
        """Names of the modules of dropped experts, which have no matrix."""
        return [name for name, module in self.modules.items() if module.is_dropped]

    @property
    def dropped_experts(self) -> list[str]:
        """Names of the dropped experts."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.dropped_modules))

    @property
    def pivoted_modules(self) -> list[str]:
        """Names of the modules that are stored pivoted."""
        low_rank = {name: module for name, module in self.modules.items() if module.rank is not None}
        return [name for name, module in low_rank.items() if module.storage == "pivoted"]

    @property
    def any_k_modules(self) -> list[str]:
        """Names of the modules whose kept components are not the first ones."""
        return [name for name, module in self.modules.items() if not module.is_prefix]

    @property
    def zero_modules(self) -> list[str]:
        """Names of the modules that the notes call zero in the base, so that their factors are zero rightly."""
        return [note.removesuffix(f": {ZERO}") for note in self.notes if note.endswith(f": {ZERO}")]

    @property
    def stored_modules(self) -> list[str]:
        """Names of the modules that have a matrix: all but those of dropped experts."""
        return [name for name, module in self.modules.items() if not module.is_dropped]

    @property
    def layers(self) -> list[str]:
        """Names of the targeted modules of the model: those of ``modules``, and in place of shared ones their own."""
        return [layer for name, module in self.modules.items() for layer in module.layers or (name,)]

    @property
    def stored_layers(self) -> list[str]:
        """Names of those ``layers`` that have a matrix: all but those of dropped experts."""
        return [layer for name in self.stored_modules for layer in self.modules[name].layers or (name,)]

    @property
    def shares_experts(self) -> bool:
        """Whether experts share right factors, at this size or another."""
        return any(module.layers for module in self.modules.values())

    def refuse_shared(self, what: str) -> None:
        """Refuse a plan with shared right factors where ``what``, a clause, says why it can't be.

        Raises:
            ValueError: Experts share right factors.
        """
        if self.shares_experts:
            raise ValueError(f"the experts of the plan share right factors, but {what}")

    @property
    def healed(self) -> str:
        """What was trained after the compression, and what that gained; empty if nothing was trained."""
        return training_of(self.notes)

    @property
    def requested(self) -> str:
        """The size that was asked for: bytes, or the fraction of the targeted parameters."""
        size = self.origin.get(BYTE_BUDGET)
        return f"{size:,} bytes" if isinstance(size, int) else percent(self.keep)

    @property
    def named_base(self) -> str:
        """Name of the model that was compressed, before any width pruning; empty if it is not known."""
        pruned = self.origin.get("narrowed")
        return str(self.origin.get("base", "") if pruned is None else pruned["base"])

    def ranks_digest(self) -> str:
        """Return the SHA-256 digest of the kept components of every module.

        It names folders of factors that were made for these ranks, so changing it would lose all such folders.
        """
        return sha256_of(canonical_json({name: [module.rank, module.indices] for name, module in self.modules.items()}))

    def dense(self) -> RankPlan:
        """Return the plan that leaves every module dense."""
        modules = {name: ModulePlan(module.shape, layers=module.layers) for name, module in self.modules.items()}
        return replace(self, keep=1.0, modules=modules, order=None, embeddings={})

    def with_origin(
        self, origin: Mapping[str, Any], fingerprint: Mapping[str, Any], notes: Iterable[str] = ()
    ) -> RankPlan:
        """Return the plan with the origin of its factors, and with ``notes`` before its own."""
        return replace(self, origin=origin, fingerprint=fingerprint, notes=(*notes, *self.notes))

    def to_json(self) -> str:
        """Return the plan as JSON: one line a module, in a stable order, the component order last.

        The counts are for people and scripts; they are computed from the ranks again when a plan is read. The component
        order is a line of base64 a module: leave it as it is when you edit ranks. A plan whose content differs from its
        digest is read with a warning.
        """
        head = {
            # Earlier versions read what they can.
            "schema": 4 if self.shares_experts or self.dropped_modules else 3 if self.is_rounded else 2,
            "method": self.method,
            "keep": {"asked": self.keep, "targeted": self.keep_targeted, "model": self.keep_model},
            "parameters": {
                "targeted": {"dense": self.targeted_parameters, "kept": self.kept_parameters},
                "model": {"dense": self.model_parameters, "kept": self.kept_model_parameters},
                **({"left_out": self.left_out} if self.left_out else {}),
            },
            "bytes": {"dense": self.dense_bytes, "kept": self.bytes, "per_parameter": self.bytes_per_parameter},
            "counts": {
                "modules": len(self.modules),
                "dense": len(self.dense_modules),
                "any_k": len(self.any_k_modules),
                "pivoted": len(self.pivoted_modules),
                **({"dropped": len(self.dropped_modules)} if self.dropped_modules else {}),
            },
            "constraints": {
                "multiple_of": self.multiple_of,
                "floors": dict(self.floors),
                "storage": self.storage,
                # Only if there are any: earlier versions refuse unknown keys, and know no such plans.
                **({"embeddings": list(self.embedded)} if self.embedded else {}),
                **({"alike_experts": True} if self.alike_experts else {}),
            },
            "notes": list(self.notes),
            "origin": dict(self.origin),
            "fingerprint": dict(self.fingerprint),
        }
        body = json.dumps(head, indent=2, ensure_ascii=False)[:-2]
        tables = _table("modules", self.modules)
        if self.embeddings:
            tables += _table("embeddings", self.embeddings)
        if self.order is not None:
            # Last, because people do not read it.
            scores = [f"    {json.dumps(name)}: {json.dumps(text)}" for name, text in self.order.to_json().items()]
            tables += ',\n  "order": {\n' + ",\n".join(scores) + "\n  }"
        tables += "\n}\n"
        return f'{body},\n  "{SEAL}": "{json_digest(json.loads(body + tables))}"{tables}'

    @classmethod
    def from_json(cls, text: str, *, place: str | Path = "the plan") -> RankPlan:
        """Return the plan that ``to_json`` wrote, or that a person edited.

        Args:
            text: The JSON.
            place: Its file, for the warning that it was edited.

        Raises:
            ValueError: The text is not JSON, has another schema, or a field is absent, unknown or impossible; the
                message names the field.
        """
        from lowrank_pl.plans.plan_schema import ModuleEntry, PlanFile

        data = checked_json(text, PlanFile)
        try:
            break_seal(data, data)
        except ValueError:
            # Plans are made to be edited.
            _log.warning(
                "%s was edited or damaged after it was written, by its digest under %r: delete that line if you edited "
                "it, or else make the plan again",
                place,
                SEAL,
            )
        # The first plans have no constraints, and those of schema 1 have factored storage only.
        constraints = {"multiple_of": 1, "floors": {}, "storage": "factored", **data.get("constraints", {})}
        return cls(
            method=data["method"],
            keep=data["keep"]["asked"],
            modules={name: ModuleEntry(**entry).plan() for name, entry in data["modules"].items()},
            model_parameters=data["parameters"]["model"]["dense"],
            bytes_per_parameter=data["bytes"]["per_parameter"],
            origin=data["origin"],
            fingerprint=data["fingerprint"],
            notes=tuple(data["notes"]),
            order=ComponentOrder.from_json(data["order"]) if "order" in data else None,
            multiple_of=constraints["multiple_of"],
            floors=constraints["floors"],
            storage=constraints["storage"],
            embedded=tuple(constraints.get("embeddings", ())),
            left_out=data["parameters"].get("left_out", 0),
            embeddings={name: ModuleEntry(**entry).plan() for name, entry in data.get("embeddings", {}).items()},
            alike_experts=constraints.get("alike_experts", False),
        )

    def save(self, path: str | Path) -> Path:
        """Write the plan to ``path`` as JSON, atomically."""
        return atomic_write(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Return the plan in the file ``path``.

        Raises:
            ValueError: There is no such file, or it holds no valid plan; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no plan at {path}: expected a JSON file of `lowrank allocate` or `lowrank fit`")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), place=path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; correct it, or make the plan again with `lowrank allocate`") from None


_DROPPED = "dropped"
"""The rank of the modules of a dropped expert in plan files."""


def _module_json(plan: ModulePlan) -> dict[str, Any]:
    rank = "dense" if plan.rank is None else plan.rank or _DROPPED
    entry: dict[str, Any] = {"shape": list(plan.shape), "rank": rank}
    if plan.indices is not None:
        entry["indices"] = list(plan.indices)
    if plan.rank is not None and plan.storage != "factored":
        entry["storage"] = plan.storage
    if plan.grid is not None:
        entry.update(plan.grid.to_json())
    if plan.layers:
        entry["layers"] = list(plan.layers)
    return entry


def _table(name: str, modules: Mapping[str, ModulePlan]) -> str:
    """Return the entry ``name`` of a plan's JSON, with one line a module."""
    lines = [f"    {json.dumps(module)}: {json.dumps(_module_json(plan))}" for module, plan in modules.items()]
    return f',\n  "{name}": {{\n' + ",\n".join(lines) + "\n  }"
