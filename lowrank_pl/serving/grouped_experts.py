"""The experts of a mixture computed together, in the place of one after the other, where that is faster.

The matrices of one kind (gate, up or down) of all experts of a block are rows of one tensor, of which the parameters
become parts: a factor of rank ``k`` takes ``k`` rows. The rows of the chosen experts are gathered for few tokens, and
for more, tokens are sorted by expert and multiplied by parts of the tensor. Each token is multiplied once by a right
factor that experts share.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, Literal
from weakref import WeakValueDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.models.hf_experts import (
    Expert,
    RoutedExperts,
    SortedExperts,
    SplitExperts,
    WeightedInputExperts,
    taken_over,
)
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear, SharedLowRankLinear
from lowrank_pl.serving.fused_layers import Member
from lowrank_pl.serving.onednn_layers import ONEDNN

__all__ = ["GROUPED", "ExpertGroup", "ExpertMatrices", "Way", "group_experts", "ungroup"]

logger = logging.getLogger(__name__)

Way = Literal["gathered", "grouped"]
"""The chosen experts' rows copied for each token, or tokens sorted by expert."""

_TOKENS = {"one": 1, "few": 16, "many": 256}
"""The numbers of tokens that all ways are timed with; each stands for those up to it, the last for all others too."""

_TURNS = 4

_FASTER = 0.97
"""The part of the time of separate experts that another way may take to be chosen."""

_BUNDLES = 4
"""In so many sizes at most are matrices padded for grouped products."""

_GATHERED = 2**28
"""At most so many numbers of matrices are gathered at once."""

_STEP = 8
"""Sizes of grouped products on a GPU are multiples of this: 16 bytes in half precision."""


