"""Models that run on a device without room for them: weights wait in main memory and come a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedModel

from lowrank_pl.utils.environment import free_memory

__all__ = ["STREAMED_BATCH_SIZE", "exceeds_memory", "streamed", "too_large"]

STREAMED_BATCH_SIZE = 4
"""Windows to score at once in a model that is streamed, whose weights are read anew in every pass."""


def too_large(weights: float, memory: float) -> bool:
    """Return whether a model and what it is compressed to don't both fit the ``memory`` of a device.

    Args:
        weights: Bytes of the dense model; the compressed one has fewer.
        memory: Bytes of the device.

    >>> too_large(16e9, 80e9), too_large(141e9, 80e9)
    (False, True)
    """
    return 2 * weights > memory


def exceeds_memory(weights: float, device: torch.device, *, ever: bool = False) -> bool:
    """Return whether a model of so many bytes is too large for ``device``; main memory is taken to have room.

    Args:
        weights: Bytes of the dense model.
        device: Where it, and what it is compressed to, would lie.
        ever: Whether to ask what there were room for if nothing else lay there.
    """
    if device.type != "cuda":
        return False
    if ever:
        return too_large(weights, torch.cuda.get_device_properties(device).total_memory)
    free = free_memory(device)
    return free is not None and too_large(weights, free)


@contextmanager
def streamed(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """Let ``model``, which lies in main memory, compute on ``device`` for a while, with one layer's weights there.

    Every pass reads all weights: give it many tokens at once. For passes without gradients, which would keep what was
    read. Modules are not to be replaced meanwhile.

    Args:
        model: A causal language model.
        device: Where it computes; None changes nothing.

    Example:
        >>> from lowrank_pl.evaluate.likelihood import perplexity
        >>> from lowrank_pl.models.tiny import tiny_model
        >>> model, sequences = tiny_model("llama"), torch.arange(64).view(4, 16)
        >>> whole = perplexity(model, sequences)
        >>> with streamed(model, torch.device("cpu")):
        ...     print(model.lm_head.weight.device, perplexity(model, sequences).nats == whole.nats)
        meta True
        >>> model.lm_head.weight.device.type
        'cpu'
    """
    if device is None:
        yield
        return
    own = {module for module in model.modules() if "forward" in vars(module)}
    cpu_offload(model, device)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)
        # Hooks leave the method behind as an attribute, which a copy of the module would take for its own.
        for module in model.modules():
            if module not in own:
                vars(module).pop("forward", None)
