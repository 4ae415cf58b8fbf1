"""What a statistics pass costs beside a frozen forward and backward pass on the same sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.backward import differentiable, loss_gradient
from lowrank_pl.calibration.gradients import measure_batch
from lowrank_pl.calibration.measures import Batch, GradientMeasure, Passes
from lowrank_pl.calibration.weighted_moments import WeightedMoments
from lowrank_pl.models.targets import Target

__all__ = ["PassTimes", "Seconds", "time_statistics_pass"]


@dataclass(frozen=True)
class Seconds:
    """How long a pass over one batch took.

    Args:
        wall: By the clock.
        process: CPU time of all threads of this process, which other programs disturb less.
    """

    wall: float
    process: float


@dataclass(frozen=True)
class PassTimes:
    """Times of statistics passes and of frozen passes, one of each per batch.

    Args:
        statistics: Forward and backward pass with all sums.
        frozen: Forward and backward pass alone.
    """

    statistics: tuple[Seconds, ...]
    frozen: tuple[Seconds, ...]

    @property
    def ratio(self) -> float:
        """Time of the fastest statistics pass over that of the fastest frozen pass."""
        return min(one.wall for one in self.statistics) / min(one.wall for one in self.frozen)

    @property
    def process_ratio(self) -> float:
        """CPU time of all statistics passes over that of all frozen passes."""
        return sum(one.process for one in self.statistics) / sum(one.process for one in self.frozen)


def time_statistics_pass(
    model: PreTrainedModel,
    targets: Sequence[Target],
    sequences: Tensor,
    *,
    kind: type[GradientMeasure] = WeightedMoments,
    batch_size: int = 1,
) -> PassTimes:
    """Return the times of statistics passes and of frozen passes that take turns, after one of each to warm up.

    A frozen pass computes the loss and its gradient by the input of the first block, while all parameters are frozen.
    Nothing is written to disk.

    Args:
        model: The dense model.
        targets: The linear layers to measure.
        sequences: ``[sequences, length]`` token ids.
        kind: What to measure; by default the statistics of ``two_sided``.
        batch_size: Sequences per pass.
    """
    device = next(model.parameters()).device
    passes = Passes(sequences, batch_size)
    measures = {target.name: kind.empty(target, passes, device) for target in targets}
    batches = [batch.to(device) for batch in passes.batches()]
    statistics, frozen = [], []
    with differentiable(model, 0):
        for batch in [batches[0], *batches]:
            frozen.append(_timed(partial(_frozen_pass, model, batch), device))
            step = partial(measure_batch, model, batch, measures, kind.labels("sampled"), passes.seed)
            statistics.append(_timed(step, device))
    return PassTimes(tuple(statistics[1:]), tuple(frozen[1:]))


def _frozen_pass(model: PreTrainedModel, batch: Batch) -> None:
    """Run the loss forward, and backward to the input of the first block."""
    starts: list[Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, output: starts.append(output))
    try:
        logits = model(input_ids=batch.tokens, use_cache=False).logits
    finally:
        handle.remove()
    torch.autograd.grad(loss_gradient(logits, batch, "text", 0)[0], starts)


def _timed(work: Callable[[], None], device: torch.device) -> Seconds:
    wall, process = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - process)
