"""Statistics on disk: what was measured on a model and a text is measured once, whoever asks for it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.blockwise import BlockwiseBackward, BlockwiseForward
from lowrank_pl.calibration.gradients import GradientMoments, OutputMeasure, WeightGradients, by_name, measure_gradients
from lowrank_pl.calibration.input_moments import InputMoments, collect_input_moments
from lowrank_pl.calibration.weighted_moments import TokenNorms, WeightedMoments
from lowrank_pl.factors.settings import Labels, Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.lazy import NotBlockwiseError, WholeModel
from lowrank_pl.models.targets import Target
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.utils.distributed import broadcast_from_first, is_first, my_share
from lowrank_pl.utils.environment import free_memory
from lowrank_pl.utils.files import cache_root
from lowrank_pl.utils.tensor_store import TensorStore, read_manifest, total_seconds

__all__ = ["SHARE", "Statistics", "block_groups", "memory_size", "packed", "statistics_of_factors"]

_log = logging.getLogger(__name__)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def block_groups(targets: Sequence[Target], sizes: Mapping[Target, int], memory: float | None) -> list[list[Target]]:
    """Return ``targets`` in groups of as many consecutive blocks as fit ``memory``, but at least one.

    Args:
        targets: Those of a block follow each other.
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
    """Return the places of ``sizes`` in groups that follow each other, as large as fit ``memory``, but at least one.

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


def memory_size(text: str) -> int:
    """Return how many bytes ``text`` names: a number with or without a unit, KB, MB, GB, TB or KiB, MiB, GiB.

    Raises:
        ValueError: It names none.

    >>> memory_size("8GB"), memory_size("1.5 GiB"), memory_size("4096")
    (8000000000, 1610612736, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Z]*)\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if not size:
        raise ValueError(
            f"{text!r} is no amount of memory: expected a positive number and a unit, such as 8GB or 512MiB"
        )
    return size


SHARE = 0.75
"""Of the memory that is free, what sums may take; activations need the rest."""


_SOURCE = ("model", "config", "tokenizer", "text")


Measured = TypeVar("Measured")


OfOutputs = TypeVar("OfOutputs", bound=OutputMeasure)


