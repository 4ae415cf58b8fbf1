"""The matrices of a plan rounded to the bits that the plan gives them."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.embeddings import RowMetric, row_metric
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import statistics_of_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.rounding import Metric, compensated, nearest, round_dense, round_factors, round_pivoted
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.quantize.settings import Rounding, grid_of
from lowrank_pl.models.hf_layers import LowRankEmbedding, LowRankLinear, PivotedLinear
from lowrank_pl.models.hf_quantized import Grid, Rounded
from lowrank_pl.models.targets import HEAD, Target, dense_weight, weight_of
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.utils.files import canonical_json, sha256_of
from lowrank_pl.utils.tensor_store import weight_digest

__all__ = [
    "NEAREST_FROM",
    "check_roundable",
    "embedding_names",
    "head_moment",
    "quantize",
    "round_embedding",
]

_log = logging.getLogger(__name__)

_STEP = "rounding"

NEAREST_FROM = 8
"""Bits from which embeddings and head are rounded to nearest: there is hardly an error to compensate."""

_HEAD_SEQUENCES = 16
"""Sequences on which the inputs of the head are measured."""


def quantize(
    plan: RankPlan, factors: FactorStore, subject: Subject, *, settings: Rounding | None = None
) -> tuple[RankPlan, FactorStore]:
    """Return the plan for rounded matrices, and the store that holds them.

    The metric of the errors is the one that the factors were made with: the second moments of inputs and outputs, with
    their damping. Factors of the kind ``svd`` have none. Pivots are chosen first, and their coefficients are rounded
    like all other matrices.

    The rounded matrices are written module by module to a folder inside that of ``factors``, so a killed run goes on
    where it was. Other sizes don't follow from the plan: make them from the plan before rounding.

    Args:
        plan: The plan, with the bits of each module (``ModulePlan.grid``, ``RankPlan.embeddings``), or without.
        factors: The factors that the plan is for, refitted ones included.
        subject: The dense model, which stays unchanged, its targets, and the sequences that the factors were made from.
        settings: Bits for all modules alike; None rounds to those that ``plan`` has.

    Raises:
        ValueError: The plan has no bits, is rounded already, or does not belong to factors and model.

    Example:
        >>> import torch
        >>> from lowrank_pl import allocate_ranks
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> subject = Subject(tiny_model("llama"), byte_tokenizer(), torch.arange(256).view(4, 64))
        >>> plan, made = quantize(*allocate_ranks(subject, keep=0.5), subject, settings=Rounding(bits=4))
        >>> plan.bits, plan.keep_bytes < 0.2
        ({'4 bits in groups of 32': 14}, True)
    """
    check_roundable(plan)
    if _STEP in factors.fingerprint:
        raise ValueError(f"the matrices in {factors.directory} are rounded already: give the plan before rounding")
    given = plan if settings is None else _with_bits(plan, settings, subject.model)
    if not given.is_rounded:
        raise ValueError("the plan gives no module any bits: say how to round it, such as with bits 4")
    work = _Work(given, factors, subject, compensate=settings is None or settings.compensate)
    return work.run(), work.made


def check_roundable(plan: RankPlan) -> None:
    """Refuse a plan some of whose matrices can't be rounded, before anything is loaded for it.

    Raises:
        ValueError: Experts share right factors.
    """
    plan.refuse_shared("no such factor is rounded to a few bits: round a plan without shared_experts")


def _with_bits(plan: RankPlan, settings: Rounding, model: PreTrainedModel) -> RankPlan:
    """Return ``plan`` with the same bits for every module, and with bits for the embeddings of ``model``."""
    ends = None if settings.embeddings is None else grid_of(settings.embeddings)
    modules = {
        name: module if module.is_dropped else replace(module, grid=ends if name in plan.embedded else settings.grid)
        for name, module in plan.modules.items()
    }
    if ends is None:
        return replace(plan, modules=modules)
    others = {name: shape for name, shape in embedding_names(model).items() if name not in modules}
    embeddings = {name: ModulePlan(shape, grid=ends) for name, shape in others.items()}
    return replace(plan, modules=modules, embeddings=embeddings)


def embedding_names(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of the embeddings and the head; of tied ones only the embeddings.

    Embeddings of a kind of their own are left out, with a warning.
    """
    found: dict[str, tuple[int, int]] = {}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if not any(module is end for end in ends):
            continue
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            _log.warning("%s is a %s: its numbers stay as they are", name, type(module).__name__)
            continue
        if not any(module.weight is other for other in seen):
            seen.append(module.weight)
            rows, columns = module.weight.shape
            found[name] = (rows, columns)
    return found


def head_moment(factors: FactorStore, subject: Subject) -> Tensor:
    """Return the mean second moment ``[width, width]`` of what the head reads, float64.

    It is measured once, on the first calibration sequences, and kept with the statistics of ``factors``.

    Args:
        factors: The factors.
        subject: The dense model, and the sequences that the factors were made from.
    """
    model, sequences = subject.model, subject.sequences
    head: nn.Module = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    rows, columns = head.get_parameter("weight").shape
    statistics = statistics_of_factors(factors, model, sequences).on(sequences[:_HEAD_SEQUENCES])
    store = statistics.collect("inputs", [Target(name, 0, HEAD, (rows, columns), name)])
    return store.read(name, "second_moment").double()


