"""How a compressed model is trained to be like its dense model again: what users choose, importable without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

__all__ = ["Healing", "Lora"]


@dataclass(frozen=True)
class Lora:
    """The LoRA adapter (arXiv 2106.09685) that is trained on a compressed model.

    Args:
        rank: Rank of the adapter of every layer.
        alpha: Scale of the adapter; its output is multiplied by ``alpha / rank``.
        targets: Names of the adapted layers or ends of them, such as ``q_proj``; by default all linear layers but the
            head.
        rslora: Multiply by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732), for high ranks.

    Raises:
        ValueError: ``rank`` or ``alpha`` is not positive.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"lora.rank is {self.rank} and lora.alpha {self.alpha}: expected a rank of at least 1 and an alpha "
                "above 0"
            )


@dataclass(frozen=True)
class Healing:
    """What is trained, and for how long.

    Args:
        tokens: Token budget; the number of optimizer steps follows from it and the batch.
        train: ``factors`` trains the low-rank layers themselves; ``lora`` trains an adapter on the compressed model,
            whose own weights stay as they are.
        lr: Highest learning rate of AdamW.
        warmup: Fraction of the steps in which the learning rate rises to ``lr``, before it falls to 0 along half a
            cosine.
        weight_decay: Weight decay of AdamW.
        lora: The adapter, for ``train: lora``.

    Raises:
        ValueError: A number is out of range, or ``train`` is ``lora`` and PEFT is not installed.

    Example:
        >>> Healing(tokens=50_000).learning_rate(0, 100) < Healing(tokens=50_000).learning_rate(4, 100)
        True
    """

    tokens: int
    train: Literal["factors", "lora"] = "factors"
    lr: float = 3e-5
    warmup: float = 0.05
    weight_decay: float = 0.0
    lora: Lora = Lora()

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}: expected a number of tokens to train on, such as 1000000")
        if self.train not in ("factors", "lora"):
            raise ValueError(f"train is {self.train!r}: expected factors or lora")
        if not self.lr > 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr is {self.lr} and weight_decay {self.weight_decay}: expected a rate above 0 and a decay of at "
                "least 0"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}: expected a fraction of the steps, from 0 to below 1")
        if self.train == "lora" and find_spec("peft") is None:
            raise ValueError("train is lora, and PEFT is not installed: pip install peft, or use train: factors")

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of ``step``, counted from 0, of a run of ``steps`` optimizer steps."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        return self.lr * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2

    def steps(self, batch_tokens: int, *, accumulated: int = 1, epoch: int | None = None) -> int:
        """Return the number of optimizer steps.

        Args:
            batch_tokens: Tokens of one batch, of all processes together.
            accumulated: Batches of one step.
            epoch: Batches of an epoch. Its last step has the batches that are left; by default it never ends.

        Raises:
            ValueError: The budget does not reach for one step.
        """
        batches = self.tokens // batch_tokens
        epochs, rest = divmod(batches, epoch) if epoch else (0, batches)
        steps = rest // accumulated + (epochs * -(-epoch // accumulated) if epoch else 0)
        if not steps:
            needed = min(accumulated, epoch or accumulated) * batch_tokens
            raise ValueError(
                f"the budget of {self.tokens:,} tokens is below the {needed:,} tokens of one optimizer step: "
                "give more tokens, or a smaller batch or length"
            )
        return steps
