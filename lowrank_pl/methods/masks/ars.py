"""ARS: binary gates whose logits come from one small network over all modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_pl.methods.masks.base import Mask, ModelMasks, dense_sizes, of_each
from lowrank_pl.methods.masks.gumbel import (
    GumbelMask,
    GumbelMethod,
    Noise,
    chosen_at_start,
    draw_noise,
    seeded,
    select_by_logits,
)
from lowrank_pl.methods.masks.objectives import alignment_penalty, kept_fractions, log_budget_penalty
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.checks import check_choices, check_counts, check_numbers

__all__ = ["ARS", "ARSMask", "Alignment", "HyperNetwork"]

Alignment = Literal["share", "mse"]
"""How gates that are no prefix are penalised: by their share of the layer's energy, or by the squared error itself."""


class HyperNetwork(nn.Module):
    """A bidirectional GRU over one fixed random vector a module, with a linear head for each module's logits.

    The heads start at zero, so that the masks start exactly at their offsets.

    Args:
        ranks: Components of each module, in the model's order.
        inputs: Size of the random vectors.
        width: Size of the GRU's state in each direction.
        seed: Seed of the vectors and the weights.
    """

    inputs: Tensor

    def __init__(self, ranks: Sequence[int], *, inputs: int, width: int, seed: int) -> None:
        super().__init__()
        generator = seeded("hyper-network", seed)
        self.register_buffer("inputs", torch.randn(len(ranks), inputs, generator=generator))
        with torch.random.fork_rng(devices=[]):
            self.recurrent = nn.GRU(inputs, width, bidirectional=True)
            self.norm = nn.LayerNorm(2 * width)
            self.heads = nn.ModuleList(nn.Linear(2 * width, rank) for rank in ranks)
        for parameter in self.recurrent.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self) -> list[Tensor]:
        """Return the logits ``[rank]`` of every module."""
        # Under Lightning's mixed precision the logits would be bfloat16.
        with torch.autocast(self.inputs.device.type, enabled=False):
            states, _ = self.recurrent(self.inputs)
            states = functional.gelu(self.norm(states))
            return [head(state) for head, state in zip(self.heads, states, strict=True)]


class ARSMask(GumbelMask):
    """The binary gates of one module: a fixed offset plus the logits of the shared network.

    Args:
        shape: ``(out, in)`` of the module.
        sigma: Singular values of the gated components.
        offset: ``[rank]`` logits to start from.
        storage: How the finished module is stored.
        temperature: Temperature of the sigmoid.

    Attributes:
        learned: ``[rank]`` logits of the network's last evaluation, with its graph; None before the first.
    """

    own: ClassVar[tuple[str, ...]] = ("offset", "learned", "noise", "sigma")

    sigma: Tensor
    offset: Tensor

    def __init__(
        self, shape: tuple[int, int], sigma: Tensor, offset: Tensor, *, storage: Storage, temperature: float
    ) -> None:
        # Any subset while learning, whatever the plan keeps: the alignment loss draws the gates to prefixes.
        super().__init__(shape, len(offset), storage=storage, temperature=temperature, any_k=True)
        self.register_buffer("sigma", sigma.float(), persistent=False)
        self.register_buffer("offset", offset.float(), persistent=False)
        self.learned: Tensor | None = None

    def gate_logits(self) -> Tensor:
        """Return the offset plus the network's logits ``[rank]``; before the network is evaluated, the offset."""
        return self.offset if self.learned is None else self.offset + self.learned


