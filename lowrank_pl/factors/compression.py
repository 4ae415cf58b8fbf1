"""Put a plan and factors into a model: its planned linear layers become low-rank ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.factors.pivoting import pivot
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.hf_experts import drop_experts
from lowrank_pl.models.hf_layers import (
    LowRankEmbedding,
    LowRankLinear,
    PivotedLinear,
    SharedLowRankLinear,
    Side,
    low_rank_embedding,
)
from lowrank_pl.models.hf_quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    Rounded,
    quantized_embedding,
    quantized_layer,
    quantized_low_rank_embedding,
    tie_head,
)
from lowrank_pl.models.targets import StandIn, dense_weight, replace_module, weight_of
from lowrank_pl.plans.plan import ZERO, ModulePlan, RankPlan
from lowrank_pl.utils.tensor_store import weight_digest

__all__ = [
    "compress",
    "compressed",
    "deployed_plan",
    "factored_embedding",
    "factored_layer",
    "low_rank_layer",
    "restore_dense",
    "rounded_embedding",
    "shared_layers",
]

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def compress(model: Model, plan: RankPlan, store: FactorStore, *, device: torch.device | None = None) -> Model:
    """Replace the planned modules of ``model`` by their factors at the planned ranks, in place, and return it.

    Modules that the plan leaves dense stay as they are. Biases are kept. The model is the dense base, or the masked
    model that ranks were learned with. A module that can't be stored pivoted accurately in its weight's type is stored
    as two factors, or stays dense where two factors would be no smaller, with a warning. ``deployed_plan`` returns the
    plan with the storage that each module has then. Dropped experts go: their tokens use the other experts.

    Args:
        model: The base that plan and store were made from.
        plan: The ranks.
        store: The factors, in any precision; they are cast to each weight's type.
        device: Where pivots are chosen, in double precision; by default the device of the weights if that is a GPU with
            CUDA, and main memory otherwise.

    Raises:
        ValueError: The plan names modules or shapes that the model lacks, or it was made for other factors, or a layer
            would be zero whose weight is not.

    Example:
        >>> from lowrank_pl import Subject, allocate_ranks
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> subject = Subject(tiny_model("llama"), byte_tokenizer(), torch.arange(256).view(4, 64))
        >>> plan, factors = allocate_ranks(subject, keep=0.5, allocator="uniform")
        >>> compress(subject.model, plan, factors).get_submodule("model.layers.0.mlp.up_proj")
        PivotedLinear(in_features=..., out_features=..., rank=..., side=in, bias=False)
    """
    _check(model, plan, store)
    drop_experts(model, plan.dropped_experts)
    for name, entry in tqdm(plan.modules.items(), desc="compress", unit="module", leave=False):
        if entry.is_dropped:
            continue
        if entry.layers:
            olds = {layer: _unmasked(model.get_submodule(layer)) for layer in entry.layers}
            made = olds if entry.rank is None else shared_layers(name, olds, store.kept(name, entry))
            for layer, module in made.items():
                replace_module(model, layer, module)
            continue
        old = _unmasked(model.get_submodule(name))
        if isinstance(old, nn.Embedding):
            for place, module in _compressed_embedding(model, name, entry, store).items():
                replace_module(model, place, module)
            continue
        if entry.grid is not None:
            new = _rounded_layer(old, entry, store.rounded(name))
        elif entry.rank is not None:
            new = low_rank_layer(name, old, entry, store.kept(name, entry), device=device)
        else:
            new = old
        replace_module(model, name, new)
    for name in plan.embeddings:
        parts, _ = store.rounded(name)
        for place, module in rounded_embedding(model, name, parts).items():
            replace_module(model, place, module)
    _log.info("compressed %d of %d modules", len(plan.modules) - len(plan.dense_modules), len(plan.modules))
    return model


def shared_layers(name: str, olds: Mapping[str, nn.Module], factors: Factors) -> dict[str, nn.Module]:
    """Return the layers, by name, that share the right one of ``factors`` and replace ``olds``.

    The first layer stores it. Each takes its rows of the left factor, the type of its old weight, and its bias.

    Args:
        name: Name of the factors, for messages.
        olds: The dense layers, or low-rank ones of a larger size, in the order of their rows.
        factors: The components that they keep.

    Raises:
        ValueError: The factors are zero and the old weights are not.
    """
    like = _like(next(iter(olds.values())))
    lefts, right = factors.left.to(like).chunk(len(olds)), factors.right.to(like)
    zero = not (factors.left.to(like).any() and right.any())
    if zero and any(_is_low_rank(old) or dense_weight(old).any() for old in olds.values()):
        raise ValueError(_zero_factors(name, like.dtype))
    found: dict[str, nn.Module] = {}
    owner: LowRankLinear | None = None
    for (layer, old), left in zip(olds.items(), lefts, strict=True):
        bias = getattr(old, "bias", None)
        if owner is None:
            found[layer] = owner = LowRankLinear.from_factors(left.clone(), right, bias)
        else:
            found[layer] = SharedLowRankLinear.from_owner(left.clone(), owner, bias)
    return found


def rounded_embedding(model: nn.Module, name: str, rounded: Mapping[str, Rounded]) -> dict[str, nn.Module]:
    """Return the modules, by name, that take the place of an embedding or a head, and of what is tied to it.

    Args:
        model: The model.
        name: The embedding, or the head.
        rounded: Its rounded ``weight``, or the rounded factors ``weight`` and ``right``.
    """
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        return {name: quantized_layer(old, rounded)}
    assert isinstance(old, nn.Embedding)
    grid = rounded["weight"].grid
    new: QuantizedEmbedding | LowRankEmbedding
    if "right" in rounded:
        factored = quantized_low_rank_embedding(old, rounded["right"].rows, grid)
        for part, matrix in rounded.items():
            factored.put(part, matrix)
        new = factored
    else:
        new = quantized_embedding(old, grid)
        new.put("weight", rounded["weight"])
    return {name: new, **_tied_to(model, old, new)}


def factored_embedding(model: nn.Module, name: str, factors: Factors) -> dict[str, nn.Module]:
    """Return the modules, by name, that take the place of an embedding and of the heads that are tied to it.

    Args:
        model: The model.
        name: The embedding.
        factors: The components that it keeps; they are cast to the type of the embedding.

    Raises:
        ValueError: The factors are zero and the embeddings are not.
    """
    old = model.get_submodule(name)
    assert isinstance(old, nn.Embedding)
    weight = old.weight
    left, right = factors.left.to(weight), factors.right.to(weight)
    if not (left.any() and right.any()) and weight.any():
        raise ValueError(_zero_factors(name, weight.dtype))
    new = low_rank_embedding(old, right.shape[0])
    new.weight, new.right = (nn.Parameter(part.detach().contiguous()) for part in (left, right))
    return {name: new, **_tied_to(model, old, new)}


def _tied_heads(model: nn.Module, embedding: nn.Embedding) -> dict[str, nn.Linear]:
    """Return the heads of ``model`` that are tied to ``embedding``, by name."""
    return {
        place: head
        for place, head in model.named_modules()
        if isinstance(head, nn.Linear) and head.weight is embedding.weight
    }


def _tied_to(model: nn.Module, old: nn.Embedding, new: QuantizedEmbedding | LowRankEmbedding) -> dict[str, nn.Module]:
    return {place: tie_head(head, new) for place, head in _tied_heads(model, old).items()}


def _compressed_embedding(model: nn.Module, name: str, entry: ModulePlan, store: FactorStore) -> dict[str, nn.Module]:
    """Return what takes the place of an embedding among the targets; nothing where it stays as it is."""
    if entry.grid is not None:
        parts, _ = store.rounded(name)
        return rounded_embedding(model, name, parts)
    return {} if entry.rank is None else factored_embedding(model, name, store.kept(name, entry))


def _rounded_layer(
    old: nn.Module, entry: ModulePlan, stored: tuple[Mapping[str, Rounded], tuple[Tensor, Side] | None]
) -> nn.Module:
    """Return the layer with the rounded matrices that are ``stored``, to replace ``old``."""
    parts, pivots = stored
    weight = _like(old)
    outputs, inputs = entry.shape
    like: dict[str, Any] = {"bias": False, "device": "meta", "dtype": weight.dtype}
    plain: nn.Linear
    if entry.rank is None:
        plain = nn.Linear(inputs, outputs, **like)
    elif pivots is None:
        plain = LowRankLinear(inputs, outputs, entry.rank, **like)
    else:
        plain = PivotedLinear(inputs, outputs, entry.rank, side=pivots[1], **like)
        plain.pivots = pivots[0].to(weight.device)
    bias: Any = getattr(old, "bias", None)
    plain.bias = bias
    return quantized_layer(plain, {name: part.to(weight.device) for name, part in parts.items()})


def low_rank_layer(
    name: str, old: nn.Module, entry: ModulePlan, factors: Factors, *, device: torch.device | None = None
) -> nn.Module:
    """Return a layer with ``factors`` to replace ``old``, in the storage of ``entry`` and the type of ``old``.

    A layer that can't be stored pivoted accurately is stored as two factors, or stays ``old`` where two factors would
    be no smaller than the dense weight.

    Args:
        name: The layer's name, for messages.
        old: The dense layer, or a low-rank one of a larger size.
        entry: Rank and storage of the new layer.
        factors: The components that ``entry`` keeps.
        device: As for ``compress``.

    Raises:
        ValueError: The factors are zero and the weight of ``old`` is not, or ``old`` would have to stay and is not
            dense.
    """
    new = _stored(name, old, entry, factors, device)
    if _is_zero(new) and not _is_zero(old) and (_is_low_rank(old) or dense_weight(old).any()):
        raise ValueError(_zero_factors(name, _like(old).dtype))
    return new


def _zero_factors(name: str, dtype: torch.dtype) -> str:
    return (
        f"the factors of {name} are zero in {_type_name(dtype)}, but its weight is not: leave it dense (--exclude "
        f"{name}), or load a base in half precision in float32"
    )


def _stored(name: str, old: nn.Module, entry: ModulePlan, factors: Factors, device: torch.device | None) -> nn.Module:
    assert entry.rank is not None
    weight = _like(old)
    if entry.storage == "pivoted":
        # Double precision: on the weight's device where that is fast.
        place = device or (weight.device if weight.device.type == "cuda" else factors.left.device)
        found = pivot(factors.left.to(place), factors.right.to(place), dtype=weight.dtype)
        if found.is_accurate:
            parts = (found.weight.to(weight.device), found.right.to(weight.device), found.pivots.to(weight.device))
            return PivotedLinear.from_parts(*parts, side=found.side, bias=getattr(old, "bias", None))
        rows, columns = entry.shape
        smaller = entry.rank * (rows + columns) < rows * columns
        if not smaller and _is_low_rank(old):
            raise ValueError(
                f"{name} can't be stored pivoted at rank {entry.rank}, and there is no dense weight for it here: make "
                "this size from the plan with `lowrank export PLAN --keep`"
            )
        _log.warning(
            "%s %s: its relative error would be %.2g stored pivoted in %s, and is %.2g as two factors (largest "
            "coefficient %.3g)",
            *(name, "is stored as two factors" if smaller else "stays dense, since two factors would be no smaller"),
            *(found.error, _type_name(weight.dtype), found.plain, found.growth),
        )
        if not smaller:
            return old
    return factored_layer(old, factors)


def _is_low_rank(layer: nn.Module) -> bool:
    return isinstance(layer, (LowRankLinear, PivotedLinear))


def _like(layer: nn.Module) -> Tensor:
    """Return a tensor with the type and the device of a dense or low-rank layer."""
    return layer.get_parameter("weight") if _is_low_rank(layer) else dense_weight(layer)


def _is_zero(layer: nn.Module) -> bool:
    """Tell whether a low-rank or rounded layer outputs only its bias; False for other layers."""
    if isinstance(layer, PivotedLinear):
        # The other part holds coefficients.
        return not layer.matrix("right" if layer.side == "out" else "weight").any()
    if isinstance(layer, QuantizedLinear):
        return not layer.matrix("weight").any()
    return isinstance(layer, (LowRankLinear, LowRankEmbedding)) and not (
        layer.matrix("weight").any() and layer.matrix("right").any()
    )


def factored_layer(old: nn.Module, factors: Factors) -> LowRankLinear:
    """Return a layer with ``factors`` to replace ``old``, in the type of its weight and with its bias."""
    weight = _like(old)
    left, right = factors.left, factors.right
    if weight.dtype == torch.float16:
        # Below 6e-5 float16 loses digits, which bfloat16 does not: both sides of a component get the same norm.
        ratio = (right.norm(dim=1) / left.norm(dim=0)).sqrt()
        ratio = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
        left, right = left * ratio, right / ratio[:, None]
    return LowRankLinear.from_factors(left.to(weight), right.to(weight), getattr(old, "bias", None))


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def deployed_plan(model: nn.Module, plan: RankPlan) -> RankPlan:
    """Return ``plan`` with the storage that the layers of ``model`` really have, which ``plan`` compressed.

    Some modules that the plan stores pivoted may be stored as two factors or stay dense. The returned plan says so, and
    its notes count them. They also name layers that are zero, as in the base. Without such modules it is ``plan``
    itself.
    """
    zero = [name for name in plan.stored_layers if _is_zero(model.get_submodule(name))]
    if zero:
        plan = replace(plan, notes=tuple(dict.fromkeys([*plan.notes, *(f"{name}: {ZERO}" for name in zero)])))
    layers = {name: model.get_submodule(name) for name in plan.pivoted_modules}
    fallen = {name: layer for name, layer in layers.items() if not isinstance(layer, PivotedLinear)}
    if not fallen:
        return plan
    changed, notes = dict(plan.modules), list(plan.notes)
    for form, names in (
        ("factored", [name for name, layer in fallen.items() if isinstance(layer, LowRankLinear)]),
        ("dense", [name for name, layer in fallen.items() if not isinstance(layer, LowRankLinear)]),
    ):
        if names:
            kind = _type_name(fallen[names[0]].get_parameter("weight").dtype)
            some = "1 module" if len(names) == 1 else f"{len(names)} modules"
            notes.append(f"{some} could not be stored pivoted in {kind}: {form}, e.g. {names[0]}")
        for name in names:
            entry = plan.modules[name]
            grid = entry.grid if isinstance(layers[name], QuantizedLinear) else None
            dense = ModulePlan(entry.shape, grid=grid)
            changed[name] = dense if form == "dense" else replace(entry, storage="factored")
    return replace(plan, modules=changed, notes=tuple(notes))


def _unmasked(module: nn.Module) -> nn.Module:
    return module.original() if isinstance(module, StandIn) else module


def stand_ins(model: nn.Module) -> dict[str, StandIn]:
    """Return the stand-ins in ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StandIn)}


