"""The Trainer's precision, which must not cast what is trained."""

from __future__ import annotations

from lightning.pytorch import Trainer

__all__ = ["check_precision"]


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