@dataclass(frozen=True, eq=False)
class Kind:
    """The matrices of one kind of all experts of a block, each as the product of a left and a right factor.

    A dense matrix among factored ones has the identity as one of its factors, and so has a part of a pivoted one.

    Attributes:
        right: ``[rows, in]`` right factors, one below the other, and a row of zeros.
        left: ``[rows, out]`` left factors, transposed; None if all matrices are dense: ``right`` then holds them.
        basis: ``[rank, in]`` right factor that all experts share; None if each has its own. ``right`` then holds the
            left factors, and what follows is computed from the product with ``basis``.
        bias: ``[experts, out]`` or None.
        starts: ``[experts]`` first row of each expert.
        ranks: ``[experts]`` number of its rows.
        spans: The same as slices.
        inputs: ``[experts, in]`` order in which an expert reads its inputs; None for the usual one.
        outputs: ``[experts, out]`` place of each output among those that are computed; None for the usual one.
    """

    right: Tensor
    left: Tensor | None
    basis: Tensor | None
    bias: Tensor | None
    starts: Tensor
    ranks: Tensor
    spans: tuple[slice, ...]
    inputs: Tensor | None
    outputs: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Sequence[nn.Linear], bundles: Sequence[range]) -> Kind:
        """Return the matrices of ``layers``, whose parameters become parts of them.

        Args:
            layers: One layer an expert.
            bundles: Experts one after the other whose matrices are padded to one size; none for no padding.
        """
        first = layers[0]
        shared = next((layer for layer in layers if isinstance(layer, SharedLowRankLinear)), None)
        factored = shared is None and any(isinstance(layer, LowRankLinear | PivotedLinear) for layer in layers)
        ranks = [_rank(layer, factored=factored) for layer in layers]
        sizes = list(ranks)
        for bundle in bundles:
            most = math.ceil(max(ranks[place] for place in bundle) / _STEP) * _STEP
            sizes[bundle.start : bundle.stop] = [most] * len(bundle)
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        basis = None if shared is None else _basis(shared.owner, padded=bool(bundles))
        width = first.in_features if basis is None else len(basis)
        right = first.weight.new_zeros(sum(sizes) + 1, width)
        left = first.weight.new_zeros(sum(sizes) + 1, first.out_features) if factored else None
        spans = tuple(slice(start, start + rank) for start, rank in zip(starts, ranks, strict=True))
        for layer, span in zip(layers, spans, strict=True):
            _move(layer, right[span], None if left is None else left[span])
        bias = None if first.bias is None else torch.stack([layer.bias.detach() for layer in layers])
        first_rows, counts = (torch.tensor(values, device=right.device) for values in (starts, ranks))
        orders = _orders(layers, "in"), _orders(layers, "out")
        return cls(right, left, basis, bias, first_rows, counts, spans, *orders)

    @property
    def width(self) -> int:
        """The largest rank."""
        return max(int(span.stop - span.start) for span in self.spans)

    def gathered(self, inputs: Tensor, experts: Tensor) -> Tensor:
        """Return the outputs ``[pairs, out]`` for ``inputs`` ``[pairs, in]``, each of one of the ``experts``.

        With a ``basis``, inputs here and in the other ways are ``[pairs, rank]``, their products with it.
        """
        steps = torch.arange(self.width, device=inputs.device)
        rows = self.starts[experts, None] + steps
        rows = torch.where(steps < self.ranks[experts, None], rows, len(self.right) - 1)
        values = torch.bmm(self.right[rows], self._read(inputs, experts).unsqueeze(-1)).squeeze(-1)
        if self.left is not None:
            values = torch.bmm(values.unsqueeze(1), self.left[rows]).squeeze(1)
        return self._placed(values, experts)

    def looped(self, inputs: Tensor, experts: Tensor, ends: Sequence[int]) -> Tensor:
        """Return the outputs for ``inputs`` that are sorted by expert, whose rows end at ``ends``."""
        inputs = self._read(inputs, experts)
        outputs = inputs.new_zeros(len(inputs), (self.right if self.left is None else self.left).shape[1])
        if self.left is None:
            outputs = inputs.new_zeros(len(inputs), self.width)
        for span, (begin, end) in zip(self.spans, pairwise([0, *ends]), strict=True):
            if end > begin:
                product, part = self.right[span].mT, outputs[begin:end]
                if self.left is None:
                    torch.mm(inputs[begin:end], product, out=part)
                else:
                    torch.mm(inputs[begin:end] @ product, self.left[span], out=part)
        return self._placed(outputs, experts)

    def grouped(self, inputs: Tensor, experts: Tensor, ends: Tensor, bundles: Sequence[range]) -> Tensor:
        """Return what :meth:`looped` returns by one product for each of the ``bundles``, without synchronisation."""
        inputs = self._read(inputs, experts)
        steps = torch.arange(len(inputs), device=inputs.device)
        outputs: Tensor | None = None
        for bundle in bundles:
            begin = ends.new_zeros(()) if bundle.start == 0 else ends[bundle.start - 1]
            # Its rows come first; what is computed for those after its last one is left out.
            rows = inputs if bundle.start == 0 else inputs[(steps + begin) % len(inputs)]
            values = self._products(rows, bundle, ends[bundle.start : bundle.stop] - begin)
            if outputs is None:
                outputs = values
            else:
                mine = (steps >= begin) & (steps < ends[bundle.stop - 1])
                outputs = torch.where(mine[:, None], values[(steps - begin) % len(inputs)], outputs)
        assert outputs is not None
        return self._placed(outputs, experts)

    def _products(self, rows: Tensor, bundle: range, ends: Tensor) -> Tensor:
        following = len(self.right) - 1 if bundle.stop == len(self.spans) else self.spans[bundle.stop].start
        part = slice(self.spans[bundle.start].start, following)
        right = self.right[part].view(len(bundle), -1, self.right.shape[1])
        values = torch._grouped_mm(rows, right.mT, offs=ends)
        if self.left is None:
            return values
        return torch._grouped_mm(values, self.left[part].view(len(bundle), -1, self.left.shape[1]), offs=ends)

    def _read(self, inputs: Tensor, experts: Tensor) -> Tensor:
        return inputs if self.inputs is None else inputs.gather(-1, self.inputs[experts])

    def _placed(self, outputs: Tensor, experts: Tensor) -> Tensor:
        if self.outputs is not None:
            outputs = outputs.gather(-1, self.outputs[experts])
        return outputs if self.bias is None else outputs + self.bias[experts]


