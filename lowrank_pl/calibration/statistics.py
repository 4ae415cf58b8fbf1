"""Statistics on disk: measured once for a model and a text, whichever method needs them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.blockwise import BlockwiseBackward, Extent, pass_through_blocks
from lowrank_pl.calibration.embedding_moments import EmbeddingMoments, PlainEmbeddingMoments
from lowrank_pl.calibration.expert_losses import DroppedLosses
from lowrank_pl.calibration.experts import with_other_experts
from lowrank_pl.calibration.gradients import GradientMoments, WeightFisher, WeightGradients, collect_gradients
from lowrank_pl.calibration.input_moments import InputMoments, collect_input_moments
from lowrank_pl.calibration.measures import GradientMeasure, Measure, Passes
from lowrank_pl.calibration.weighted_moments import TokenNorms, WeightedMoments
from lowrank_pl.factors.settings import Labels, Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.forward import forward_until
from lowrank_pl.models.lazy import NotBlockwiseError, WholeModel
from lowrank_pl.models.targets import Target, body_of
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.utils.distributed import broadcast_from_first, is_first, my_share
from lowrank_pl.utils.environment import free_memory
from lowrank_pl.utils.files import cache_root
from lowrank_pl.utils.tensor_store import TensorStore, read_manifest, total_seconds

__all__ = ["MEASURES", "SHARE", "Statistics", "block_groups", "packed", "statistics_of_factors"]

_log = logging.getLogger(__name__)

SHARE = 0.75
"""Fraction of the free memory that sums may take; activations need the rest."""

_SOURCE = ("model", "config", "tokenizer", "text")
"""What of a fingerprint of factors their statistics depend on."""

_DERIVED = ("correction", "refit")
"""The steps, by their names in fingerprints, that make factors of other factors."""

MEASURES: dict[Statistic, type[Measure]] = {
    "inputs": InputMoments,
    "output_gradients": GradientMoments,
    "weighted_moments": WeightedMoments,
    "gradient_norms": TokenNorms,
    "weight_gradients": WeightGradients,
    "weight_fisher": WeightFisher,
    "dropped_losses": DroppedLosses,
    "embedding_moments": EmbeddingMoments,
    "plain_embedding_moments": PlainEmbeddingMoments,
}


def block_groups(targets: Sequence[Target], sizes: Mapping[Target, int], memory: float | None) -> list[list[Target]]:
    """Return ``targets`` in groups of as many consecutive blocks as fit ``memory``, at least one.

    Args:
        targets: Linear layers in the order of their blocks.
        sizes: Bytes that each takes.
        memory: Bytes that a group may take; None is no limit.
    """
    blocks = [list(members) for _, members in groupby(targets, key=lambda target: target.block)]
    needed = [sum(sizes[target] for target in members) for members in blocks]
    if memory is not None and max(needed, default=0) > memory:
        text = "one block alone takes %.3g GB, more than the %.3g GB of the memory budget: going block by block"
        _log.warning(text, max(needed) / 1e9, memory / 1e9)
    return [[target for number in group for target in blocks[number]] for group in packed(needed, memory)]


def packed(sizes: Sequence[float], memory: float | None) -> list[list[int]]:
    """Return the indices of ``sizes`` in consecutive groups, each as large as fits ``memory``, with at least one index.

    >>> packed([2, 3, 1, 9, 1], 5)
    [[0, 1], [2], [3], [4]]
    """
    groups: list[list[int]] = []
    taken = 0.0
    for place, size in enumerate(sizes):
        if not groups or (memory is not None and taken + size > memory):
            groups.append([])
            taken = 0.0
        groups[-1].append(place)
        taken += size
    return groups


class Statistics:
    """What is measured on one model and text: a store on disk for each kind, filled when it is first asked for.

    Args:
        model: The dense base.
        passes: The calibration sequences, and how they are run.
        source: Fingerprint of model, tokenizer and sequences.
        directory: Folder that gets a folder for each kind; by default each lies in the cache under its fingerprint.
        memory: Bytes that sums may take at a time; by default most of the free memory of the model's device. Larger
            sums are collected block by block, in one forward pass and, for gradients, one backward pass. Where blocks
            share more than the hidden state, as many consecutive blocks as fit get passes of their own. Sums are
            written before the next are collected.
        can_collect: Whether ``model`` is the one that ``source`` names, so that missing statistics can be collected.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        passes: Passes,
        source: Mapping[str, Any],
        *,
        directory: str | Path | None = None,
        memory: int | None = None,
        can_collect: bool = True,
    ) -> None:
        self.model, self.passes, self.source = model, passes, dict(source)
        self.memory, self.can_collect = memory, can_collect
        self._directory = None if directory is None else Path(directory)

    def compressed(self, point: Mapping[str, Any], *, can_collect: bool = False) -> Statistics:
        """Return the statistics of the model when it is compressed, on the same sequences.

        Args:
            point: How the model is compressed; it is added to the fingerprint.
            can_collect: Whether the model is compressed in this way while statistics are collected.
        """
        return self._beside("compressed", self.passes, point, can_collect)

    def on(self, sequences: Tensor) -> Statistics:
        """Return the statistics of the same model on other ``sequences`` ``[sequences, length]``."""
        text = sequences_fingerprint(sequences)
        passes = replace(self.passes, sequences=sequences)
        return self._beside(f"texts/{text[:20]}", passes, {"text": text}, self.can_collect)

    def _beside(self, folder: str, passes: Passes, source: Mapping[str, Any], can_collect: bool) -> Statistics:
        directory = None if self._directory is None else self._directory / folder
        return Statistics(
            self.model, passes, {**self.source, **source}, directory=directory, memory=self.memory,
            can_collect=can_collect,
        )  # fmt: skip

    def missing(self, statistic: Statistic, targets: Sequence[Target], labels: Labels) -> list[Target]:
        """Return the ``targets`` whose ``statistic`` has not been measured yet."""
        kind = MEASURES[statistic]
        store = self._store(kind, labels)
        return [target for target in self._measured_for(kind, targets) if kind.key(target) not in store]

    def _measured_for(self, kind: type[Measure], targets: Sequence[Target]) -> Sequence[Target]:
        """Return the layers to measure for ``targets``."""
        return with_other_experts(targets, self.model) if kind.shrinks_experts else targets

    def collect(
        self,
        statistic: Statistic,
        targets: Sequence[Target],
        labels: Labels = "text",
        *,
        backward: BlockwiseBackward | None = None,
    ) -> TensorStore:
        """Return the store of one ``statistic`` of ``targets``; missing entries are collected and written first.

        The class of each statistic in ``MEASURES`` describes the tensors of an entry.

        Args:
            statistic: What to measure.
            targets: The linear layers.
            labels: Whose next tokens the loss asks for, where gradients are needed.
            backward: The backward pass through the block of ``targets``, in a block-wise pass.

        Raises:
            ValueError: The statistics of a compressed model are missing, or an input or a gradient is not finite.
        """
        kind = MEASURES[statistic]
        store = self._store(kind, labels)
        keys = {target: kind.key(target) for target in self._measured_for(kind, targets)}
        with store.filling(keys.values()) as missing:
            if missing and not self.can_collect:
                raise ValueError(
                    f"what was measured in the compressed model is missing in {store.directory} for {missing[0]} and "
                    f"{len(missing) - 1} more: delete the factors that were made from it and decompose the base again "
                    "(at_keep)"
                )
            # The first of the layers that share an entry stands for all of them.
            absent = set(missing)
            first = {key: target for target, key in reversed(keys.items()) if key in absent}
            todo = [target for target, key in keys.items() if first.get(key) is target]
            if todo:
                _Filling(self, kind, store, labels).fill(todo, backward)
        return store

    def stores(
        self,
        needs: Iterable[Statistic],
        targets: Sequence[Target],
        labels: Labels,
        *,
        backward: BlockwiseBackward | None = None,
    ) -> dict[Statistic, TensorStore]:
        """Return the store of each statistic in ``needs``; other arguments as in ``collect``."""
        return {need: self.collect(need, targets, labels, backward=backward) for need in needs}

    def seconds(self, needs: Iterable[Statistic], targets: Sequence[Target], labels: Labels) -> float | None:
        """Return how long collecting the statistics in ``needs`` took; None where that is not known.

        Missing statistics are collected. Arguments are those of ``stores``.
        """
        return total_seconds(
            store.seconds({MEASURES[need].key(target) for target in targets})
            for need, store in self.stores(needs, targets, labels).items()
        )

    def memory_for(self, needed: int, device: torch.device | None = None) -> float:
        """Return the bytes that sums may take at a time, where all sums together take ``needed``.

        Args:
            needed: Bytes of all sums.
            device: Where they are; by default the model's device.
        """
        if self.memory is not None:
            return self.memory
        # All processes make the same passes, so the first one decides.
        free = broadcast_from_first(lambda: free_memory(device or self.model.device))
        return max(needed, 1) if free is None else SHARE * free

    def _store(self, kind: type[Measure], labels: Labels) -> TensorStore:
        identity = {**self.source, **kind.identity(labels, self.passes.batch_size)}
        return TensorStore(kind.folder, identity, self._directory / kind.folder if self._directory else None)