class ARS(GumbelMethod):
    """Adaptive Rank Selections (ARS, Gao et al., NAACL 2024): gates from a hyper-network, drawn towards prefixes.

    Masks gate full-rank factors, start with every component on, and never compute densely while they learn. The budget
    penalty ``log(max(T, pT) / pT)`` counts the parameters ``T`` under this step's noise; a module that costs more than
    its dense weight counts as dense. Plans count the components whose probability is above 1/2 without noise, and keep
    as many of the first ones, or with ``any_k`` these components themselves, at the exact budget.

    Args:
        temperature: Temperature of the sigmoids.
        noise: ``logistic``, the difference of two Gumbel draws; ``gumbel``, a single draw as in the paper, whose mean
            of 0.58 favours components that are on; or ``none``.
        start: Logit that components start with, negated for those that a plan to start from drops.
        budget_weight: Called lambda in the paper.
        alignment_weight: Called gamma in the paper: weight of the alignment of gates with prefixes.
        alignment: ``mse``, the mean squared error of ``gate * sigma`` from ``prefix * sigma`` as in the paper, which
            depends on the scale of a layer's singular values; or ``share`` (ours), the same divided by the mean of
            ``sigma ** 2``, so that all layers count alike whatever their scale.
        width: Size of the network's state in each direction.
        inputs: Size of the network's input vectors.
        any_k: Let the plan keep any subset of the components. While they learn, gates are any subset in both cases.
        seed: Seed of the noise and the network.

    Raises:
        ValueError: A setting outside its range.
    """

    name: ClassVar[str] = "ars"
    # Gao et al., "Adaptive Rank Selections for Low-Rank Approximation of Language Models", NAACL 2024.
    paper: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        temperature: float = 0.4,
        noise: Noise = "logistic",
        start: float = 3.0,
        budget_weight: float = 16.0,
        alignment_weight: float = 1.0,
        alignment: Alignment = "share",
        width: int = 64,
        inputs: int = 32,
        any_k: bool = False,
        seed: int = 0,
    ) -> None:
        check_numbers({"temperature": (temperature, 0), "start": (start, 0)}, above=True)
        check_numbers({"budget_weight": (budget_weight, 0), "alignment_weight": (alignment_weight, 0)})
        check_counts({"width": width, "inputs": inputs})
        check_choices({"noise": (noise, Noise), "alignment": (alignment, Alignment)})
        self.temperature, self.noise, self.start = temperature, noise, start
        self.budget_weight, self.alignment_weight, self.alignment = budget_weight, alignment_weight, alignment
        self.width, self.inputs, self.any_k, self.seed = width, inputs, any_k, seed

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> ARSMask:
        """Return a mask with the components of the start on and all others off; arguments as in ``MaskMethod``."""
        rank = self.stored_rank(shape, storage)
        on = chosen_at_start(shape, rank, keep, kept if self.any_k else None, storage=storage)
        offset = self.start * (2.0 * on - 1.0)
        return ARSMask(shape, sigma[:rank], offset, storage=storage, temperature=self.temperature)

    def shared_module(self, masks: Mapping[str, Mask]) -> HyperNetwork:
        """Return the network that computes the logits of all masks."""
        return HyperNetwork(
            [mask.rank for mask in masks.values()], inputs=self.inputs, width=self.width, seed=self.seed
        )

    def advance(self, masks: ModelMasks, step: int, budget: Budget) -> None:
        """Evaluate the network and draw the noise of ``step``."""
        _evaluate_network(masks)
        draw_noise(masks, kind=self.noise, seed=self.seed, step=step)

    def penalties(self, masks: ModelMasks, ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``budget`` and ``alignment``, weighted; arguments as in ``MaskMethod.penalties``."""
        drawn = of_each(masks, lambda mask: mask.storage.ratio(mask.shape, mask().sum(-1)))
        apart = of_each(masks, self._apart)
        return {
            "budget": self.budget_weight * log_budget_penalty(kept_fractions(drawn), dense_sizes(masks, ratios), keep),
            "alignment": self.alignment_weight * apart.mean(),
        }

    def _apart(self, mask: ARSMask) -> Tensor:
        """Return how far the gate is from the prefix of the same count, a scalar."""
        share = alignment_penalty(mask(), mask.sigma)
        return share if self.alignment == "share" else share * mask.sigma.square().mean(-1)

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
        """Return the plan of the highest probabilities without noise, at the exact budget."""
        with torch.no_grad():
            _evaluate_network(masks)
        return select_by_logits(masks, budget, any_k=self.any_k, method=self.name)


def _evaluate_network(masks: ModelMasks) -> None:
    """Evaluate the shared network once and set every mask's logits."""
    network = masks.shared
    assert isinstance(network, HyperNetwork)
    for mask, logits in zip(_ars_masks(masks), network(), strict=True):
        mask.learned = logits


def _ars_masks(masks: Mapping[str, Mask]) -> list[ARSMask]:
    found = [mask for mask in masks.values() if isinstance(mask, ARSMask)]
    assert len(found) == len(masks)
    return found
