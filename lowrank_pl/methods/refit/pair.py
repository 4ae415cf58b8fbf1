"""A block-wise pass of a dense and a compressed model together, and the layers whose inputs can be compared."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from lowrank_pl.calibration.hidden_states import Cache, HiddenStates, cache_for
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.forward import forward_from, forward_from_is_exact, forward_until, move_output
from lowrank_pl.models.hf_experts import routers, split_modules
from lowrank_pl.models.targets import Target, decoder_blocks, dense_weight, first_argument, replaced

__all__ = ["ModelPair", "Pair", "Wiring", "find_wiring"]

_log = logging.getLogger(__name__)


_ROUNDINGS = 4
"""Two sums count as equal if they differ by at most this many roundings."""


Pair = tuple[Tensor, Tensor]
"""The same tensor in the dense and in the compressed model."""


Receive = Callable[[str, int, Pair | None, Pair | None], None]


Seen = dict[str, list[Tensor]]
"""Inputs of watched modules in one pass: one tensor per call, by name of the module."""


Done = Callable[[int, Seen], None]


@dataclass(frozen=True)
class Wiring:
    """How a linear layer is wired into its block.

    Args:
        every_token: Whether a pass calls the layer exactly once, for every token.
        experts: Name of the module of experts that the layer belongs to; None if it belongs to none, or if no router of
            the module is known.
        stream: Name of a module whose input is the residual stream that the layer's output is added to; None if the
            output is not simply added to a stream.
    """

    every_token: bool = False
    experts: str | None = None
    stream: str | None = None

    @property
    def paired(self) -> bool:
        """Whether the layer's inputs in two models can be compared: it sees all tokens, or those of its expert."""
        return self.every_token or self.experts is not None


def find_wiring(model: PreTrainedModel, targets: Sequence[Target], tokens: Tensor) -> dict[str, Wiring]:
    """Return the wiring of each of ``targets``, from one forward pass over ``tokens`` ``[sequences, length]``.

    No model family is known by name. An output ``y`` is added to a stream if an earlier module has the input ``s``, and
    a later module or the next block has the input ``s + y``. An output that passes a norm or a factor first does not
    count as added to a stream. Nor do two outputs that are added at once, as by parallel attention and MLP.
    """
    prefix, blocks = decoder_blocks(model)
    names = {target.name for target in targets}
    wiring = dict.fromkeys(names, Wiring())
    for experts in routers(model):
        routed = [name for name in names if name.startswith(f"{experts}.")]
        wiring |= dict.fromkeys(routed, Wiring(experts=experts))
    with evaluating(model), ExitStack() as stack:
        for number, block in enumerate(blocks):
            log = _CallLog(tokens.numel())
            for inner, module in block.named_modules():
                name = f"{prefix}.{number}.{inner}".rstrip(".")
                stack.callback(module.register_forward_pre_hook(log.before(name), with_kwargs=True).remove)
                if name in names:
                    stack.callback(module.register_forward_hook(log.after(name)).remove)
            stack.callback(block.register_forward_hook(log.end(wiring)).remove)
        model(input_ids=tokens.to(model.device), use_cache=False)
    return wiring


