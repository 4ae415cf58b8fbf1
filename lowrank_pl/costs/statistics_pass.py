"""The cost of the pass that measures statistics beside the frozen model's own forward and input-gradient step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.backward import differentiable
from lowrank_pl.calibration.gradients import measure_batch
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.calibration.weighted_moments import WeightedMoments
from lowrank_pl.costs.turns import frozen_step, timed_in_turns
from lowrank_pl.models.targets import find_targets

__all__ = ["measure_statistics"]


def measure_statistics(
    model: PreTrainedModel, sequences: Tensor, *, batch_size: int = 1, repeats: int = 5
) -> dict[str, Any]:
    """Return the seconds of the statistics pass and of the frozen model's step on the same sequences, and their ratio.

    The pass is that of a ``two_sided`` decomposition: forward and backward, with the weighted moments of the inputs and
    output gradients of every target. The frozen model's step is one forward pass and one backward pass to the input
    embeddings. Both take turns, and the fastest turn of each counts. CPU times and their ratio are those of all
    threads of this process, which other programs disturb less; they say nothing of a GPU.

    Args:
        model: The dense model.
        sequences: ``[sequences, length]`` token ids, which every turn goes through once.
        batch_size: Sequences in a pass.
        repeats: Turns of each, after one to warm up.
    """
    # Kept over all turns: memory that is touched for the first time would be a part of what is measured.
    passes = Passes(sequences, batch_size=batch_size)
    moments = {
        target.name: WeightedMoments.empty(target, passes, model.device) for target in find_targets(model).modules
    }

    def statistics() -> None:
        with differentiable(model, 0) as starts:
            for batch in passes.batches():
                measure_batch(model, starts, batch.to(model.device), moments, "sampled")

    def frozen() -> None:
        with differentiable(model, 0):
            for batch in torch.split(sequences, batch_size):
                frozen_step(model, batch.to(model.device))

    times = timed_in_turns(
        {"frozen": frozen, "statistics": statistics}, repeats=repeats, device=model.device, label="bench statistics"
    )
    return {
        "sequences": len(sequences),
        "length": sequences.shape[1],
        "batch_size": batch_size,
        **{f"{name}_seconds": time.seconds for name, time in times.items()},
        "ratio_to_frozen": times["statistics"].seconds / times["frozen"].seconds,
        **{f"{name}_cpu_seconds": time.cpu_seconds for name, time in times.items()},
        "cpu_ratio_to_frozen": times["statistics"].cpu_seconds / times["frozen"].cpu_seconds,
        **{f"{name}_peak_memory": time.peak_memory for name, time in times.items()},
    }