def restore_dense(model: Model) -> Model:
    """Replace the masked layers of ``model`` by the dense layers that they stand in for, in place, and return it.

    The model of a ``RankLearner`` becomes the dense base again, to score it or to compress it by another plan.

    Args:
        model: A model, with or without masked layers.
    """
    for name, layer in [*stand_ins(model).items()]:
        replace_module(model, name, layer.original())
    return model


@contextmanager
def compressed(
    model: Model, plan: RankPlan, store: FactorStore, *, device: torch.device | None = None
) -> Iterator[Model]:
    """Yield ``model`` compressed by ``plan``; the original modules are put back at the end.

    Several plans can be scored on one model in this way, without an export. Both kinds of modules are in memory.

    Args:
        model: The base that plan and store were made from.
        plan: The ranks.
        store: The factors.
        device: As for ``compress``.

    Raises:
        ValueError: As ``compress``.
    """
    modules = dict(model.named_modules())
    # If the plan is for another model, `compress` says so.
    # Dropped experts first: their layers are inside.
    names = (*plan.dropped_experts, *plan.layers, *plan.embeddings)
    before = {name: modules[name] for name in names if name in modules}
    embedded = [modules[name].weight for name in (*plan.embeddings, *plan.embedded) if name in modules]
    before.update({n: m for n, m in modules.items() if any(getattr(m, "weight", None) is one for one in embedded)})
    try:
        yield compress(model, plan, store, device=device)
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def _check(model: nn.Module, plan: RankPlan, store: FactorStore) -> None:
    store.check_plan(plan)
    modules = dict(model.named_modules())
    for name, entry in (*plan.modules.items(), *plan.embeddings.items()):
        for layer in entry.layers or (name,):
            if layer not in modules:
                raise ValueError(
                    f"the plan names {layer}, which the model lacks: load the model that the plan was made for"
                )
            shape = tuple(_weight_of(modules[layer]).shape)
            if shape != entry.layer_shape:
                raise ValueError(
                    f"the plan gives {layer} the shape {entry.layer_shape}, the model has {shape}: load the model that "
                    "the plan was made for"
                )
    for expert in plan.dropped_experts:
        of_expert = [f"{expert}.{name}" for name, _ in model.get_submodule(expert).named_modules() if name]
        left = [name for name in of_expert if name not in plan.modules or not plan.modules[name].is_dropped]
        if left:
            raise ValueError(
                f"the plan drops some matrices of {expert}, but not {left[0]}: an expert is dropped as a whole; drop "
                "all of its matrices or none"
            )
    for name, entry in (*plan.modules.items(), *plan.embeddings.items()):
        if entry.is_dropped:
            continue
        if entry.layers:
            weight = torch.cat([_weight_of(modules[layer]).detach() for layer in entry.layers])
        else:
            weight = _weight_of(modules[name]).detach()
        is_made = entry.rank is not None or entry.grid is not None
        if is_made and not _made_from(weight, store.notes(name).get("weight", "")):
            raise ValueError(
                f"the factors of {name} in {store.directory} were made from another weight than the model has: load "
                "the base that the store was made from"
            )
        if entry.grid is not None:
            _check_stored(name, entry, store)