def _rank(layer: nn.Linear, *, factored: bool) -> int:
    """Return the rows that a layer's matrix takes."""
    if not factored:
        return layer.out_features
    if isinstance(layer, LowRankLinear | PivotedLinear):
        return layer.rank
    return min(layer.in_features, layer.out_features)


def _basis(owner: LowRankLinear, *, padded: bool) -> Tensor:
    """Return a right factor that experts share, with rows of zeros up to the step of grouped products if ``padded``."""
    rank = owner.rank
    basis = owner.right.new_zeros(math.ceil(rank / _STEP) * _STEP if padded else rank, owner.in_features)
    basis[:rank] = owner.right
    owner.right.data = basis[:rank]
    return basis


def _move(layer: nn.Linear, right: Tensor, left: Tensor | None) -> None:
    """Copy a layer's matrices to ``right`` ``[rank, in]`` and ``left`` ``[rank, out]``; they become parts of these."""
    rank, parts = len(right), dict[str, Tensor]()
    if left is None:
        parts["weight"] = right[:, : layer.weight.shape[1]]
    elif isinstance(layer, LowRankLinear | PivotedLinear):
        parts = {"weight": left.mT, "right": right}
        if isinstance(layer, PivotedLinear):
            (left if layer.side == "out" else right)[:, :rank].fill_diagonal_(1)
            parts |= {"weight": left[:, rank:].mT} if layer.side == "out" else {"right": right[:, rank:]}
    else:
        (right if layer.in_features == rank else left).fill_diagonal_(1)
        parts["weight"] = left.mT if layer.in_features == rank else right
    for name, part in parts.items():
        parameter = layer.get_parameter(name)
        part.copy_(parameter.data)
        parameter.data = part


def _orders(layers: Sequence[nn.Linear], side: str) -> Tensor | None:
    """Return ``[experts, size]`` orders of the inputs or places of the outputs; None if all are the usual ones."""
    if not any(isinstance(layer, PivotedLinear) and layer.side == side for layer in layers):
        return None
    first = layers[0]
    usual = torch.arange(first.in_features if side == "in" else first.out_features, device=first.weight.device)
    orders = []
    for layer in layers:
        order = usual
        if isinstance(layer, PivotedLinear) and layer.side == side:
            order = torch.cat(layer.order())
        orders.append(order if side == "in" else order.argsort())
    return torch.stack(orders)


