"""One budget in bytes: rank and bits of every module together, by the loss that truncating and rounding cost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.provenance import base_notes, describe_origin, preparation_notes
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.likelihood import divergence
from lowrank_pl.factors.compression import rounded_embedding
from lowrank_pl.factors.rounding import component_costs, dense_costs
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.quantize.quantizing import (
    NEAREST_FROM,
    embedding_names,
    head_moment,
    quantize,
    round_embedding,
)
from lowrank_pl.methods.quantize.settings import ByteBudget
from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.models.targets import EMBEDDINGS, Target, dense_weight, replace_module
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.convex_hull import losses_by_rank
from lowrank_pl.plans.plan import BYTE_BUDGET, ModulePlan, RankPlan
from lowrank_pl.plans.size_choices import Sizes, choose_sizes
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["SizeOptions", "allocate_bytes", "check_budget", "size_options"]

_log = logging.getLogger(__name__)

METHOD = "bytes"
"""Name of the method in plans."""


@dataclass(frozen=True)
class SizeOptions:
    """The sizes that every part of a model may have, with their bytes and losses.

    Args:
        choices: For each module and embedding, its possible plans.
        sizes: Their bytes, and the losses in nats that K-FAC predicts for them; measured for embeddings.
    """

    choices: Mapping[str, Sequence[ModulePlan]]
    sizes: Mapping[str, Sizes]


def allocate_bytes(
    subject: Subject,
    settings: ByteBudget,
    *,
    decomposition: Decomposition | None = None,
    store: FactorStore | None = None,
) -> tuple[RankPlan, FactorStore]:
    """Return the plan with the least predicted loss in so many bytes, and the store with its rounded matrices.

    If the budget has room for the dense model, nothing is rounded, and the store is that of the factors.

    A module may have any rank, as it is or at any number of bits, or its dense weight at any number of bits. What each
    of these loses is predicted by the two-sided metric: ``sum(sigma[k:] ** 2) / 2`` nats for truncating, plus the same
    form of the rounding error. For factors the second is an upper estimate
    (:func:`lowrank_pl.factors.rounding.component_costs`), for dense weights it is what their rounding costs. What
    embeddings and head lose is measured as a divergence on calibration text. The exact Lagrangian allocation over all
    these sizes decides. Modules with bits are never pivoted.

    Args:
        subject: The dense model, its tokenizer, the calibration sequences and the constraints on ranks.
        settings: The budget.
        decomposition: How weights are decomposed; two-sided with default settings by default. Unused with ``store``.
        store: The factors, if they are made already.

    Raises:
        ValueError: The factors are not two-sided, experts are to be alike or dropped, or the budget is below the
            smallest size.

    Example:
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> subject = Subject(tiny_model("llama"), byte_tokenizer(), torch.arange(256).view(4, 64))
        >>> plan, factors = allocate_bytes(subject, ByteBudget(keep=0.2))
        >>> plan.method, plan.keep_bytes <= 0.2
        ('bytes', True)
    """
    made_by = decomposition or Decomposition("two_sided")
    if store is not None:
        made_by = Decomposition.of_fingerprint(store.fingerprint)
    check_budget(subject, settings, made_by)
    factors = store or build_factors(subject, settings=made_by)
    plan = _byte_plan(subject, settings, size_options(subject, factors, settings))
    notes = [*base_notes(subject), *preparation_notes(subject.targets, factors)]
    origin = {**describe_origin(subject, made_by, factors), **plan.origin}
    plan = plan.with_origin(origin, factors.fingerprint, notes)
    if not plan.is_rounded:
        return plan, factors
    return quantize(plan, factors, subject)


def _byte_plan(subject: Subject, settings: ByteBudget, options: SizeOptions) -> RankPlan:
    """Return the plan of a budget, which ``check_budget`` accepts, with bits that are not rounded to yet."""
    budget = subject.budget(1.0)
    number = budget.bytes_per_parameter
    dense = budget.model_parameters * number
    limit = settings.limit(dense)
    chosen = choose_sizes(options.sizes, limit - _other_bytes(budget, options.choices))
    plans = {name: options.choices[name][index] for name, index in chosen.items()}
    losses = {name: float(options.sizes[name].losses[index]) for name, index in chosen.items()}
    embeddings = {name: plan for name, plan in plans.items() if name not in budget.shapes}
    modules = {name: plans[name] for name in budget.shapes}
    in_modules = sum(losses[name] for name in modules)
    plan = RankPlan(
        method=METHOD,
        keep=1.0,
        modules=modules,
        model_parameters=budget.model_parameters,
        bytes_per_parameter=number,
        notes=(
            f"budget of {limit:,} bytes, {limit / dense:.4f} of the dense model",
            f"predicted loss in nats: {in_modules:.4g} in modules, {sum(losses.values()) - in_modules:.4g} in "
            "embeddings and head",
        ),
        multiple_of=budget.multiple_of,
        floors=budget.floors,
        storage=budget.storage,
        left_out=budget.left_out,
        origin={BYTE_BUDGET: limit},
        embeddings={name: plan for name, plan in embeddings.items() if plan.grid is not None},
    )
    return replace(plan, keep=min(1.0, plan.keep_targeted))


def size_options(subject: Subject, factors: FactorStore, settings: ByteBudget) -> SizeOptions:
    """Return the sizes of every module and embedding, with their bytes and losses.

    The rounding costs of a module are kept in a folder inside that of ``factors``, so that another budget, and a run
    that was killed, find them again.

    Args:
        subject: The dense model, its targets, and the sequences that the factors were made from.
        factors: Two-sided factors.
        settings: Which bits there are.

    Raises:
        ValueError: The factors are not two-sided, or embeddings are among the targets.
    """
    _check_kind(factors.fingerprint.get("kind"))
    _check_targets(subject)
    budget = subject.budget(1.0)
    choices = _choices(subject, settings)
    costs = _module_costs(subject, factors, settings)
    losses = {
        target.name: _module_losses(target, choices[target.name], factors, costs) for target in subject.targets.modules
    }
    if settings.embeddings:
        losses |= _embedding_losses(subject, factors, settings)
    stored = {name: [plan.bytes(budget.bytes_per_parameter) for plan in plans] for name, plans in choices.items()}
    return SizeOptions(choices, {name: Sizes(np.array(stored[name]), np.array(losses[name])) for name in choices})


def check_budget(subject: Subject, settings: ByteBudget, decomposition: Decomposition) -> None:
    """Check that a budget in bytes can be met, before any factors are built.

    Args:
        subject: The dense model, its targets and the constraints on ranks.
        settings: The budget.
        decomposition: How weights are to be decomposed.

    Raises:
        ValueError: The decomposition is not two-sided, the budget is below the smallest size, or there are targets that
            it can't choose a size for: embeddings, which it gives bits and no rank, or experts that are to share right
            factors, to be alike or to be dropped.
    """
    _check_kind(decomposition.kind)
    _check_targets(subject)
    budget = subject.budget(1.0)
    number = budget.bytes_per_parameter
    dense = budget.model_parameters * number
    limit = settings.limit(dense)
    smallest = _choices(subject, settings, only_least=True)
    least = _other_bytes(budget, smallest)
    least += sum(min(plan.bytes(number) for plan in plans) for plans in smallest.values())
    if limit < least:
        raise ValueError(
            f"a budget of {limit:,} bytes was given: the smallest size takes {least:,} ({least / dense:.3f} of the "
            "dense model): raise it, or allow fewer bits"
        )


def _other_bytes(budget: Budget, choices: Mapping[str, Sequence[ModulePlan]]) -> int:
    """Return the bytes of all parameters that get no size of their own."""
    parts = sum(plans[0].dense_parameters for plans in choices.values())
    return (budget.model_parameters - budget.left_out - parts) * budget.bytes_per_parameter


def _check_kind(kind: str | None) -> None:
    if kind != "two_sided":
        raise ValueError(
            f"a budget in bytes was given factors of the kind {kind!r}: expected two_sided (decomposition.kind), whose "
            "losses of ranks and of bits compare"
        )


def _check_targets(subject: Subject) -> None:
    targets = subject.targets
    for asked in ("alike_experts", "drop_experts"):
        if getattr(subject.constraints, asked):
            raise ValueError(
                f"{asked} is true, but a budget of bytes chooses rank and bits of every module by itself: leave it "
                "out, or choose ranks with keep and round them with `lowrank quantize`"
            )
    if targets.stacks:
        raise ValueError(
            f"shared_experts is true, but a budget in bytes gives {next(iter(targets.stacks))} no bits: leave it out, "
            "or choose ranks alone with keep"
        )
    if targets.embeddings:
        raise ValueError(
            f"a budget in bytes was given the embeddings {targets.embeddings[0].name} as a target, and gives "
            f"embeddings bits but no rank: leave out --include {EMBEDDINGS}, or allocate by fisher and round its plan "
            "with `lowrank quantize`"
        )


def _choices(subject: Subject, settings: ByteBudget, *, only_least: bool = False) -> dict[str, list[ModulePlan]]:
    """Return all plans of every module and embedding, the dense one first.

    Args:
        subject: The dense model, its targets and the constraints on ranks.
        settings: Which bits there are.
        only_least: Only plans of the lowest rank, or dense: the smallest plan is one of these.
    """
    budget = subject.budget(1.0)
    found = {}
    for target in subject.targets.modules:
        least = budget.least_rank(target.name)
        ranks = [] if least is None else [*range(least, budget.top_rank(target.name) + 1, budget.multiple_of)]
        found[target.name] = _plans(target.shape, ranks[:1] if only_least else ranks, settings, budget)
    if settings.embeddings:
        found |= {name: _plans(shape, [], settings, budget) for name, shape in embedding_names(subject.model).items()}
    return found


def _plans(shape: tuple[int, int], ranks: Sequence[int], settings: ByteBudget, budget: Budget) -> list[ModulePlan]:
    """Return the plans of one matrix: dense or of one of ``ranks``, as it is or at any number of bits."""
    # Rounded coefficients of pivots lose more than rounded factors.
    rounded = [rank for rank in ranks if rank <= _top_rank(shape)]
    return [
        ModulePlan(shape),
        *(ModulePlan(shape, rank, storage=budget.rank_costs.form(shape, rank)) for rank in ranks),
        *(ModulePlan(shape, rank, grid=grid) for grid in settings.grids for rank in (None, *rounded)),
    ]


def _module_losses(
    target: Target, plans: Sequence[ModulePlan], factors: FactorStore, costs: TensorStore
) -> list[float]:
    """Return the predicted loss of every plan of a module, in nats."""
    name = target.name
    tail = losses_by_rank(factors.sigma(name))
    keys = dict.fromkeys(_key(plan.grid) for plan in plans if plan.grid is not None)
    whole = {key: costs.read(name, f"dense.{key}").item() for key in keys}
    added = {key: costs.read(name, f"components.{key}").cumsum(0) for key in keys}

    def loss(plan: ModulePlan) -> float:
        if plan.grid is None:
            return 0.0 if plan.rank is None else float(tail[plan.rank])
        key = _key(plan.grid)
        return whole[key] if plan.rank is None else float(tail[plan.rank] + added[key][plan.rank - 1])

    return [loss(plan) for plan in plans]


def _top_rank(shape: tuple[int, int]) -> int:
    """Return the largest rank at which two factors are smaller than the dense weight in as many bits; at least 1."""
    return max(1, Storage("factored").break_even(shape))


def _key(grid: Grid) -> str:
    return "-".join(str(value) for value in grid.to_json().values())


def _module_costs(subject: Subject, factors: FactorStore, settings: ByteBudget) -> TensorStore:
    """Return the store of what rounding costs: of the dense weight, and of every component."""
    grids = [grid.to_json() for grid in settings.grids]
    fingerprint, directory = factors.derived("rounding_costs", {"grids": grids})
    store = TensorStore("rounding_costs", fingerprint, directory)
    with store.filling(target.name for target in subject.targets.modules) as missing:
        todo = subject.targets.among(missing)
        if todo:
            roots = Roots.of_factors(factors, subject.model, subject.sequences, todo)
            for target, metric in tqdm(roots.metrics(todo), desc="cost of bits", unit="module", total=len(todo)):
                weight = dense_weight(subject.model.get_submodule(target.name)).detach().float()
                kept = factors.factors(target.name, _top_rank(target.shape))
                left, right = kept.left.to(weight), kept.right.to(weight)
                keys = [_key(grid) for grid in settings.grids]
                whole = dense_costs(weight, settings.grids, metric)
                each = component_costs(left, right, settings.grids, metric)
                found = {f"components.{key}": costs.cpu() for key, costs in zip(keys, each, strict=True)}
                found |= {f"dense.{key}": torch.tensor([cost]).double() for key, cost in zip(keys, whole, strict=True)}
                store.write(target.name, found)
    return store


def _embedding_losses(subject: Subject, factors: FactorStore, settings: ByteBudget) -> dict[str, list[float]]:
    """Return the divergence that each plan of embeddings and head causes alone, in nats a token."""
    model = subject.model
    names = embedding_names(model)
    grids = [grid.to_json() for grid in settings.grids]
    given = {"grids": grids, "sequences": settings.sequences, "nearest_from": NEAREST_FROM}
    fingerprint, directory = factors.derived("embedding_costs", given)
    store = TensorStore("embedding_costs", fingerprint, directory)
    head = model.get_output_embeddings()
    with store.filling(names) as missing:
        coarse = any(grid.bits < NEAREST_FROM for grid in settings.grids)
        moment = head_moment(factors, subject) if missing and coarse else None
        for name in missing:
            weight = model.get_submodule(name).get_parameter("weight")
            reads = moment if weight is head.weight else None
            found = {
                _key(grid): torch.tensor([_divergence(subject, name, grid, reads, settings)], dtype=torch.float64)
                for grid in settings.grids
            }
            store.write(name, found)
    return {name: [0.0, *(store.read(name, _key(grid)).item() for grid in settings.grids)] for name in names}


def _divergence(subject: Subject, name: str, grid: Grid, moment: Tensor | None, settings: ByteBudget) -> float:
    """Return the divergence of the model whose embedding ``name`` alone is rounded, in nats a token."""
    model = subject.model
    rounded = round_embedding(model.get_submodule(name).get_parameter("weight"), grid, moment)
    # It shares all tensors with the model.
    changed: PreTrainedModel = copy.deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    )
    for place, module in rounded_embedding(changed, name, {"weight": rounded}).items():
        replace_module(changed, place, module)
    some = subject.sequences[: settings.sequences]
    return divergence(changed, model, some, progress=f"{name} in {grid.bits} bits").kl
