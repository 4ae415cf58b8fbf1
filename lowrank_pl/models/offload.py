"""Models that run on a device too small for them: weights stay in main memory and are sent one layer at a time."""

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
"""Sequences to score at once in a streamed model, which reads all of its weights in every pass."""


def too_large(weights: float, memory: float) -> bool:
    """Return whether a model and its compressed version do not fit into ``memory`` together.

    Args:
        weights: Bytes of the dense model's weights; the compressed model has fewer.
        memory: Bytes of memory.

    >>> too_large(16e9, 80e9), too_large(141e9, 80e9)
    (False, True)
    """
    return 2 * weights > memory


def exceeds_memory(weights: float, device: torch.device, *, ever: bool = False) -> bool:
    """Return whether a model and its compressed version are too large for ``device``; main memory always has room.

    Args:
        weights: Bytes of the dense model's weights.
        device: Device for both.
        ever: Compare with all memory of the device instead of its free memory.
    """
    if device.type != "cuda":
        return False
    if ever:
        return too_large(weights, torch.cuda.get_device_properties(device).total_memory)
    free = free_memory(device)
    return free is not None and too_large(weights, free)


@contextmanager
def streamed(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """Let ``model``, which lies in main memory, compute on ``device`` while the block runs, one layer at a time.

    Every pass reads all weights, so give it many tokens at once. Gradients would keep these weights: use it for passes
    without them. Do not replace modules inside the block.

    Args:
        model: A causal language model in main memory.
        device: Device to compute on; None changes nothing.

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
    # Codes of rounded layers are buffers.
    cpu_offload(model, device, offload_buffers=True)
    try:
        yield
    finally:
        remove_hook_from_submodules(model)
        # The hooks leave the forward method behind as an attribute, which a copy of the module would share.
        for module in model.modules():
            if module not in own:
                vars(module).pop("forward", None)