class ExpertMatrices:
    """The matrices of all experts of a block, and ways to multiply with those of some experts.

    Args:
        layers: The linear layers of the experts by kind, one layer an expert; their parameters become parts of larger
            tensors. The kind is empty if an expert is one layer.
        activation: Returns what lies between the stages, from the outputs of the gate, or None, and of the up matrix.
        here: Of every expert of the block, whether ``layers`` has it. The others were dropped, or another process
            computes them.

    Attributes:
        count: The number of experts that ``layers`` has.
        dtype: Type of the matrices.
        device: Their device.
        pads: Whether torch multiplies groups of rows at once.
        kinds: The matrices by kind.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[Any]],
        activation: Callable[[Tensor | None, Tensor], Tensor],
        here: Sequence[bool],
    ) -> None:
        first = next(iter(layers.values()))[0]
        self.count, self.dtype, self.device = len(next(iter(layers.values()))), first.weight.dtype, first.weight.device
        self._activation = activation
        sizes = [size for named in layers.values() for size in (named[0].in_features, named[0].out_features)]
        self.pads = _has_grouped_mm(self.device, self.dtype) and all(size % _STEP == 0 for size in sizes)
        self._bundles: list[range] = []
        order = list(range(self.count))
        if self.pads:
            ranks = [[_rank(layer, factored=True) for layer in named] for named in layers.values()]
            order, self._bundles = _bundles([sum(of_expert) for of_expert in zip(*ranks, strict=True)])
        with torch.inference_mode(False):
            self.kinds = {
                name: Kind.of([named[place] for place in order], self._bundles) for name, named in layers.items()
            }
            # Where each expert lies; behind all lie pairs that nobody computes here, as those of the number behind all.
            present = [number for number, found in enumerate(here) if found]
            places = {present[one]: place for place, one in enumerate(order)}
            self._last = len(here)
            numbers = range(self._last + 1)
            self._places = torch.tensor([places.get(number, self.count) for number in numbers], device=self.device)
            self._every = torch.arange(self.count, device=self.device)
        self._outputs = layers["down_proj" if "down_proj" in layers else ""][0].out_features
        self._handle = next(_HANDLES)
        _MATRICES[self._handle] = self

    @property
    def offers(self) -> tuple[Way, ...]:
        """The ways that are worth trying on this device."""
        # A loop over experts has to know how many rows each gets: on a GPU, separate experts do the same.
        return ("gathered", "grouped") if self.pads or self.device.type == "cpu" else ("gathered",)

    def compute(self, way: Way, rows: Tensor, experts: Tensor, sources: Tensor) -> Tensor:
        """Return ``[pairs, out]`` outputs of experts; zeros for pairs whose expert is none of the block.

        Args:
            way: How they are computed.
            rows: ``[rows, in]`` inputs.
            experts: ``[pairs]`` number of the expert; -1 and numbers behind the last are none of the block.
            sources: ``[pairs]`` row that it reads.
        """
        if way == "grouped":
            if torch.compiler.is_compiling():
                outputs: Tensor = _grouped(rows, experts, sources, self._outputs, self._handle)
                return outputs
            return self.sorted(rows, experts, sources)
        pairs = max(1, _GATHERED // max(kind.width * kind.right.shape[1] for kind in self.kinds.values()))
        parts = zip(torch.split(experts, pairs), torch.split(sources, pairs), strict=True)
        return torch.cat([self._gathered(rows, *part) for part in parts])

    def _gathered(self, rows: Tensor, experts: Tensor, sources: Tensor) -> Tensor:
        places = self._places[experts.clamp(max=self._last)]
        here = places.clamp(max=self.count - 1)
        outputs = self._chain(rows, sources, lambda kind, inputs: kind.gathered(inputs, here))
        return torch.where((places < self.count)[:, None], outputs, 0)

    def sorted(self, rows: Tensor, experts: Tensor, sources: Tensor) -> Tensor:
        """Return what :meth:`compute` returns, from pairs sorted by expert."""
        places, order = self._places[experts.clamp(max=self._last)].sort(stable=True)
        ends = torch.searchsorted(places, self._every, right=True, out_int32=True)
        here = places.clamp(max=self.count - 1)
        listed = [] if self.pads else ends.tolist()

        def product(kind: Kind, inputs: Tensor) -> Tensor:
            return kind.grouped(inputs, here, ends, self._bundles) if self.pads else kind.looped(inputs, here, listed)

        outputs = self._chain(rows, sources[order], product)
        outputs = torch.where((places < self.count)[:, None], outputs, 0)
        return torch.empty_like(outputs).index_copy_(0, order, outputs)

    def _chain(self, rows: Tensor, sources: Tensor, product: Callable[[Kind, Tensor], Tensor]) -> Tensor:
        firsts = {name: kind for name, kind in self.kinds.items() if name != "down_proj"}
        own = rows[sources] if any(kind.basis is None for kind in firsts.values()) else rows
        # The experts of a token have the product with a shared factor in common.
        outputs = {
            name: product(kind, own if kind.basis is None else F.linear(rows, kind.basis)[sources])
            for name, kind in firsts.items()
        }
        if "" in outputs:
            return outputs[""]
        return product(self.kinds["down_proj"], self._activation(outputs.get("gate_proj"), outputs["up_proj"]))


class ExpertGroup:
    """The experts of a block, which may be computed together.

    A copy of it, as ``deepcopy`` and ``pickle`` make them, leaves everything to the separate experts.

    Args:
        block: The experts; None for a group that computes nothing.

    Attributes:
        matrices: Their matrices; None if the experts are no longer what the group was made for.
        most: How many rows, as the block is called with them, are those of one token and of a few.
        ways: What is fastest for one token, a few and many; nothing where separate experts are.
        kept: Whether each expert of the block is kept, known once and for all; None if all are.
    """

    def __init__(self, block: SplitExperts | None = None) -> None:
        self.matrices: ExpertMatrices | None = None
        self.most: dict[str, int] = {}
        self.ways: dict[str, Way] = {}
        self.kept: Tensor | None = None
        if block is not None:
            self._block = ref(block)
            dropped = block.dropped
            here = [place not in dropped for place in range(len(block))]
            self.matrices = ExpertMatrices(_layers(block), block.fused.activation, here)
            with torch.inference_mode(False):
                self.kept = block.kept(self.matrices.device) if isinstance(block, RoutedExperts) else None
            self._addresses = self._now()

    def __reduce__(self) -> tuple[type[ExpertGroup], tuple[()]]:
        """Return how a copy is made: without experts."""
        return ExpertGroup, ()

    def way(self, rows: Tensor) -> tuple[ExpertMatrices, Way] | None:
        """Return by which matrices, and how, experts are computed for so many rows; None if one after the other."""
        other = torch.is_grad_enabled() or torch.is_autocast_enabled(rows.device.type) or SplitExperts.every
        made = self.matrices
        if made is None or other or rows.numel() == 0 or rows.dtype != made.dtype or rows.device != made.device:
            return None
        size = next((size for size, most in self.most.items() if len(rows) <= most), "many")
        way = self.ways.get(size)
        # A loop over separate experts would break the graph.
        if way is None and torch.compiler.is_compiling() and "grouped" in made.offers:
            way = "grouped"
        return None if way is None else (made, way)

    def check(self) -> None:
        """Leave everything to separate experts if their parameters are no longer where they were."""
        if self.matrices is not None and self._addresses != self._now():
            self.forget()

    def forget(self) -> None:
        """Leave everything to separate experts, since they are no longer what the group was made for."""
        if self.matrices is not None:
            logger.warning(
                "experts were changed after optimize_for_inference: they are computed one after the other until it is "
                "called again"
            )
        self.matrices = None

    def _now(self) -> list[int]:
        block = self._block()
        assert block is not None
        return [parameter.data_ptr() for parameter in block.parameters()]


_MATRICES: WeakValueDictionary[int, ExpertMatrices] = WeakValueDictionary()
"""The matrices of all blocks by the number under which compiled code knows them."""

_HANDLES = count()


@torch.library.custom_op("lowrank_pl::grouped_experts", mutates_args=())
def _grouped(rows: Tensor, experts: Tensor, sources: Tensor, outputs: int, handle: int) -> Tensor:
    return _MATRICES[handle].sorted(rows, experts, sources)


@_grouped.register_fake
def _(rows: Tensor, experts: Tensor, sources: Tensor, outputs: int, handle: int) -> Tensor:
    # The number of pairs may be symbolic, which len would make a constant.
    return rows.new_empty(sources.shape[0], outputs)


def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies groups of rows at once; elsewhere it loops over them itself."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _bundles(ranks: Sequence[int]) -> tuple[list[int], list[range]]:
    """Return the experts in the order of their ranks, and parts of that order in which ranks differ little.

    >>> _bundles([8, 100, 10, 90])
    ([0, 2, 3, 1], [range(0, 2), range(2, 4)])
    """
    order = sorted(range(len(ranks)), key=lambda expert: ranks[expert])
    least, spread = ranks[order[0]], math.log(ranks[order[-1]] / ranks[order[0]])
    parts = min(_BUNDLES, math.ceil(spread / math.log(1.25))) or 1
    step = spread / parts or 1.0
    numbers = [min(int(math.log(ranks[expert] / least) / step), parts - 1) for expert in order]
    cuts = [0, *(place for place in range(1, len(order)) if numbers[place] != numbers[place - 1]), len(order)]
    return order, [range(*part) for part in pairwise(cuts)]


class _Watched:
    """A module that tells its group when a part of it is replaced."""

    group: ExpertGroup

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.group.forget()


class _Grouped(_Watched, Member):
    """The experts of a block that a group may compute."""

    group: ExpertGroup


class GroupedExpert(_Watched, Expert):
    """An expert of a group."""


class GroupedRoutedExperts(_Grouped, RoutedExperts):
    """Experts that are called with all tokens and their places and weights."""

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, each times its weight."""
        chosen = self.group.way(hidden_states)
        if chosen is None:
            return super().forward(hidden_states, *args, **kwargs)
        matrices, way = chosen
        index, weights = (*args, *kwargs.values())
        if self.group.kept is not None:
            index, weights = taken_over(index, weights, self.group.kept)
        sources = torch.arange(index.numel(), device=index.device) // index.shape[-1]
        outputs = matrices.compute(way, hidden_states, index.flatten(), sources)
        outputs = (outputs * weights.reshape(-1, 1)).to(hidden_states.dtype)
        return outputs.view(*index.shape, -1).sum(dim=-2)


