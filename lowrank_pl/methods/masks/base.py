"""The interface of learned masks: a gate for each component, the parameters that it costs, and a plan in the end.

A mask writes its formulas once, for tensors ``[..., components]``. The masks of a mixture's experts, of which there are
many and each is small, are then computed in few operations: ``stacks`` makes one mask of all those of one shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lowrank_pl.methods.masks.objectives import budget_penalty, kept_fractions
from lowrank_pl.models.names import expert_number
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import Storage

__all__ = [
    "NEARLY_FULL",
    "Mask",
    "MaskMethod",
    "ModelMasks",
    "dense_sizes",
    "gated_rank",
    "of_each",
    "stacks",
]

AnyMask = TypeVar("AnyMask", bound="Mask")

NEARLY_FULL = 0.97
"""With pivoted storage, a mask gates at most the components that cost this fraction of the dense weight.

The last components cost next to nothing: 17 % of a square weight's components are 3 % of its parameters. In a layer
that learns they would take memory (2.39 instead of 2.30 times the weights of Llama-3-8B's blocks) and compute what the
dense weight, which the layer holds anyway, computes as well.
"""


class Mask(nn.Module, ABC):
    """The learnable gate of one module's components.

    Its parameters are float32 whatever the base's type is. Checkpoints hold its ``state_dict``, so buffers that can be
    computed again are not persistent.

    A class that names its ``own`` attributes writes ``forward``, ``soft``, ``active``, ``ratio`` and ``kept`` such that
    they also hold where these attributes have one more dimension in front, that of several masks: components are the
    last dimension, and a number of the mask's own is ``[...]``. Tensors of shape ``[masks, rank]`` and ``[masks]`` then
    come out in the place of ``[rank]`` and of scalars.

    Args:
        shape: ``(out, in)`` of the module.
        rank: Components that the mask gates.
        storage: How the finished module is stored, which decides what a rank costs.

    Attributes:
        own: Names of the tensors and numbers in which masks of one method and shape differ; empty for a class whose
            masks are computed one by one.
        inactive_learn: Whether the gates of inactive components get a gradient.
        dense_beyond: The ratio from which the mask stands for more components than it gates, so that its layer computes
            with the dense weight; infinite where the gated components always suffice.
    """

    own: ClassVar[tuple[str, ...]] = ()
    inactive_learn: bool = True

    def __init__(self, shape: tuple[int, int], rank: int, storage: Storage) -> None:
        super().__init__()
        self.shape = shape
        self.rank = rank
        self.storage = storage
        self.dense_beyond = math.inf
        if storage.choice != "factored" and rank < min(shape):
            self.dense_beyond = storage.ratio(shape, torch.tensor(rank + 0.5, device="cpu")).item()

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the gate ``[rank]`` of this training step, differentiable in the mask's parameters."""

    def soft(self) -> Tensor:
        """Return how far each component is on, from 0 to 1, without rounding and noise, ``[rank]``.

        By default this is the gate. TensorBoard shows it: it says how decided the mask is.
        """
        gate: Tensor = self()
        return gate

    def active(self) -> Tensor | None:
        """Return the components that tokens pass through in this step, bool ``[rank]``; None stands for all.

        The gate of every inactive component is exactly 0.
        """
        return None

    def ratio(self) -> Tensor:
        """Return the expected parameters as a fraction of the dense weight's, differentiable, a scalar.

        At 1 and above the finished module is dense. By default the sum of the gates is the expected rank.
        """
        return self.storage.ratio(self.shape, self().sum(-1))

    def kept(self) -> Tensor:
        """Return which components the mask stands for now, without noise, bool ``[rank]``.

        By default these are the components that are more than half on.
        """
        return self.soft().detach() > 0.5

    @property
    def kin(self) -> Hashable:
        """What the masks of one method have in common that are computed together; None for one that is not."""
        return (type(self), self.shape, self.rank, self.storage) if self.own else None

    @classmethod
    def stacked(cls: type[AnyMask], masks: Sequence[AnyMask]) -> AnyMask:
        """Return one mask that stands for ``masks``: what it returns has one more dimension in front, that of masks.

        It holds their state of this moment, and gradients reach each of them through it.

        Args:
            masks: Masks of one ``kin``.
        """
        stack = cls.__new__(cls)
        stack.__dict__.update(masks[0].__dict__)
        # Entries of the dictionary hide the parameters and buffers of the first mask.
        stack.__dict__.update({name: _stacked([getattr(mask, name) for mask in masks]) for name in cls.own})
        return stack


def _stacked(values: Sequence[Any]) -> Tensor | None:
    """Return the tensors or numbers ``values`` in one tensor with a dimension in front; None where they are None."""
    if values[0] is None:
        return None
    return torch.stack(list(values)) if isinstance(values[0], Tensor) else torch.tensor(values, device="cpu")


def stacks(masks: Mapping[str, Mask]) -> list[tuple[list[str], Mask]]:
    """Return every mask with its name, in the order of ``masks``; those of a mixture that are of one kin stacked.

    In models without experts every mask stays alone: there are few, and each is large.

    Args:
        masks: Masks of one method by name of the module.

    Returns:
        Names and a mask each; one of several names returns tensors with a dimension in front, in the order of these.
    """
    if all(expert_number(name) is None for name in masks):
        return [([name], mask) for name, mask in masks.items()]
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, mask in masks.items():
        kin = mask.kin
        groups[name if kin is None else kin].append(name)
    return [
        (names, masks[names[0]] if len(names) == 1 else type(masks[names[0]]).stacked([masks[name] for name in names]))
        for names in groups.values()
    ]


def of_each(masks: Mapping[str, Mask], what: Callable[[Any], Tensor]) -> Tensor:
    """Return what ``what`` says of each mask, a scalar, in their order, ``[masks]``.

    Args:
        masks: Masks of one method by name of the module.
        what: Takes a mask and returns a scalar, or ``[masks]`` for a stack of several.
    """
    found: dict[str, Tensor] = {}
    for names, mask in stacks(masks):
        values = what(mask)
        found |= zip(names, values.unbind() if len(names) > 1 else [values], strict=True)
    return torch.stack([found[name] for name in masks])


class ModelMasks(dict[str, Mask]):
    """The masks of a model's modules by name, in the model's order, and the module that these masks share.

    Args:
        masks: Every module's mask by name.
        shared: What ``MaskMethod.shared_module`` returned for them. The learner registers it beside the masks, so that
            the optimizer and checkpoints have it exactly once.
    """

    def __init__(self, masks: Mapping[str, Mask], shared: nn.Module | None = None) -> None:
        super().__init__(masks)
        self.shared = shared


class MaskMethod(ABC):
    """A way to learn ranks: it makes the masks, updates and charges them in every step, and makes the plan.

    A method has settings and no other state. What changes during learning lies in the masks, or in the module that
    ``shared_module`` returns, so that checkpoints hold it. The order of calls is: ``create`` for every module, then
    ``shared_module``; in each step ``advance``, then forward passes and ``penalties`` once a batch, then ``observe``;
    after the optimizer's step ``advance`` and ``finished``; in the end ``finalise``.

    A new method has to define ``name`` and ``create``. Everything else has a default.

    Attributes:
        name: The method's name in plans and checkpoints.
        paper: arXiv number of its paper; None for a method of ours or a paper that is not on arXiv.
        former_names: Names of the method in plans and checkpoints of earlier versions.
        dense_from: The ratio from which a module computes with its dense weight during training; infinity for never.
        kinds: Kinds of decomposition whose singular values the masks can read; empty for any.
        skips_inactive: Whether its masks name the active components (``Mask.active``), so that layers skip all others.
        own_start: Whether the method decides where its masks start, so that they take no plan to start from.
        any_k: Whether its masks or plans may keep components that are not the first ones.
        top: Parameters of the gated components over those of the dense weight; above 1, so that a module can be dense.
        budget_weight: Weight of the squared distance of the kept parameters from the budget.
    """

    name: ClassVar[str]
    paper: ClassVar[str | None] = None
    former_names: ClassVar[tuple[str, ...]] = ()
    dense_from: ClassVar[float] = 1.0
    kinds: ClassVar[tuple[str, ...]] = ()
    own_start: ClassVar[bool] = False
    skips_inactive: ClassVar[bool] = False
    any_k: bool = False
    top: float = 1.2
    budget_weight: float = 100.0

    @property
    def plans_any_k(self) -> bool:
        """Whether its plans may keep components that are not the first ones."""
        return self.any_k

    def stored_rank(self, shape: tuple[int, int], storage: Storage) -> int:
        """Return how many components of a module of ``shape`` a mask gates, by default what ``top`` pays for.

        Args:
            shape: ``(out, in)`` of the module.
            storage: How the finished module is stored.
        """
        return gated_rank(shape, self.top, storage)

    def check_base(self, kind: str) -> None:
        """Refuse a ``kind`` of decomposition whose factors the masks can't gate.

        Raises:
            ValueError: The singular values of this kind mean something else.
        """
        if self.kinds and kind not in self.kinds:
            raise ValueError(
                f"masks of {self.name} were given factors of the kind {kind!r}: expected {' or '.join(self.kinds)} "
                "(--model.decomposition.kind)"
            )

    @property
    def idle_steps(self) -> int:
        """First optimizer steps of a run, in which nothing is learned."""
        return 0

    def start_keep(self, target: float) -> float:
        """Return the fraction that masks start at without a plan to start from, for the first step's ``target``."""
        return target

    @abstractmethod
    def create(
        self, shape: tuple[int, int], sigma: Tensor, keep: float, *, storage: Storage, kept: Tensor | None = None
    ) -> Mask:
        """Return a mask that starts at ``keep`` of the module's parameters.

        Args:
            shape: ``(out, in)`` of the module.
            sigma: All its singular values, descending.
            keep: Fraction to start from; 1 and above is dense.
            storage: How the finished module is stored, which decides what a rank costs.
            kept: Indices of exactly the components to start from, where there is a plan. A method whose ``any_k`` is
                false starts from as many of the first components.
        """

    def shared_module(self, masks: Mapping[str, Mask]) -> nn.Module | None:
        """Return the module that all masks share, for ``ModelMasks``; most methods have none.

        Args:
            masks: Every module's mask by name, all made by this method.
        """
        return None

    def advance(self, masks: ModelMasks, step: int, budget: Budget) -> None:
        """Bring the masks to optimizer step ``step``: temperature, noise, outputs of a shared network.

        It is called before every training step with gradients enabled, and after every optimizer step without them.

        Args:
            masks: Every module's mask by name.
            step: Optimizer steps done.
            budget: The target of this step.
        """
        return

    def penalties(self, masks: ModelMasks, ratios: Tensor, keep: float, step: int) -> dict[str, Tensor]:
        """Return the weighted loss terms that hold the masks to the budget, by name, each a scalar.

        By default this is ARA's budget penalty with a gradient for dense modules too, so that these shrink again when
        the budget asks for it.

        Args:
            masks: Every module's mask by name.
            ratios: ``[modules]``, each mask's ``ratio()`` in the same order.
            keep: Target fraction of the targeted parameters in this step.
            step: Optimizer steps done.
        """
        return {"budget": self.budget_weight * budget_penalty(kept_fractions(ratios), dense_sizes(masks, ratios), keep)}

    def observe(self, masks: ModelMasks, step: int, *, accumulated: int = 1) -> None:
        """Read the gradients of optimizer step ``step``, averaged over processes and not yet clipped.

        The optimizer leaves a parameter as it is, momentum included, when its gradient is set to ``None`` here.

        Args:
            masks: Every module's mask by name.
            step: Optimizer steps done.
            accumulated: Divisor of each batch's loss. The last step of an epoch may have fewer batches than this.
        """
        return

    def finished(self, masks: ModelMasks, budget: Budget, step: int) -> bool:
        """Tell whether the method's own stopping rule ends learning; most methods have none.

        It is called after every optimizer step, before a checkpoint is written, and returns the same for the same step.

        Args:
            masks: Every module's mask by name.
            budget: The final budget.
            step: Optimizer steps done.
        """
        return False

    def finalise(self, masks: ModelMasks, budget: Budget) -> RankPlan:
        """Return the plan of the masks, at the exact budget.

        By default modules whose ratio is at least ``dense_from`` become dense. Every other module requests the sum of
        its soft gate as its rank, and one common factor scales these requests to the budget.

        Args:
            masks: Every module's mask by name.
            budget: The final budget.
        """
        requested = {}
        with torch.no_grad():
            for name, mask in masks.items():
                dense = mask.ratio().item() >= self.dense_from
                requested[name] = math.inf if dense else mask.soft().sum().item()
        return budget.fit(requested, method=self.name)


def gated_rank(shape: tuple[int, int], top: float, storage: Storage) -> int:
    """Return how many components cost ``top`` times the dense weight, rounded down, at most all.

    With pivoted storage they cost at most ``NEARLY_FULL`` of the dense weight.

    >>> gated_rank((30, 60), 1.2, Storage("factored")), gated_rank((30, 900), 1.2, Storage("factored"))
    (24, 30)
    >>> gated_rank((300, 300), 1.2, Storage("pivoted"))
    245
    """
    most = top if storage.choice == "factored" else min(top, NEARLY_FULL)
    return max(1, int(storage.rank_at(shape, most)))


def dense_sizes(masks: Mapping[str, Mask], like: Tensor) -> Tensor:
    """Return the parameters ``[modules]`` of the dense weights, on the device of ``like``."""
    return torch.tensor([mask.shape[0] * mask.shape[1] for mask in masks.values()], device=like.device)
