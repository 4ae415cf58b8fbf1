"""Passes over all sequences through one block of a model at a time: forward from the first, backward from the last."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.calibration.backward import Recorder, differentiable, loss_of_batch
from lowrank_pl.calibration.gradients import OutputMeasure, WeightGradients, by_name, merge_all, take_in
from lowrank_pl.calibration.hidden_states import Cache, HiddenStates, cache_for
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.forward import clone_output, forward_from, forward_replaced, forward_until, move_output
from lowrank_pl.models.lazy import Blocks, NotBlockwiseError, explain_not_blockwise
from lowrank_pl.models.targets import Target, decoder_blocks
from lowrank_pl.utils.distributed import is_first, my_share

__all__ = ["BlockwiseBackward", "BlockwiseForward"]

_log = logging.getLogger(__name__)


_TRIAL = 32
"""Tokens of the pass that tells whether blocks can be run one by one."""


_START = ""
"""What a recorder calls the input of a block, as if a map had returned it."""


class BlockwiseForward:
    """Forward passes over all sequences through one block of a model at a time, from the first block to the last.

    Processes that work together run the sequences of their share alone.

    Args:
        skeleton: The model.
        sequences: ``[sequences, length]`` token ids.
        batch_size: Sequences per pass.
        cache: Where hidden states wait between blocks; by default in main memory, unless that is short.
        keep_from: The first block whose output is kept when the next one has run, for passes back; none by default.

    Attributes:
        batches: Number and token ids of each batch of this process.
        states: What blocks returned, by block; of those before ``keep_from`` the last one alone.

    Raises:
        NotBlockwiseError: The model's code fails where only one block is loaded, or blocks are not run once each, or
            return more than the hidden state.
    """

    def __init__(
        self,
        skeleton: Blocks,
        sequences: Tensor,
        *,
        batch_size: int = 1,
        cache: Cache | None = None,
        keep_from: int | None = None,
    ) -> None:
        self.skeleton, self._keep_from = skeleton, keep_from
        # Those that `collect_input_moments` and `measure_gradients` run.
        self.batches = my_share(list(enumerate(torch.split(sequences, batch_size))))
        self.sequences = sum(len(batch) for _, batch in self.batches)
        self.states: dict[int, HiddenStates] = {}
        # Hidden states at a time: one, or those that blocks are fed on the way back, the last one's, and a gradient.
        self._kept = 1 if keep_from is None else len(skeleton.blocks) - keep_from + 1
        hidden = skeleton.model.get_input_embeddings().weight
        size = self._kept * self.sequences * sequences.shape[1] * hidden.shape[1] * hidden.itemsize
        self.cache = cache or cache_for(size)
        self._trial = sequences[:1, :_TRIAL]
        # What every block returns in one whole pass, to compare with.
        self._whole: list[Any] = []
        with explain_not_blockwise(), ExitStack() as stack:
            for block in decoder_blocks(skeleton.model)[1]:
                stack.callback(block.register_forward_hook(self._remember).remove)
            stack.enter_context(skeleton.streaming())
            self._run(self._trial)
        if len(self._whole) != len(skeleton.blocks):
            raise NotBlockwiseError("its blocks are not run once each")

    def _remember(self, _: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor) and any(isinstance(part, Tensor) for part in output[1:]):
            raise NotBlockwiseError("its blocks return more than the hidden state")
        self._whole.append(move_output(clone_output(output), torch.device("cpu")))

    @contextmanager
    def at(self, block: int) -> Iterator[None]:
        """Let forward passes run ``block``, and it alone, on what the block before returned; its weights are loaded.

        One pass over all sequences, batch by batch, may be made meanwhile, by ``collect_input_moments`` say. Without one
        it is made at the end, since the next block needs what this one returns.

        Args:
            block: The one after that of the last call, beginning with 0.

        Raises:
            NotBlockwiseError: Blocks share more than the hidden state.
        """
        model, keep_from = self.skeleton.model, self._keep_from
        before = self.states.get(block - 1)
        # What a pass began with is not needed any more where it is not kept: the next states take its place.
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
                forward_from(model, block, (move_output(output, self.skeleton.device) for output in inputs)),
                forward_until(model, decoder_blocks(model)[1][block], keep),
            ):
                yield
                if passes == 0:
                    for _, batch in tqdm(self.batches, desc="forward", unit="batch", disable=not is_first()):
                        self._run(batch)
        assert passes == len(self.batches)
        if not kept:
            self.states.pop(block - 1, None)
        self.states[block] = after
        if block == 0:
            size = self._kept * after.bytes / 1e9
            _log.info("hidden states of all sequences, %d at a time: %.2f GB (%s)", self._kept, size, self.cache)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield for each batch the number of its first sequence among those of this process, and how many it has."""
        first = 0
        for _, batch in self.batches:
            yield first, len(batch)
            first += len(batch)

    @contextmanager
    def only(self, block: int) -> Iterator[None]:
        """Load what a pass that begins at ``block`` needs; from the second block on, that is not the embeddings.

        Args:
            block: Its number; that of the last one and 1 for the head alone.
        """
        skeleton = self.skeleton
        embeddings = skeleton.model.get_input_embeddings()
        with ExitStack() as stack:
            parts = [*skeleton.blocks, skeleton.head]
            stack.enter_context(skeleton.loaded([*skeleton.outer, *parts[block]]))
            if block == 0:
                stack.enter_context(skeleton.loaded(skeleton.embeddings))
            else:
                width, dtype = embeddings.weight.shape[1], embeddings.weight.dtype

                def nothing(ids: Tensor, *_: Any, **__: Any) -> Tensor:
                    return torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

                stack.enter_context(forward_replaced(embeddings, nothing))
            yield

    def _compare(self, block: int) -> None:
        """Refuse a model in which ``block`` alone does not return what it does in a whole pass."""
        found: list[Any] = []
        before = [move_output(self._whole[block - 1], self.skeleton.device)] if block else []
        model = self.skeleton.model
        alone = decoder_blocks(model)[1][block]
        with explain_not_blockwise(), forward_from(model, block, before), forward_until(model, alone, found.append):
            self._run(self._trial)
        if not torch.equal(_hidden(found[0]).cpu(), _hidden(self._whole[block])):
            raise NotBlockwiseError("its blocks share more than the hidden state")

    def check_head(self) -> None:
        """Refuse a model whose head can't be run alone.

        Raises:
            NotBlockwiseError: Its code fails.
        """
        model, last = self.skeleton.model, move_output(self._whole[-1], self.skeleton.device)
        with self.only(len(self._whole)), explain_not_blockwise(), forward_from(model, len(self._whole), [last]):
            self._run(self._trial)

    def _run(self, batch: Tensor) -> None:
        with evaluating(self.skeleton.model):
            self.skeleton.model(input_ids=batch.to(self.skeleton.device), use_cache=False)


