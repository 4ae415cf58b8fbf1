"""Joint refit: all factors of a block fitted together to the block's output in the dense model."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_pl.methods.refit.block import BlockError, Curvature, Parts
from lowrank_pl.methods.refit.settings import Joint, JointMethod

__all__ = ["Fitted", "fit_jointly"]

_log = logging.getLogger(__name__)

_RIDGE = 1e-2
"""Added to the moments of the preconditioner, relative to the means of their diagonals."""

_METRIC_TOKENS = 8_192
"""About how many tokens the moments of the preconditioner come from, which cost more than a pass."""

_FRACTIONS = (1.0, 0.5, 0.25, 0.125)
"""Fractions of a Gauss-Newton step that are tried on held-back text."""


@dataclass(frozen=True)
class Fitted:
    """Result of a joint refit of one block.

    Args:
        values: Left and right factors of every layer, fitted to all text.
        before: Error on held-back text before the refit, of factors that were made without it.
        after: The least error on held-back text, of factors that were fitted without it.
        sweeps: Number of sweeps that it took; 0 if no sweep lowered the error, so that ``values`` are the first ones.
    """

    values: Parts
    before: float
    after: float
    sweeps: int


def fit_jointly(
    error: BlockError,
    settings: Joint,
    fit: Sequence[int],
    held: Sequence[int],
    *,
    unseen: Parts,
    seed: int,
    label: str,
) -> Fitted:
    """Return the factors of a block after a joint refit.

    A first fit, without the held-back text, decides on the number of sweeps, and on the fraction that is taken of each
    Gauss-Newton step. It starts from factors that have not seen that text either: those that have look better on it
    than any step away from them. A second fit does the same on all text.

    Args:
        error: The error of the block's output.
        settings: Method and effort.
        fit: Numbers of the batches to fit to.
        held: Numbers of the held-back batches.
        unseen: Left and right factors of every layer, made without the held-back text.
        seed: Seed of random numbers.
        label: Name of the block, for the progress bar.

    Raises:
        NotImplementedError: An operation of the block has no derivative that the method needs.
    """
    before = error.mean(unseen, held)
    if not 0 < before < math.inf:
        return Fitted(error.values, before, before, 0)
    make = _FITTERS[settings.method]
    everything = [*fit, *held]
    total = math.ceil(settings.passes_of_fit * (len(fit) + len(everything)))
    with tqdm(total=total, desc=label, unit="batch", leave=False) as bar:
        alone = make(error, unseen, settings, fit, seed, bar)
        best, taken = Fitted(error.values, before, before, 0), []
        for sweep in range(1, settings.most_sweeps + 1):
            trials = alone.sweep()
            errors = [error.mean(trial, held) for trial in trials]
            _log.debug("%s: sweep %d: held-back error %.4g, then %s", label, sweep, best.after, errors)
            taken.append(min(range(len(errors)), key=errors.__getitem__))
            alone.take(trials[taken[-1]])
            if errors[taken[-1]] < best.after:
                best = Fitted(alone.values, before, errors[taken[-1]], sweep)
            elif not alone.recovers:
                break
        if not best.sweeps:
            return best
        whole = make(error, error.values, settings, everything, seed, bar)
        for place in taken[: best.sweeps]:
            whole.take(whole.sweep()[place])
    # Nothing has judged the second fit yet, and the first one only beside what it started from.
    errors = [error.mean(values, everything) for values in (whole.values, best.values, error.values)]
    if errors[0] < errors[2]:
        return replace(best, values=whole.values)
    if errors[1] < errors[2]:
        _log.warning("%s: fitted to all text its error rises: the fit without held-back text is kept", label)
        return best
    _log.warning("%s: fitted to all text its error rises: the factors stay as they were", label)
    return Fitted(error.values, before, before, 0)


class _Fitter(ABC):
    """A fit of the factors of a block, sweep by sweep.

    Args:
        error: The error of the block's output.
        values: The factors to start from.
        settings: Method and effort.
        batches: Numbers of the batches to fit to.
        seed: Seed of random numbers.
        bar: Progress bar, which counts batches.

    Attributes:
        values: The present factors.
        recovers: Whether the error may fall after a sweep in which it rose.
    """

    recovers = False

    def __init__(
        self,
        error: BlockError,
        values: Parts,
        settings: Joint,
        batches: Sequence[int],
        seed: int,
        bar: tqdm[Any],
    ) -> None:
        self.error, self.values, self.settings, self.batches, self.seed = error, values, settings, batches, seed
        self.bar = bar
        self._start()

    @abstractmethod
    def _start(self) -> None:
        """Prepare the first sweep."""

    @abstractmethod
    def sweep(self) -> list[Parts]:
        """Return the factors that the next sweep may lead to."""

    def take(self, values: Parts) -> None:
        """Go on from ``values``, one of the last sweep's."""
        self.values = values


