"""Forward passes that begin at a later decoder block, with what came before it, or end at an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lowrank_pl.models.eval_mode import evaluating, input_device
from lowrank_pl.models.targets import decoder_blocks

__all__ = [
    "activation_checkpointing",
    "block_outputs",
    "clone_output",
    "enable_activation_checkpointing",
    "forward_from",
    "forward_from_is_exact",
    "forward_replaced",
    "forward_until",
    "forward_with_activations",
    "move_output",
    "refuse_dropout",
]


class _ForwardStoppedError(Exception):
    """Ends a forward pass of whose rest nobody wants to know."""


@contextmanager
def forward_from(model: PreTrainedModel, block: int, outputs: Iterable[Any]) -> Iterator[None]:
    """Let forward passes of ``model`` begin at ``block``: pass number ``i`` takes ``outputs[i]`` of the block before.

    Embeddings, masks and positions are still computed; the blocks before compute nothing. Exact where a block looks at
    nothing of earlier blocks but the hidden state, see ``forward_from_is_exact``.

    Args:
        model: A causal language model.
        block: Number of the first block that runs.
        outputs: What block ``block - 1`` returned, one a pass (``block_outputs``); unused for block 0.
    """
    blocks = decoder_blocks(model)[1]
    passes = iter(outputs)
    current: list[Any] = [None]

    def first(*_: Any, **__: Any) -> Any:
        current[0] = next(passes)
        # Some blocks add to their input in place.
        return clone_output(current[0]) if block == 1 else current[0]

    def later(*_: Any, **__: Any) -> Any:
        return current[0]

    def last(*_: Any, **__: Any) -> Any:
        return clone_output(current[0])

    with ExitStack() as stack:
        for number in range(block):
            stand_in = first if number == 0 else last if number == block - 1 else later
            stack.enter_context(forward_replaced(blocks[number], stand_in))
        yield


@contextmanager
def forward_until(
    model: PreTrainedModel,
    module: nn.Module,
    receive: Callable[[Any], None] = lambda _: None,
    *,
    before: bool = False,
) -> Iterator[None]:
    """Let forward passes of ``model`` end when ``module`` has run, and return nothing.

    Args:
        model: A causal language model.
        module: A part of it, such as a decoder block, or ``model.base_model`` for all but the head.
        receive: Is given what it returned, once a pass.
        before: End when it is about to run; hooks that were set before this one still see its inputs, and nothing is
            received.
    """
    whole = model.forward

    def part(*args: Any, **kwargs: Any) -> None:
        with suppress(_ForwardStoppedError):
            whole(*args, **kwargs)

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        receive(output)
        raise _ForwardStoppedError

    def stop_before(_: nn.Module, __: Any) -> None:
        raise _ForwardStoppedError

    with ExitStack() as stack:
        stack.enter_context(forward_replaced(model, part))
        handle = module.register_forward_pre_hook(stop_before) if before else module.register_forward_hook(stop)
        stack.callback(handle.remove)
        yield


def block_outputs(
    model: PreTrainedModel,
    sequences: Tensor,
    block: int,
    *,
    batch_size: int,
    start: int = 0,
    outputs: Sequence[Any] = (),
) -> list[Any]:
    """Return what ``block`` returns in each pass over ``sequences``.

    Args:
        model: A causal language model; in evaluation mode meanwhile.
        sequences: ``[sequences, length]`` token ids.
        block: Whose output.
        batch_size: Sequences per pass.
        start: Block to begin at, where ``outputs`` of the one before it are known.
        outputs: As in ``forward_from``.
    """
    found: list[Any] = []
    handle = decoder_blocks(model)[1][block].register_forward_hook(
        lambda _, __, output: found.append(clone_output(output))
    )
    device = input_device(model)
    try:
        with evaluating(model), forward_from(model, start, outputs):
            for batch in torch.split(sequences, batch_size):
                model(input_ids=batch.to(device), use_cache=False)
    finally:
        handle.remove()
    return found


def forward_from_is_exact(model: PreTrainedModel, sequences: Tensor) -> bool:
    """Tell whether passes that begin at any block give the very logits of whole passes.

    They do not where blocks share more than the hidden state, such as keys and values of earlier blocks.

    Args:
        model: A causal language model.
        sequences: ``[sequences, length]`` token ids to try it on; a few short ones are enough.
    """
    device = input_device(model)
    with evaluating(model):
        whole = model(input_ids=sequences.to(device), use_cache=False).logits
        for block in range(1, len(decoder_blocks(model)[1])):
            outputs = block_outputs(model, sequences, block - 1, batch_size=len(sequences))
            if len(outputs) != 1:
                return False
            with forward_from(model, block, outputs):
                if not torch.equal(model(input_ids=sequences.to(device), use_cache=False).logits, whole):
                    return False
    return True


@contextmanager
def forward_replaced(module: nn.Module, stand_in: Any) -> Iterator[None]:
    """Let ``stand_in`` be called in the place of what ``module`` computes, for a while."""
    # Not the module: the loop over blocks may read attributes of theirs, and others may hold references.
    own = vars(module).get("forward")
    module.forward = stand_in
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def clone_output(output: Any) -> Any:
    """Return the output of a block, a tensor or a tuple that begins with one, with tensors of its own."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(clone_output(part) if isinstance(part, Tensor) else part for part in output)


def move_output(output: Any, device: torch.device) -> Any:
    """Return the output of a block, a tensor or a tuple that begins with one, on ``device``."""
    if isinstance(output, Tensor):
        return output.to(device)
    return type(output)(part.to(device) if isinstance(part, Tensor) else part for part in output)


def forward_with_activations(
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


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Let the backward pass compute each block's activations again instead of keeping them, in train mode only."""
    # Later releases of transformers 5 warn of the name that the first ones have.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Let backward passes compute each block's activations again instead of keeping them, for a while, in any mode.

    What ``enable_activation_checkpointing`` asks of transformers works in train mode only, and lets gradients begin at the embeddings.
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
