"""How weights are decomposed: by what their inputs and outputs are weighted, and the square roots of these weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.backward import Labels
from lowrank_pl.collected import Statistic, Statistics, statistics_behind
from lowrank_pl.decompose import SquareRoot, diagonal_root, square_root
from lowrank_pl.factor_store import FactorStore, TensorStore
from lowrank_pl.targets import Target

__all__ = ["Decomposition", "Kind", "Roots"]

Kind = Literal["whitened", "two_sided", "svd", "asvd", "fwsvd"]
_NEEDS: dict[str, tuple[Statistic, ...]] = {
    "svd": (),
    "asvd": ("inputs",),
    "fwsvd": ("weight_gradients",),
    "whitened": ("inputs",),
    "two_sided": ("inputs", "output_gradients"),
}


@dataclass(frozen=True)
class Decomposition:
    """How weights are decomposed: by what the errors of inputs and outputs are weighted.

    ================  ================================================  ==================================
    kind              inputs weighted by                                outputs weighted by
    ================  ================================================  ==================================
    ``svd``           nothing                                           nothing
    ``asvd``          mean absolute value to the power ``alpha``        nothing
    ``fwsvd``         nothing                                           root of summed squared weight gradients
    ``whitened``      second moment                                     nothing
    ``two_sided``     second moment, tokens weighted by the size of     second moment of output gradients, tokens
                      their output gradient                             weighted by its inverse
    ================  ================================================  ==================================

    Sources: ASVD (arXiv 2312.05821), FWSVD (arXiv 2207.00112), SVD-LLM (arXiv 2403.07378); ``two_sided`` weighs by
    K-FAC's estimate (arXiv 1503.05671) of the loss, so that its singular values compare across modules. K-FAC takes
    inputs and gradients to be independent. With ``token_weights`` (ours) the size of each token's gradient is split
    evenly over both sides: an estimate as well, and a lower one where sizes vary much, as if few tokens with large
    gradients counted for less; it is what measures best.

    Args:
        kind: One of the table.
        damping: Added to the inputs' weights, relative to their mean.
        output_damping: Added to the outputs' weights, likewise.
        alpha: Power of ``asvd``.
        labels: ``two_sided``: gradients of a loss whose labels are ``sampled`` from the model, or those of the
            ``text``.
        token_weights: ``two_sided``: weigh tokens as in the table, which keeps the few that much depends on, as
            attention sinks in keys and values, from standing for all; otherwise all weigh the same, as in K-FAC.
        at_keep: ``two_sided``: measure everything a second time, in the model that is already compressed to this
            fraction (by the ``fisher`` allocator on the factors of the first time), and weigh by the mean of the two.
            The loss's curvature far from the dense model is another than at it.
        at_weight: What the second time weighs in that mean, from 0 to 1.

    Raises:
        ValueError: Another kind, labels or power, a damping that is negative or not finite, a fraction or weight
            outside its range, or ``at_keep`` with another kind.
    """

    kind: Kind = "whitened"
    damping: float = 1e-6
    output_damping: float = 1e-2
    alpha: float = 0.5
    labels: Labels = "sampled"
    token_weights: bool = True
    at_keep: float | None = None
    at_weight: float = 0.5

    def __post_init__(self) -> None:
        for name, value, choices in (("kind", self.kind, Kind), ("labels", self.labels, Labels)):
            if value not in get_args(choices):
                what = "kind of decomposition is" if name == "kind" else "labels of the decomposition are"
                raise ValueError(f"the {what} {value!r}: expected one of {', '.join(get_args(choices))}")
        for name in ("damping", "output_damping"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a finite number of at least 0")
        if not 0 < self.alpha <= 2:
            raise ValueError(f"alpha is {self.alpha}: expected a power above 0 and at most 2")
        if self.at_keep is not None:
            if not 0 < self.at_keep < 1:
                raise ValueError(f"at_keep is {self.at_keep}: expected a fraction above 0 and below 1")
            if self.kind != "two_sided":
                raise ValueError(
                    f"at_keep is given to a decomposition of the kind {self.kind!r}: only two_sided measures in the "
                    "compressed model; leave it out"
                )
        if not 0 < self.at_weight <= 1:
            raise ValueError(f"at_weight is {self.at_weight}: expected a number above 0 and at most 1")

    @classmethod
    def behind(cls, fingerprint: Mapping[str, Any]) -> Decomposition:
        """Return the decomposition that factors of ``fingerprint`` were made by, or what it says of its settings."""
        # What was made without weights says nothing of them.
        known = {"token_weights": fingerprint.get("kind") != "two_sided", **fingerprint}
        return cls(**{part.name: known[part.name] for part in fields(cls) if part.name in known})

    @property
    def needs_text(self) -> bool:
        """Whether calibration text changes the result."""
        return bool(self.needs)

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that the weights come from."""
        if self.weighs_tokens:
            return ("weighted_moments",)
        return _NEEDS[self.kind]

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss is differentiated for it."""
        return bool(set(self.needs) - {"inputs"})

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count by the size of their gradient."""
        return self.kind == "two_sided" and self.token_weights

    @property
    def block_by_block(self) -> bool:
        """Whether it can be made with one decoder block in memory, which measuring in the compressed model can't."""
        return self.at_keep is None

    def identity(self) -> dict[str, Any]:
        """Return the settings that change the result, which are not all for every kind."""
        uses = {
            "svd": (),
            "asvd": ("damping", "alpha"),
            "fwsvd": ("output_damping",),
            "whitened": ("damping",),
            "two_sided": ("damping", "output_damping", "labels"),
        }
        # Factors that were made before there was a choice keep their identity.
        weights = ("token_weights",) if self.weighs_tokens else ()
        again = () if self.at_keep is None else ("at_keep", "at_weight")
        return {"kind": self.kind, **{name: getattr(self, name) for name in (*uses[self.kind], *weights, *again)}}

    def point(self, modules: str) -> dict[str, Any]:
        """Return what tells the compressed model of ``at_keep`` from others made from the same base and text.

        Args:
            modules: Digest of the names of all maps that were compressed.
        """
        return {"compressed": {**replace(self, at_keep=None).identity(), "keep": self.at_keep, "modules": modules}}


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
    def behind(cls, factors: FactorStore, model: PreTrainedModel, windows: Tensor, todo: Sequence[Target]) -> Roots:
        """Return the roots that ``factors`` were made by, of the maps ``todo``.

        Args:
            factors: Those of a decomposition, or of a correction of one.
            model: The dense base.
            windows: ``[windows, length]`` calibration token ids that they were made from.
            todo: Which maps.

        Raises:
            ValueError: What was measured in a compressed model is gone.
        """
        settings = Decomposition.behind(factors.fingerprint)
        statistics = statistics_behind(factors, model, windows)
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
