"""How the target fraction of parameters, and the step size, change while ranks are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowrank_pl.plans.budget import check_keep

__all__ = ["KeepSchedule", "half_cosine"]


@dataclass(frozen=True)
class KeepSchedule:
    """The target fraction to keep in each step: constant, or on a line from ``start`` to ``keep``.

    Args:
        keep: The last target.
        start: The first target; needs ``steps``.
        steps: Optimizer steps from ``start`` to ``keep``.
        falling: Whether the target has to fall.

    Raises:
        ValueError: A fraction outside (0, 1], only one of ``start`` and ``steps``, or a target that has to fall and
            does not.

    Example:
        >>> schedule = KeepSchedule(0.5, start=0.9, steps=4)
        >>> [round(schedule.at(step), 2) for step in (0, 1, 4, 100)]
        [0.9, 0.8, 0.5, 0.5]
    """

    keep: float
    start: float | None = None
    steps: int = 0
    falling: bool = False

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if (self.start is None) != (self.steps == 0) or self.steps < 0:
            raise ValueError(f"start.keep is {self.start} and start.steps {self.steps}: a schedule needs both")
        if self.start is not None:
            check_keep(self.start)
        if self.falling and (self.start is None or self.start <= self.keep):
            raise ValueError(f"start.record_order needs a start.keep above keep: they are {self.start} and {self.keep}")

    def at(self, step: int) -> float:
        """Return the target fraction after ``step`` optimizer steps."""
        if self.start is None:
            return self.keep
        return self.start + min(1.0, step / self.steps) * (self.keep - self.start)


def half_cosine(optimizer: Optimizer, *, steps: float) -> LambdaLR:
    """Return a schedule in which the step size falls to 0 along half a cosine, and stays there.

    ``CosineAnnealingLR`` would rise again after its end, and a resumed one keeps the end of the run that it began in.

    Args:
        optimizer: The optimizer whose step size is scheduled.
        steps: Optimizer steps until the step size is 0; infinite in a run without an end.

    Raises:
        ValueError: The run has no end.
    """
    if steps == math.inf:
        raise ValueError("a step size along a cosine needs a run with an end: give the trainer max_steps or max_epochs")
    return LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2)
