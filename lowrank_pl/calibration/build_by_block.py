"""Factors of a model that is never whole in memory: each block is loaded, run over the text, decomposed and freed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lowrank_pl.calibration.backward import check_length
from lowrank_pl.calibration.blockwise import BlockwiseBackward, BlockwiseForward
from lowrank_pl.calibration.build import check_finite, decompose_all, factor_store, statistics_of
from lowrank_pl.calibration.hidden_states import Cache
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition, Labels
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.lazy import NotBlockwiseError, Skeleton
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.distributed import broadcast_from_first, world_size

__all__ = ["build_factors_by_block", "refuse_compressed"]

_log = logging.getLogger(__name__)


def build_factors_by_block(
    skeleton: Skeleton,
    subject: Subject,
    *,
    settings: Decomposition | None = None,
    directory: str | Path | None = None,
    batch_size: int = 1,
    memory: int | None = None,
    cache: Cache | None = None,
) -> FactorStore:
    """Return the store that ``build_factors`` gives of the same model loaded whole, holding one block at a time.

    Where gradients are needed, all sequences go forward through one block after the other, and back through one before
    the other. Processes that work together (``lowrank_pl.utils.distributed.cooperating``) take a share each of the sequences, and
    then of the decompositions, for which they load one group of maps at a time; all need the same folder.

    Args:
        skeleton: The dense base without its weights.
        subject: The skeleton's model with its targets, its tokenizer and the calibration sequences.
        settings: How to decompose.
        directory: Folder of the store; by default one named by the fingerprint in the cache.
        batch_size: Sequences per forward.
        memory: Bytes that the statistics of a block are meant to take; more is told, since there is nothing smaller.
        cache: Where the hidden states of all sequences wait between blocks, for gradients those before every block; by
            default in main memory, unless that is short.

    Raises:
        ValueError: As in ``build_factors``.
        NotBlockwiseError: What is missing is to be measured in the compressed model, or blocks share more than the
            hidden state; what was made before that showed is right and stays.
    """
    settings = settings or Decomposition()
    targets, sequences = subject.targets, subject.sequences
    statistics = statistics_of(
        subject, parameters=skeleton.parameters(), directory=directory, batch_size=batch_size, memory=memory,
    )  # fmt: skip
    store = factor_store(targets, statistics.source, settings, directory, batch_size=batch_size)
    with store.filling(target.name for target in targets.modules) as missing:
        if missing:
            refuse_compressed(settings)
        todo = [target for target in targets.modules if target.name in set(missing)]
        # Of the maps of one block, several processes would get shares that are far from equal.
        later = todo if world_size() > 1 else []
        gradients = [need for need in settings.needs if need != "inputs"]
        labels: Labels = "text" if "weight_gradients" in gradients else settings.labels
        behind = [target for need in gradients for target in statistics.unmeasured(need, todo, labels)]
        forward = statistics.unmeasured("inputs", todo, labels) if "inputs" in settings.needs else []
        blocks = len(skeleton.blocks)
        # Where everything behind a block is measured, nothing has to be run through it; back it goes to the first block
        # of which a gradient is missing.
        runs, lowest = broadcast_from_first(
            lambda: (
                blocks if behind else max((target.block + 1 for target in forward), default=0),
                min((target.block for target in behind), default=blocks),
            )
        )
        walk, keep_from, began = None, None, time.perf_counter()
        if lowest < blocks:
            check_length(sequences)
            keep_from = lowest - 1
        if runs:
            walk = BlockwiseForward(skeleton, sequences, batch_size=batch_size, cache=cache, keep_from=keep_from)

        def make(those: Sequence[Target]) -> None:
            roots = Roots(settings, statistics, those, skeleton.device)
            if not later:
                decompose_all(skeleton.model, those, store, roots)

        def of(block: int) -> list[Target]:
            return [target for target in todo if target.block == block]

        for block, names in enumerate(skeleton.blocks):
            those = of(block)
            if block >= runs and (later or not those):
                continue
            _log.info("block %d of %d: %d modules to decompose", block + 1, blocks, len(those))
            with walk.at(block) if walk is not None and block < runs else skeleton.loaded(names):
                check_finite(skeleton.model, those)
                if those and block < lowest:
                    make(those)
                elif those and "inputs" in settings.needs:
                    statistics.inputs(those)
        if walk is not None and lowest < blocks:
            statistics.backward = back = BlockwiseBackward(walk, labels)
            statistics.seconds_before = (time.perf_counter() - began) / max(1, len(behind))
            for block in reversed(range(lowest, blocks)):
                _log.info("block %d of %d, backward", block + 1, blocks)
                with back.at(block):
                    if of(block):
                        make(of(block))
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


def refuse_compressed(settings: Decomposition) -> None:
    """Refuse a decomposition that can't be made block by block.

    Raises:
        NotBlockwiseError: It is measured in the compressed model as well.
    """
    if not settings.block_by_block:
        raise NotBlockwiseError("at_keep measures in the compressed model as well, which is whole")
