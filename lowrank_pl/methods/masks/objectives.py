"""Loss terms as pure functions of tensors: data terms that masks learn from, and penalties that hold the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lowrank_pl.utils.checks import check_choices

__all__ = [
    "DATA_TERMS",
    "DataTerms",
    "activation_divergence",
    "alignment_penalty",
    "budget_penalty",
    "cyclical_weight",
    "guidance_penalty",
    "kept_fractions",
    "kept_share",
    "log_budget_penalty",
    "logit_kl",
    "next_token_loss",
    "total_variation",
]

DivergenceKind = Literal["mse", "cosine", "normalised_mse", "token_normalised_mse"]
"""How activations are compared; ``activation_divergence`` explains the kinds."""

DATA_TERMS = ("cross_entropy", "kl", "divergence")
"""Names of the loss terms that are computed on text."""


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of each token given all tokens before it, a float32 scalar.

    Args:
        logits: ``[batch, length, vocabulary]``.
        tokens: ``[batch, length]``.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def logit_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence in nats from teacher to student per position, a float32 scalar.

    Args:
        student: ``[batch, length, vocabulary]``.
        teacher: The same shape.

    Example:
        >>> logit_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).item()
        0.0
    """
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def activation_divergence(student: Tensor, teacher: Tensor, kind: DivergenceKind = "mse") -> Tensor:
    """Return how far activations have moved from the original model's, a float32 scalar.

    LLRC (arXiv 2512.13733) leaves the kind open. In models with an attention sink, one token has nearly all of the
    squared norm between the first and the last blocks (97 % in the middle of SmolLM2). There ``mse`` and
    ``normalised_mse`` measure little but that token. The other two kinds give all tokens the same weight.

    Args:
        student: ``[..., features]``.
        teacher: The same shape.
        kind: ``mse``; ``normalised_mse``, the same over the teacher's mean square, so that layers of different scale
            count alike; ``token_normalised_mse``, the squared error of each token over the teacher's squared norm
            there, averaged over tokens; ``cosine``, one minus the mean cosine similarity.

    Example:
        >>> teacher = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
        >>> student = torch.tensor([[90.0, 0.0], [0.0, 0.0]])
        >>> [round(activation_divergence(student, teacher, kind).item(), 4)
        ...  for kind in ("mse", "normalised_mse", "token_normalised_mse", "cosine")]
        [25.25, 0.0101, 0.505, 0.5]
    """
    student, teacher = student.float(), teacher.float()
    if kind == "cosine":
        return 1 - functional.cosine_similarity(student, teacher, dim=-1).mean()
    if kind == "token_normalised_mse":
        norms = teacher.square().sum(-1).clamp_min(1e-12)
        return ((student - teacher).square().sum(-1) / norms).mean()
    error = functional.mse_loss(student, teacher)
    return error / teacher.square().mean().clamp_min(1e-12) if kind == "normalised_mse" else error


def kept_fractions(ratios: Tensor) -> Tensor:
    """Return the kept fraction of each module ``[modules]``: its ratio, but 1 where the factors cost more than dense.

    Above 1 the gradient is still that of the ratio, unlike a clamp's, so that the budget can shrink a dense module.

    Args:
        ratios: ``[modules]`` parameters of the components over those of the dense weight.
    """
    return ratios - (ratios - 1).clamp(min=0).detach()


def kept_share(ratios: Tensor, sizes: Tensor) -> Tensor:
    """Return the kept fraction of the parameters of all modules together, a scalar.

    Args:
        ratios: ``[modules]`` kept fraction of each module.
        sizes: ``[modules]`` dense parameters of each module.

    Example:
        >>> kept_share(torch.tensor([0.5, 1.0]), torch.tensor([3, 1])).item()
        0.625
    """
    weights = sizes.to(ratios.dtype)
    return (ratios * weights).sum() / weights.sum()


def budget_penalty(ratios: Tensor, sizes: Tensor, keep: float) -> Tensor:
    """Return the squared distance of the kept fraction of parameters from ``keep`` (ARA, arXiv 2510.19389).

    Args:
        ratios: ``[modules]`` kept fraction of each module, at most 1.
        sizes: ``[modules]`` dense parameters of each module.
        keep: The target fraction.

    Example:
        >>> round(budget_penalty(torch.tensor([0.5, 1.0]), torch.tensor([3, 1]), 0.5).item(), 6)
        0.015625
    """
    return (kept_share(ratios, sizes) - keep).square()


def guidance_penalty(ratios: Tensor, errors: Tensor) -> Tensor:
    """Return ARA's guidance: the mean distance from dense of modules that cost more than they preserve.

    Such a module keeps a larger fraction of its parameters than of its norm, of which it keeps ``1 - error``
    (arXiv 2510.19389).

    Args:
        ratios: ``[modules]`` kept fraction of each module, at most 1.
        errors: ``[modules]`` lost share of the norm at that fraction.

    Example:
        >>> round(guidance_penalty(torch.tensor([0.9, 0.9]), torch.tensor([0.2, 0.05])).item(), 6)
        0.05
    """
    wasteful = (ratios > 1 - errors).to(ratios.dtype)
    return ((1 - ratios) * wasteful).mean()


def log_budget_penalty(ratios: Tensor, sizes: Tensor, keep: float) -> Tensor:
    """Return ``log(max(T, keep) / keep)`` with the kept fraction ``T``: 0 once the budget is met (ARS, NAACL 2024).

    Args:
        ratios: ``[modules]`` kept fraction of each module, at most 1.
        sizes: ``[modules]`` dense parameters of each module.
        keep: The target fraction.

    Example:
        >>> round(log_budget_penalty(torch.tensor([0.5, 1.0]), torch.tensor([3, 1]), 0.5).item(), 4)
        0.2231
    """
    return (kept_share(ratios, sizes) / keep).clamp(min=1).log()


