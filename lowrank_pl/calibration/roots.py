"""The square roots of second moments by which a decomposition weights inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.experts import ROUTING_WEIGHT, ExpertMeans
from lowrank_pl.calibration.statistics import MEASURES, Statistics, statistics_of_factors
from lowrank_pl.factors.decomposition import SquareRoot, StackedRoots, any_zero, diagonal_root, square_root
from lowrank_pl.factors.rounding import Metric
from lowrank_pl.factors.settings import Decomposition, Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["OfStack", "Roots"]

_LEAST = 1e-12
"""Least weight of a layer of a stack, relative to that of the mean: no root may be 0."""


class OfStack(NamedTuple):
    """The roots that weight the layers of a stack: one of their inputs, None for the identity, and their outputs'."""

    inputs: SquareRoot | None
    outputs: StackedRoots


class Roots:
    """The square roots that a decomposition weights by, from statistics that are collected when they are missing.

    What an expert adds to the loss is a sum over the tokens that are routed to it. With gradients, the moment of its
    inputs is a mean over these tokens and that of its gradients one over all tokens, so that their product has the
    fraction of the tokens once. Without gradients the inputs are weighted by the router, and their mean is over all
    tokens. Where an expert saw few tokens, ``lowrank_pl.calibration.experts`` says what stands in for its means.

    Args:
        settings: How to decompose.
        statistics: The statistics of the dense model.
        todo: The linear layers to decompose.
        device: Where to compute.
        compressed: The statistics of the compressed model, with ``settings.at_keep``.
    """

    def __init__(
        self,
        settings: Decomposition,
        statistics: Statistics,
        todo: Sequence[Target],
        device: torch.device,
        compressed: Statistics | None = None,
    ) -> None:
        self.settings, self.device = settings, device
        self._dense = statistics.stores(settings.needs, todo, settings.labels)
        self._compressed: dict[Statistic, TensorStore] = {}
        if compressed is not None:
            self._compressed = compressed.stores(settings.needs, todo, settings.labels)
        self._of_experts = {target.name: target for target in todo if target.experts}
        self._means = ExpertMeans(statistics.model, device)

    @classmethod
    def of_factors(
        cls, factors: FactorStore, model: PreTrainedModel, sequences: Tensor, todo: Sequence[Target]
    ) -> Roots:
        """Return the roots that ``factors`` were made with.

        Args:
            factors: The factors of a decomposition, or of the correction of one.
            model: The dense base.
            sequences: ``[sequences, length]`` calibration token ids that the factors were made from.
            todo: The linear layers.

        Raises:
            ValueError: The statistics of the compressed model are gone.
        """
        settings = Decomposition.of_fingerprint(factors.fingerprint)
        statistics = statistics_of_factors(factors, model, sequences)
        compressed = None
        if settings.at_keep is not None:
            compressed = statistics.compressed(settings.point(factors.fingerprint["at_modules"]))
        return cls(settings, statistics, todo, model.device, compressed)

    def by_inputs(self, targets: Iterable[Target]) -> Iterator[tuple[SquareRoot | None, list[Target]]]:
        """Yield neighbours among ``targets`` that share the root of their inputs, with that root."""
        shared = self.settings.shares_input_weights
        for _, members in groupby(targets, key=lambda target: target.group if shared else target.name):
            neighbours = list(members)
            yield self._of_inputs(neighbours[0]), neighbours

    def _of_inputs(self, target: Target) -> SquareRoot | None:
        damping = self.settings.damping
        if self.settings.kind == "asvd":
            mean = self._read(self._dense, "inputs", target.group, "mean_absolute", target)
            return _located(lambda: diagonal_root(mean**self.settings.alpha, damping=damping), "input", target.group)
        if self.settings.kind == "fwsvd" and self.settings.fisher_side == "inputs":
            squares = self._read(self._dense, "weight_fisher", target.name, "inputs", target)
            return _located(lambda: diagonal_root(squares.sqrt(), damping=damping), "input", target.name)
        moment = self.moment_of_inputs(target)
        return None if moment is None else _located(lambda: square_root(moment, damping=damping), "input", target.group)

    def of_stack(self, members: Sequence[Target]) -> OfStack:
        """Return the roots that weight the layers of a stack, which read the input of one block.

        The stack has one moment of inputs: the mean over its layers, each counted by what errors of its outputs cost
        (the trace of their moment). The moment ``C_e`` of a layer is taken as the multiple of the mean ``C`` that has
        its trace, so that the predicted loss of the stack is that of its layers where their inputs differ in size only.
        """
        outputs = [self.of_outputs(target.name) for target in members]
        costs = [1.0 if root is None else 0.0 if root.zero else root.root.square().sum().item() for root in outputs]
        costs = costs if sum(costs) > 0 else [1.0] * len(members)
        total: Tensor | None = None
        traces = []
        for target, cost in zip(members, costs, strict=True):
            moment = self.moment_of_inputs(target)
            if moment is None:
                return OfStack(None, StackedRoots(tuple(outputs), (1.0,) * len(members), members[0].shape[0]))
            moment = moment.double()
            traces.append(moment.trace().item())
            total = moment * cost if total is None else total.add_(moment, alpha=cost)
        assert total is not None
        common = total / sum(costs)
        mean = common.trace().item() or 1.0
        # The root of a layer whose outputs cost nothing is the identity, however small those of the others are.
        size = members[0].shape[0]
        free = (_LEAST * max(costs) / size) ** 0.5
        scales = tuple(
            free if any_zero(root) else max(trace / mean, _LEAST) ** 0.5
            for trace, root in zip(traces, outputs, strict=True)
        )
        inputs = _located(lambda: square_root(common, damping=self.settings.damping), "input", members[0].stack)
        return OfStack(inputs, StackedRoots(tuple(outputs), scales, size))

    def metrics(self, targets: Iterable[Target]) -> Iterator[tuple[Target, Metric]]:
        """Yield each of ``targets`` with what errors of its weight cost."""
        for inputs, members in self.by_inputs(targets):
            moment = None if inputs is None else inputs.moment()
            for target in members:
                outputs = self.of_outputs(target.name)
                felt = None if outputs is None else outputs.moment()
                yield target, Metric(moment, felt, any_zero(inputs, outputs))

    def moment_of_inputs(self, target: Target) -> Tensor | None:
        """Return the second moment ``[in, in]`` that weights the inputs of ``target``; None where none does."""
        if "weighted_moments" in self._dense:
            return self._moment("weighted_moments", target.name, "inputs", target)
        if "inputs" in self._dense:
            return self._moment("inputs", target.group, "second_moment", target)
        return None

    def of_outputs(self, name: str) -> SquareRoot | None:
        """Return the root that weights the outputs of module ``name``; None where none does."""
        damping, expert = self.settings.output_damping, self._of_experts.get(name)
        if "weighted_moments" in self._dense:
            moment = self._moment("weighted_moments", name, "outputs", expert)
        elif "output_gradients" in self._dense:
            moment = self._moment("output_gradients", name, "second_moment", expert)
        elif "weight_fisher" in self._dense and self.settings.fisher_side == "outputs":
            squares = self._read(self._dense, "weight_fisher", name, "outputs", expert)
            return _located(lambda: diagonal_root(squares.sqrt(), damping=damping), "output", name)
        else:
            return None
        return _located(lambda: square_root(moment, damping=damping), "output", name)

    def _moment(self, statistic: Statistic, entry: str, tensor: str, target: Target | None) -> Tensor:
        """Return a moment of the dense model, or the weighted mean of it and that of the compressed model."""
        moment = self._read(self._dense, statistic, entry, tensor, target)
        if statistic not in self._compressed:
            return moment
        other = self._read(self._compressed, statistic, entry, tensor, target)
        return torch.lerp(moment.double(), other.double(), self.settings.at_weight)

    def _read(
        self,
        stores: Mapping[Statistic, TensorStore],
        statistic: Statistic,
        entry: str,
        tensor: str,
        target: Target | None,
    ) -> Tensor:
        """Return a statistic: of an expert's layer ``target`` one that is shrunk and scaled, of others as it is."""
        store = stores[statistic]
        if target is None or not target.experts:
            return store.read(entry, tensor).to(self.device)
        kind, side = MEASURES[statistic], target.shape["inputs" in (statistic, tensor)]
        size = 1 if statistic == "weight_fisher" or tensor == "mean_absolute" else side
        found = self._means.of(kind, store, target, tensor, size)
        if (statistic, tensor) == ("weighted_moments", "inputs"):
            return found.mean
        if statistic == "inputs" and "output_gradients" in stores:
            # A token's gradient has the router's weight as a factor, so tokens weigh by its square on this side too.
            weight = self._means.of(kind, store, target, ROUTING_WEIGHT, size).mean
            return found.mean / weight.clamp_min(torch.finfo(torch.float64).tiny)
        return found.mean * found.share

    def notes(self, target: Target, inputs: SquareRoot | None, outputs: SquareRoot | None) -> dict[str, str]:
        """Return what to note beside the factors of ``target``: the kinds of its roots, and their tokens.

        Of an expert there is also ``rows``, how many of the tokens it saw.
        """
        notes: dict[str, str] = {}
        if inputs is not None:
            notes["square_root"] = inputs.kind
        if "weighted_moments" in self._dense:
            measured = self._dense["weighted_moments"].notes(target.name)
        elif "weight_fisher" in self._dense:
            measured = self._dense["weight_fisher"].notes(target.name)
        elif inputs is not None and "inputs" in self._dense:
            measured = self._dense["inputs"].notes(target.group)
        else:
            measured = {}
        notes |= {key: measured[key] for key in ("tokens", "rows") if key in measured}
        if outputs is not None:
            notes["output_root"] = outputs.kind
        return notes


def _located(root: Callable[[], SquareRoot], side: str, name: str) -> SquareRoot:
    try:
        return root()
    except ValueError as error:
        raise ValueError(f"{error}: at the {side} of {name}") from None