def _weight_of(module: nn.Module) -> Tensor:
    # A masked layer has its weight at hand, without making the dense layer.
    return module.weight if isinstance(module, StandIn) else weight_of(module)


def _check_stored(name: str, entry: ModulePlan, store: FactorStore) -> None:
    """Check that ``store`` holds the matrices of a rounded module as the plan says."""
    parts, pivots = store.rounded(name)
    sizes = {part: (rounded.rows, rounded.columns) for part, rounded in parts.items()}
    rank = parts["right"].rows if "right" in parts else None
    grids = {rounded.grid for rounded in parts.values()}
    form = "pivoted" if pivots else "factored"
    wrong = rank != entry.rank or grids != {entry.grid} or (rank is not None and form != entry.storage)
    if wrong:
        raise ValueError(
            f"the plan gives {name} rank {entry.rank}, {entry.grid} and storage {entry.storage}, but {store.directory} "
            f"holds {sizes} with {grids}, {form}: bits can't be edited after rounding; round the plan before with "
            "`lowrank quantize`, or allocate anew"
        )


def _made_from(weight: Tensor, noted: str) -> bool:
    """Tell whether factors may have been made from ``weight``. A weight of another type can't be compared."""
    ours = weight_digest(weight)
    return noted == ours or noted.split(":")[0] != ours.split(":")[0]
