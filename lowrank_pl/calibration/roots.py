"""How weights are decomposed: by what their inputs and outputs are weighted, and the square roots of these weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.statistics import Statistics, statistics_of_factors
from lowrank_pl.factors.decomposition import SquareRoot, diagonal_root, square_root
from lowrank_pl.factors.settings import Decomposition, Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["Roots"]


class Roots:
    """The square roots that a decomposition weighs by, from statistics that are collected when first needed.

    Args:
        settings: How to decompose.
        statistics: Where what was measured comes from.
        todo: The maps to decompose.
        device: Where to compute.
        compressed: What was measured in the compressed model, with ``settings.at_keep``.
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
        found = statistics.stores(settings.needs, todo, settings.labels)
        self.inputs, self.moments = found.get("inputs"), found.get("output_gradients")
        self.weights, self.weighted = found.get("weight_gradients"), found.get("weighted_moments")
        self.later: dict[Statistic, TensorStore] = {}
        if compressed is not None:
            self.later = compressed.stores(settings.needs, todo, settings.labels)

    @classmethod
    def behind(cls, factors: FactorStore, model: PreTrainedModel, sequences: Tensor, todo: Sequence[Target]) -> Roots:
        """Return the roots that ``factors`` were made by, of the maps ``todo``.

        Args:
            factors: Those of a decomposition, or of a correction of one.
            model: The dense base.
            sequences: ``[sequences, length]`` calibration token ids that they were made from.
            todo: Which maps.

        Raises:
            ValueError: What was measured in a compressed model is gone.
        """
        settings = Decomposition.behind(factors.fingerprint)
        statistics = statistics_of_factors(factors, model, sequences)
        compressed = None
        if settings.at_keep is not None:
            compressed = statistics.compressed(settings.point(factors.fingerprint["at_modules"]))
        return cls(settings, statistics, todo, model.device, compressed)

    def by_inputs(self, targets: Iterable[Target]) -> Iterator[tuple[SquareRoot | None, list[Target]]]:
        """Yield the neighbours among ``targets`` whose inputs are weighted by the same, with what that is."""
        # Tokens weigh for each map what they do for it alone.
        for _, members in groupby(targets, key=lambda target: target.group if self.weighted is None else target.name):
            those = list(members)
            yield self._of_inputs(those[0]), those

    def _of_inputs(self, target: Target) -> SquareRoot | None:
        if self.inputs is not None and self.settings.kind == "asvd":
            mean = self.inputs.read(target.group, "mean_absolute").to(self.device)
            return _located(
                lambda: diagonal_root(mean**self.settings.alpha, damping=self.settings.damping), "input", target.group
            )
        moment = self.moment_of_inputs(target)
        if moment is None:
            return None
        return _located(lambda: square_root(moment, damping=self.settings.damping), "input", target.group)

    def moment_of_inputs(self, target: Target) -> Tensor | None:
        """Return the second moment ``[in, in]`` that the inputs of ``target`` are weighted by, if they are by one."""
        if self.weighted is not None:
            return self._moment("weighted_moments", self.weighted, target.name, "inputs")
        if self.inputs is not None:
            return self._moment("inputs", self.inputs, target.group, "second_moment")
        return None

    def of_outputs(self, name: str) -> SquareRoot | None:
        """Return what the outputs of module ``name`` are weighted by."""
        if self.weighted is not None:
            moment = self._moment("weighted_moments", self.weighted, name, "outputs")
        elif self.moments is not None:
            moment = self._moment("output_gradients", self.moments, name, "second_moment")
        elif self.weights is not None:
            squares = self.weights.read(name, "mean_squares").to(self.device)
            return _located(lambda: diagonal_root(squares.sqrt(), damping=self.settings.output_damping), "output", name)
        else:
            return None
        return _located(lambda: square_root(moment, damping=self.settings.output_damping), "output", name)

    def _moment(self, statistic: Statistic, store: TensorStore, name: str, tensor: str) -> Tensor:
        """Return the moment that ``name`` has, or the mean of those before and after compression."""
        moment = store.read(name, tensor).to(self.device)
        if statistic not in self.later:
            return moment
        later = self.later[statistic].read(name, tensor).to(self.device)
        return torch.lerp(moment.double(), later.double(), self.settings.at_weight)

    def notes(self, target: Target, inputs: SquareRoot | None, outputs: SquareRoot | None) -> dict[str, str]:
        """Return what to note beside the factors of ``target``: the kinds of its roots, and their tokens."""
        notes: dict[str, str] = {}
        if inputs is not None:
            notes["square_root"] = inputs.kind
        if self.weighted is not None:
            notes["tokens"] = self.weighted.notes(target.name)["tokens"]
        elif inputs is not None and self.inputs is not None:
            notes["tokens"] = self.inputs.notes(target.group)["tokens"]
        if outputs is not None:
            notes["output_root"] = outputs.kind
        return notes


def _located(root: Callable[[], SquareRoot], side: str, name: str) -> SquareRoot:
    try:
        return root()
    except ValueError as error:
        raise ValueError(f"{error}: at the {side} of {name}") from None