class BlockwiseBackward:
    """Backward passes over all sequences through one block of a model at a time, from the last block to the first.

    Each block is run forward once more on what it was fed, and the gradient of the loss by what it returned gives that
    by all inside, which is what one pass through the whole model gives. What one block was fed and one gradient of a
    hidden state are kept for every sequence; processes that work together keep those of their share.

    Args:
        walk: The forward passes, through all blocks.
        labels: Whose next tokens the loss asks for.
        seed: Of the sampled ones.

    Raises:
        ValueError: A loss or a gradient that is not finite.
        NotBlockwiseError: The model's head can't be run alone.
    """

    def __init__(self, walk: BlockwiseForward, labels: Labels, *, seed: int = 0) -> None:
        self.walk, self.labels = walk, labels
        walk.check_head()
        self._gradients = HiddenStates(walk.sequences, cache=walk.cache)
        self._block, self._done = len(walk.skeleton.blocks), False
        with walk.only(self._block), differentiable(walk.skeleton.model, self._block):
            for (number, tokens), (first, start) in self._batches("loss"):
                model = walk.skeleton.model
                with forward_from(model, self._block, [start]):
                    logits = model(input_ids=tokens, use_cache=False).logits
                loss = loss_of_batch(logits, tokens, labels, seed=seed, number=number)
                self._gradients.write(first, torch.autograd.grad(loss, _hidden(start))[0])

    @contextmanager
    def at(self, block: int) -> Iterator[None]:
        """Let ``measure`` run ``block``, whose weights are loaded; without it the pass is made at the end.

        Args:
            block: The one before that of the last call, beginning with the last.
        """
        assert block == self._block - 1
        self._block, self._done = block, False
        with self.walk.only(block):
            yield
            if not self._done and block > 0:
                self.measure({}, {}, self.labels)
        # Nothing before needs what this block was given any more.
        self.walk.states.pop(block, None)

    def measure(
        self, outputs: Mapping[Target, OutputMeasure], weights: Mapping[Target, WeightGradients], labels: Labels
    ) -> None:
        """Let what is measured of maps of the block see the gradients by their outputs and weights.

        Args:
            outputs: By map of the block.
            weights: Likewise.
            labels: Those that the loss asked for.
        """
        assert labels == self.labels
        assert not self._done, "the gradients of this block have made way for those of the one before"
        self._done = True
        seen, sums, recorder = by_name(outputs), by_name(weights), Recorder()
        model, block = self.walk.skeleton.model, self._block
        alone = decoder_blocks(model)[1][block]
        with differentiable(model, block):
            for (number, tokens), (first, start) in self._batches(f"gradients, block {block + 1}"):
                ends: list[Any] = []
                if block:
                    recorder.keep(_START, _hidden(start), _hidden(start))
                with (
                    recorder.watching(model, dict.fromkeys([*seen, *sums])),
                    forward_from(model, block, [start]),
                    forward_until(model, alone, ends.append),
                ):
                    model(input_ids=tokens, use_cache=False)
                end = _hidden(ends[0])
                found = dict(recorder.gradients(end, self._gradients.read(first, len(tokens)).to(end.device)))
                onward = found.pop(_START, None)
                take_in(found.items(), seen, sums, tokens[:, 1:].numel(), number)
                if onward is not None:
                    # Last: a map at the end of the block may have been given the very memory that this is written to.
                    self._gradients.write(first, onward[0][1])
                recorder.clear()
        merge_all(seen, sums)

    def _batches(self, progress: str) -> Iterator[tuple[tuple[int, Tensor], tuple[int, Any]]]:
        """Yield number and tokens of each batch, its first window's place, and what the block is fed."""
        device, before = self.walk.skeleton.device, self.walk.states.get(self._block - 1)
        bar = tqdm(self.walk.batches, desc=progress, unit="batch", leave=False, disable=not is_first())
        for (number, batch), (first, count) in zip(bar, self.walk.places(), strict=True):
            start: Any = None
            if before is not None:
                start = clone_output(move_output(before.read(first, count), device))
                _hidden(start).requires_grad_()
            yield (number, batch.to(device)), (first, start)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
