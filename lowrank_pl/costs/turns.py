"""Actions that are timed in turns, and the frozen model's step that other passes are compared with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.methods.masks.objectives import next_token_loss
from lowrank_pl.utils.environment import peak_memory, reset_peak_memory, timed

__all__ = ["Timing", "frozen_step", "timed_in_turns"]


@dataclass(frozen=True)
class Timing:
    """What turns of one action took.

    Attributes:
        seconds: The fastest turn, by the clock.
        cpu_seconds: The turn of least CPU time of all threads of this process; other programs disturb it less.
        peak_memory: The most bytes that were in use during the first turn.
    """

    seconds: float
    cpu_seconds: float
    peak_memory: int


def timed_in_turns(
    actions: Mapping[str, Callable[[], None]], *, repeats: int, device: torch.device, label: str
) -> dict[str, Timing]:
    """Return the timing of each action. Actions take turns, so that all meet the same disturbances.

    Args:
        actions: The actions by name.
        repeats: Turns of each that count, after one to warm up.
        device: Where they compute.
        label: Label of the progress bar.
    """
    found: dict[str, Timing] = {}
    with tqdm(total=(repeats + 1) * len(actions), desc=label, unit="turn") as bar:
        for turn in range(repeats + 1):
            for name, action in actions.items():
                reset_peak_memory(device)
                began = time.process_time()
                _, seconds = timed(action, device)
                cpu_seconds = time.process_time() - began
                if turn:
                    old = found[name]
                    found[name] = replace(
                        old, seconds=min(old.seconds, seconds), cpu_seconds=min(old.cpu_seconds, cpu_seconds)
                    )
                else:
                    found[name] = Timing(math.inf, math.inf, peak_memory(device))
                bar.update()
    return found


def frozen_step(model: PreTrainedModel, tokens: Tensor) -> None:
    """Run ``tokens`` ``[batch, length]`` forward, and backward to the input embeddings; no weight gets a gradient."""
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    next_token_loss(logits, tokens).backward()  # type: ignore[no-untyped-call]
