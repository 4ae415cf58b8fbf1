"""Passes over all sequences through one block of a model at a time: forward from the first, backward from the last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.calibration.backward import Recorder, differentiable, loss_gradient
from lowrank_pl.calibration.hidden_states import Cache, HiddenStates, cache_for
from lowrank_pl.calibration.measures import Batch, GradientMeasure, Passes
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.forward import clone_output, forward_from, forward_replaced, forward_until, move_output
from lowrank_pl.models.lazy import Blocks, NotBlockwiseError, explain_not_blockwise
from lowrank_pl.models.targets import Target, decoder_blocks
from lowrank_pl.utils.distributed import is_first

__all__ = ["BlockwiseBackward", "BlockwiseForward", "Extent", "pass_through_blocks"]

_log = logging.getLogger(__name__)

_TRIAL = 32
"""Tokens of the pass that tells whether blocks can be run one by one."""


@dataclass(frozen=True)
class Extent:
    """How far block-wise passes have to go.

    Args:
        forward: How many blocks run forward, from the first.
        backward: The first block that needs gradients; None where no block does.
        entries: How many linear layers need gradients.
    """

    forward: int
    backward: int | None
    entries: int

    @classmethod
    def of(cls, blocks: int, inputs: Sequence[Target], gradients: Sequence[Target]) -> Extent:
        """Return the extent for a model of ``blocks`` blocks.

        Args:
            blocks: How many the model has.
            inputs: Linear layers whose inputs are to be measured.
            gradients: Linear layers whose gradients are to be measured.
        """
        last = max((target.block + 1 for target in inputs), default=0)
        lowest = min((target.block for target in gradients), default=None)
        return cls(last if lowest is None else blocks, lowest, len(gradients))


def pass_through_blocks(
    model: Blocks,
    passes: Passes,
    extent: Extent,
    visit: Callable[[int, BlockwiseBackward | None], None],
    *,
    labels: Labels,
    cache: Cache | None = None,
) -> None:
    """Run all sequences forward through one block after the other, and back through them where gradients are needed.

    Args:
        model: The model.
        passes: The sequences, and how many at a time.
        extent: How far to go.
        visit: Is called while a block has its weights, with the number of the block. On the way forward it may run one
            pass over all sequences, with ``collect_input_moments`` for instance. On the way back it is given the
            backward pass of the block as well, and may call its ``measure`` once.
        labels: Whose next tokens the loss asks for.
        cache: Where hidden states wait between blocks; by default in main memory, unless that is short.

    Raises:
        ValueError: A loss or a gradient is not finite.
        NotBlockwiseError: The model's blocks can't be run one by one.
    """
    if not extent.forward:
        return
    began = time.perf_counter()
    keep_from = None if extent.backward is None else extent.backward - 1
    forward = BlockwiseForward(model, passes, cache=cache, keep_from=keep_from)
    for block in range(extent.forward):
        with forward.at(block):
            visit(block, None)
    if extent.backward is None:
        return
    backward = BlockwiseBackward(forward, labels, entries=extent.entries, began=began)
    for block in range(extent.forward - 1, extent.backward - 1, -1):
        _log.info("block %d of %d, backward", block + 1, extent.forward)
        with backward.at(block):
            visit(block, backward)


class BlockwiseForward:
    """Forward passes over all sequences through one block of a model at a time, from the first block to the last.

    Processes that work together run the batches of their share alone.

    Args:
        model: The model.
        passes: The sequences, and how many at a time.
        cache: Where hidden states wait between blocks; by default in main memory, unless that is short.
        keep_from: The first block whose output is kept after the next block has run, for backward passes; None keeps
            only the output of the last block that has run.

    Attributes:
        batches: The batches of this process.
        states: Outputs of blocks, by block. Of the blocks before ``keep_from`` only the last one is there.

    Raises:
        NotBlockwiseError: The model's code fails where only one block is loaded, or blocks are not run once each, or
            blocks return more than the hidden state.
    """

    def __init__(
        self, model: Blocks, passes: Passes, *, cache: Cache | None = None, keep_from: int | None = None
    ) -> None:
        self.model, self.passes, self._keep_from = model, passes, keep_from
        self.batches = passes.batches()
        self.sequences = sum(len(batch.tokens) for batch in self.batches)
        self.states: dict[int, HiddenStates] = {}
        # Without backward passes one output at a time is kept. Otherwise there are the inputs of the blocks on the way
        # back, the output of the last block, and a gradient.
        self._kept = 1 if keep_from is None else len(model.blocks) - keep_from + 1
        hidden = model.model.get_input_embeddings().weight
        size = self._kept * self.sequences * passes.sequences.shape[1] * hidden.shape[1] * hidden.itemsize
        self.cache = cache or cache_for(size)
        self._trial = passes.sequences[:1, :_TRIAL]
        # The output of every block in one pass through the whole model, to compare with.
        self._whole: list[Any] = []
        with explain_not_blockwise(), ExitStack() as stack:
            for block in decoder_blocks(model.model)[1]:
                stack.callback(block.register_forward_hook(self._remember).remove)
            stack.enter_context(model.streaming())
            self._run(self._trial)
        if len(self._whole) != len(model.blocks):
            raise NotBlockwiseError("its blocks are not run once each")

    def _remember(self, _: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor) and any(isinstance(part, Tensor) for part in output[1:]):
            raise NotBlockwiseError("its blocks return more than the hidden state")
        self._whole.append(move_output(clone_output(output), torch.device("cpu")))

    @contextmanager
    def at(self, block: int) -> Iterator[None]:
        """Let forward passes run ``block`` alone, on the output of the block before; its weights are loaded.

        One pass over all sequences may be made meanwhile, batch by batch, with ``collect_input_moments`` for instance.
        Otherwise it is made at the end, since the next block needs the output of this one.

        Args:
            block: The block after that of the last call, beginning with 0.

        Raises:
            NotBlockwiseError: Blocks share more than the hidden state.
        """
        model, keep_from = self.model.model, self._keep_from
        before = self.states.get(block - 1)
        # Where the input of this block is not kept, its output takes the same place.
        kept = keep_from is not None and block - 1 >= keep_from
        after = HiddenStates(self.sequences, cache=self.cache) if kept or before is None else before
        inputs = () if before is None else (before.read(*place) for place in self.places())
        places = self.places()
        with self.only(block):
            self._compare(block)
            passes = 0

            def keep(output: Any) -> None:
                nonlocal passes
                after.write(next(places)[0], output)
                passes += 1

            with (
                forward_from(model, block, (move_output(output, self.model.device) for output in inputs)),
                forward_until(model, decoder_blocks(model)[1][block], keep),
            ):
                yield
                if passes == 0:
                    for batch in tqdm(self.batches, desc="forward", unit="batch", disable=not is_first()):
                        self._run(batch.tokens)
        assert passes == len(self.batches)
        if not kept:
            self.states.pop(block - 1, None)
        self.states[block] = after
        if block == 0:
            size = self._kept * after.bytes / 1e9
            _log.info("hidden states of all sequences, %d at a time: %.2f GB (%s)", self._kept, size, self.cache)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield for each batch its first sequence among those of this process, and how many sequences it has."""
        first = 0
        for batch in self.batches:
            yield first, len(batch.tokens)
            first += len(batch.tokens)

    @contextmanager
    def only(self, block: int) -> Iterator[None]:
        """Load the weights for a pass that begins at ``block``, without the embeddings from the second block on.

        Args:
            block: Number of the block; one more than the last for the head alone.
        """
        model = self.model
        embeddings = model.model.get_input_embeddings()
        with ExitStack() as stack:
            parts = [*model.blocks, model.head]
            stack.enter_context(model.loaded([*model.outer, *parts[block]]))
            if block == 0:
                stack.enter_context(model.loaded(model.embeddings))
            else:
                width, dtype = embeddings.weight.shape[1], embeddings.weight.dtype

                def nothing(ids: Tensor, *_: Any, **__: Any) -> Tensor:
                    # Llama 4 moves the ids to where the embeddings are, which are not loaded.
                    return torch.zeros(*ids.shape, width, dtype=dtype, device=model.device)

                stack.enter_context(forward_replaced(embeddings, nothing))
            yield

    def _compare(self, block: int) -> None:
        """Refuse a model in which ``block`` alone returns something else than in a pass through the whole model."""
        found: list[Any] = []
        before = [move_output(self._whole[block - 1], self.model.device)] if block else []
        model = self.model.model
        alone = decoder_blocks(model)[1][block]
        with explain_not_blockwise(), forward_from(model, block, before), forward_until(model, alone, found.append):
            self._run(self._trial)
        if not torch.equal(_hidden(found[0]).cpu(), _hidden(self._whole[block])):
            raise NotBlockwiseError("its blocks share more than the hidden state")

    def check_head(self) -> None:
        """Refuse a model whose head can't be run alone.

        Raises:
            NotBlockwiseError: The model's code fails.
        """
        model, last = self.model.model, move_output(self._whole[-1], self.model.device)
        with self.only(len(self._whole)), explain_not_blockwise(), forward_from(model, len(self._whole), [last]):
            self._run(self._trial)

    def _run(self, tokens: Tensor) -> None:
        with evaluating(self.model.model):
            self.model.model(input_ids=tokens.to(self.model.device), use_cache=False)