def total_variation(gates: Sequence[Tensor]) -> Tensor:
    """Return the mean of ``|gate[j + 1] - gate[j]|`` over all neighbours in all gates, a scalar (LLRC, 2512.13733).

    Args:
        gates: ``[..., rank]`` each; a gate of one component has no neighbours.

    Example:
        >>> total_variation([torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])]).item()
        0.75
    """
    steps = torch.cat([gate.diff().abs().flatten() for gate in gates])
    return steps.sum() / max(1, len(steps))


def alignment_penalty(gate: Tensor, sigma: Tensor) -> Tensor:
    """Return the share of a spectrum's energy on which ``gate`` and the prefix of the same count differ, ``[...]``.

    ARS's mean squared error of ``gate * sigma`` from ``prefix * sigma`` (Gao et al., NAACL 2024), with sigma scaled to
    a mean square of 1, so that modules count alike. No gradient flows through the prefix.

    Args:
        gate: ``[..., rank]``, of zeros and ones.
        sigma: ``[..., rank]`` singular values, descending.

    Example:
        >>> round(alignment_penalty(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2.0, 1.0, 1.0])).item(), 4)
        0.3333
    """
    count = gate.detach().sum(-1, keepdim=True).round()
    prefix = (torch.arange(gate.shape[-1], device=gate.device) < count).to(gate.dtype)
    energy = sigma.square()
    return ((gate - prefix).square() * energy).sum(-1) / energy.sum(-1).clamp_min(torch.finfo(energy.dtype).tiny)


def cyclical_weight(step: int, *, low: float, high: float, period: int, cycle: str = "cosine") -> float:
    """Return a weight that rises from ``low`` to ``high`` and falls back once every ``period`` steps.

    Args:
        step: Optimizer steps done; at 0 the weight is ``low``.
        low: The least weight.
        high: The greatest weight.
        period: Steps of a cycle.
        cycle: ``cosine`` or ``triangular``.

    Example:
        >>> [cyclical_weight(step, low=1.0, high=3.0, period=4, cycle="triangular") for step in range(5)]
        [1.0, 2.0, 3.0, 2.0, 1.0]
    """
    phase = step % period / period
    risen = (1 - math.cos(2 * math.pi * phase)) / 2 if cycle == "cosine" else 1 - abs(2 * phase - 1)
    return low + (high - low) * risen


@dataclass(frozen=True)
class DataTerms:
    """Weights of the loss terms that are computed on text; a weight of 0 leaves the term out and saves its cost.

    Args:
        cross_entropy: Weight of next-token cross-entropy.
        kl: Weight of the divergence of the logits from the original model's.
        divergence: Weight of the divergence of activations from the original model's.
        divergence_kind: How activations are compared.
        divergence_at: Where activations are compared: ``last`` (the hidden state before the head), ``middle`` (output
            of the middle block), or the number of a block, from 0. The divergences of several places are averaged.

    Raises:
        ValueError: A negative weight, all weights 0, an unknown kind, or a divergence without a place.
    """

    cross_entropy: float = 1.0
    kl: float = 0.0
    divergence: float = 0.0
    divergence_kind: DivergenceKind = "mse"
    divergence_at: Sequence[str] = field(default=("middle", "last"))

    def __post_init__(self) -> None:
        weights: dict[str, float] = {name: getattr(self, name) for name in DATA_TERMS}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(
                f"the weights of the data terms are {weights}: expected none below 0 and at least one above 0"
            )
        check_choices({"divergence_kind": (self.divergence_kind, DivergenceKind)})
        if self.divergence and not self.divergence_at:
            raise ValueError(
                f"divergence is {self.divergence} but divergence_at names no place: give middle, last or a block's "
                "number"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the original model must run on every batch too."""
        return self.kl > 0 or self.divergence > 0

    def blocks(self, count: int) -> dict[str, int | None]:
        """Return the block whose output each place of ``divergence_at`` means; ``None`` is the last hidden state.

        Args:
            count: Blocks of the model.

        Raises:
            ValueError: A place that is neither ``middle``, ``last`` nor a block of the model.
        """
        places: dict[str, int | None] = {}
        for place in self.divergence_at if self.divergence else ():
            if place not in ("middle", "last") and not (place.isdecimal() and int(place) < count):
                raise ValueError(
                    f"divergence_at holds {place!r}: expected middle, last or a block from 0 to {count - 1}"
                )
            places[place] = None if place == "last" else count // 2 if place == "middle" else int(place)
        return places

    def compute(
        self,
        tokens: Tensor,
        logits: Tensor,
        activations: Mapping[str, Tensor],
        teacher_logits: Tensor | None = None,
        teacher_activations: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms by name, each a scalar.

        Args:
            tokens: ``[batch, length]``.
            logits: ``[batch, length, vocabulary]`` of the masked model.
            activations: ``[batch, length, features]`` of the masked model at each place.
            teacher_logits: ``[batch, length, vocabulary]`` of the original model, when ``needs_teacher``.
            teacher_activations: ``[batch, length, features]`` of the original model at each place, when
                ``needs_teacher``.
        """
        terms = {}
        if self.cross_entropy:
            terms["cross_entropy"] = self.cross_entropy * next_token_loss(logits, tokens)
        if self.kl:
            assert teacher_logits is not None
            terms["kl"] = self.kl * logit_kl(logits, teacher_logits)
        if self.divergence:
            assert teacher_activations is not None
            each = [
                activation_divergence(activations[place], teacher_activations[place], self.divergence_kind)
                for place in activations
            ]
            terms["divergence"] = self.divergence * torch.stack(each).mean()
        return terms
