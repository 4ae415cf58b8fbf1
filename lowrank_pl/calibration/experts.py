"""Statistics of the experts of mixtures: which tokens they are means over, and what stands in for too few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_pl.calibration.measures import Measure
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["ROUTING_WEIGHT", "ExpertMeans", "OfExpert", "Reached", "own_share", "own_weight", "with_other_experts"]

ROUTING_WEIGHT = "routing_weight"
"""Note beside moments of inputs: the mean square of the weights that the router gives the expert's tokens."""

_UNSEEN = 0.5
"""Tokens that an expert counts as having seen where it saw none: as likely as not, twice the text would show one."""


def own_weight(rows: int, size: int) -> float:
    """Return what an expert's mean weighs beside that of all experts of its block: ``rows / (rows + size / 2)``.

    A second moment of fewer rows than it has features is singular: it weights some directions by nothing, and predicts
    a loss of nothing there. The mean of all experts fills them. Half of the features as the number of tokens that it
    counts for is measured, on experts with 64 features, known moments, and 4 to 1,024 tokens: a quarter to all of the
    features lose about the same, and more or less loses more. At 16 tokens the truncated weight loses 1.2 to 2
    times the least possible, against 1.9 to 2.8 times without the mean, and 1.1 to 3.2 times with nothing but it.

    Args:
        rows: Tokens that the expert saw.
        size: Length of a row; 1 for statistics that are one number a feature.

    >>> own_weight(0, 64), own_weight(32, 64), own_weight(960, 64)
    (0.0, 0.5, 0.967741935483871)
    """
    return rows / (rows + size / 2)


def own_share(rows: int, tokens: int) -> float:
    """Return the fraction of all ``tokens`` that an expert counts as having seen, of which it saw ``rows``."""
    return max(rows, _UNSEEN) / tokens


def with_other_experts(targets: Sequence[Target], model: nn.Module) -> Sequence[Target]:
    """Return ``targets``, and for each layer of an expert the same layer of all other experts of its block.

    Whether or not these are to be compressed: what stands in for an expert must not depend on it.
    """
    firsts = dict.fromkeys(target.of_expert(0) for target in targets if target.experts)
    if not firsts:
        return targets
    counts = {name: len(model.get_submodule(name)) for name in {first.experts for first in firsts}}  # type: ignore[arg-type]
    others = [first.of_expert(number) for first in firsts for number in range(counts[first.experts])]
    return sorted(dict.fromkeys([*targets, *others]), key=lambda target: target.block)


@dataclass(frozen=True)
class OfExpert:
    """A statistic of one expert.

    Args:
        mean: Its mean over the tokens that the expert saw, shrunk towards that of its block's experts; float64.
        share: The fraction of all tokens that the expert saw; half a token where it saw none.
    """

    mean: Tensor
    share: float


@dataclass(frozen=True)
class Reached:
    """How many experts few tokens of the calibration text reached.

    Args:
        experts: All experts.
        shrunk: Experts that are weighted by the mean of their block's experts more than by what they saw themselves.
        unseen: Experts among these that saw nothing.
    """

    experts: int
    shrunk: int
    unseen: int

    @classmethod
    def of(cls, rows: Mapping[Target, int]) -> Reached:
        """Return the numbers for experts whose layers saw so many ``rows``."""
        fewest: dict[str, tuple[float, int]] = {}
        for target, seen in rows.items():
            number, _, _ = target.name.removeprefix(f"{target.experts}.").partition(".")
            found = (own_weight(seen, target.shape[1]), seen)
            expert = f"{target.experts}.{number}"
            fewest[expert] = min(found, fewest.get(expert, found))
        shrunk = sum(weight < 0.5 for weight, _ in fewest.values())
        return cls(len(fewest), shrunk, sum(not seen for _, seen in fewest.values()))

    def sentences(self) -> list[str]:
        """Return a sentence about experts that few tokens reached; nothing where there are none."""
        if not self.shrunk:
            return []
        return [
            f"experts: {self.shrunk:,} of {self.experts:,} saw fewer calibration tokens than half of their inputs, "
            f"{self.unseen:,} of these none: they are weighted mostly by the mean of their block's experts; give more "
            "text"
        ]


class ExpertMeans:
    """Means of statistics over the tokens that experts saw, shrunk towards the means of all experts of their block.

    Stores hold sums over these tokens, divided by the number of all tokens, and the two numbers of tokens beside them.

    Args:
        model: The model, which tells how many experts a block has.
        device: Where to compute.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._block = -1
        self._all: dict[tuple[int, str, str], OfExpert] = {}

    def of(self, kind: type[Measure], store: TensorStore, target: Target, tensor: str, size: int = 1) -> OfExpert:
        """Return the statistic ``tensor`` of the expert that ``target`` belongs to.

        Args:
            kind: The kind of statistic.
            store: Where it is stored.
            target: A layer of the expert.
            tensor: Name of the tensor in the store, or ``ROUTING_WEIGHT``.
            size: As in ``own_weight``.

        Raises:
            ValueError: No token reached any expert of the block.
        """
        name = kind.key(target)
        notes = store.notes(name)
        rows, tokens = int(notes["rows"]), int(notes["tokens"])
        everywhere = self._of_all(kind, store, target, tensor)
        total = self._mean(store, name, notes, tensor) * tokens
        mean = torch.lerp(everywhere.mean, total / max(rows, 1), own_weight(rows, size))
        return OfExpert(mean, own_share(rows, tokens))

    def _mean(self, store: TensorStore, name: str, notes: Mapping[str, str], tensor: str) -> Tensor:
        """Return the mean over all tokens."""
        if tensor == ROUTING_WEIGHT:
            return torch.tensor(float(notes[tensor]), dtype=torch.float64, device=self._device)
        return store.read(name, tensor).to(self._device, torch.float64)

    def _of_all(self, kind: type[Measure], store: TensorStore, target: Target, tensor: str) -> OfExpert:
        """Return the statistic of all experts together."""
        if target.block != self._block:
            # Layers come in the order of their blocks: those of an earlier one are done.
            self._all.clear()
            self._block = target.block
        key = (id(store), kind.key(target.of_expert(0)), tensor)
        if key not in self._all:
            self._all[key] = self._measured_of_all(kind, store, target, tensor)
        return self._all[key]

    def _measured_of_all(self, kind: type[Measure], store: TensorStore, target: Target, tensor: str) -> OfExpert:
        experts: nn.ModuleList = self._model.get_submodule(target.experts)  # type: ignore[assignment]
        total, seen, tokens = None, 0, 0
        for number in range(len(experts)):
            name = kind.key(target.of_expert(number))
            notes = store.notes(name)
            part = self._mean(store, name, notes, tensor)
            total = part if total is None else total.add_(part)
            seen, tokens = seen + int(notes["rows"]), int(notes["tokens"])
        if not seen or total is None:
            raise ValueError(
                f"no token of the calibration text reached an expert of {target.experts}, or none has a gradient: give "
                "more text, or exclude its experts"
            )
        return OfExpert(total * (tokens / seen), seen / tokens)