@dataclass
class _CallLog:
    """Inputs of a block's modules and outputs of its target layers, in call order."""

    tokens: int
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    returned: list[tuple[str, int, Tensor]] = field(default_factory=list)

    def before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first_argument(args, kwargs)
            if isinstance(value, Tensor):
                # A copy, because some blocks later add to the tensor in place.
                self.inputs.append((name, value.clone()))

        return hook

    def after(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.returned.append((name, len(self.inputs), output.clone()))

        return hook

    def end(self, wiring: dict[str, Wiring]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last = output if isinstance(output, Tensor) else output[0]
            calls = Counter(name for name, _, _ in self.returned)
            for name, position, written in self.returned:
                if calls[name] == 1 and _tokens(written) == self.tokens and wiring[name].experts is None:
                    later = [value for _, value in self.inputs[position:]]
                    stream = _stream(written, self.inputs[:position], [*later, last])
                    wiring[name] = Wiring(True, stream=stream)
            # Tensors of finished blocks are released.
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
            # An output that vanishes in the rounding of the stream would count as added to any stream.
            if is_sum(whole, one, two) and not is_sum(whole, one, torch.zeros_like(two)):
                return name
    return None


def _is_like(one: Tensor, two: Tensor) -> bool:
    return one.is_floating_point() and one.shape[-1:] == two.shape[-1:] and one.numel() == two.numel()


def _tokens(tensor: Tensor) -> int:
    return tensor.numel() // max(1, tensor.shape[-1])


class ModelPair:
    """A dense and a compressed model, run over the same sequences block by block.

    Both are one model: passes of the compressed model replace its dense layers by low-rank ones. The dense model runs
    each block once, and the inputs of its layers are buffered. The compressed model runs the block again for every
    compared layer, because the layers before it have changed; such a pass ends at that layer. Layers of several experts
    share a pass. Their inputs would take as many numbers as tokens, times the experts that serve each, times the width,
    so they are not buffered: the dense model runs the block again, batch by batch beside the compressed one.

    A token may be routed to other experts in the compressed model, and has nothing to be compared with there. So while
    the layers of a block are compared, its routers return what they returned in the dense model: each expert sees the
    tokens that it sees there, as the compressed model computes them. Later blocks get what the compressed model
    computes with its own routing.

    Args:
        model: The dense model; it stays unchanged.
        batches: Token ids ``[sequences, length]`` of every pass.
        replacements: Modules that replace others in every pass of the compressed model, by name: what stands in the
            place of dropped experts, and compressed embeddings.

    Attributes:
        replacements: As given.
        layers: Low-rank layers of the compressed model by the name of the layer that they replace. The caller adds them
            as they are made: those of earlier blocks before ``start_block``, others after it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        *,
        replacements: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.replacements = dict(replacements or {})
        self.layers: dict[str, nn.Module] = {}
        self._resuming = forward_from_is_exact(model, self.batches[0][:1, :32])
        if not self._resuming:
            _log.warning(
                "the blocks of %s share more than the hidden state: every pass runs all blocks from the first one",
                type(model).__name__,
            )
        # Number of sequences before each batch, and of all sequences.
        self._offsets = list(accumulate(map(len, self.batches), initial=0))
        self._tokens = sum(batch.numel() for batch in self.batches)
        # The dense model has already run a block when the compressed model is about to.
        self._dense, self._compressed = (_Progress(0, [None] * len(self.batches)) for _ in range(2))
        self._state_device = _buffer_device(model, 2 * self._tokens * _width(model, None) * model.dtype.itemsize)
        self._streams: Mapping[str, str | None] = {}
        self._dense_inputs: dict[str, HiddenStates] = {}
        self._buffers: dict[int, list[HiddenStates]] = {}
        self._unpaired: set[str] = set()
        self._routers, self._experts = routers(model), dict(split_modules(model))
        # Of the started block: each router's outputs, batch by batch, and where the dense model runs it again.
        self._routed: dict[str, list[Any]] = {}
        self._again = _Progress(0, [])
        # Of the batch that is compared: the weights of experts' rows.
        self._row_weights: dict[str, Tensor | None] = {}

    def start_block(self, block: int, streams: Mapping[str, str | None]) -> None:
        """Run both models up to ``block``, and the dense one through it; later passes are about this block.

        Args:
            block: Number of the block.
            streams: The stream's module (``Wiring.stream``) of each layer of the block that will be compared; None for
                a layer whose stream is not needed.
        """
        if self._resuming and block > self._compressed.start:
            self._advance(self._compressed, block, self.layers)
            # The hidden states now include the effect of these layers.
            self.layers.clear()
        experts = {name for name in streams if self._experts_of(name) is not None}
        buffered = {name: stream for name, stream in streams.items() if name not in experts}
        self._streams, self._dense_inputs, self._unpaired = streams, self._input_buffers(buffered), set()
        self._again = _Progress(0, [])
        if experts:
            if self._resuming and block > self._dense.start:
                self._advance(self._dense, block, {})
            self._again = replace(self._dense, states=list(self._dense.states))
        prefix = f"{decoder_blocks(self.model)[0]}.{block}."
        self._routed = {name: [] for name in self._routers.values() if experts and name.startswith(prefix)}

        def write(number: int, seen: Seen) -> None:
            batch = self.batches[number]
            for name, calls in seen.items():
                if len(calls) != 1 or _tokens(calls[0]) != batch.numel():
                    self._unpaired.add(name)
                else:
                    self._dense_inputs[name].write(
                        self._offsets[number], calls[0].reshape(len(batch), -1, calls[0].shape[-1])
                    )

        with self._routing(self._remember):
            self._advance(self._dense, block + 1, {}, [*self._dense_inputs], write)

    def routing_weights(self, name: str) -> Tensor | None:
        """Return the weights ``[rows]`` that the dense router gives the outputs of an expert in the compared batch.

        Args:
            name: A layer of the expert.
        """
        return self._row_weights[name]

    def compare(self, names: Sequence[str], receive: Receive) -> None:
        """Pass the inputs of layers in both models to ``receive``, batch by batch.

        Args:
            names: Layers given to ``start_block`` that are not in ``layers`` yet: one, or layers of several experts of
                one module, which do not depend on each other.
            receive: Called with the name, the batch's number, the inputs and the streams. The inputs are None if a
                layer is not called once for every token. Of an expert they are those of the tokens that the dense model
                routes to it, and there is no call for batches without any.
        """
        experts = self._experts_of(names[0])
        if experts is not None:
            self._compare_experts(experts, names, receive)
            return
        (name,) = names
        stream = self._streams[name]

        def pair(number: int, where: str, seen: Seen) -> Pair | None:
            batch, calls = self.batches[number], seen[where]
            if where in self._unpaired or len(calls) != 1 or _tokens(calls[0]) != batch.numel():
                return None
            dense = self._dense_inputs[where].read(self._offsets[number], len(batch))
            return dense.to(self.model.device).reshape(calls[0].shape), calls[0]

        def done(number: int, seen: Seen) -> None:
            receive(name, number, pair(number, name, seen), None if stream is None else pair(number, stream, seen))

        module = self.model.get_submodule(name)
        watched = list(dict.fromkeys(filter(None, (stream, name))))
        self._run(
            self._compressed, self.layers, watched, done, lambda _: forward_until(self.model, module, before=True)
        )

    def _compare_experts(self, experts: str, names: Sequence[str], receive: Receive) -> None:
        """Do the work of ``compare`` for layers of experts, in passes that end after the module of experts."""
        dense: Seen = {}

        def done(number: int, seen: Seen) -> None:
            for name, calls in seen.items():
                if not dense[name] and not calls:
                    continue
                paired = len(calls) == len(dense[name]) == 1 and calls[0].shape == dense[name][0].shape
                receive(name, number, (dense[name][0], calls[0]) if paired else None, None)

        module = self._experts[experts]
        end: Callable[[int], AbstractContextManager[None]] = lambda _: forward_until(self.model, module)  # noqa: E731
        routed = {name: iter(outputs) for name, outputs in self._routed.items()}
        for number in range(len(self.batches)):
            with self._weights_kept(names):
                self._run(self._again, {}, names, lambda _, seen: dense.update(seen), end, [number])
            with self._routing(lambda name: self._repeat(routed[name])):
                self._run(self._compressed, self.layers, names, done, end, [number])

    @contextmanager
    def _weights_kept(self, names: Sequence[str]) -> Iterator[None]:
        """Keep the weights of the rows of experts' layers while the block runs."""
        self._row_weights = dict.fromkeys(names)

        def keep(name: str) -> Callable[[nn.Module, Any], None]:
            expert: Any = self.model.get_submodule(name.rpartition(".")[0])

            def hook(_: nn.Module, __: Any) -> None:
                self._row_weights[name] = getattr(expert, "routing_weights", None)

            return hook

        with ExitStack() as stack:
            for name in names:
                stack.callback(self.model.get_submodule(name).register_forward_pre_hook(keep(name)).remove)
            yield

    def _experts_of(self, name: str) -> str | None:
        """Return the module of experts that layer ``name`` belongs to, if its router is known."""
        return next((experts for experts in self._routers if name.startswith(f"{experts}.")), None)

    @contextmanager
    def _routing(self, hook: Callable[[str], Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
        """Let ``hook`` see or replace the outputs of the started block's routers while the block runs."""
        with ExitStack() as stack:
            for name in self._routed:
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook(name)).remove)
            yield

    def _remember(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._routed[name].append(tree_map(_on(self._state_device), output))

        return hook

    def _repeat(self, stored: Iterator[Any]) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, __: Any, ___: Any) -> Any:
            return tree_map(_on(self.model.device), next(stored))

        return hook

    @property
    def runs_blocks_alone(self) -> bool:
        """Whether a block's output depends on earlier blocks through the hidden state only."""
        return self._resuming

    def sequences_of(self, number: int) -> tuple[int, int]:
        """Return the number of the first sequence of a batch, and how many there are."""
        return self._offsets[number], len(self.batches[number])

    def call_of_block(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Return the arguments of the started block in the compressed model, and its output in the dense model.

        Floating-point tensors are float32. Only for models that run blocks alone.

        Args:
            number: The batch.
        """
        assert self._resuming
        device, start = self.model.device, self._compressed.start
        block = decoder_blocks(self.model)[1][start]
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states = [move_output(self._compressed.states[number], device)] if start else []
        with (
            evaluating(self.model),
            replaced(self.model, self.replacements),
            forward_from(self.model, start, states),
            ExitStack() as stack,
        ):
            hook = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(forward_until(self.model, block, before=True))
            self.model(input_ids=self.batches[number].to(device), use_cache=False)
        dense = self._dense.states[number]
        args, kwargs = tree_map(_in_float32, calls[0])
        return args, kwargs, (dense if isinstance(dense, Tensor) else dense[0]).to(device, torch.float32)

    def _advance(
        self,
        progress: _Progress,
        block: int,
        layers: Mapping[str, nn.Module],
        watched: Sequence[str] = (),
        done: Done = lambda *_: None,
    ) -> None:
        """Run a model from ``progress`` up to ``block``, and let its later passes start there."""
        last = decoder_blocks(self.model)[1][block - 1]

        def end(number: int) -> AbstractContextManager[None]:
            def keep(output: Any) -> None:
                # This replaces the state that the pass started from, which is no longer needed.
                progress.states[number] = move_output(output, self._state_device) if self._resuming else None

            return forward_until(self.model, last, keep)

        self._run(progress, layers, watched, done, end)
        progress.start = block if self._resuming else 0

    def _run(
        self,
        progress: _Progress,
        layers: Mapping[str, nn.Module],
        watched: Sequence[str],
        done: Done,
        end: Callable[[int], AbstractContextManager[None]],
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Run the model with ``layers``, and pass the inputs of modules ``watched`` to ``done``.

        Args:
            progress: Where passes start.
            layers: Replace those of the dense model.
            watched: Names of modules.
            done: Called after each batch.
            end: Where the pass of a batch ends.
            numbers: The batches; None for all.
        """
        device = self.model.device
        numbers = range(len(self.batches)) if numbers is None else numbers
        states = (move_output(progress.states[number], device) for number in numbers)
        if progress is self._compressed:
            layers = {**layers, **self.replacements}
        with evaluating(self.model), replaced(self.model, layers), forward_from(self.model, progress.start, states):
            for number in numbers:
                batch = self.batches[number]
                seen: Seen = {name: [] for name in watched}
                with ExitStack() as stack:
                    for name, calls in seen.items():
                        hook = self.model.get_submodule(name).register_forward_pre_hook(_keep(calls), with_kwargs=True)
                        stack.callback(hook.remove)
                    stack.enter_context(end(number))
                    self.model(input_ids=batch.to(device), use_cache=False)
                done(number, seen)

    def _input_buffers(self, streams: Mapping[str, str | None]) -> dict[str, HiddenStates]:
        """Return buffers for the inputs of the layers and modules in ``streams``, in memory or else on disk.

        Blocks are alike, so the buffers of the previous block are used again.
        """
        wanted: dict[int, list[str]] = {}
        for name in dict.fromkeys(filter(None, (*streams, *streams.values()))):
            wanted.setdefault(_width(self.model, name if name in streams else None), []).append(name)
        buffers = {width: self._buffers.get(width, [])[: len(names)] for width, names in wanted.items()}
        self._buffers = buffers
        missing = {width: len(names) - len(buffers[width]) for width, names in wanted.items()}
        size = sum(width * count for width, count in missing.items()) * self._tokens * self.model.dtype.itemsize
        place = _buffer_device(self.model, size)
        cache: Cache = cache_for(size) if place.type == "cpu" else "ram"
        if cache == "disk":
            _log.info(
                "the inputs of a block's linear layers are kept on disk, since memory is short: %.2f GB", size / 1e9
            )
        for width, count in missing.items():
            buffers[width] += [HiddenStates(self._offsets[-1], cache=cache, device=place) for _ in range(count)]
        pairs = [zip(names, buffers[width], strict=True) for width, names in wanted.items()]
        return dict(chain.from_iterable(pairs))


@dataclass
class _Progress:
    """How far a model has run: the block that passes start at, and each batch's output of the block before it."""

    start: int
    states: list[Any]


def _on(device: torch.device) -> Callable[[Any], Any]:
    return lambda value: value.to(device) if isinstance(value, Tensor) else value


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _keep(calls: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy, because a stream may be written to in place later.
        calls.append(first_argument(args, kwargs).clone())

    return hook


def _width(model: PreTrainedModel, name: str | None) -> int:
    """Return the width of the input of layer ``name``, or of the hidden state if it is None."""
    weight = model.get_input_embeddings().weight if name is None else dense_weight(model.get_submodule(name))
    return int(weight.shape[1])


def _buffer_device(model: PreTrainedModel, size: int) -> torch.device:
    """Return the device for a buffer of ``size`` bytes: the GPU if it fits, since transfers are slower than passes."""
    device: torch.device = model.device
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
        return device
    return torch.device("cpu")
