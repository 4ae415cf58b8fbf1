"""The square roots of second moments by which a decomposition weights inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.statistics import Statistics, statistics_of_factors
from lowrank_pl.factors.decomposition import SquareRoot, diagonal_root, square_root
from lowrank_pl.factors.rounding import Metric
from lowrank_pl.factors.settings import Decomposition, Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["Roots"]


class Roots:
    """The square roots that a decomposition weights by, from statistics that are collected when they are missing.

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
            mean = self._dense["inputs"].read(target.group, "mean_absolute").to(self.device)
            return _located(lambda: diagonal_root(mean**self.settings.alpha, damping=damping), "input", target.group)
        if self.settings.kind == "fwsvd" and self.settings.fisher_side == "inputs":
            squares = self._dense["weight_fisher"].read(target.name, "inputs").to(self.device)
            return _located(lambda: diagonal_root(squares.sqrt(), damping=damping), "input", target.name)
        moment = self.moment_of_inputs(target)
        return None if moment is None else _located(lambda: square_root(moment, damping=damping), "input", target.group)

    def metrics(self, targets: Iterable[Target]) -> Iterator[tuple[Target, Metric]]:
        """Yield each of ``targets`` with what errors of its weight cost."""
        for inputs, members in self.by_inputs(targets):
            moment = None if inputs is None else inputs.moment()
            for target in members:
                outputs = self.of_outputs(target.name)
                yield target, Metric(moment, None if outputs is None else outputs.moment())

    def moment_of_inputs(self, target: Target) -> Tensor | None:
        """Return the second moment ``[in, in]`` that weights the inputs of ``target``; None where none does."""
        if "weighted_moments" in self._dense:
            return self._moment("weighted_moments", target.name, "inputs")
        if "inputs" in self._dense:
            return self._moment("inputs", target.group, "second_moment")
        return None

    def of_outputs(self, name: str) -> SquareRoot | None:
        """Return the root that weights the outputs of module ``name``; None where none does."""
        damping = self.settings.output_damping
        if "weighted_moments" in self._dense:
            moment = self._moment("weighted_moments", name, "outputs")
        elif "output_gradients" in self._dense:
            moment = self._moment("output_gradients", name, "second_moment")
        elif "weight_fisher" in self._dense and self.settings.fisher_side == "outputs":
            squares = self._dense["weight_fisher"].read(name, "outputs").to(self.device)
            return _located(lambda: diagonal_root(squares.sqrt(), damping=damping), "output", name)
        else:
            return None
        return _located(lambda: square_root(moment, damping=damping), "output", name)

    def _moment(self, statistic: Statistic, name: str, tensor: str) -> Tensor:
        """Return a moment of the dense model, or the weighted mean of it and that of the compressed model."""
        moment = self._dense[statistic].read(name, tensor).to(self.device)
        if statistic not in self._compressed:
            return moment
        other = self._compressed[statistic].read(name, tensor).to(self.device)
        return torch.lerp(moment.double(), other.double(), self.settings.at_weight)

    def notes(self, target: Target, inputs: SquareRoot | None, outputs: SquareRoot | None) -> dict[str, str]:
        """Return what to note beside the factors of ``target``: the kinds of its roots, and their tokens."""
        notes: dict[str, str] = {}
        if inputs is not None:
            notes["square_root"] = inputs.kind
        if "weighted_moments" in self._dense:
            notes["tokens"] = self._dense["weighted_moments"].notes(target.name)["tokens"]
        elif inputs is not None and "inputs" in self._dense:
            notes["tokens"] = self._dense["inputs"].notes(target.group)["tokens"]
        if outputs is not None:
            notes["output_root"] = outputs.kind
        return notes


def _located(root: Callable[[], SquareRoot], side: str, name: str) -> SquareRoot:
    try:
        return root()
    except ValueError as error:
        raise ValueError(f"{error}: at the {side} of {name}") from None