class _GaussNewton(_Fitter):
    """Damped Gauss-Newton steps (Levenberg-Marquardt).

    ``(G + damping K) step = -gradient`` is solved by conjugate gradients from zero. ``G`` is the Gauss-Newton matrix of
    all factors together, on a fraction of the batches that changes from step to step (as in Martens, ICML 2010): it is
    nearly that of all batches, and its products are what a step costs. ``K`` is its Kronecker-factored block-diagonal
    approximation, which also preconditions. In the metric of ``K`` both factors of a layer have the same scale, so that
    damping does not depend on how a weight is divided between them.
    """

    def _start(self) -> None:
        tokens = sum(self.error.models.batches[batch].numel() for batch in self.batches)
        some = self.batches[:: max(1, tokens // _METRIC_TOKENS)]
        self._next = 0
        self._metric = _Metric(self.values, self.error.curvature(self.values, some, seed=self.seed))

    def sweep(self) -> list[Parts]:
        """Return the factors after each fraction of the next step."""
        values, settings = self.values, self.settings
        gradient = self._sum(self.batches, lambda batch: self.error.gradient(values, batch))
        count = max(1, round(settings.curvature * len(self.batches)))
        some = [self.batches[(self._next + place) % len(self.batches)] for place in range(count)]
        self._next += count
        step = _solve(
            lambda direction: self._sum(some, lambda batch: self.error.gauss_newton_product(values, direction, batch)),
            gradient, self._metric, settings.damping, settings.iterations,
        )  # fmt: skip
        return [_added(values, step, fraction) for fraction in _FRACTIONS]

    def _sum(self, batches: Sequence[int], part: Callable[[int], Parts]) -> Parts:
        """Return the mean per token of what ``part`` returns for each of ``batches``."""
        total, tokens = [torch.zeros_like(value) for value in self.values], 0
        for batch in batches:
            total = _added(total, part(batch), 1.0)
            tokens += self.error.models.batches[batch].numel()
            self.bar.update()
        return [value / tokens for value in total]


class _Metric:
    """The Kronecker-factored, block-diagonal Gauss-Newton matrix of factors, and its inverse.

    Left factors have the blocks ``(R C R') x G`` and right factors ``C x (L' G L)``, where ``C`` and ``G`` are the
    moments of the layer's inputs and of the gradients at its outputs.
    """

    def __init__(self, values: Parts, curvature: Sequence[Curvature]) -> None:
        # For each factor: what multiplies it from the left and from the right.
        self._sides: list[tuple[Tensor, Tensor]] = []
        for place, moments in enumerate(curvature):
            left, right = values[2 * place : 2 * place + 2]
            self._sides += [
                (_cholesky(moments.outputs), _cholesky(right @ moments.inputs @ right.mT)),
                (_cholesky(left.mT @ moments.outputs @ left), _cholesky(moments.inputs)),
            ]

    def solve(self, parts: Parts) -> Parts:
        """Return the inverse times ``parts``."""
        return [
            torch.cholesky_solve(torch.cholesky_solve(part, left).mT, right).mT
            for part, (left, right) in zip(parts, self._sides, strict=True)
        ]


def _cholesky(moment: Tensor) -> Tensor:
    moment = moment.double()
    moment = (moment + moment.mT) / 2
    ridge = _RIDGE * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    root: Tensor = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), device=moment.device))
    return root.float()


def _solve(
    product: Callable[[Parts], Parts], gradient: Parts, metric: _Metric, damping: float, iterations: int
) -> Parts:
    """Return the step after ``iterations`` preconditioned conjugate gradients from zero.

    The preconditioner is also the damping matrix ``K``. So ``K`` times a direction follows from the recursion of the
    directions, and is never computed.
    """
    step = [torch.zeros_like(part) for part in gradient]
    residual = [-part for part in gradient]
    scaled = metric.solve(residual)
    direction, metric_direction = scaled, residual
    norm = _dot(residual, scaled)
    for number in range(iterations):
        curved = product(direction)
        image = _added(curved, metric_direction, damping)
        along = _dot(direction, image)
        if not (norm > 0 and along > 0 and math.isfinite(along)):
            break
        size = norm / along
        step, residual = _added(step, direction, size), _added(residual, image, -size)
        if number == iterations - 1:
            break
        scaled = metric.solve(residual)
        before, norm = norm, _dot(residual, scaled)
        direction = _added(scaled, direction, norm / before)
        metric_direction = _added(residual, metric_direction, norm / before)
    return step


def _dot(one: Parts, two: Parts) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(one, two, strict=True))


def _added(one: Parts, two: Parts, scale: float) -> Parts:
    return [torch.add(a, b, alpha=scale) for a, b in zip(one, two, strict=True)]


class _AdamW(_Fitter):
    """Passes of AdamW (arXiv 1711.05101) over all batches, in a new order each time.

    The learning rate is relative to the root mean square of each factor, and falls to zero as a cosine.
    """

    recovers = True

    def _start(self) -> None:
        settings = self.settings
        self._parameters = [value.clone() for value in self.values]
        sizes = [settings.learning_rate * value.square().mean().sqrt().item() for value in self.values]
        groups = [{"params": [value], "lr": size} for value, size in zip(self._parameters, sizes, strict=True)]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        steps = settings.most_sweeps * len(self.batches)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
        )
        self._order = torch.Generator().manual_seed(self.seed)

    def sweep(self) -> list[Parts]:
        """Return the factors after the next pass."""
        for place in torch.randperm(len(self.batches), generator=self._order).tolist():
            batch = self.batches[place]
            parts = self.error.gradient(self._parameters, batch)
            for value, part in zip(self._parameters, parts, strict=True):
                value.grad = part / self.error.models.batches[batch].numel()
            self._optimizer.step()
            self._schedule.step()
            self.bar.update()
        return [[value.clone() for value in self._parameters]]


_FITTERS: dict[JointMethod, type[_Fitter]] = {"gauss_newton": _GaussNewton, "adamw": _AdamW}
