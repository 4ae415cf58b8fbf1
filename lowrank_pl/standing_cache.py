"""A cache of keys and values that stands still, so that one step of decoding can be repeated as often as wished.

What is special: transformers' growing cache copies itself at every step, and its fixed one makes a copy of keys and
values for every query head; both would hide what a step spends on weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["StandingLayer", "standing_cache"]


def standing_cache(model: PreTrainedModel, tokens: Tensor) -> Cache:
    """Return a cache that holds all of ``tokens`` but the last, to be given together with that last one.

    Args:
        model: A decoder in evaluation mode.
        tokens: Token ids ``[batch, length]``, of equal rows: only the first row is read, the others are copies of it.

    Raises:
        ValueError: A layer of the model keeps something else than keys and values.

    >>> from lowrank_pl.tiny_models import tiny_model
    >>> model, tokens = tiny_model("llama"), torch.arange(6)[None]
    >>> with torch.inference_mode():
    ...     cache = standing_cache(model, tokens)
    ...     steps = [model(input_ids=tokens[:, -1:], past_key_values=cache).logits for _ in range(2)]
    ...     whole = model(input_ids=tokens).logits[:, -1:]
    >>> torch.equal(*steps), torch.allclose(steps[0], whole, atol=1e-5)
    (True, True)
    """
    read = model(input_ids=tokens[:1, :-1], use_cache=True, logits_to_keep=1).past_key_values
    return Cache(layers=[StandingLayer(layer, *tokens.shape) for layer in read.layers])


class StandingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of all tokens but the last, and a place for that one, which every step fills anew.

    Args:
        read: What one sequence of all tokens but the last left behind.
        batch_size: Copies of it.
        length: How many tokens there are with the last one; a sliding window keeps fewer of them.

    Raises:
        ValueError: It holds no keys and values.
    """

    def __init__(self, read: Any, batch_size: int, length: int) -> None:
        super().__init__()
        if not isinstance(read, DynamicLayer) or read.keys is None:
            raise ValueError(f"expected keys and values of every layer in the cache, got a {type(read).__name__}")
        self.keys, self.values = (
            torch.cat([part, part[:, :, -1:]], dim=2).repeat(batch_size, 1, 1, 1) for part in (read.keys, read.values)
        )
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_sliding, self.is_initialized = read.is_sliding, True
        self.length = length
        for part in (self.keys, self.values):
            # Or else torch.compile would not record the kernels that write to them.
            torch._dynamo.mark_static_address(part)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values of the last token in its place; return those of all."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        """Return how many tokens come before the last one."""
        return self.length - 1

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return how many tokens can be looked at, and how many came before these."""
        return self.keys.shape[-2], self.length - self.keys.shape[-2]
