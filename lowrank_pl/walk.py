"""Factors of a model that is never whole in memory: each block is loaded, run over the text, decomposed and freed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lowrank_pl.decomposition import Decomposition, Roots
from lowrank_pl.evaluating import evaluating
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.hidden_states import Cache, HiddenStates
from lowrank_pl.prepare import check_finite, decompose_all, factor_store, statistics_of
from lowrank_pl.processes import from_first, is_first, share, world_size
from lowrank_pl.resume_forward import copied, ended, forward_replaced, moved, resumed
from lowrank_pl.skeleton import CannotWalkError, Skeleton, one_by_one
from lowrank_pl.targets import Target, Targets, decoder_blocks

__all__ = ["Walk", "refuse_gradients", "walk_factors"]

_log = logging.getLogger(__name__)
_TRIAL = 32
"""Tokens of the pass that tells whether blocks can be run one by one."""


def walk_factors(
    skeleton: Skeleton,
    targets: Targets,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: Decomposition | None = None,
    directory: str | Path | None = None,
    batch_size: int = 1,
    memory: int | None = None,
    cache: Cache = "ram",
) -> FactorStore:
    """Return the store that ``build_factors`` gives of the same model loaded whole, holding one block at a time.

    Processes that work together (``lowrank_pl.processes.together``) take a share each of the windows, and then of the
    decompositions, for which they load one group of maps at a time; all need the same folder.

    Args:
        skeleton: The dense base without its weights.
        targets: What was found in it.
        windows: ``[windows, length]`` calibration token ids.
        tokenizer: The one that made them.
        settings: How to decompose; not by gradients.
        directory: Folder of the store; by default one named by the fingerprint in the cache.
        batch_size: Windows per forward.
        memory: Bytes that the statistics of a block are meant to take; more is told, since there is nothing smaller.
        cache: Where the hidden states of all windows wait between blocks.

    Raises:
        ValueError: As in ``build_factors``.
        CannotWalkError: Factors are missing whose decomposition needs gradients, or blocks share more than the hidden
            state; what was made before that showed is right and stays.
    """
    settings = settings or Decomposition()
    statistics = statistics_of(
        skeleton.model, windows, tokenizer, parameters=skeleton.parameters(), directory=directory,
        batch_size=batch_size, memory=memory,
    )  # fmt: skip
    store = factor_store(targets, statistics.source, settings, directory)
    with store.making(target.name for target in targets.modules) as missing:
        if missing:
            refuse_gradients(settings)
        todo = [target for target in targets.modules if target.name in set(missing)]
        # Where everything behind a block is measured, nothing has to be run through it.
        unmeasured = statistics.unmeasured(todo) if settings.needs else []
        runs = from_first(lambda: max((target.block + 1 for target in unmeasured), default=0))
        walk = Walk(skeleton, windows, batch_size=batch_size, cache=cache) if runs else None
        # Of the maps of one block, several processes would get shares that are far from equal.
        later = todo if world_size() > 1 else []
        for block, names in enumerate(skeleton.blocks):
            those = [target for target in todo if target.block == block]
            if block >= runs and (later or not those):
                continue
            _log.info("block %d of %d: %d modules to decompose", block + 1, len(skeleton.blocks), len(those))
            with walk.at(block) if walk is not None and block < runs else skeleton.loaded(names):
                check_finite(skeleton.model, those)
                if those:
                    roots = Roots(settings, statistics, those, skeleton.device)
                    if not later:
                        decompose_all(skeleton.model, those, store, roots)
        if later:
            roots = Roots(settings, statistics, later, skeleton.device)
            decompose_all(skeleton.model, later, store, roots, loading=partial(_loaded, skeleton))
    return store


@contextmanager
def _loaded(skeleton: Skeleton, those: Sequence[Target]) -> Iterator[None]:
    """Let the maps ``those``, and nothing else, have their weights while the block runs."""
    with skeleton.loaded(f"{target.name}.weight" for target in those):
        check_finite(skeleton.model, those)
        yield


def refuse_gradients(settings: Decomposition) -> None:
    """Refuse a decomposition that can't be made block by block.

    Raises:
        CannotWalkError: It weighs by gradients.
    """
    if not settings.block_by_block:
        raise CannotWalkError(
            f"a {settings.kind} decomposition needs gradients, which a backward pass through the whole model gives"
        )


class Walk:
    """Forward passes over all windows through one block of a model at a time, from the first block to the last.

    Processes that work together run the windows of their share alone.

    Args:
        skeleton: The model.
        windows: ``[windows, length]`` token ids.
        batch_size: Windows per pass.
        cache: Where hidden states wait between blocks.

    Raises:
        CannotWalkError: The model's code fails where only one block is loaded, or blocks are not run once each, or
            return more than the hidden state.
    """

    def __init__(self, skeleton: Skeleton, windows: Tensor, *, batch_size: int = 1, cache: Cache = "ram") -> None:
        self.skeleton, self.batch_size = skeleton, batch_size
        # Those that `collect_input_moments` runs.
        self._batches = share(torch.split(windows, batch_size))
        self._windows = sum(map(len, self._batches))
        self._states = HiddenStates(self._windows, cache=cache)
        self._trial = windows[:1, :_TRIAL]
        # What every block returns in one whole pass, to compare with.
        self._whole: list[Any] = []
        self._passes = 0
        with one_by_one(), ExitStack() as stack:
            for block in decoder_blocks(skeleton.model)[1]:
                stack.callback(block.register_forward_hook(self._remember).remove)
            stack.enter_context(skeleton.streaming())
            self._run(self._trial)
        if len(self._whole) != len(skeleton.blocks):
            raise CannotWalkError("its blocks are not run once each")

    def _remember(self, _: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor) and any(isinstance(part, Tensor) for part in output[1:]):
            raise CannotWalkError("its blocks return more than the hidden state")
        self._whole.append(moved(copied(output), torch.device("cpu")))

    @contextmanager
    def at(self, block: int) -> Iterator[None]:
        """Let forward passes run ``block``, and it alone, on what the block before returned; its weights are loaded.

        One pass over all windows, batch by batch, may be made meanwhile, by ``collect_input_moments`` say. Without one
        it is made at the end, since the next block needs what this one returns.

        Args:
            block: The one after that of the last call, beginning with 0.

        Raises:
            CannotWalkError: Blocks share more than the hidden state.
        """
        model = self.skeleton.model
        starts = range(0, self._windows, self.batch_size)
        inputs = (moved(self._states.read(start, self.batch_size), self.skeleton.device) for start in starts)
        self._passes = 0

        def keep(output: Any) -> None:
            # What this pass began with is not needed any more.
            self._states.write(starts[self._passes], output)
            self._passes += 1

        with self._only(block):
            self._compare(block)
            with resumed(model, block, inputs), ended(model, decoder_blocks(model)[1][block], keep):
                yield
                if self._passes == 0:
                    for batch in tqdm(self._batches, desc="forward", unit="batch", disable=not is_first()):
                        self._run(batch)
        assert self._passes == len(starts)

    @contextmanager
    def _only(self, block: int) -> Iterator[None]:
        """Load what a pass that begins at ``block`` needs; from the second block on, that is not the embeddings."""
        skeleton = self.skeleton
        embeddings = skeleton.model.get_input_embeddings()
        with ExitStack() as stack:
            stack.enter_context(skeleton.loaded([*skeleton.outer, *skeleton.blocks[block]]))
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
        before = [moved(self._whole[block - 1], self.skeleton.device)] if block else []
        model = self.skeleton.model
        alone = decoder_blocks(model)[1][block]
        with one_by_one(), resumed(model, block, before), ended(model, alone, found.append):
            self._run(self._trial)
        if not torch.equal(_hidden(found[0]).cpu(), _hidden(self._whole[block])):
            raise CannotWalkError("its blocks share more than the hidden state")

    def _run(self, batch: Tensor) -> None:
        with evaluating(self.skeleton.model):
            self.skeleton.model(input_ids=batch.to(self.skeleton.device), use_cache=False)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