class GroupedWeightedInputExperts(_Grouped, WeightedInputExperts):
    """Experts of Llama 4."""

    def forward(self, hidden_states: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the experts' outputs ``[experts x tokens, hidden]`` for as many rows."""
        chosen = self.group.way(hidden_states)
        if chosen is None:
            return super().forward(hidden_states, *args, **kwargs)
        every = torch.arange(len(hidden_states), device=hidden_states.device)
        experts = every // (len(hidden_states) // len(self))
        experts = torch.where(hidden_states.any(dim=-1), experts, len(self))
        return chosen[0].compute("grouped", hidden_states, experts, every)


class GroupedSortedExperts(_Grouped, SortedExperts):
    """Matrices of experts that are called with sorted rows."""

    def forward(self, inputs: Tensor, expert_size: Any) -> Tensor:
        """Return the outputs ``[rows, out]``."""
        chosen = self.group.way(inputs)
        if chosen is None:
            return super().forward(inputs, expert_size)
        sizes = torch.as_tensor(expert_size, device=inputs.device)
        numbers = torch.arange(len(self), device=inputs.device)
        experts = numbers.repeat_interleave(sizes, output_size=len(inputs))
        return chosen[0].compute("grouped", inputs, experts, torch.arange(len(inputs), device=inputs.device))


GROUPED: dict[type[nn.Module], type[nn.Module]] = {
    RoutedExperts: GroupedRoutedExperts,
    WeightedInputExperts: GroupedWeightedInputExperts,
    SortedExperts: GroupedSortedExperts,
    Expert: GroupedExpert,
}
"""The class of a part of a group, by that of the part before."""

_PLAIN = {*ONEDNN, *ONEDNN.values(), SharedLowRankLinear}
"""The layers whose matrices a group can read."""


def group_experts(model: PreTrainedModel) -> list[dict[str, bool]]:
    """Compute the experts of each block together where that is faster; return for each block whether it is.

    Times are those of the model's own rows, of random tokens. A block stays as it was if anything would be slower.

    Args:
        model: A model whose experts are separate modules; others stay as they are.
    """
    every = [
        module
        for module in model.modules()
        # Without experts there is nothing to compute.
        if isinstance(module, SplitExperts) and type(module) in GROUPED and len(module.dropped) < len(module)
    ]
    blocks = [block for block in every if all(_is_plain(layer) for named in _layers(block).values() for layer in named)]
    if len(blocks) < len(every):
        logger.warning(
            "%d of %d blocks of experts have other layers than dense, factored and pivoted ones: their experts are "
            "computed one after the other",
            *(len(every) - len(blocks), len(every)),
        )
    if not blocks:
        return []
    ways: tuple[Way | None, ...] = (None, "gathered", "grouped")
    with torch.inference_mode():
        calls = {size: _calls(model, blocks, tokens) for size, tokens in _TOKENS.items()}
        blocks = [block for block in blocks if all(id(block) in called for called in calls.values())]
        before = _seconds(calls, blocks, (None,))
        for block in blocks:
            _group(block).most = {size: len(calls[size][id(block)][0][0]) for size in ("one", "few")}
        after = _seconds(calls, blocks, ways)
    return [
        _choose(
            block,
            {size: before[id(block), size, None] for size in _TOKENS},
            {size: {way: after.get((id(block), size, way), math.inf) for way in ways} for size in _TOKENS},
        )
        for block in blocks
    ]


def _choose(
    block: Any, before: Mapping[str, float], after: Mapping[str, Mapping[Way | None, float]]
) -> dict[str, bool]:
    """Take what is fastest for each number of tokens, or leave the block as it was; return where it is faster."""
    best = {size: min(seconds, key=lambda way: seconds[way]) for size, seconds in after.items()}
    slower = any(_FASTER * after[size][way] > before[size] for size, way in best.items())
    faster = {
        size: not slower and way is not None and after[size][way] < _FASTER * before[size] for size, way in best.items()
    }
    if any(faster.values()):
        block.group.ways = {size: way for size, way in best.items() if way is not None}
    else:
        ungroup(block)
    return faster


def ungroup(block: nn.Module) -> None:
    """Undo :func:`group_experts` for one block: parameters lie in their own memory again."""
    own = {kind: plain for plain, kind in GROUPED.items()}
    for module in block.modules():
        if type(module) in own:
            module.__class__ = own[type(module)]
            vars(module).pop("group")
    # Tensors that are made in inference mode can't be trained later.
    with torch.inference_mode(False), torch.no_grad():
        for parameter in block.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _group(block: SplitExperts) -> ExpertGroup:
    group = ExpertGroup(block)
    for module in list(block.modules()):
        if type(module) in GROUPED:
            vars(module)["group"] = group
            module.__class__ = GROUPED[type(module)]
    return group


def _layers(block: SplitExperts) -> dict[str, list[Any]]:
    """Return the linear layers of the experts that a block has by kind; the kind is empty if an expert is one layer."""
    dropped = block.dropped
    experts = [expert for place, expert in enumerate(block) if place not in dropped]
    if isinstance(block, SortedExperts):
        return {"": experts}
    return {name: [getattr(expert, name) for expert in experts] for name, _ in experts[0].named_children()}


def _is_plain(layer: nn.Module) -> bool:
    # Hooks of accelerate call the forward pass that the layer had before.
    return type(layer) in _PLAIN and "forward" not in vars(layer)


Calls = Mapping[str, Mapping[int, tuple[tuple[Any, ...], Mapping[str, Any]]]]
"""Arguments of the forward pass of each block, by the number of tokens."""


def _calls(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: int) -> dict[int, tuple[Any, Any]]:
    """Return the arguments with which the model calls each of ``blocks`` for so many random tokens."""
    seen: dict[int, tuple[Any, Any]] = {}
    hooks = [
        block.register_forward_pre_hook(lambda block, *call: seen.update({id(block): call}), with_kwargs=True)
        for block in blocks
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.get_input_embeddings().num_embeddings, (1, tokens), generator=generator)
    try:
        model(input_ids=drawn.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _seconds(
    calls: Calls, blocks: Sequence[Any], ways: Sequence[Way | None]
) -> dict[tuple[int, str, Way | None], float]:
    """Return the least time of each block for each number of tokens in each way; None is one expert after the other.

    Each turn goes through all blocks, so that weights are read from memory as when the model runs.
    """
    found: dict[tuple[int, str, Way | None], float] = {}
    steps = [(size, way) for _ in range(_TURNS) for size in _TOKENS for way in ways]
    for size, way in tqdm(steps, desc="timing experts", unit="pass", leave=False):
        for block in blocks:
            args, kwargs = calls[size][id(block)]
            if way is not None:
                if not _fits(way, block, args, kwargs):
                    continue
                block.group.ways = {size: way}
            begun = _clock(args[0].device)
            block(*args, **kwargs)
            key = (id(block), size, way)
            found[key] = min(found.get(key, math.inf), _clock(args[0].device) - begun)
            if way is not None:
                block.group.ways = {}
    return found


def _fits(way: Way, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a way is worth timing: gathering reads and writes an expert's matrices for each of its tokens."""
    if way == "grouped":
        matrices = block.group.matrices
        return matrices is not None and way in matrices.offers
    return type(block) is GroupedRoutedExperts and 2 * (*args, *kwargs.values())[1].numel() <= len(block)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
