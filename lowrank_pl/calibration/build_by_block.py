"""Factors of a model that is never whole in memory: each block is loaded, run over the text, decomposed and freed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lowrank_pl.calibration.blockwise import BlockwiseBackward, Extent, pass_through_blocks
from lowrank_pl.calibration.build import check_finite, decompose_all, factor_store, statistics_of
from lowrank_pl.calibration.hidden_states import Cache
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition, Labels
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.lazy import NotBlockwiseError, Skeleton
from lowrank_pl.models.targets import Target, droppable
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

    Where gradients are needed, all sequences go forward through one block after the other, and then back. Processes
    that work together (``lowrank_pl.utils.distributed.cooperating``) take a share of the sequences each, and then of
    the decompositions, for which they load one group of linear layers at a time. All need the same folder.

    Args:
        skeleton: The dense base without its weights.
        subject: The skeleton's model with its targets, its tokenizer and the calibration sequences.
        settings: How to decompose.
        directory: Folder of the store; by default one named by the fingerprint in the cache.
        batch_size: Sequences per forward.
        memory: Bytes that the statistics of a block should take at most. A block that takes more is reported, since it
            can't be divided.
        cache: Where the hidden states of all sequences wait between blocks (for gradients, the input of every block);
            by default in main memory, unless that is short.

    Raises:
        ValueError: As in ``build_factors``.
        NotBlockwiseError: Missing statistics have to be measured in the compressed model, or blocks share more than
            the hidden state. Everything that was written before is correct and stays.
    """
    settings = settings or Decomposition()
    if subject.targets.embeddings:
        raise NotBlockwiseError("the statistics of embeddings need passes through the whole model")
    statistics = statistics_of(
        subject, parameters=skeleton.parameters(), directory=directory, batch_size=batch_size, memory=memory
    )
    store = factor_store(subject.targets, statistics.source, settings, directory, batch_size=batch_size)
    # Without embeddings, these are the linear layers and the stacks of experts.
    with store.filling(subject.targets.names) as missing:
        if missing:
            refuse_compressed(settings)
        todo = subject.targets.among(set(missing))
        experts: list[Target] = []
        if subject.constraints.drop_experts and settings.kind == "two_sided":
            found = droppable(skeleton.model, subject.targets)
            experts = statistics.missing("dropped_losses", found, settings.labels)
        _Builder(skeleton, statistics, settings, store, todo, experts).build(cache)
    return store


@dataclass(frozen=True)
class _Builder:
    """Measures and decomposes the linear layers ``todo`` of a model without weights.

    Of ``experts``, the predicted losses of dropping them are measured.

    Several processes first measure everything together. They decompose afterwards: within one block, their shares would
    be far from equal.
    """

    skeleton: Skeleton
    statistics: Statistics
    settings: Decomposition
    store: FactorStore
    todo: Sequence[Target]
    experts: Sequence[Target] = ()

    def build(self, cache: Cache | None) -> None:
        """Write the factors of all layers, with the hidden states in ``cache``."""
        # The first process decides: another one may see fewer of the files that are being written.
        extent = broadcast_from_first(self._extent)
        visit = partial(self._visit, extent)
        pass_through_blocks(self.skeleton, self.statistics.passes, extent, visit, labels=self._labels(), cache=cache)
        if world_size() > 1:
            self._decompose(self.todo, separately=True)
            return
        # The statistics of all later blocks are there, so that nothing has to run through them.
        for block in range(extent.forward, len(self.skeleton.blocks)):
            if self._targets(block):
                with self.skeleton.loaded(self.skeleton.blocks[block]):
                    self._visit(extent, block, None)

    def _extent(self) -> Extent:
        """Return how far passes have to go for the statistics that are missing."""
        missing = {need: self.statistics.missing(need, self.todo, self._labels()) for need in self.settings.needs}
        inputs = missing.pop("inputs", [])
        gradients = [*(target for targets in missing.values() for target in targets), *self.experts]
        return Extent.of(len(self.skeleton.blocks), inputs, gradients)

    def _labels(self) -> Labels:
        return "text" if "weight_fisher" in self.settings.needs else self.settings.labels

    def _targets(self, block: int) -> list[Target]:
        return [target for target in self.todo if target.block == block]

    def _visit(self, extent: Extent, block: int, backward: BlockwiseBackward | None) -> None:
        """Measure the layers of a block whose weights are loaded, and decompose them once all statistics are there."""
        targets, settings, blocks = self._targets(block), self.settings, len(self.skeleton.blocks)
        if backward is None:
            _log.info("block %d of %d: %d modules to decompose", block + 1, blocks, len(targets))
            check_finite(self.skeleton.model, targets)
        experts = [target for target in self.experts if target.block == block]
        if backward is not None and experts:
            self.statistics.collect("dropped_losses", experts, settings.labels, backward=backward)
        if not targets:
            return
        if backward is None and extent.backward is not None and block >= extent.backward:
            # Gradients, and with them the rest, follow on the way back.
            if "inputs" in settings.needs:
                self.statistics.collect("inputs", targets)
            return
        self.statistics.stores(settings.needs, targets, settings.labels, backward=backward)
        if world_size() == 1:
            self._decompose(targets)

    def _decompose(self, targets: Sequence[Target], *, separately: bool = False) -> None:
        """Write the factors of ``targets``, whose weights are loaded; ``separately`` loads them group by group."""
        roots = Roots(self.settings, self.statistics, targets, self.skeleton.device)
        if separately:
            decompose_all(self.skeleton.model, targets, self.store, roots, loading=self._loaded)
        else:
            decompose_all(self.skeleton.model, targets, self.store, roots)

    @contextmanager
    def _loaded(self, targets: Sequence[Target]) -> Iterator[None]:
        """Load the weights of ``targets``, and no others, while the block runs."""
        with self.skeleton.loaded(f"{target.name}.weight" for target in targets):
            check_finite(self.skeleton.model, targets)
            yield


def refuse_compressed(settings: Decomposition) -> None:
    """Refuse a decomposition that can't be made block by block.

    Raises:
        NotBlockwiseError: It needs statistics of the compressed model as well.
    """
    if not settings.block_by_block:
        raise NotBlockwiseError("at_keep measures in the compressed model as well, which needs all blocks at once")