def round_embedding(weight: Tensor, grid: Grid, moment: Tensor | None) -> Rounded:
    """Return the weight ``[tokens, width]`` of embeddings or a head, rounded.

    Args:
        weight: The weight.
        grid: The numbers to round to.
        moment: What the head reads, for error compensation, which ``NEAREST_FROM`` bits do without; None rounds to
            nearest, as for embeddings alone.
    """
    used = None if moment is None or grid.bits >= NEAREST_FROM else moment.to(weight.device)
    return compensated(weight.detach(), grid, used)


class _Work:
    """One rounding: its plan with bits, and its store."""

    def __init__(self, plan: RankPlan, base: FactorStore, subject: Subject, *, compensate: bool) -> None:
        self.plan, self.base, self.subject, self.compensate = plan, base, subject, compensate
        self.model = subject.model
        grids = {
            name: None if module.grid is None else module.grid.to_json()
            for name, module in (*plan.modules.items(), *plan.embeddings.items())
        }
        identity = {
            "plan": plan.ranks_digest(),
            "forms": sha256_of(canonical_json({name: module.storage for name, module in plan.modules.items()})),
            "bits": sha256_of(canonical_json(grids)),
            "compensate": compensate,
        }
        if self._reads_head():
            identity["text"] = sequences_fingerprint(subject.sequences)
        self.made = FactorStore(*base.derived(_STEP, identity))

    def run(self) -> RankPlan:
        """Round what is missing, and return the plan."""
        plain = replace(
            self.plan,
            modules={name: replace(module, grid=None) for name, module in self.plan.modules.items()},
            embeddings={},
        )
        names = [
            *self.plan.embeddings,
            *(name for name, module in self.plan.modules.items() if module.grid is not None or module.rank),
        ]
        with self.made.filling(names) as missing:
            if missing:
                before = {name: weight_of(self.model.get_submodule(name)).detach() for name in self.plan.modules}
                self._round_embeddings([name for name in missing if name in self.plan.embeddings])
                todo = self._copy_bare([name for name in missing if name in self.plan.modules])
                # Statistics that are gone are collected again, in the dense model.
                roots = Roots.of_factors(self.base, self.model, self.subject.sequences, todo) if todo else None
                ends = self._ends({*missing} & {*self.plan.embedded})
                with compressed(self.model, plain, self.base):
                    for name, metric in ends.items():
                        self._round_target(name, metric, before[name])
                    for target, seen in () if roots is None else _with_bar(roots.metrics(todo), len(todo)):
                        self._round(target, seen, before[target.name])
        return self._planned()

    def _copy_bare(self, names: Sequence[str]) -> list[Target]:
        """Copy the factors of modules that get no bits, and return the others."""
        bare = [name for name in names if self.plan.modules[name].grid is None]
        for name in bare:
            notes = {**self.base.notes(name), "seconds": "0"}
            self.made.add(name, self.base.kept(name, self.plan.modules[name]), notes=notes)
        return self.subject.targets.among(set(names) - set(bare))

    def _round(self, target: Target, metric: Metric, weight: Tensor) -> None:
        began = time.perf_counter()
        layer = self.model.get_submodule(target.name)
        grid = self.plan.modules[target.name].grid
        assert grid is not None
        parts = _rounded(layer, grid, metric if self.compensate else None)
        pivots = (layer.pivots, layer.side) if isinstance(layer, PivotedLinear) else None
        before = _matrix(layer) - weight.double()
        after = _merged(layer, parts) - weight.double()
        notes = {
            "weight": weight_digest(weight),
            "form": "pivoted" if pivots else "factored" if "right" in parts else "dense",
            "cost_before": f"{metric.cost(before):.6g}",
            "cost": f"{metric.cost(after):.6g}",
            "seconds": f"{time.perf_counter() - began:.4f}",
        }
        self.made.add_rounded(target.name, parts, pivots=pivots, notes=notes)

    def _ends(self, names: Collection[str]) -> dict[str, RowMetric]:
        """Return what errors cost of those embeddings and heads among the targets that are ``names`` and get bits."""
        targets = [target for target in self.subject.targets.embeddings if target.name in names]
        targets = [target for target in targets if self.plan.modules[target.name].grid is not None]
        settings = Decomposition.of_fingerprint(self.base.fingerprint)
        statistics = statistics_of_factors(self.base, self.model, self.subject.sequences)
        return {one.name: row_metric(settings, statistics, one, device=self.model.device) for one in targets}

    def _round_target(self, name: str, metric: RowMetric, weight: Tensor) -> None:
        """Round embeddings or a head among the targets, dense or factored, in the metric of the hidden side."""
        began = time.perf_counter()
        layer, grid = self.model.get_submodule(name), self.plan.modules[name].grid
        assert grid is not None
        moment = metric.columns.moment() if metric.columns is not None and self.compensate else None
        before: Tensor | None = None
        if isinstance(layer, (LowRankEmbedding, LowRankLinear)):
            left, right = (layer.matrix(part).detach() for part in ("weight", "right"))
            exact = {"weight": left, "right": right}
            parts = (
                round_factors(left, right, grid, Metric(moment))
                if self.compensate
                else {part: nearest(matrix, grid) for part, matrix in exact.items()}
            )
            before = left.float() @ right.float() - weight.float()
        else:
            parts = {"weight": compensated(weight, grid, moment)}
        made = parts["weight"].dense()
        after = (made @ parts["right"].dense() if "right" in parts else made) - weight.float()
        notes = {
            "weight": weight_digest(weight),
            "form": "factored" if "right" in parts else "dense",
            "cost_before": f"{0.0 if before is None else metric.cost(before):.6g}",
            "cost": f"{metric.cost(after):.6g}",
            "seconds": f"{time.perf_counter() - began:.4f}",
        }
        self.made.add_rounded(name, parts, notes=notes)

    def _round_embeddings(self, names: Sequence[str]) -> None:
        if not names:
            return
        head = self.model.get_output_embeddings()
        reads = {name: self.model.get_submodule(name).get_parameter("weight") is head.weight for name in names}
        moment = head_moment(self.base, self.subject) if self._reads_head() else None
        for name in tqdm(names, desc="round embeddings", unit="matrix", leave=False):
            weight, grid = self.model.get_submodule(name).get_parameter("weight"), self.plan.embeddings[name].grid
            assert grid is not None
            rounded = round_embedding(weight, grid, moment if reads[name] else None)
            notes = {"weight": weight_digest(weight.detach()), "form": "dense", "seconds": "0"}
            self.made.add_rounded(name, {"weight": rounded}, notes=notes)

    def _reads_head(self) -> bool:
        """Tell whether what the head reads decides how an embedding is rounded."""
        fine = (entry.grid is not None and entry.grid.bits < NEAREST_FROM for entry in self.plan.embeddings.values())
        return self.compensate and any(fine)

    def _planned(self) -> RankPlan:
        """Return the plan with the forms that the layers have, and with notes on what rounding costs."""
        modules, costs = dict(self.plan.modules), [0.0, 0.0]
        for name, module in self.plan.modules.items():
            if module.grid is None:
                modules[name] = replace(module, indices=None)
                continue
            noted = self.made.notes(name)
            form = noted["form"]
            costs[0] += float(noted["cost_before"])
            costs[1] += float(noted["cost"])
            if form == "dense":
                modules[name] = ModulePlan(module.shape, grid=module.grid)
            else:
                modules[name] = replace(module, indices=None, storage="pivoted" if form == "pivoted" else "factored")
        how = "with error compensation" if self.compensate else "to nearest"
        counts = ", ".join(f"{count} modules {kind}" for kind, count in self.plan.bits.items())
        notes = [f"rounded {how}: {counts}"]
        if self.base.fingerprint.get("kind") == "two_sided":
            notes.append(f"predicted loss in nats: {costs[0]:.4g} by truncation, {costs[1]:.4g} with rounding")
        for note in notes:
            _log.info("quantize: %s", note)
        return replace(
            self.plan,
            modules=modules,
            origin={**self.plan.origin, "store": str(self.made.directory.resolve())},
            fingerprint=self.made.fingerprint,
            notes=(*self.plan.notes, *notes),
            order=None,
        )


