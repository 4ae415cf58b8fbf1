"""ARS's masks: switches whose logits come out of one small network over all modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_pl.methods.masks.base import Mask, check_numbers, dense_sizes
from lowrank_pl.methods.masks.gumbel import (
    GumbelMask,
    GumbelMethod,
    Noise,
    check_noise,
    chosen_at_start,
    draw_noise,
    seeded,
    select_by_logits,
)
from lowrank_pl.methods.masks.objectives import alignment_penalty, kept_fractions, log_budget_penalty
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = ["ARS", "ARSMask", "HyperNetwork"]


class HyperNetwork(nn.Module):
    """A bidirectional GRU over one fixed random vector a module, with a linear head for the logits of each.

    Heads start at zero: the masks then start exactly where their offsets put them, and learning fills in the rest.

    Args:
        ranks: Components of each module, in the model's order.
        inputs: Size of the random vectors.
        width: Size of the GRU's state in each direction.
        seed: Of vectors and weights.
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
        self.rows: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """Return the logits ``[rank]`` of every module."""
        # Under Lightning's mixed precision the logits would be bfloat16.
        with torch.autocast(self.inputs.device.type, enabled=False):
            states, _ = self.recurrent(self.inputs)
            states = functional.gelu(self.norm(states))
            return [head(state) for head, state in zip(self.heads, states, strict=True)]

    def refresh(self) -> None:
        """Evaluate once and keep the logits for the masks."""
        self.rows = self()


class ARSMask(GumbelMask):
    """The switches of one module, with a fixed offset and the logits that the shared network gives them.

    Args:
        shape: ``(out, in)`` of the module.
        sigma: Singular values of the gated components.
        offset: ``[rank]`` logits to start from.
        prices: What ranks cost in the finished model.
        temperature: Of the sigmoid.
    """

    sigma: Tensor
    offset: Tensor

    def __init__(
        self, shape: tuple[int, int], sigma: Tensor, offset: Tensor, *, prices: Storage, temperature: float
    ) -> None:
        # Any subset while it learns, whatever the plan keeps: the alignment is what draws gates to prefixes.
        super().__init__(shape, len(offset), prices=prices, temperature=temperature, any_k=True)
        self.register_buffer("sigma", sigma.float(), persistent=False)
        self.register_buffer("offset", offset.float(), persistent=False)
        # In a tuple, so that the network is registered once and not with every mask.
        self.source: tuple[HyperNetwork, int] | None = None

    def switch_logits(self) -> Tensor:
        """Return the offset plus the network's logits ``[rank]`` as last evaluated; before that, the offset."""
        if self.source is None or not self.source[0].rows:
            return self.offset
        network, index = self.source
        return self.offset + network.rows[index]


class ARS(GumbelMethod):
    """Adaptive Rank Selections (ARS, Gao et al., NAACL 2024): switches from a hyper-network, drawn towards prefixes.

    Masks gate full-rank factors, start with everything on, and never compute densely while they learn. The budget
    penalty ``log(max(T, pT) / pT)`` counts the parameters ``T`` of the gates as drawn, with a module that costs more
    than its dense weight counted as dense. Plans keep as many of the first components as have a probability above 1/2
    without noise, or those themselves with ``any_k``, at the exact budget.

    Args:
        temperature: Of the sigmoids.
        noise: ``logistic``, the difference of two Gumbel draws, as in a Gumbel-sigmoid; ``gumbel`` or ``none``.
        start: Logit that components start with, negated for those that a plan to start from drops.
        budget_weight: Called lambda in the paper.
        alignment_weight: Called gamma in the paper: weight of the share of energy on which gates differ from prefixes.
        width: Size of the network's state in each direction.
        inputs: Size of its input vectors.
        any_k: Let the plan keep any subset of the components; gates are any subset while they learn in both cases.
        seed: Of the noise and the network.

    Raises:
        ValueError: A setting outside its range.
    """

    name = "ars"

    def __init__(
        self,
        *,
        temperature: float = 0.4,
        noise: Noise = "logistic",
        start: float = 3.0,
        budget_weight: float = 16.0,
        alignment_weight: float = 1.0,
        width: int = 64,
        inputs: int = 32,
        any_k: bool = False,
        seed: int = 0,
    ) -> None:
        check_numbers({"temperature": (temperature, 0), "start": (start, 0)}, above=True)
        check_numbers({
            "budget_weight": (budget_weight, 0), "alignment_weight": (alignment_weight, 0), "width": (width, 1),
            "inputs": (inputs, 1),
        })  # fmt: skip
        check_noise(noise)
        self.temperature, self.noise, self.start = temperature, noise, start
        self.budget_weight, self.alignment_weight = budget_weight, alignment_weight
        self.width, self.inputs, self.any_k, self.seed = width, inputs, any_k, seed

    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, prices: Storage, kept: Tensor | None = None
    ) -> ARSMask:
        """Return a mask with the components of the start on and all others off; arguments as in ``MaskMethod``."""
        rank = self.stored_rank(shape, prices)
        on = chosen_at_start(shape, rank, keep, kept if self.any_k else None, prices=prices)
        offset = self.start * (2.0 * on - 1.0)
        return ARSMask(shape, sigma[:rank], offset, prices=prices, temperature=self.temperature)

    def share(self, masks: Mapping[str, Mask]) -> HyperNetwork:
        """Return the network that gives all masks their logits."""
        network = HyperNetwork(
            [mask.rank for mask in masks.values()], inputs=self.inputs, width=self.width, seed=self.seed
        )
        for index, mask in enumerate(masks.values()):
            _ars(mask).source = (network, index)
        return network

    def advance(self, masks: Mapping[str, Mask], step: int, budget: Budget) -> None:
        """Evaluate the network for this step and draw its noise."""
        _refresh(masks)
        draw_noise(masks, kind=self.noise, seed=self.seed, step=step)

    def penalties(self, masks: Mapping[str, Mask], ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return ``budget`` and ``alignment``, weighted; arguments as in ``MaskMethod.penalties``."""
        gates = {name: mask() for name, mask in masks.items()}
        drawn = torch.stack([mask.prices.ratio(mask.shape, gates[name].sum()) for name, mask in masks.items()])
        apart = torch.stack([alignment_penalty(gates[name], _ars(mask).sigma) for name, mask in masks.items()])
        return {
            "budget": self.budget_weight * log_budget_penalty(kept_fractions(drawn), dense_sizes(masks, ratios), keep),
            "alignment": self.alignment_weight * apart.mean(),
        }

    def finalise(self, masks: Mapping[str, Mask], budget: Budget) -> RankPlan:
        """Return the plan of the highest probabilities without noise, at the exact budget."""
        with torch.no_grad():
            _refresh(masks)
        return select_by_logits(masks, budget, any_k=self.any_k, method=self.name)


def _refresh(masks: Mapping[str, Mask]) -> None:
    source = next((_ars(mask).source for mask in masks.values()), None)
    if source is not None:
        source[0].refresh()


def _ars(mask: Mask) -> ARSMask:
    assert isinstance(mask, ARSMask)
    return mask
