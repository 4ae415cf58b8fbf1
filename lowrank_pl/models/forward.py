"""Forward passes of a part of the model, with intermediate activations, or with activation checkpointing."""

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
from lowrank_pl.models.targets import body_of, decoder_blocks

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
    """Stops a forward pass whose remaining outputs are not needed."""


@contextmanager
def forward_from(model: PreTrainedModel, block: int, outputs: Iterable[Any]) -> Iterator[None]:
    """Let forward passes of ``model`` begin at ``block``.

    Pass number ``i`` takes ``outputs[i]`` as the output of the block before. Embeddings, masks and positions are still
    computed; earlier blocks compute nothing. The result is exact if blocks depend on earlier blocks through the hidden
    state only; see ``forward_from_is_exact``.

    Args:
        model: A causal language model.
        block: Index of the first block that runs.
        outputs: Outputs of block ``block - 1``, one a pass, as ``block_outputs`` returns them; not used for block 0.
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
            replacement = first if number == 0 else last if number == block - 1 else later
            stack.enter_context(forward_replaced(blocks[number], replacement))
        yield


@contextmanager
def forward_until(
    model: PreTrainedModel,
    module: nn.Module,
    receive: Callable[[Any], None] = lambda _: None,
    *,
    before: bool = False,
) -> Iterator[None]:
    """Let forward passes of ``model`` stop after ``module`` has run, and return nothing.

    Args:
        model: A causal language model.
        module: A part of the model, such as a decoder block, or ``body_of(model)`` for all but the head.
        receive: Called with the output of ``module``, once a pass.
        before: Stop just before ``module`` runs. Hooks set earlier still see its inputs, and ``receive`` is not called.
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
    """Return the output of ``block`` in each pass over ``sequences``.

    Args:
        model: A causal language model; the passes run in evaluation mode.
        sequences: ``[sequences, length]`` token ids.
        block: Index of the block.
        batch_size: Sequences per pass.
        start: Index of the block to begin at, if the outputs of the block before it are known.
        outputs: The outputs of block ``start - 1``, one a pass.
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
    """Tell whether passes that begin at a later block give exactly the logits of whole passes, for every block.

    They do not if blocks share more than the hidden state, such as keys and values of earlier blocks.

    Args:
        model: A causal language model.
        sequences: ``[sequences, length]`` token ids for the trial; a few short sequences are enough.
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
def forward_replaced(module: nn.Module, replacement: Any) -> Iterator[None]:
    """Replace the forward method of ``module`` by ``replacement`` while the block runs."""
    # The module itself stays: the loop over blocks may read its attributes, and others may hold references to it.
    own = vars(module).get("forward")
    module.forward = replacement
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def clone_output(output: Any) -> Any:
    """Return the output of a block, a tensor or a tuple that begins with one, with all tensors cloned."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(clone_output(part) if isinstance(part, Tensor) else part for part in output)


def move_output(output: Any, device: torch.device) -> Any:
    """Return the output of a block, a tensor or a tuple that begins with one, with all tensors on ``device``."""
    if isinstance(output, Tensor):
        return output.to(device)
    return type(output)(part.to(device) if isinstance(part, Tensor) else part for part in output)


def forward_with_activations(
    model: PreTrainedModel, tokens: Tensor, places: Mapping[str, int | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits ``[batch, length, vocabulary]`` and activations ``[batch, length, features]`` by name.

    Args:
        model: A causal language model.
        tokens: ``[batch, length]`` token ids.
        places: Index of the block whose output to return, by name; ``None`` stands for the hidden state before the
            head.
    """
    blocks = decoder_blocks(model)[1]
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for place, block in places.items():
            watched = body_of(model) if block is None else blocks[block]
            stack.enter_context(_keeping_output(watched, seen, place))
        logits = model(input_ids=tokens, use_cache=False).logits
    return logits, seen


@contextmanager
def _keeping_output(module: nn.Module, seen: dict[str, Tensor], place: str) -> Iterator[None]:
    """Store the first output of ``module`` in ``seen`` under ``place`` while the block runs."""

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        seen[place] = output if isinstance(output, Tensor) else output[0]

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Let the backward pass recompute each block's activations instead of keeping them, in train mode only."""
    # Later releases of transformers 5 deprecate the name that the first ones have.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextmanager
def activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Let backward passes recompute each block's activations instead of keeping them while the block runs, in any mode.

    ``enable_activation_checkpointing`` works in train mode only, and lets gradients begin at the embeddings.
    """
    with ExitStack() as stack:
        for block in decoder_blocks(model)[1]:
            again = partial(checkpoint, block.forward, use_reentrant=False)
            stack.enter_context(forward_replaced(block, again))
        yield


def refuse_dropout(model: nn.Module) -> None:
    """Refuse a model with dropout: gradient checkpointing needs train mode, which would enable it.

    Modules are checked, not the config: GPT-2's config also names the dropout of heads that the model does not have.

    Raises:
        ValueError: The model has dropout; the message names the module.
    """
    for name, module in model.named_modules():
        rates = {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
        if isinstance(module, nn.Dropout):
            rates["p"] = module.p
        active = [f"{name}.{key} = {rate}" for key, rate in rates.items() if rate > 0]
        if active:
            raise ValueError(
                f"the base has dropout ({active[0]}), which gradient checkpointing would enable: "
                "set it to 0 in its config.json, or leave gradient_checkpointing off"
            )