class _Filling:
    """Collects one kind of statistic and writes it to its store.

    Args:
        statistics: The model, the passes, and the memory for sums.
        kind: What to measure.
        store: Where it is written.
        labels: Whose next tokens the loss asks for.
    """

    def __init__(self, statistics: Statistics, kind: type[Measure], store: TensorStore, labels: Labels) -> None:
        self.statistics, self.kind, self.store, self.labels = statistics, kind, store, labels
        self.model, self.passes = statistics.model, statistics.passes
        self.called = store.kind.replace("_", " ")

    def fill(self, todo: Sequence[Target], backward: BlockwiseBackward | None) -> None:
        """Collect and write the statistic of ``todo``: all at once, or block by block where memory is short."""
        if backward is not None and any(target.experts for target in todo):
            self._gather_block(todo, backward)
            return
        sizes = {target: self.kind.bytes_of(target, self.passes) for target in todo}
        memory = self.statistics.memory_for(sum(sizes.values()))
        groups = block_groups(todo, sizes, memory)
        if len(groups) > 1:
            _log.info("%s are measured block by block, in %.3g GB at a time", self.called, memory / 1e9)
            try:
                self._block_by_block(todo)
                return
            except NotBlockwiseError as error:
                _log.warning("%s take %d passes through the whole model: %s", self.called, len(groups), error)
                groups = block_groups([one for one in todo if self.kind.key(one) not in self.store], sizes, memory)
        for number, members in enumerate(groups, 1):
            if len(groups) > 1:
                first, last = members[0].block, members[-1].block
                _log.info("%s: blocks %d to %d, group %d of %d", self.called, first, last, number, len(groups))
            self._gather(members, backward)

    def _block_by_block(self, todo: Sequence[Target]) -> None:
        """Collect and write the statistic of one block at a time.

        Raises:
            NotBlockwiseError: Blocks share more than the hidden state.
        """
        of_block = {block: list(members) for block, members in groupby(todo, key=lambda target: target.block)}
        differentiate = issubclass(self.kind, GradientMeasure)
        model = WholeModel(self.model)
        extent = Extent.of(len(model.blocks), *([], todo) if differentiate else (todo, []))

        def visit(block: int, backward: BlockwiseBackward | None) -> None:
            if block in of_block and (backward is not None) == differentiate:
                self._gather_block(of_block[block], backward)

        pass_through_blocks(model, self.passes, extent, visit, labels=self._labels())

    def _labels(self) -> Labels:
        return self.kind.labels(self.labels) if issubclass(self.kind, GradientMeasure) else self.labels

    def _gather_block(self, targets: Sequence[Target], backward: BlockwiseBackward | None) -> None:
        """Collect and write the statistic of ``targets``, which lie in one block.

        The block of a mixture goes back several times where the sums of all its experts do not fit the memory.
        """
        if backward is None or not any(target.experts for target in targets):
            self._gather(targets, backward)
            return
        sizes = [self.kind.bytes_of(target, self.passes) for target in targets]
        device = next(self.model.get_submodule(targets[0].name).parameters()).device
        parts = packed(sizes, self.statistics.memory_for(sum(sizes), device))
        if len(parts) > 1:
            text = "%s of block %d take %.3g GB: they are measured in %d passes"
            _log.info(text, self.called, targets[0].block + 1, sum(sizes) / 1e9, len(parts))
        for part in parts:
            self._gather([targets[place] for place in part], backward, last=part is parts[-1])

    def _gather(
        self, targets: Sequence[Target], backward: BlockwiseBackward | None = None, *, last: bool = True
    ) -> None:
        """Collect the statistic of ``targets`` in one pass, and write it."""
        began = time.perf_counter()
        measured = self._measure(targets, backward, last)
        # The time of a pass is shared out among its entries, so that the store knows the total however often a run was
        # resumed.
        seconds = (time.perf_counter() - began) / max(1, len(measured))
        if backward is not None:
            seconds += backward.seconds_per_entry
        # All processes have the sums. Each writes a share of them.
        mine = {name: measured[name] for name in my_share(list(measured))}
        measured.clear()
        for name in tqdm(list(mine), desc=f"saving {self.called}", unit="file", disable=not is_first()):
            # Popped, so that memory shrinks while files are written.
            found = mine.pop(name)
            self.store.write(name, found.tensors(), notes={**found.notes(), "seconds": f"{seconds:.4f}"})

    def _measure(self, targets: Sequence[Target], backward: BlockwiseBackward | None, last: bool) -> dict[str, Measure]:
        kind, measured = self.kind, dict[str, Measure]()
        if not issubclass(kind, GradientMeasure):
            body = body_of(self.model)
            inside = {*body.modules()}
            # No linear layer of a block reads what the head computes, which may be a target itself.
            blocks = all(self.model.get_submodule(target.name) in inside for target in targets)
            with forward_until(self.model, body) if blocks else nullcontext():
                measured.update(collect_input_moments(self.model, targets, self.passes))
        elif backward is None:
            measured.update(collect_gradients(kind, self.model, targets, self.passes, labels=self.labels))
        else:
            assert backward.labels == self._labels()
            # In a block-wise pass only the layers of the current block have their weights.
            device: torch.device = next(self.model.get_submodule(targets[0].name).parameters()).device
            gradients = {kind.key(target): kind.empty(target, self.passes, device) for target in targets}
            backward.measure(gradients, last=last and not kind.others_follow)
            measured.update(gradients)
        return measured


def statistics_of_factors(factors: FactorStore, model: PreTrainedModel, sequences: Tensor) -> Statistics:
    """Return the statistics that ``factors`` were made from, where they lie.

    Args:
        factors: The factors of a decomposition, or of the correction of one.
        model: The dense base.
        sequences: ``[sequences, length]`` calibration token ids that the factors were made from.
    """
    source = {key: factors.fingerprint[key] for key in _SOURCE if key in factors.fingerprint}
    passes = Passes(sequences, batch_size=factors.fingerprint.get("batch_size", 1))
    if "heal" in factors.fingerprint:
        # Trained factors lie in the folder of their run.
        return Statistics(model, passes, source)
    directory = factors.directory.resolve()
    for _ in set(factors.fingerprint) & set(_DERIVED):
        # Such factors lie in a folder inside that of the factors that they were made from.
        directory = directory.parents[1]
    digest = read_manifest(directory)["digest"]
    in_cache = directory == (cache_root() / factors.kind / digest[:20]).resolve()
    return Statistics(model, passes, source, directory=None if in_cache else directory)
