"""Checks of numbers: the Trainer's precision must not cast what is trained, and losses must be finite."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import Tensor

from lowrank_pl.models.settings import NOT_FINITE, Base

__all__ = ["check_computed_in_half", "check_loss", "check_precision"]


def check_precision(trainer: Trainer, trained: str, cure: str) -> None:
    """Refuse a precision that casts the whole module.

    Args:
        trainer: The Trainer.
        trained: What is trained, in words.
        cure: How to load or compute in half precision instead.

    Raises:
        ValueError: The precision is ``64-true``, ``bf16-true`` or the like.
    """
    precision = str(trainer.precision)
    if precision == "64-true":
        raise ValueError(
            "the Trainer's precision is '64-true', which also casts the base: the export would be in float64, "
            "twice as large as planned; use precision '32-true': whatever needs float64 is computed in it anyway"
        )
    if precision.endswith("-true") and precision != "32-true":
        raise ValueError(
            f"the Trainer's precision is {precision!r}, which also casts {trained}; small updates vanish in "
            f"rounding: {cure}"
        )


def check_computed_in_half(trainer: Trainer, base: Base, trained: str) -> None:
    """Refuse to compute in float32 where the base is in half precision and what is trained in float32.

    Args:
        trainer: The Trainer.
        base: The base, and how it is loaded.
        trained: What is trained, in words.

    Raises:
        ValueError: The base is in half precision, and the Trainer's precision is ``32-true``.
    """
    if base.dtype != "float32" and str(trainer.precision) == "32-true":
        raise ValueError(
            f"the base is loaded in {base.dtype}, and {trained} are trained in float32: use --trainer.precision "
            "bf16-mixed, which computes in bfloat16"
        )


def check_loss(loss: Tensor, step: int, cure: str) -> None:
    """Refuse a loss that is not finite.

    Args:
        loss: The loss, a scalar.
        step: Optimizer steps done.
        cure: How to learn more slowly.

    Raises:
        ValueError: The loss is NaN or infinite.
    """
    if not loss.isfinite():
        raise ValueError(f"the loss of step {step} is {loss.item()}: {cure}; or {NOT_FINITE}")
