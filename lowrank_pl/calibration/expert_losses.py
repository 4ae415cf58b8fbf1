"""What it costs to drop an expert of a mixture: its tokens then use the other experts that they chose.

A token has the output ``y``, the sum of its experts' outputs times their weights ``w``, and ``y'`` without an expert,
whose weight goes to the others (``lowrank_pl.models.hf_experts.RoutedExperts``). With the gradient ``g`` of the loss by
that output, half the mean of ``(g (y' - y))^2`` over tokens is the second-order estimate of the divergence, in nats a
token, that K-FAC makes for ranks, here without its factors. Only the gradients of the loss by the weights are needed:
they are ``g`` times the output of each expert, of which ``y`` and ``y'`` are sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.experts import own_share, own_weight
from lowrank_pl.calibration.measures import Batch, Call, GradientMeasure, Passes
from lowrank_pl.models.targets import Target, Targets, droppable
from lowrank_pl.plans.expert_dropping import ExpertLosses
from lowrank_pl.utils.distributed import sum_across_processes, total_across_processes
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["DroppedLosses", "expert_losses"]


class DroppedLosses(GradientMeasure):
    """Predicted losses when one expert of a block, or two, are dropped: means over all tokens with a label.

    Args:
        device: Where the sums are.

    Attributes:
        tokens: How many tokens had a label.
        chosen: How many experts a token chooses.

    Example:
        >>> losses = DroppedLosses()
        >>> weights, gradient = torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 1.0]])
        >>> losses.add([Call(weights, gradient, torch.tensor([[0, 2]]), 3)], Batch(0, torch.zeros(1, 2)))
        >>> losses.tensors()["single"].tolist()
        [0.5, 0.0, 0.5]
    """

    folder = "dropped_losses"
    others_follow = True

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self.tokens = self.chosen = 0
        self._device = device
        self._single, self._both, self._rows = (torch.zeros(0, dtype=torch.float64, device=device) for _ in range(3))

    @classmethod
    def key(cls, target: Target) -> str:
        """Return the name of the module of experts."""
        return target.experts

    @classmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return 0: a number for every two experts of a block is little beside all other sums."""
        return 0

    @classmethod
    def empty(cls, target: Target, passes: Passes, device: torch.device) -> DroppedLosses:
        """Return the losses of the experts of ``target`` before the first batch."""
        return cls(device=device)

    def add(self, calls: Sequence[Call], batch: Batch) -> None:
        """Add the weights of the tokens' experts, and the gradients by them, of one batch.

        Raises:
            ValueError: A gradient holds NaN or infinity.
        """
        for call in calls:
            assert call.chosen is not None
            self._allocate(call.experts)
            index = call.chosen.reshape(-1, call.chosen.shape[-1])
            weights, gradients = (part.detach().reshape(index.shape).double() for part in (call.inputs, call.gradient))
            if not torch.isfinite(gradients).all():
                raise ValueError("the gradients by the router's weights hold NaN or infinity")
            self.chosen = index.shape[-1]
            self._add(index, weights, weights * gradients, gradients.any(dim=-1))
        self.tokens += batch.labels

    def _add(self, index: Tensor, weights: Tensor, parts: Tensor, has_gradient: Tensor) -> None:
        """Add tokens.

        Args:
            index: ``[tokens, chosen]`` numbers of the experts.
            weights: ``[tokens, chosen]`` their weights.
            parts: ``[tokens, chosen]`` gradient times the part of the output that each expert has.
            has_gradient: ``[tokens]`` whether the token counts; the last of a sequence has no gradient.
        """
        chosen = range(index.shape[-1])
        losses = [_loss(weights, parts, (place,)) for place in chosen]
        for place, loss in zip(chosen, losses, strict=True):
            self._single.index_add_(0, index[:, place], loss)
            self._rows.index_add_(0, index[:, place], has_gradient.double())
        experts = len(self._single)
        for one, two in combinations(chosen, 2):
            more = _loss(weights, parts, (one, two)) - losses[one] - losses[two]
            self._both.view(-1).index_add_(0, index[:, one] * experts + index[:, two], more)

    def _allocate(self, experts: int) -> None:
        if not len(self._single):
            self._single, self._rows = self._single.new_zeros(experts), self._rows.new_zeros(experts)
            self._both = self._both.new_zeros(experts, experts)

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        # A process without batches does not know how many experts there are.
        known = total_across_processes(int(len(self._single) > 0))
        self._allocate(total_across_processes(len(self._single)) // max(1, known))
        self.chosen = total_across_processes(self.chosen) // max(1, known)
        for part in (self._single, self._both, self._rows):
            sum_across_processes(part)
        self.tokens = total_across_processes(self.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``single`` ``[experts]``, ``both`` ``[experts, experts]`` and ``rows`` ``[experts]``, float64.

        ``both`` is what two experts cost together more than alone, and ``rows`` how many tokens chose each.
        """
        tokens = max(1, self.tokens)
        return {"single": self._single / tokens, "both": (self._both + self._both.mT) / tokens, "rows": self._rows}

    def notes(self) -> dict[str, str]:
        """Return how many tokens had a label, and how many experts a token chooses."""
        return {"tokens": str(self.tokens), "chosen": str(self.chosen)}


def _loss(weights: Tensor, parts: Tensor, dropped: Sequence[int]) -> Tensor:
    """Return half the squared change ``[tokens]`` of the loss when the experts at places ``dropped`` are dropped."""
    kept = [place for place in range(weights.shape[-1]) if place not in dropped]
    left, output = weights[:, kept].sum(dim=-1), parts.sum(dim=-1)
    scale = torch.where(left == 0, 0, weights.sum(dim=-1) / torch.where(left == 0, 1, left))
    return (scale * parts[:, kept].sum(dim=-1) - output).square() / 2


def expert_losses(store: TensorStore, model: PreTrainedModel, targets: Targets) -> dict[str, ExpertLosses]:
    """Return the predicted losses of dropping experts, by module of experts.

    An expert that few tokens of the text reach costs what it showed, shrunk towards the mean of its block's experts for
    a token, as its moments are.

    Args:
        store: The store of ``DroppedLosses``.
        model: The model.
        targets: Its targets. Experts some of whose matrices are none can't be dropped.

    Raises:
        ValueError: No targets are experts that can be dropped.
    """
    names = set(targets.names)
    found = {}
    for experts in dict.fromkeys(target.experts for target in droppable(model, targets)):
        notes = store.notes(experts)
        single, both, rows = (store.read(experts, part).double() for part in ("single", "both", "rows"))
        tokens, total = int(notes["tokens"]), float(rows.sum())
        losses = single.clone()
        for number, seen in enumerate(rows.tolist()):
            own = single[number] * tokens / max(seen, 1)
            everywhere = single.sum() * tokens / max(total, 1)
            losses[number] = torch.lerp(everywhere, own, own_weight(int(seen), 1)) * own_share(int(seen), tokens)
        every = _matrices(model, experts, range(len(rows)))
        matrices = {number: of_one for number, of_one in every.items() if names.issuperset(of_one)}
        found[experts] = ExpertLosses(losses.numpy(), both.numpy(), int(notes["chosen"]), matrices)
    return found


def _matrices(model: PreTrainedModel, experts: str, numbers: Iterable[int]) -> Mapping[int, tuple[str, ...]]:
    """Return the names of the layers of each expert."""
    layers = {number: model.get_submodule(f"{experts}.{number}").named_children() for number in numbers}
    return {
        number: tuple(f"{experts}.{number}.{name}" for name, layer in inside if [*layer.parameters()])
        for number, inside in layers.items()
    }
