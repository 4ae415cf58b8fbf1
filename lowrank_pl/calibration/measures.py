"""What every kind of statistic knows about itself, and the passes in which it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.settings import NOT_FINITE
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.distributed import my_share

__all__ = ["Batch", "Call", "GradientMeasure", "Measure", "Passes", "located"]

AnyMeasure = TypeVar("AnyMeasure", bound="Measure")


class Call(NamedTuple):
    """One call of a linear layer, or of a module of experts.

    Args:
        inputs: ``[..., in]``; of experts ``[tokens, chosen]``, the weights of those that each token chose.
        gradient: ``[..., out]`` gradient of the summed loss by the output; of experts that by the weights.
        chosen: ``[tokens, chosen]`` numbers of the chosen experts; None for a linear layer.
        experts: How many there are.
    """

    inputs: Tensor
    gradient: Tensor
    chosen: Tensor | None = None
    experts: int = 0


@dataclass(frozen=True)
class Batch:
    """A batch of calibration text.

    Args:
        number: Its place among the batches of all processes.
        tokens: ``[sequences, length]`` token ids.
    """

    number: int
    tokens: Tensor

    @property
    def labels(self) -> int:
        """How many tokens the loss predicts: all but the first of each sequence."""
        return self.tokens[:, 1:].numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its token ids on ``device``."""
        return Batch(self.number, self.tokens.to(device))


@dataclass(frozen=True, eq=False)
class Passes:
    """Passes over calibration text.

    Args:
        sequences: ``[sequences, length]`` token ids.
        batch_size: Sequences per pass. Gradients are squared, and labels are sampled, batch by batch.
        gradient_checkpointing: Compute each block's activations again in backward passes, to save memory.
    """

    sequences: Tensor
    batch_size: int = 1
    gradient_checkpointing: bool = False

    def batches(self) -> list[Batch]:
        """Return the batches of this process. A batch has the same number, whichever process it goes to."""
        parts = torch.split(self.sequences, self.batch_size)
        return my_share([Batch(number, tokens) for number, tokens in enumerate(parts)])


@contextmanager
def located(name: str, batch: Batch) -> Iterator[None]:
    """Add to a ``ValueError`` the linear layer and the batch that it comes from, and the cure."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}: at module {name} in calibration batch {batch.number}; {NOT_FINITE}") from None


class Measure(ABC):
    """A statistic of one linear layer, or of an input that linear layers share, summed over batches.

    Attributes:
        folder: Name of the store that holds statistics of this kind, and of its folder.
        shrinks_experts: Whether the mean of all experts of a block stands in where few tokens reach one of them
            (``lowrank_pl.calibration.experts``), so that all are measured.
    """

    folder: ClassVar[str]
    shrinks_experts: ClassVar[bool] = False

    @classmethod
    def key(cls, target: Target) -> str:
        """Return the name of the entry of ``target`` in the store."""
        return target.name

    @classmethod
    @abstractmethod
    def identity(cls, labels: Labels, batch_size: int) -> dict[str, str]:
        """Return the settings of the passes that change the statistic; they become part of the store's fingerprint."""

    @classmethod
    @abstractmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return the bytes that the sums of ``target`` take."""

    @classmethod
    @abstractmethod
    def empty(cls: type[AnyMeasure], target: Target, passes: Passes, device: torch.device) -> AnyMeasure:
        """Return the statistic of ``target`` before the first batch, with its sums on ``device``."""

    @abstractmethod
    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store, by name."""

    @abstractmethod
    def notes(self) -> dict[str, str]:
        """Return what to note beside the tensors."""


class GradientMeasure(Measure):
    """A statistic that needs the gradient of the loss by the output of a linear layer, or by the weights of experts.

    Attributes:
        others_follow: Whether it is collected before other statistics of a block in block-wise passes.
    """

    others_follow: ClassVar[bool] = False

    @classmethod
    def identity(cls, labels: Labels, batch_size: int) -> dict[str, str]:
        """Return whose labels the loss uses, and the batch size where labels are sampled batch by batch."""
        sampled = {"batch_size": str(batch_size)} if labels == "sampled" and batch_size != 1 else {}
        return {"labels": labels, **sampled}

    @classmethod
    def labels(cls, asked: Labels) -> Labels:
        """Return whose labels the loss uses, where ``asked`` were asked for."""
        return asked

    @abstractmethod
    def add(self, calls: Sequence[Call], batch: Batch) -> None:
        """Add all calls of the linear layer in one batch; none, where no token of it reached the layer's expert.

        Raises:
            ValueError: An input or a gradient holds NaN or infinity.
        """
