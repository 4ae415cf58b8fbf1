"""Forward passes that keep activations on the way, and backward passes that compute them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_pl.resume_forward import forward_replaced
from lowrank_pl.targets import decoder_blocks

__all__ = ["recompute_blocks", "recomputing", "refuse_dropout", "watched_forward"]


def watched_forward(
    model: PreTrainedModel, tokens: Tensor, places: Mapping[str, int | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits ``[batch, length, vocabulary]`` and the activations ``[batch, length, features]`` at ``places``.

    Args:
        model: A causal language model.
        tokens: ``[batch, length]``.
        places: By name, the number of a block whose output is kept, or ``None`` for the hidden state before the head.
    """
    blocks = decoder_blocks(model)[1]
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for place, block in places.items():
            watched = model.base_model if block is None else blocks[block]
            stack.enter_context(_keeping_output(watched, seen, place))
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits, seen


@contextmanager
def _keeping_output(module: nn.Module, seen: dict[str, Tensor], place: str) -> Iterator[None]:
    """Keep the first output of ``module`` under ``place`` while the block runs."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        seen[place] = output if isinstance(output, Tensor) else output[0]

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def recompute_blocks(model: PreTrainedModel) -> None:
    """Let the backward pass compute each block's activations again instead of keeping them, in train mode only."""
    # Later releases of transformers 5 warn of the name that the first ones have.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Let backward passes compute each block's activations again instead of keeping them, for a while, in any mode.

    What ``recompute_blocks`` asks of transformers works in train mode only, and lets gradients begin at the embeddings.
    """
    with ExitStack() as stack:
        for block in decoder_blocks(model)[1]:
            again = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(forward_replaced(block, again))
        yield


def refuse_dropout(model: nn.Module) -> None:
    """Refuse dropout, which train mode, and so gradient checkpointing, would switch on.

    Modules are asked, not the config: that of GPT-2 also names the dropout of heads that this model does not have.

    Raises:
        ValueError: The model has some; the message names where.
    """
    for name, module in model.named_modules():
        rates = {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
        if isinstance(module, nn.Dropout):
            rates["p"] = module.p
        active = [f"{name}.{key} = {rate}" for key, rate in rates.items() if rate > 0]
        if active:
            raise ValueError(
                f"the base has dropout ({active[0]}), which gradient checkpointing would switch on: "
                "set it to 0 in its config.json, or leave gradient_checkpointing off"
            )
