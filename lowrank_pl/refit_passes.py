"""A dense model and its compressed twin run side by side, block by block; and which maps can be compared there."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_pl.evaluating import evaluating
from lowrank_pl.resume_forward import EnoughError, can_resume, ended, moved, resumed
from lowrank_pl.targets import Target, decoder_blocks, replaced

__all__ = ["Pair", "Place", "Twins", "survey"]

_log = logging.getLogger(__name__)
_ROUNDINGS = 4
"""How many roundings two sums may differ by that are taken for the same one."""
Pair = tuple[Tensor, Tensor]
"""The same tensor in the dense and in the compressed model."""
Receive = Callable[[int, Pair | None, Pair | None], None]


@dataclass(frozen=True)
class Place:
    """Where a map stands in its block.

    Args:
        every_token: Whether a pass calls it once and for every token, so that its inputs in two models can be compared.
        stream: Name of the module that is fed the stream which the map's output is then added to; None where the
            output is no plain summand of a stream.
    """

    every_token: bool = False
    stream: str | None = None


def survey(model: PreTrainedModel, targets: Sequence[Target], tokens: Tensor) -> dict[str, Place]:
    """Return where each of ``targets`` stands, found by one forward pass over ``tokens`` ``[windows, length]``.

    Nothing here knows a family by name. An output ``y`` is a summand of a stream where a module that runs before is fed
    ``s``, and a module that runs after, or the next block, is fed ``s + y``. So it is not where a norm or a factor
    comes between, nor where two outputs are added at once, as of attention and MLP side by side.
    """
    prefix, blocks = decoder_blocks(model)
    names = {target.name for target in targets}
    places: dict[str, Place] = dict.fromkeys(names, Place())
    with evaluating(model), ExitStack() as stack:
        for number, block in enumerate(blocks):
            log = _Log(tokens.numel())
            for inner, module in block.named_modules():
                name = f"{prefix}.{number}.{inner}".rstrip(".")
                stack.callback(module.register_forward_pre_hook(log.before(name), with_kwargs=True).remove)
                if name in names:
                    stack.callback(module.register_forward_hook(log.after(name)).remove)
            stack.callback(block.register_forward_hook(log.end(places)).remove)
        model(input_ids=tokens.to(model.device), use_cache=False)
    return places


@dataclass
class _Log:
    """What the modules of a block are fed, and what its maps return, in the order of the calls."""

    tokens: int
    fed: list[tuple[str, Tensor]] = field(default_factory=list)
    returned: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = _first(args, kwargs)
            if isinstance(value, Tensor):
                # Some blocks add to it in place later.
                self.fed.append((name, value.clone()))

        return hook

    def after(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.returned.append((name, len(self.fed), output.clone()))

        return hook

    def end(self, places: dict[str, Place]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last = output if isinstance(output, Tensor) else output[0]
            calls = Counter(name for name, _, _ in self.returned)
            for name, position, written in self.returned:
                if calls[name] == 1 and _tokens(written) == self.tokens:
                    later = [value for _, value in self.fed[position:]]
                    places[name] = Place(True, _stream(written, self.fed[:position], [*later, last]))
            # A pass over many blocks need not hold them all.
            self.fed.clear()
            self.returned.clear()

        return hook


def _stream(written: Tensor, earlier: Sequence[tuple[str, Tensor]], later: Sequence[Tensor]) -> str | None:
    """Return the first name among ``earlier`` whose tensor plus ``written`` is one of ``later``."""
    two = written.reshape(-1, written.shape[-1]).double()
    unit = _ROUNDINGS * torch.finfo(written.dtype).eps

    def is_sum(whole: Tensor, one: Tensor, two: Tensor) -> bool:
        return bool(((whole - one - two).abs() <= unit * (whole.abs() + one.abs() + two.abs())).all())

    alike = [(name, value.reshape(two.shape).double()) for name, value in earlier if _is_like(value, written)]
    wholes = [value.reshape(two.shape).double() for value in later if _is_like(value, written)]
    for name, one in alike:
        for whole in wholes:
            # What is lost in the rounding of the stream would be a summand of any.
            if is_sum(whole, one, two) and not is_sum(whole, one, torch.zeros_like(two)):
                return name
    return None


def _is_like(one: Tensor, two: Tensor) -> bool:
    return one.is_floating_point() and one.shape[-1:] == two.shape[-1:] and one.numel() == two.numel()


def _tokens(tensor: Tensor) -> int:
    return tensor.numel() // max(1, tensor.shape[-1])


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


class Twins:
    """A dense model and its compressed twin, run side by side over the same windows, block by block.

    There is one model: for a pass of the twin its low-rank layers stand in the places of the dense ones. Between
    blocks the hidden states of both wait, on a GPU that has room for them or on the CPU, so that a pass runs one block,
    and of that no more than what comes before the map that is asked about.

    Args:
        model: The dense model; left as it was.
        batches: ``[windows, length]`` token ids of every pass.

    Attributes:
        layers: Low-rank layers of the twin by the name of the map whose place they take; to be filled as they are made,
            those of earlier blocks before ``go_to``, others after it.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, list(batches)
        self.layers: dict[str, nn.Module] = {}
        self._resuming = can_resume(model, self.batches[0][:1, :32])
        if not self._resuming:
            _log.warning(
                "the blocks of %s share more than the hidden state: every pass runs all blocks up to the one it is for",
                type(model).__name__,
            )
        self._start = 0
        self._place = _resting_place(model, sum(batch.numel() for batch in self.batches))
        # Of the dense model and its twin in turn.
        self._hidden: list[Any] = []

    def go_to(self, block: int) -> None:
        """Let passes begin at ``block``, having run all that comes before it, through the layers that there are.

        Where blocks share more than the hidden state, every pass begins at the embeddings and this does nothing.
        """
        if not self._resuming or block == self._start:
            return
        last = decoder_blocks(self.model)[1][block - 1]
        found: list[Any] = []

        def keep(output: Any) -> None:
            found.append(moved(output, self._place))

        self._run(lambda stack: stack.enter_context(ended(self.model, last, keep)), lambda _: None)
        self._hidden, self._start = found, block
        # They are behind the hidden states now.
        self.layers.clear()

    def compare(self, name: str, stream: str | None, receive: Receive) -> None:
        """Give the inputs of map ``name`` in both models to ``receive``, batch by batch.

        Args:
            name: A map of the block that passes begin at; the twin has no layer for it yet.
            stream: The module that is fed the stream (``Place.stream``), or None if it is not asked for.
            receive: Is given the batch's number, the inputs, which are None where the map is not called for every token
                as an expert is not, and the streams.
        """
        seen: dict[str, list[Tensor]] = {}

        def keep(where: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # A stream may be written to in place, and what matters is what it was.
                seen.setdefault(where, []).append(_first(args, kwargs).clone())
                if where == name:
                    raise EnoughError

            return hook

        def watch(stack: ExitStack) -> None:
            for where in dict.fromkeys(filter(None, (stream, name))):
                module = self.model.get_submodule(where)
                stack.callback(module.register_forward_pre_hook(keep(where), with_kwargs=True).remove)

        def done(number: int) -> None:
            calls, streams = seen.get(name, []), seen.get(stream or "", [])
            whole = len(calls) == 2 and all(_tokens(value) == self.batches[number].numel() for value in calls)
            receive(number, (calls[0], calls[1]) if whole else None, (streams[0], streams[-1]) if streams else None)
            seen.clear()

        self._run(watch, done)

    def _run(self, watch: Callable[[ExitStack], Any], done: Callable[[int], None]) -> None:
        """Run the dense model over one batch and then its twin, both watched; so with all batches."""
        device = self.model.device
        states = (moved(state, device) for state in self._hidden)
        with evaluating(self.model), resumed(self.model, self._start, states):
            for number, batch in enumerate(self.batches):
                for layers in ({}, self.layers):
                    with replaced(self.model, layers), ExitStack() as stack, suppress(EnoughError):
                        watch(stack)
                        self.model(input_ids=batch.to(device), use_cache=False)
                done(number)


def _resting_place(model: PreTrainedModel, tokens: int) -> torch.device:
    """Return where hidden states of ``tokens`` tokens wait: moving them takes a GPU longer than what it computes."""
    device: torch.device = model.device
    if device.type == "cuda":
        width, size = model.get_input_embeddings().weight.shape[1], model.dtype.itemsize
        # Those of both models, and while a block is passed, in front of it and behind it.
        if 4 * tokens * width * size < torch.cuda.mem_get_info(device)[0] / 2:
            return device
    return torch.device("cpu")