def _with_bar(metrics: Iterator[tuple[Target, Metric]], count: int) -> Iterator[tuple[Target, Metric]]:
    yield from tqdm(metrics, desc="round", unit="module", total=count)


def _rounded(layer: nn.Module, grid: Grid, metric: Metric | None) -> dict[str, Rounded]:
    """Return the rounded matrices of a layer; without a metric they are rounded to nearest."""
    if not isinstance(layer, (LowRankLinear, PivotedLinear)):
        weight = dense_weight(layer).detach()
        return {"weight": nearest(weight, grid) if metric is None else round_dense(weight, grid, metric)}
    matrices = {name: layer.matrix(name).detach() for name in ("weight", "right")}
    if metric is None:
        return {name: nearest(matrix, grid) for name, matrix in matrices.items()}
    if isinstance(layer, PivotedLinear):
        return round_pivoted(layer, grid, metric)
    return round_factors(matrices["weight"], matrices["right"], grid, metric)


def _matrix(layer: nn.Module) -> Tensor:
    """Return the merged matrix ``[out, in]`` of a layer, float64."""
    if isinstance(layer, (LowRankLinear, PivotedLinear)):
        return layer.dense().double()
    return dense_weight(layer).detach().double()


def _merged(layer: nn.Module, parts: Mapping[str, Rounded]) -> Tensor:
    """Return the merged matrix ``[out, in]`` of the rounded ``parts`` of a layer, float64."""
    matrices = {name: part.dense() for name, part in parts.items()}
    if isinstance(layer, PivotedLinear):
        made = PivotedLinear.from_parts(matrices["weight"], matrices["right"], layer.pivots, side=layer.side)
        return made.dense().double()
    if isinstance(layer, LowRankLinear):
        return matrices["weight"].double() @ matrices["right"].double()
    return matrices["weight"].double()
