"""A dense model and its compressed twin run side by side, block by block; and which maps can be compared there."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_pl.calibration.hidden_states import Cache, HiddenStates, cache_for
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.forward import forward_from, forward_from_is_exact, forward_until, move_output
from lowrank_pl.models.targets import Target, decoder_blocks, dense_weight, first_argument, replaced

__all__ = ["ModelPair", "Pair", "Place", "survey"]

_log = logging.getLogger(__name__)


_ROUNDINGS = 4
"""How many roundings two sums may differ by that are taken for the same one."""


Pair = tuple[Tensor, Tensor]
"""The same tensor in the dense and in the compressed model."""


Receive = Callable[[int, Pair | None, Pair | None], None]


Seen = dict[str, list[Tensor]]
"""What modules were fed in one pass, one a call."""


Done = Callable[[int, Seen], None]


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
    """Return where each of ``targets`` stands, found by one forward pass over ``tokens`` ``[sequences, length]``.

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
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    returned: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first_argument(args, kwargs)
            if isinstance(value, Tensor):
                # Some blocks add to it in place later.
                self.inputs.append((name, value.clone()))

        return hook

    def after(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.returned.append((name, len(self.inputs), output.clone()))

        return hook

    def end(self, places: dict[str, Place]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last = output if isinstance(output, Tensor) else output[0]
            calls = Counter(name for name, _, _ in self.returned)
            for name, position, written in self.returned:
                if calls[name] == 1 and _tokens(written) == self.tokens:
                    later = [value for _, value in self.inputs[position:]]
                    places[name] = Place(True, _stream(written, self.inputs[:position], [*later, last]))
            # A pass over many blocks need not hold them all.
            self.inputs.clear()
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


class ModelPair:
    """A dense model and its compressed twin, run over the same sequences, block by block.

    There is one model: for passes of the twin its low-rank layers stand in the places of the dense ones. The dense
    model runs each block once, and what its maps are fed there waits for the twin. The twin runs a block again for
    every map that is asked about, since the layers before it have changed, but no more than what comes before that map.

    Args:
        model: The dense model; left as it was.
        batches: ``[sequences, length]`` token ids of every pass.

    Attributes:
        layers: Low-rank layers of the twin by the name of the map whose place they take; to be filled as they are made,
            those of earlier blocks before ``go_to``, others after it.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, list(batches)
        self.layers: dict[str, nn.Module] = {}
        self._resuming = forward_from_is_exact(model, self.batches[0][:1, :32])
        if not self._resuming:
            _log.warning(
                "the blocks of %s share more than the hidden state: every pass runs all blocks up to the one it is for",
                type(model).__name__,
            )
        # Sequences before each batch, and all of them.
        self._firsts = list(accumulate(map(len, self.batches), initial=0))
        self._tokens = sum(batch.numel() for batch in self.batches)
        # The dense model is behind a block when its twin is before it.
        self._dense, self._twin = (_Course(0, [None] * len(self.batches)) for _ in range(2))
        self._place = _resting_place(model, 2 * self._tokens * _width(model, None) * model.dtype.itemsize)
        self._streams: Mapping[str, str | None] = {}
        self._fed: dict[str, HiddenStates] = {}
        self._rooms: dict[int, list[HiddenStates]] = {}
        self._not_once: set[str] = set()

    def go_to(self, block: int, maps: Mapping[str, str | None]) -> None:
        """Let passes be about ``block``, having run all that comes before it, through the layers that there are.

        Args:
            block: Number of the block.
            maps: Those of its maps that are to be compared, each with the module that is fed the stream
                (``Place.stream``), or None if it is not asked for.
        """
        if self._resuming and block > self._twin.start:
            self._advance(self._twin, block, self.layers)
            # They are behind the hidden states now.
            self.layers.clear()
        self._streams, self._fed, self._not_once = maps, self._waiting(maps), set()

        def write(number: int, seen: Seen) -> None:
            batch = self.batches[number]
            for name, calls in seen.items():
                if len(calls) != 1 or _tokens(calls[0]) != batch.numel():
                    self._not_once.add(name)
                else:
                    self._fed[name].write(self._firsts[number], calls[0].reshape(len(batch), -1, calls[0].shape[-1]))

        self._advance(self._dense, block + 1, {}, list(self._fed), write)

    def compare(self, name: str, receive: Receive) -> None:
        """Give the inputs of map ``name`` in both models to ``receive``, batch by batch.

        Args:
            name: A map of those given to ``go_to``; the twin has no layer for it yet.
            receive: Is given the batch's number, the inputs, which are None where the map is not called for every token
                as an expert is not, and the streams.
        """
        stream = self._streams[name]

        def pair(number: int, where: str, seen: Seen) -> Pair | None:
            batch, calls = self.batches[number], seen[where]
            if where in self._not_once or len(calls) != 1 or _tokens(calls[0]) != batch.numel():
                return None
            dense = self._fed[where].read(self._firsts[number], len(batch))
            return dense.to(self.model.device).reshape(calls[0].shape), calls[0]

        def done(number: int, seen: Seen) -> None:
            receive(number, pair(number, name, seen), None if stream is None else pair(number, stream, seen))

        module = self.model.get_submodule(name)
        watched = list(dict.fromkeys(filter(None, (stream, name))))
        self._run(self._twin, self.layers, watched, done, lambda _: forward_until(self.model, module, before=True))

    def _advance(
        self,
        course: _Course,
        block: int,
        layers: Mapping[str, nn.Module],
        watched: Sequence[str] = (),
        done: Done = lambda *_: None,
    ) -> None:
        """Run what ``course`` is of up to ``block``, and have it begin there from then on."""
        last = decoder_blocks(self.model)[1][block - 1]

        def end(number: int) -> AbstractContextManager[None]:
            def keep(output: Any) -> None:
                # What this pass began with is not needed any more.
                course.states[number] = move_output(output, self._place) if self._resuming else None

            return forward_until(self.model, last, keep)

        self._run(course, layers, watched, done, end)
        course.start = block if self._resuming else 0

    def _run(
        self,
        course: _Course,
        layers: Mapping[str, nn.Module],
        watched: Sequence[str],
        done: Done,
        end: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        """Run the model with ``layers`` over all batches and tell ``done`` what the modules ``watched`` were fed."""
        device = self.model.device
        states = (move_output(state, device) for state in course.states)
        with evaluating(self.model), replaced(self.model, layers), forward_from(self.model, course.start, states):
            for number, batch in enumerate(self.batches):
                seen: Seen = {name: [] for name in watched}
                with ExitStack() as stack:
                    for name, calls in seen.items():
                        hook = self.model.get_submodule(name).register_forward_pre_hook(_keep(calls), with_kwargs=True)
                        stack.callback(hook.remove)
                    stack.enter_context(end(number))
                    self.model(input_ids=batch.to(device), use_cache=False)
                done(number, seen)

    def _waiting(self, maps: Mapping[str, str | None]) -> dict[str, HiddenStates]:
        """Return where what ``maps`` and the modules of their streams are fed waits, there or on disk for want of room.

        Blocks are alike, and what one was fed is written over what the one before was.
        """
        wanted: dict[int, list[str]] = {}
        for name in dict.fromkeys(filter(None, (*maps, *maps.values()))):
            wanted.setdefault(_width(self.model, name if name in maps else None), []).append(name)
        rooms = {width: self._rooms.get(width, [])[: len(names)] for width, names in wanted.items()}
        self._rooms = rooms
        missing = {width: len(names) - len(rooms[width]) for width, names in wanted.items()}
        size = sum(width * count for width, count in missing.items()) * self._tokens * self.model.dtype.itemsize
        place = _resting_place(self.model, size)
        cache: Cache = cache_for(size) if place.type == "cpu" else "ram"
        if cache == "disk":
            _log.info("what the maps of a block are fed waits on disk, for want of room: %.2f GB", size / 1e9)
        for width, count in missing.items():
            rooms[width] += [HiddenStates(self._firsts[-1], cache=cache, device=place) for _ in range(count)]
        pairs = [zip(names, rooms[width], strict=True) for width, names in wanted.items()]
        return dict(chain.from_iterable(pairs))


@dataclass
class _Course:
    """How far a model has been run: the block that passes begin at, and for each what the block before returned."""

    start: int
    states: list[Any]


def _keep(calls: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A stream may be written to in place, and what matters is what it was.
        calls.append(first_argument(args, kwargs).clone())

    return hook


def _width(model: PreTrainedModel, name: str | None) -> int:
    """Return how many values a token has in what the map ``name`` is fed, or in the hidden state."""
    weight = model.get_input_embeddings().weight if name is None else dense_weight(model.get_submodule(name))
    return int(weight.shape[1])


def _resting_place(model: PreTrainedModel, size: int) -> torch.device:
    """Return where ``size`` bytes wait for passes: moving them takes a GPU longer than what it computes."""
    device: torch.device = model.device
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
        return device
    return torch.device("cpu")
