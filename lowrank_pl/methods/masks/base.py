"""What every learned mask offers: a gate per component, a price, and a way to whole ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = ["NEARLY_FULL", "Mask", "MaskMethod", "check_numbers", "dense_sizes", "gated_rank"]

NEARLY_FULL = 0.97
"""Of the dense weight's numbers: what components at pivoted prices cost from which a mask has no more of them.

The last ones cost next to nothing there: of a square weight 17 % of the components are 3 % of the numbers. In a layer
that learns they would be memory (2.39 times the weights of Llama-3-8B's blocks instead of 2.30) for what the dense
weight, which it has anyway, computes as well.
"""


class Mask(nn.Module, ABC):
    """The learnable gate of one module's components; its parameters stay float32 whatever the base's type is.

    Its ``state_dict`` is what a checkpoint holds of it, so buffers that can be derived are not persistent.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that it gates.
        prices: What ranks cost in the finished model.

    Attributes:
        inactive_learn: Whether gates of components that are not ``lit`` have a gradient.
        covered: The ratio from which the mask stands for more components than it gates, for which its layer computes
            with its dense weight; infinity where that is no reason to.
    """

    inactive_learn: bool = True

    def __init__(self, shape: tuple[int, int], rank: int, prices: Storage) -> None:
        super().__init__()
        self.shape = shape
        self.rank = rank
        self.prices = prices
        self.covered = math.inf
        if prices.choice != "factored" and rank < min(shape):
            self.covered = prices.ratio(shape, torch.tensor(rank + 0.5, device="cpu")).item()

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the gate ``[rank]`` of this training step, differentiable in the mask's parameters."""

    def soft(self) -> Tensor:
        """Return how far each component is on, before any rounding and without noise, from 0 to 1, ``[rank]``.

        It is there to be looked at: how decided the mask is. A mask that knows no degrees gives zeros and ones.
        """
        gate: Tensor = self()
        return gate

    def lit(self) -> Tensor | None:
        """Return the components that a token has to go through in this step, bool ``[rank]``; None for all.

        The gate of all others is exactly 0.
        """
        return None

    @abstractmethod
    def ratio(self) -> Tensor:
        """Return the expected parameters as a fraction of the dense weight's, differentiable, a scalar.

        At 1 and above the finished module is dense.
        """

    @abstractmethod
    def kept(self) -> Tensor:
        """Return which components the mask stands for now, without noise, bool ``[rank]``."""


class MaskMethod(ABC):
    """A family of masks with its settings: makes them, moves them on, charges them and turns them into a plan.

    It has no state besides its settings: what changes while it learns lies in the masks, or in the module that
    ``share`` returns, where checkpoints find it. The order of calls is ``create`` for every module, ``share``, then
    for each step ``advance``, forward passes and ``penalties``, once for each accumulated batch, then ``observe``, and
    after the optimizer's step ``advance`` and ``finished``.

    Attributes:
        name: What plans call the method.
        dense_from: The ratio from which a module computes with its dense weight during training; infinity is never.
        any_k: Whether its plans may keep components that are not the first ones.
        kinds: Kinds of decomposition whose singular values mean what the masks take them for; empty for any.
        own_start: Whether its masks have a start of their own and take no plan to start from.
    """

    name: str
    dense_from: float = 1.0
    any_k: bool = False
    kinds: tuple[str, ...] = ()
    own_start: bool = False

    @abstractmethod
    def stored_rank(self, shape: tuple[int, int], prices: Storage) -> int:
        """Return how many components of a module of ``shape`` a mask gates, where ranks cost ``prices``."""

    def check_base(self, kind: str) -> None:
        """Check that masks of this method can gate factors of a ``kind`` of decomposition.

        Raises:
            ValueError: Their singular values mean something else.
        """
        if self.kinds and kind not in self.kinds:
            raise ValueError(
                f"masks of {self.name} were given factors of the kind {kind!r}: expected {' or '.join(self.kinds)} "
                "(--model.decomposition.kind)"
            )

    def start_keep(self, aim: float) -> float:
        """Return the fraction that masks start at without a plan to start from, when learning begins at ``aim``."""
        return aim

    @abstractmethod
    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, prices: Storage, kept: Tensor | None = None
    ) -> Mask:
        """Return a mask that starts at ``keep`` of the module's parameters.

        Args:
            shape: ``(out, in)`` of the module.
            sigma: All its singular values, descending.
            keep: Fraction to start from; 1 and above is dense.
            prices: What ranks cost in the finished model.
            kept: Component indices to start from exactly, where there is a plan. A method whose ``any_k`` is false
                takes as many of the first ones.
        """

    def share(self, masks: Mapping[str, Mask]) -> nn.Module | None:
        """Return what all masks have in common and learners register beside them; most methods have nothing.

        Args:
            masks: Every module's mask by name, all made by this method.
        """
        return None

    def advance(self, masks: Mapping[str, Mask], step: int, budget: Budget) -> None:
        """Bring the masks to optimizer step ``step``: temperatures, noise, what a shared network gives.

        Called before every training step with gradients on, and after every optimizer step without.

        Args:
            masks: Every module's mask by name.
            step: Optimizer steps done.
            budget: What is aimed at in this step.
        """
        return

    @abstractmethod
    def penalties(self, masks: Mapping[str, Mask], ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return the weighted loss terms that hold the masks to the budget, by name, each a scalar.

        Args:
            masks: Every module's mask by name.
            ratios: ``[modules]``, each mask's ``ratio()`` in the same order.
            keep: Fraction of the targeted parameters aimed at in this step.
            step: Optimizer steps done.
        """

    def observe(self, masks: Mapping[str, Mask], step: int, *, accumulated: int = 1) -> None:
        """Look at the gradients that optimizer step ``step`` will use: averaged over processes, not yet clipped.

        A parameter whose gradient is set to ``None`` here is left as it is by the optimizer, its momentum included.

        Args:
            masks: Every module's mask by name.
            step: Optimizer steps done.
            accumulated: What the loss of each batch was divided by. The last step of an epoch may have fewer batches.
        """
        return

    def finished(self, masks: Mapping[str, Mask], budget: Budget, step: int) -> bool:
        """Tell whether learning is over by the method's own rule, of which most have none.

        Called after every optimizer step and before a checkpoint of it is written; calls with the same step agree.

        Args:
            masks: Every module's mask by name.
            budget: What the masks are to meet in the end.
            step: Optimizer steps done.
        """
        return False

    @abstractmethod
    def finalise(self, masks: Mapping[str, Mask], budget: Budget) -> RankPlan:
        """Return the plan that the masks stand for, at the exact budget."""


def gated_rank(shape: tuple[int, int], top: float, prices: Storage) -> int:
    """Return how many components cost ``top`` times the dense weight, rounded down, at most all.

    At pivoted prices they are at most what costs ``NEARLY_FULL``.

    >>> gated_rank((30, 60), 1.2, Storage("factored")), gated_rank((30, 900), 1.2, Storage("factored"))
    (24, 30)
    >>> gated_rank((300, 300), 1.2, Storage("pivoted"))
    245
    """
    most = top if prices.choice == "factored" else min(top, NEARLY_FULL)
    return max(1, int(prices.rank_at(shape, most)))


def dense_sizes(masks: Mapping[str, Mask], like: Tensor) -> Tensor:
    """Return the parameters ``[modules]`` of the dense weights, on the device of ``like``."""
    return torch.tensor([mask.shape[0] * mask.shape[1] for mask in masks.values()], device=like.device)


def check_numbers(least: Mapping[str, tuple[float, float]], *, above: bool = False) -> None:
    """Check settings that have a smallest value.

    Args:
        least: By the setting's name, its value and the smallest that is allowed.
        above: Whether that smallest value itself is refused.

    Raises:
        ValueError: A value is too small, infinite or NaN.
    """
    for name, (value, bound) in least.items():
        if not (bound < value if above else bound <= value) or math.isinf(value):
            word = "above" if above else "of at least"
            raise ValueError(f"{name} is {value}: expected a finite number {word} {bound:g}")