class Statistics:
    """What is measured on one model and text, each kind in a store of its own that fills when asked.

    Args:
        model: The dense base.
        sequences: ``[sequences, length]`` calibration token ids.
        source: Fingerprint of model, tokenizer and sequences.
        directory: Folder that gets a folder for each kind; by default each lies in the cache under its fingerprint.
        batch_size: Sequences per pass.
        memory: Bytes that the sums of what is collected at a time may take; by default most of what is free where the
            model is. What takes more is collected block by block, in one pass forward and, for gradients, one back
            (``lowrank_pl.calibration.blockwise``). Where blocks share more than the hidden state, as many consecutive ones as fit
            get passes of their own instead, at least one. What is collected is written before the next begins.
        gradient_checkpointing: Compute each block's activations again in backward passes, to save memory.
        collecting: Whether ``model`` is what ``source`` says, so that what is missing can be collected.

    Attributes:
        backward: What gradients come from, where passes are made block by block.
        seconds_before: What these passes took before they came to an entry, shared out among all entries.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Tensor,
        source: Mapping[str, Any],
        *,
        directory: str | Path | None = None,
        batch_size: int = 1,
        memory: int | None = None,
        gradient_checkpointing: bool = False,
        collecting: bool = True,
    ) -> None:
        self.model, self.sequences, self.source, self.batch_size = model, sequences, dict(source), batch_size
        self.memory, self.gradient_checkpointing, self.collecting = memory, gradient_checkpointing, collecting
        self._directory = None if directory is None else Path(directory)
        self.backward: BlockwiseBackward | None = None
        self.seconds_before = 0.0

    def compressed(self, point: Mapping[str, Any], *, collecting: bool = False) -> Statistics:
        """Return the statistics of the same model when it is compressed as ``point`` says, on the same sequences.

        Args:
            point: Added to the fingerprint.
            collecting: Whether the model is compressed so when they are asked for what is missing.
        """
        return self._beside("compressed", self.sequences, point, collecting)

    def on(self, sequences: Tensor) -> Statistics:
        """Return the statistics of the same model on other ``sequences`` ``[sequences, length]``."""
        text = sequences_fingerprint(sequences)
        return self._beside(f"texts/{text[:20]}", sequences, {"text": text}, self.collecting)

    def _beside(self, folder: str, sequences: Tensor, source: Mapping[str, Any], collecting: bool) -> Statistics:
        directory = None if self._directory is None else self._directory / folder
        return Statistics(
            self.model, sequences, {**self.source, **source}, directory=directory, batch_size=self.batch_size,
            memory=self.memory, gradient_checkpointing=self.gradient_checkpointing, collecting=collecting,
        )  # fmt: skip

    def inputs(self, targets: Sequence[Target]) -> TensorStore:
        """Return the store of ``second_moment`` ``[in, in]`` and ``mean_absolute`` ``[in]``, keyed by group."""
        store = self._store_of("inputs")

        def collect(those: Sequence[Target]) -> dict[str, InputMoments]:
            return collect_input_moments(self.model, those, self.sequences, batch_size=self.batch_size)

        groups = {target: target.group for target in targets}
        sizes = {target: 8 * target.shape[1] ** 2 for target in targets}
        self._fill(store, groups, sizes, collect, _input_tensors, lambda found: {"tokens": str(found.tokens)})
        return store

    def unmeasured(self, need: Statistic, targets: Sequence[Target], labels: Labels) -> list[Target]:
        """Return those of ``targets`` of which ``need`` has not been measured yet."""
        store = self._store_of(need, labels)
        return [target for target in targets if (target.group if need == "inputs" else target.name) not in store]

    def output_gradients(self, targets: Sequence[Target], labels: Labels) -> TensorStore:
        """Return the store of ``second_moment`` ``[out, out]`` of output gradients, keyed by module."""
        store = self._store_of("output_gradients", labels)

        def collect(those: Sequence[Target]) -> dict[str, GradientMoments]:
            device = self._device(those)
            return self._measured(
                {target: GradientMoments.empty(target.shape[0], device=device) for target in those}, labels
            )

        names = {target: target.name for target in targets}
        sizes = {target: 8 * target.shape[0] ** 2 for target in targets}
        self._fill(store, names, sizes, collect, _gradient_tensors, lambda found: {"tokens": str(found.tokens)}, labels)
        return store

    def weighted_moments(self, targets: Sequence[Target], labels: Labels) -> TensorStore:
        """Return the store of ``inputs`` ``[in, in]`` and ``outputs`` ``[out, out]``, keyed by module.

        They are the means of ``|g| x x'`` and of ``g g' / |g|``, ``x`` an input and ``g`` the gradient by its output.
        """
        store = self._store_of("weighted_moments", labels)

        def collect(those: Sequence[Target]) -> dict[str, WeightedMoments]:
            device = self._device(those)
            return self._measured(
                {target: WeightedMoments.empty(target.shape, device=device) for target in those}, labels
            )

        names = {target: target.name for target in targets}
        sizes = {target: 8 * sum(side**2 for side in target.shape) for target in targets}
        self._fill(store, names, sizes, collect, _weighted_tensors, lambda found: {"tokens": str(found.tokens)}, labels)
        return store

    def gradient_norms(self, targets: Sequence[Target], labels: Labels) -> TensorStore:
        """Return the store of ``norms`` ``[sequences, length]`` of output gradients, token by token, keyed by module.

        Raises:
            ValueError: A map is not called once for every token.
        """
        store = self._of_gradients("gradient_norms", labels)

        def collect(those: Sequence[Target]) -> dict[str, TokenNorms]:
            shape = self.sequences.shape
            return self._measured(
                {target: TokenNorms.empty(*shape, batch_size=self.batch_size) for target in those}, labels
            )

        names = {target: target.name for target in targets}
        sizes = dict.fromkeys(targets, 4 * self.sequences.numel())
        self._fill(store, names, sizes, collect, lambda found: {"norms": found.norms}, lambda _: {}, labels)
        return store

    def weight_gradients(self, targets: Sequence[Target]) -> TensorStore:
        """Return the store of ``mean`` ``[out, in]`` and ``mean_squares`` ``[out]`` of gradients, keyed by module."""
        store = self._store_of("weight_gradients")

        def collect(those: Sequence[Target]) -> dict[str, WeightGradients]:
            device = self._device(those)
            sums = {target: WeightGradients.empty(target.shape, device=device) for target in those}
            self._differentiate({}, sums, "text")
            return by_name(sums)

        names = {target: target.name for target in targets}
        sizes = {target: 4 * target.shape[0] * target.shape[1] for target in targets}
        self._fill(store, names, sizes, collect, _weight_tensors, lambda found: {"batches": str(found.batches)}, "text")
        return store

    def _measured(self, measures: Mapping[Target, OfOutputs], labels: Labels) -> dict[str, OfOutputs]:
        self._differentiate(measures, {}, labels)
        return by_name(measures)

    def _differentiate(
        self, outputs: Mapping[Target, OutputMeasure], weights: Mapping[Target, WeightGradients], labels: Labels
    ) -> None:
        if self.backward is not None:
            self.backward.measure(outputs, weights, labels)
        else:
            measure_gradients(
                self.model, self.sequences, outputs, weights, labels=labels, batch_size=self.batch_size,
                gradient_checkpointing=self.gradient_checkpointing,
            )  # fmt: skip

    def _device(self, targets: Sequence[Target]) -> torch.device:
        # Of a model that is walked block by block, only what is watched has its weights.
        device: torch.device = next(self.model.get_submodule(targets[0].name).parameters()).device
        return device

    def stores(
        self, needs: Iterable[Statistic], targets: Sequence[Target], labels: Labels
    ) -> dict[Statistic, TensorStore]:
        """Return the store of each statistic that is needed for ``targets``; arguments as in ``seconds``."""
        found: dict[Statistic, TensorStore] = {}
        for need in needs:
            if need == "inputs":
                found[need] = self.inputs(targets)
            elif need == "output_gradients":
                found[need] = self.output_gradients(targets, labels)
            elif need == "weighted_moments":
                found[need] = self.weighted_moments(targets, labels)
            else:
                found[need] = self.weight_gradients(targets)
        return found

    def seconds(self, needs: Iterable[Statistic], targets: Sequence[Target], labels: Labels) -> float | None:
        """Return what collecting the statistics that are needed for ``targets`` took; ``None`` where it is not known.

        Args:
            needs: Which statistics; those that are missing are collected.
            targets: For which maps.
            labels: As in ``output_gradients``.
        """
        names = [target.name for target in targets]
        return total_seconds(
            store.seconds({target.group for target in targets} if need == "inputs" else names)
            for need, store in self.stores(needs, targets, labels).items()
        )

    def _store_of(self, need: Statistic, labels: Labels = "text") -> TensorStore:
        if need == "inputs":
            return self._store("statistics")
        if need == "weight_gradients":
            return self._store(need, batch_size=str(self.batch_size))
        return self._of_gradients(need, labels)

    def _of_gradients(self, need: str, labels: Labels) -> TensorStore:
        # Labels are drawn batch by batch.
        drawn = {"batch_size": str(self.batch_size)} if labels == "sampled" and self.batch_size != 1 else {}
        return self._store(need, labels=labels, **drawn)

    def _store(self, kind: str, **settings: str) -> TensorStore:
        return TensorStore(kind, {**self.source, **settings}, self._directory / kind if self._directory else None)

    def _fill(
        self,
        store: TensorStore,
        keys: Mapping[Target, str],
        sizes: Mapping[Target, int],
        collect: Callable[[Sequence[Target]], dict[str, Measured]],
        tensors: Callable[[Measured], dict[str, Tensor]],
        notes: Callable[[Measured], dict[str, str]],
        labels: Labels | None = None,
    ) -> None:
        """Collect and write what ``store`` lacks: all at once, or block by block.

        Args:
            store: Where it goes.
            keys: What each target's entry is called there.
            sizes: Bytes that the sums of each target's entry take.
            collect: Measures what is asked for of targets.
            tensors: What of the measured is written.
            notes: What is noted beside it.
            labels: Whose next tokens the loss asks for; None where no gradients are needed.
        """

        def gather(those: Sequence[Target]) -> None:
            began = time.perf_counter()
            measured = collect(those)
            # What one pass took is shared out among its files, so that a store knows what it cost however often it
            # resumed.
            seconds = self.seconds_before + (time.perf_counter() - began) / max(1, len(measured))
            # All processes have the sums, each writes a share of them.
            measured = {name: measured[name] for name in my_share(list(measured))}
            for name in tqdm(list(measured), desc=f"saving {_said(store)}", unit="file", disable=not is_first()):
                # Popped, so that memory shrinks as the disk fills.
                found = measured.pop(name)
                store.write(name, tensors(found), notes={**notes(found), "seconds": f"{seconds:.4f}"})

        with store.filling(keys.values()) as missing:
            if missing and not self.collecting:
                raise ValueError(
                    f"what was measured in the compressed model is missing in {store.directory} for {missing[0]} and "
                    f"{len(missing) - 1} more: delete the factors that were made from it and decompose the base again "
                    "(at_keep)"
                )
            lacking, first = set(missing), dict[str, Target]()
            for target, key in keys.items():
                # The first of those that share an entry stands for them all.
                if key in lacking:
                    first.setdefault(key, target)
            if not first:
                return
            todo = list(first.values())
            memory = self._memory(sum(sizes[target] for target in todo))
            groups = block_groups(todo, sizes, memory)
            if len(groups) > 1:
                _log.info("%s are measured block by block, in %.3g GB at a time", _said(store), memory / 1e9)
                try:
                    self._block_by_block(todo, gather, labels)
                    return
                except NotBlockwiseError as error:
                    _log.warning("%s take %d passes through the whole model: %s", _said(store), len(groups), error)
                    left = set(store.missing(first))
                    groups = block_groups([one for key, one in first.items() if key in left], sizes, memory)
            for number, those in enumerate(groups, 1):
                if len(groups) > 1:
                    _log.info(
                        "%s: blocks %d to %d, group %d of %d",
                        _said(store), those[0].block, those[-1].block, number, len(groups),
                    )  # fmt: skip
                gather(those)

    def _memory(self, needed: int) -> float:
        """Return the bytes that sums may take at a time."""
        if self.memory is not None:
            return self.memory
        # One answer for all processes, which have to make the same passes.
        free = broadcast_from_first(lambda: free_memory(self.model.device))
        return max(needed, 1) if free is None else SHARE * free

    def _block_by_block(
        self, todo: Sequence[Target], gather: Callable[[Sequence[Target]], None], labels: Labels | None
    ) -> None:
        """Gather what is missing of one block at a time, in one pass forward and, for gradients, one back.

        Args:
            todo: Maps with something missing.
            gather: Collects and writes it, of maps of a block.
            labels: As in ``_fill``.

        Raises:
            NotBlockwiseError: Blocks share more than the hidden state.
        """
        of_block = {block: list(those) for block, those in groupby(todo, key=lambda target: target.block)}
        whole = WholeModel(self.model)
        lowest, last = (min(of_block), len(whole.blocks) - 1) if labels else (None, max(of_block))
        began = time.perf_counter()
        keep_from = None if lowest is None else lowest - 1
        walk = BlockwiseForward(whole, self.sequences, batch_size=self.batch_size, keep_from=keep_from)
        for block in range(last + 1):
            with walk.at(block):
                if lowest is None and block in of_block:
                    gather(of_block[block])
        if lowest is None or labels is None:
            return
        try:
            self.backward = back = BlockwiseBackward(walk, labels)
            self.seconds_before = (time.perf_counter() - began) / len(todo)
            for block in range(last, lowest - 1, -1):
                with back.at(block):
                    if block in of_block:
                        gather(of_block[block])
        finally:
            self.backward, self.seconds_before = None, 0.0


def statistics_of_factors(factors: FactorStore, model: PreTrainedModel, sequences: Tensor) -> Statistics:
    """Return the statistics that ``factors`` were made from, where they lie.

    Args:
        factors: Those of a decomposition, or of a correction of one.
        model: The dense base.
        sequences: ``[sequences, length]`` calibration token ids that they were made from.
    """
    source = {key: factors.fingerprint[key] for key in _SOURCE if key in factors.fingerprint}
    directory = factors.directory.resolve()
    if "correction" in factors.fingerprint:
        # Corrected factors lie in a folder of those that they were made from.
        directory = directory.parents[1]
    digest = read_manifest(directory)["digest"]
    in_cache = directory == (cache_root() / factors.kind / digest[:20]).resolve()
    batch_size = factors.fingerprint.get("batch_size", 1)
    return Statistics(model, sequences, source, directory=None if in_cache else directory, batch_size=batch_size)


def _said(store: TensorStore) -> str:
    return store.kind.replace("_", " ")


def _input_tensors(moments: InputMoments) -> dict[str, Tensor]:
    return {"second_moment": _prune(moments.second_moment), "mean_absolute": moments.mean_absolute.float()}


def _gradient_tensors(moments: GradientMoments) -> dict[str, Tensor]:
    return {"second_moment": _prune(moments.second_moment)}


def _weighted_tensors(moments: WeightedMoments) -> dict[str, Tensor]:
    return {"inputs": _prune(moments.mean_inputs), "outputs": _prune(moments.mean_outputs)}


def _weight_tensors(gradients: WeightGradients) -> dict[str, Tensor]:
    return {"mean": gradients.mean, "mean_squares": gradients.mean_squares}


def _prune(second: Tensor) -> Tensor:
    # float32 on disk: the batch products were summed from float32 products, more digits would only be noise. But the
    # squares of massive activations may lie beyond its range, and those of faint gradients below it.
    prune = second.float()
    lost = not torch.isfinite(prune).all() or second.diagonal().abs().max() < torch.finfo(torch.float32).tiny * 1e6
    return second if lost else prune