class BlockwiseBackward:
    """Backward passes over all sequences through one block of a model at a time, from the last block to the first.

    Each block runs forward once more on its input. The gradient of the loss by its output then gives the gradients by
    everything inside, the same as one pass through the whole model. For every sequence the input of each block and one
    gradient of a hidden state are kept. Processes that work together keep those of their share.

    Args:
        forward: The forward passes, through all blocks.
        labels: Whose next tokens the loss asks for.
        entries: How many linear layers will be measured, which share the time of the forward passes.
        began: When the forward passes began, by ``time.perf_counter``.

    Attributes:
        seconds_per_entry: The time of the forward passes and of the head's backward passes, per linear layer.

    Raises:
        ValueError: A loss or a gradient is not finite.
        NotBlockwiseError: The model's head can't be run alone.
    """

    def __init__(self, forward: BlockwiseForward, labels: Labels, *, entries: int, began: float) -> None:
        self.forward, self.labels = forward, labels
        forward.check_head()
        self._gradients = HiddenStates(forward.sequences, cache=forward.cache)
        self._block, self._done = len(forward.model.blocks), False
        with forward.only(self._block), differentiable(forward.model.model, self._block) as starts:
            for batch, first, start in self._batches("loss"):
                with forward_from(forward.model.model, self._block, [start]):
                    logits = forward.model.model(input_ids=batch.tokens, use_cache=False).logits
                end, gradient = loss_gradient(logits, batch, labels)
                self._gradients.write(first, torch.autograd.grad(end, starts, gradient)[0])
        self.seconds_per_entry = (time.perf_counter() - began) / max(1, entries)

    @contextmanager
    def at(self, block: int) -> Iterator[None]:
        """Let ``measure`` run ``block``, whose weights are loaded. Otherwise the pass is made at the end.

        Args:
            block: The block before that of the last call, beginning with the last.
        """
        assert block == self._block - 1
        self._block, self._done = block, False
        with self.forward.only(block):
            yield
            if not self._done and block > 0:
                self.measure({})
        # No earlier block needs the input of this one.
        self.forward.states.pop(block, None)

    def measure(self, measures: Mapping[str, GradientMeasure], *, last: bool = True) -> None:
        """Add the gradients of all sequences to the statistics of linear layers of the block.

        Args:
            measures: The statistics, by linear layer.
            last: Whether no other layers of the block follow, in a pass of their own.

        Raises:
            ValueError: An input or a gradient is not finite. The message names the linear layer and the batch.
        """
        assert not self._done, "the gradients of this block have been overwritten by those of the block before"
        self._done = last
        model, block = self.forward.model.model, self._block
        alone = decoder_blocks(model)[1][block]
        with differentiable(model, block) as starts:
            recorder = Recorder(starts)
            for batch, first, start in self._batches(f"gradients, block {block + 1}"):
                ends: list[Any] = []
                with (
                    recorder.watching(model, measures),
                    forward_from(model, block, [start]),
                    forward_until(model, alone, ends.append),
                ):
                    model(input_ids=batch.tokens, use_cache=False)
                end = _hidden(ends[0])
                gradient = self._gradients.read(first, len(batch.tokens)).to(end.device)
                onward = recorder.measure(measures, batch, end, gradient)
                if block and last:
                    # Written last: the gradient of a layer at the end of the block may be a view of the same memory.
                    self._gradients.write(first, onward)
        for found in measures.values():
            found.merge_processes()

    def _batches(self, progress: str) -> Iterator[tuple[Batch, int, Any]]:
        """Yield each batch, the place of its first sequence among those of this process, and the input of the block."""
        device, before = self.forward.model.device, self.forward.states.get(self._block - 1)
        bar = tqdm(self.forward.batches, desc=progress, unit="batch", leave=False, disable=not is_first())
        for batch, (first, count) in zip(bar, self.forward.places(), strict=True):
            start: Any = None
            if before is not None:
                start = clone_output(move_output(before.read(first, count), device))
                _hidden(start).requires_grad_()
            yield batch.to(device), first, start


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
