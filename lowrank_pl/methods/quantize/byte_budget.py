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
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.size_choices import Sizes, choose_sizes
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["SizeOptions", "allocate_bytes", "byte_plan", "size_options"]

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
        decomposition: How weights are decomposed; two-sided with default settings by default.
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
    check_targets(subject)
    made_by = decomposition or Decomposition("two_sided")
    factors = store or build_factors(subject, settings=made_by)
    options = size_options(subject, factors, settings)
    plan = byte_plan(subject, settings, options)
    notes = [*base_notes(subject), *preparation_notes(subject.targets, factors)]
    plan = plan.with_origin(describe_origin(subject, made_by, factors), factors.fingerprint, notes)
    if not plan.is_rounded:
        return plan, factors
    return quantize(plan, factors, subject)


def byte_plan(subject: Subject, settings: ByteBudget, options: SizeOptions) -> RankPlan:
    """Return the plan of a budget from ``options``, with bits that are not rounded to yet.

    Args:
        subject: The dense model, its targets and the constraints on ranks.
        settings: The budget.
        options: The sizes that there are.

    Raises:
        ValueError: The budget is below the smallest size.
    """
    budget = subject.budget(1.0)
    number = budget.bytes_per_parameter
    dense = budget.model_parameters * number
    limit = settings.limit(dense)
    parts = sum(max(choice.dense_parameters for choice in choices) for choices in options.choices.values())
    others = (budget.model_parameters - budget.left_out - parts) * number
    try:
        chosen = choose_sizes(options.sizes, limit - others)
    except ValueError:
        least = others + sum(int(sizes.bytes.min()) for sizes in options.sizes.values())
        raise ValueError(
            f"a budget of {limit:,} bytes was given: the smallest size takes {least:,} ({least / dense:.3f} of the "
            "dense model): raise it, or allow fewer bits"
        ) from None
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
    kind = factors.fingerprint.get("kind")
    if kind != "two_sided":
        raise ValueError(
            f"a budget in bytes was given factors of the kind {kind!r}: expected two_sided (decomposition.kind), whose "
            "losses of ranks and of bits compare"
        )
    check_targets(subject)
    budget = subject.budget(1.0)
    costs = _module_costs(subject, factors, settings)
    found = {
        target.name: _module_choices(target, factors, costs, settings, budget) for target in subject.targets.modules
    }
    if settings.embeddings:
        found |= _embedding_choices(subject, factors, settings)
    choices = {name: [plan for plan, _ in options] for name, options in found.items()}
    stored = {name: [plan.bytes(budget.bytes_per_parameter) for plan in plans] for name, plans in choices.items()}
    sizes = {
        name: Sizes(np.array(stored[name]), np.array([loss for _, loss in options])) for name, options in found.items()
    }
    return SizeOptions(choices, sizes)


def check_targets(subject: Subject) -> None:
    """Check that a budget in bytes can choose a size for every target, before any factors are built.

    Raises:
        ValueError: Embeddings are among the targets, to which such a budget gives bits and no rank, or experts that are
            to share right factors, to be alike or to be dropped.
    """
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


def _module_choices(
    target: Target, factors: FactorStore, costs: TensorStore, settings: ByteBudget, budget: Budget
) -> list[tuple[ModulePlan, float]]:
    """Return all plans of a module with their losses."""
    name, shape = target.name, target.shape
    tail = losses_by_rank(factors.sigma(name))
    least = budget.least_rank(name)
    ranks = [] if least is None else [*range(least, budget.top_rank(name) + 1, budget.multiple_of)]
    found = [(ModulePlan(shape), 0.0)]
    for rank in ranks:
        form = budget.rank_costs.form(shape, rank)
        found.append((ModulePlan(shape, rank, storage=form), float(tail[rank])))
    for grid in settings.grids:
        key = _key(grid)
        found.append((ModulePlan(shape, grid=grid), costs.read(name, f"dense.{key}").item()))
        added = costs.read(name, f"components.{key}").cumsum(0)
        # Rounded coefficients of pivots lose more than rounded factors.
        some = [rank for rank in ranks if rank <= _top_rank(shape)]
        found += [(ModulePlan(shape, rank, grid=grid), float(tail[rank] + added[rank - 1])) for rank in some]
    return found


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


def _embedding_choices(
    subject: Subject, factors: FactorStore, settings: ByteBudget
) -> dict[str, list[tuple[ModulePlan, float]]]:
    """Return all plans of embeddings and head with the divergence that each causes alone, in nats a token."""
    model, sequences = subject.model, subject.sequences
    names = embedding_names(model)
    grids = [grid.to_json() for grid in settings.grids]
    given = {"grids": grids, "sequences": settings.sequences, "nearest_from": NEAREST_FROM}
    fingerprint, directory = factors.derived("embedding_costs", given)
    store = TensorStore("embedding_costs", fingerprint, directory)
    head = model.get_output_embeddings()
    with store.filling(names) as missing:
        coarse = any(grid.bits < NEAREST_FROM for grid in settings.grids)
        moment = head_moment(model, sequences) if missing and coarse else None
        for name in missing:
            weight = model.get_submodule(name).get_parameter("weight")
            reads = moment if weight is head.weight else None
            found = {
                _key(grid): torch.tensor([_divergence(subject, name, grid, reads, settings)], dtype=torch.float64)
                for grid in settings.grids
            }
            store.write(name, found)
    return {
        name: [
            (ModulePlan(shape), 0.0),
            *((ModulePlan(shape, grid=grid), store.read(name, _key(grid)).item()) for grid in settings.grids),
        ]
        for name, shape in names.items()
    }


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
