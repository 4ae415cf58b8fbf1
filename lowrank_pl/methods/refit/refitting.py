"""Refit: a closed-form update of the factors, block by block, on the compressed model's own inputs."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import SHARE, packed, statistics_of_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import factored_embedding, factored_layer
from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.refit.block import BlockError, BlockWeights
from lowrank_pl.methods.refit.joint import fit_jointly
from lowrank_pl.methods.refit.moments import PairMoments
from lowrank_pl.methods.refit.pair import ModelPair, Pair, Wiring, find_wiring
from lowrank_pl.methods.refit.plan import (
    APPLIED,
    EMBEDDED,
    NO_DERIVATIVE,
    NO_GAIN,
    UNCHANGED,
    UNPAIRED,
    UNROUTED,
    check_belongs,
    refitted_plan,
)
from lowrank_pl.methods.refit.settings import Refit
from lowrank_pl.methods.refit.solve import NOTHING, Choice, Problem, choose, refitted, refitted_left
from lowrank_pl.models.hf_experts import DroppedExpert
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.settings import NOT_FINITE
from lowrank_pl.models.targets import Target, dense_weight
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.text.sequences import count_overlapping, sequences_fingerprint
from lowrank_pl.utils.environment import free_memory
from lowrank_pl.utils.tensor_store import TensorStore

__all__ = ["Refit", "refit"]

_log = logging.getLogger(__name__)


_BUSY = {"cpu": 1_024, "cuda": 32_768}
"""Tokens per pass that keep the device busy. The fixed cost of a pass is smaller then: summing moments in float64 on a
CPU, starting kernels on a GPU."""

_BUSY_JOINT = 4_096
"""At most so many tokens per pass of a joint refit, which keeps activations and their derivatives in float32."""


def refit(
    plan: RankPlan,
    factors: FactorStore,
    subject: Subject,
    *,
    sequences: Tensor,
    settings: Refit | None = None,
    batch_size: int | None = None,
) -> tuple[RankPlan, FactorStore]:
    """Return the plan for factors that are fitted to the compressed model's own inputs, and these factors.

    Compressing a module changes the inputs of all later modules. Modules are refitted in execution order. Each gets new
    factors of the planned rank whose output on the compressed model's inputs ``t`` is close to that of the dense weight
    on the dense model's inputs ``x`` (closed-form updates of SVD-LLM, arXiv 2403.07378, and PIFA, arXiv 2501.19090).
    The objective is ``E s |R' (W x + e - W' t)|^2``. ``e`` is the error of the stream that the output is added to,
    ``R R'`` is the second moment of the outputs' gradients, and ``s`` is the weight of a token: the norm of its
    gradient in the dense model if the factors were made with weighted tokens, else 1.

    The compensated fractions and the damping are chosen for each module on held-back sequences. A module whose error
    there does not fall by the margin keeps its factors. Modules that the plan leaves dense are not changed. A right
    factor that experts share stays as it is: each of them gets a left factor of its own inputs.

    The new factors are written module by module to a folder inside that of ``factors``, so a killed run continues at
    the block that it was in. The passes cost about four passes over all sequences, and one backward pass if tokens are
    weighted. Memory holds the moments of one input, the hidden states of both models for all sequences, and the inputs
    of one block's layers in the dense model. The last two are on the CPU if the GPU lacks room, and the inputs on disk
    if the CPU does.

    Args:
        plan: The plan. A module with an index set is refitted to the same number of components.
        factors: The factors that the plan is for.
        subject: The dense model, which stays unchanged, its targets, and the sequences that the factors were made from.
        sequences: Token ids ``[sequences, length]`` to fit to: the sequences that the factors were made from, or more.
            The first ``Refit.sequences`` are used.
        settings: Settings of the refit.
        batch_size: Sequences per pass; by default enough to keep the device busy.

    Raises:
        ValueError: Plan, factors, model and sequences do not belong together, there are too few sequences, an
            activation is not finite, or experts share factors and a joint refit is asked for.
    """
    work = _Work(plan, factors, subject, sequences, settings or Refit(), batch_size)
    work.run()
    return refitted_plan(plan, work.made, fitted=len(work.fitting), held=len(work.held)), work.made


class _Work:
    """One refit: its store, and its modules group by group."""

    def __init__(
        self,
        plan: RankPlan,
        base: FactorStore,
        subject: Subject,
        sequences: Tensor,
        settings: Refit,
        batch_size: int | None,
    ) -> None:
        model, calibration = subject.model, subject.sequences
        if settings.joint is not None:
            plan.refuse_shared("a joint refit changes both factors of every layer: leave the joint refit out")
        check_belongs(plan, base, model, subject.targets)
        check_sequences(model, sequences)
        self.plan, self.base, self.model, self.settings = plan, base, model, settings
        self.calibration = calibration
        busy = _BUSY.get(model.device.type, _BUSY["cpu"])
        if settings.joint is not None:
            busy = min(busy, _BUSY_JOINT)
        self.batch_size = batch_size or max(1, busy // sequences.shape[1])
        self.fitting, self.held = settings.split(sequences)
        self.sequences = sequences[: settings.sequences]
        self.overlapping = count_overlapping(self.held, [calibration]) > 0
        self.modules = subject.targets.among(plan.modules)
        self.made = FactorStore(*base.derived("refit", self._identity()))
        self._began = 0.0
        self._pending: dict[str, _Made] = {}
        self._read: dict[tuple[Path, str, int], Factors] = {}
        self.made_by = Decomposition.of_fingerprint(base.fingerprint)
        self.two_sided = settings.two_sided and self.made_by.kind == "two_sided"

    def _identity(self) -> dict[str, Any]:
        return {
            **self.settings.identity(),
            "keep": self.plan.keep,
            "plan": self.plan.ranks_digest(),
            "windows": sequences_fingerprint(self.sequences),
            # Whether the factors have seen the held-back text decides what a refit must beat, and some factors
            # (those of the kind svd) don't say what text they were made from.
            "overlapping": self.overlapping,
            # A joint refit steps, or measures curvature, by the batch.
            **({} if self.settings.joint is None else {"batch_size": self.batch_size}),
            # An earlier version ran the compressed model with the dense embeddings: its refits are not used again.
            **({"embeddings": embeddings} if (embeddings := self._embedding_ranks()) else {}),
        }

    def _embedding_ranks(self) -> dict[str, int]:
        """Return the ranks of the factored embeddings, which feed the blocks; those of heads do not count."""
        ranks = {name: self.plan.modules[name].rank for name in self.plan.embedded}
        return {
            name: rank
            for name, rank in ranks.items()
            if rank and isinstance(self.model.get_submodule(name), nn.Embedding)
        }

    def _replacements(self) -> dict[str, nn.Module]:
        """Return what the compressed model has besides the refitted layers, by name."""
        found: dict[str, nn.Module] = {name: DroppedExpert() for name in self.plan.dropped_experts}
        for name in self._embedding_ranks():
            kept = self.base.kept(name, self.plan.modules[name])
            found |= factored_embedding(self.model, name, kept)
        return found

    def run(self) -> None:
        """Refit the modules that are missing; wait if another run is refitting them."""
        with self.made.filling(
            [*dict.fromkeys(target.stored_as for target in self.modules), *self.plan.embedded]
        ) as missing:
            if missing:
                self._copy_embeddings()
                self._make_missing()

    def _copy_embeddings(self) -> None:
        """Keep the factors of embeddings and heads among the targets: no linear layer of a block feeds them alone."""
        for name in self.made.missing(self.plan.embedded):
            _log.info("refit: %s keeps its factors", name)
            notes = {**self.base.notes(name), "refit": EMBEDDED, "seconds": "0"}
            self.made.add(name, self.base.kept(name, self.plan.modules[name]), notes=notes)

    def _make_missing(self) -> None:
        # There is nothing to refit of a dropped expert either.
        names = dict.fromkeys(target.stored_as for target in self.modules)
        dense = [name for name in names if not self.plan.modules[name].rank]
        for name in self.made.missing(dense):
            # A smaller size of the plan may truncate the module.
            self.made.add(name, self.base.factors(name), notes={**self.base.notes(name), "seconds": "0"})
        low_rank = [target for target in self.modules if target.stored_as not in dense]
        absent = set(self.made.missing(target.stored_as for target in low_rank))
        missing = [target.name for target in low_rank if target.stored_as in absent]
        if self.settings.joint is not None:
            blocks = {target.block for target in low_rank if target.name in missing}
            missing = [target.name for target in low_rank if target.block in blocks]
        total, done = len(low_rank), len(low_rank) - len(missing)
        _log.info("refit: %d of %d modules are done, in %s", done, total, self.made.directory)
        if missing:
            with tqdm(total=total, initial=done, desc="refit", unit="module") as bar:
                self._run(low_rank, bar)

    def _run(self, low_rank: Sequence[Target], bar: tqdm[Any]) -> None:
        batches = self._batches(self.sequences)
        joint = self.settings.joint is not None
        # The last layer of a block that writes to the stream may be one that stays dense.
        wiring = find_wiring(self.model, self.modules if joint else low_rank, self.fitting[:1, :32])
        models = ModelPair(self.model, batches, replacements=self._replacements())
        if joint and not models.runs_blocks_alone:
            raise ValueError(
                f"a joint refit runs blocks alone, and the blocks of {type(self.model).__name__} share more than the "
                "hidden state: leave the joint refit out"
            )
        roots = self._output_roots()
        named = {target.name for target in low_rank if wiring[target.name].every_token}
        if joint:
            named.update(filter(None, (self._writer(target.block, wiring) for target in low_rank)))
        norms = self._gradient_norms([target for target in self.modules if target.name in named])
        self._began = time.perf_counter()
        for block, inside in groupby(low_rank, key=lambda target: target.block):
            # Modules that share an input but are not called in sequence form two groups.
            groups = [list(members) for _, members in groupby(inside, key=lambda target: target.group)]
            todo = [[target for target in members if target.stored_as not in self.made] for members in groups]
            jointly = joint and any(todo)
            if jointly:
                # Modules that a killed run has stored are those of a finished joint refit: the block begins anew.
                todo = groups
            leaders = [missing[0].name for missing in todo if missing]
            if leaders:
                paired = {name: self._stream(wiring[name]) for name in leaders if wiring[name].paired}
                models.start_block(block, paired)
            for stage in self._stages(groups, wiring, parts=1 if norms is None else max(map(len, groups))):
                missing = [todo[number] for number in stage if todo[number]]
                if missing:
                    self._solve(missing, wiring, models, roots, norms)
                    bar.update(sum(map(len, missing)))
                for target in chain.from_iterable(groups[number] for number in stage):
                    self._put(target, models)
            if jointly:
                self._fit_jointly(block, models, self._block_weights(block, wiring, roots, norms))
                for target in chain.from_iterable(groups):
                    self._put(target, models)

    def _put(self, target: Target, models: ModelPair) -> None:
        """Let the compressed model have the present factors of a layer."""
        name = target.name
        factors = self._pending[name].factors if name in self._pending else self._factors(target, self.made)
        models.layers[name] = factored_layer(self.model.get_submodule(name), factors)

    def _factors(self, target: Target, store: FactorStore) -> Factors:
        """Return the factors of a layer that the plan keeps of those in ``store``; ``made`` has no others."""
        name = target.stored_as
        entry = self.plan.modules[name]
        if not target.stack:
            return store.factors(name) if store is self.made else store.kept(name, entry)
        key = store.directory, name, target.block
        if key not in self._read:
            # One file has all experts of the block. Those of earlier blocks are done.
            self._read = {one: read for one, read in self._read.items() if one[2] == target.block}
            self._read[key] = store.factors(name) if store is self.made else store.kept(name, entry)
        whole = self._read[key]
        return replace(whole, left=whole.left.chunk(len(entry.layers))[entry.layers.index(target.name)])

    def _writer(self, block: int, wiring: Mapping[str, Wiring]) -> str | None:
        """Return the block's last layer that writes to the stream; None if there is none."""
        inside = [target.name for target in self.modules if target.block == block]
        return next((name for name in reversed(inside) if wiring[name].stream is not None), None)

    def _block_weights(
        self, block: int, wiring: Mapping[str, Wiring], roots: Roots | None, norms: TensorStore | None
    ) -> BlockWeights:
        """Return the weights of a block's outputs: those of the block's last layer that writes to the stream."""
        name = self._writer(block, wiring)
        if roots is None or name is None:
            return BlockWeights()
        tokens = None if norms is None else _weights(norms.read(name, "norms"))
        return BlockWeights(roots.of_outputs(name), tokens)

    def _fit_jointly(self, block: int, models: ModelPair, weights: BlockWeights) -> None:
        """Fit the pending factors of a block together, and store those that are best on held-back text."""
        joint = self.settings.joint
        assert joint is not None
        pending, self._pending = self._pending, {}
        held = range(-(-len(self.fitting) // self.batch_size), len(models.batches))
        notes: dict[str, str] = {}
        try:
            error = BlockError(models, block, {name: made.factors for name, made in pending.items()}, weights)
            unseen = [part for made in pending.values() for part in (made.unseen.left, made.unseen.right)]
            found = fit_jointly(
                error, joint, range(held.start), held, unseen=[part.to(error.values[0]) for part in unseen],
                seed=block, label=f"refit of block {block}",
            )  # fmt: skip
        except NotImplementedError as missing:
            _log.warning("block %d is not refitted jointly: %s", block, missing)
            notes = {"joint": NO_DERIVATIVE}
        else:
            gain = 1 - found.after / found.before if found.before > 0 else 0.0
            taken = gain > self.settings.margin
            notes = {"joint": joint.method if taken else NO_GAIN, "joint_gain": f"{gain:.6g}"}
            if taken:
                pairs = zip(found.values[::2], found.values[1::2], strict=True)
                for (name, made), (left, right) in zip([*pending.items()], pairs, strict=True):
                    pending[name] = replace(made, factors=replace(made.factors, left=left, right=right))
        for name, made in pending.items():
            self._write(name, made.factors, {**made.notes, **notes, "block": str(block)})

    def _batches(self, sequences: Tensor) -> list[Tensor]:
        """Split ``[sequences, length]`` token ids, or values per token, into the batches of the passes."""
        first_held = len(self.fitting)
        return [
            *torch.split(sequences[:first_held], self.batch_size),
            *torch.split(sequences[first_held:], self.batch_size),
        ]

    def _stream(self, wired: Wiring) -> str | None:
        return wired.stream if self.settings.residual else None

    def _stages(self, groups: Sequence[list[Target]], wiring: Mapping[str, Wiring], parts: int) -> list[list[int]]:
        """Return the numbers of the groups that are compared in one pass, in the order in which they are refitted.

        Layers of several experts share a pass, as far as their moments fit the memory.

        Args:
            groups: Layers that share an input, in execution order.
            wiring: Their wiring.
            parts: How many moments a group has.
        """
        stages: dict[tuple[str, int], list[int]] = {}
        before: Counter[str] = Counter()
        for number, (leader, *_) in enumerate(groups):
            experts = wiring[leader.name].experts
            if experts is None:
                stages[leader.name, 0] = [number]
            else:
                # The layers of one expert depend on each other, those of several experts don't.
                expert = leader.name.removeprefix(f"{experts}.").partition(".")[0]
                stages.setdefault((experts, before[f"{experts}.{expert}"]), []).append(number)
                before[f"{experts}.{expert}"] += 1
        free = free_memory(self.model.device)
        memory = None if free is None else SHARE * free
        found = []
        for numbers in stages.values():
            sizes = [parts * PairMoments.bytes_of(groups[number][0].shape[1]) for number in numbers]
            found += [[numbers[place] for place in part] for part in packed(sizes, memory)]
        return found

    def _solve(
        self,
        groups: Sequence[Sequence[Target]],
        wiring: Mapping[str, Wiring],
        models: ModelPair,
        roots: Roots | None,
        norms: TensorStore | None,
    ) -> None:
        """Refit modules in groups that share an input, all of which are compared in one pass."""
        for members in groups:
            if not wiring[members[0].name].paired:
                self._keep_factors(members, UNPAIRED)
        paired = {members[0].name: members for members in groups if wiring[members[0].name].paired}
        if not paired:
            return
        sums = self._moments(paired, wiring, models, norms)
        for name, members in paired.items():
            found = sums[name]
            if found is None:
                self._keep_factors(members, UNPAIRED)
            else:
                # With weighted tokens each module has its own weights, and so its own moments.
                parts = [members] if len(found) < len(members) else [[target] for target in members]
                for part, (fit, held) in zip(parts, found, strict=True):
                    self._solve_group(part, fit, held, wiring, roots)

    def _solve_group(
        self,
        members: Sequence[Target],
        fit: PairMoments,
        held: PairMoments,
        wiring: Mapping[str, Wiring],
        roots: Roots | None,
    ) -> None:
        """Refit modules that share an input and its moments."""
        wired = wiring[members[0].name]
        if not fit.tokens:
            return self._keep_factors(members, UNROUTED)
        if fit.nothing_lost and held.nothing_lost:
            return self._keep_factors(members, UNCHANGED)
        problems = [
            Problem(
                dense_weight(self.model.get_submodule(target.name)).detach(),
                outputs=None if roots is None else roots.of_outputs(target.name),
                has_stream=fit.stream is not None and wiring[target.name].stream == wired.stream,
            )
            for target in members
        ]
        both = fit.merged(held).mean_()
        text = _Text(fit.mean_(), held.mean_(), both)
        settings = self.settings
        choices = choose(problems, text.fit, text.held, blends=settings.blends, dampings=settings.dampings)
        for target, problem, choice in zip(members, problems, choices, strict=True):
            self._decide(target, problem, choice, text)
        return None

    def _moments(
        self,
        groups: Mapping[str, Sequence[Target]],
        wiring: Mapping[str, Wiring],
        models: ModelPair,
        norms: TensorStore | None,
    ) -> dict[str, list[tuple[PairMoments, PairMoments]] | None]:
        """Return moments of the fitted and of the held-back sequences; None if tokens can't be paired.

        Args:
            groups: Modules that share an input, by the name of the first one.
            wiring: Their wiring.
            models: The two models.
            norms: Norms of the gradients of tokens; None if tokens are not weighted. Each module then has its own
                moments, but for modules of experts.
        """
        sums: dict[str, list[tuple[PairMoments, PairMoments]] | None] = {}
        weights: dict[str, list[list[Tensor] | None]] = {}
        for name, members in groups.items():
            leader, weights[name] = members[0], [None]
            if norms is not None and wiring[name].experts is None:
                weights[name] = [self._batches(_weights(norms.read(target.name, "norms"))) for target in members]
            width = leader.shape[0] if self._stream(wiring[name]) is not None else None
            empty = partial(PairMoments.empty, leader.shape[1], stream=width, device=self.model.device)
            sums[name] = [(empty(errors=False), empty()) for _ in weights[name]]
        first_held = -(-len(self.fitting) // self.batch_size)

        def receive(name: str, number: int, inputs: Pair | None, streams: Pair | None) -> None:
            if inputs is None or (self._stream(wiring[name]) is not None and streams is None):
                sums[name] = None
            for (fit, held), weight in zip(sums[name] or (), weights[name], strict=False):
                assert inputs is not None
                part = None if weight is None else weight[number]
                if wiring[name].experts is not None:
                    part = self._routed(models.routing_weights(name))
                try:
                    (fit if number < first_held else held).update(*inputs, streams, weights=part)
                except ValueError as error:
                    raise ValueError(
                        f"{error}: before module {name} in batch {number} of the refit's sequences; {NOT_FINITE}"
                    ) from None

        models.compare([*groups], receive)
        return sums

    def _routed(self, weights: Tensor | None) -> Tensor | None:
        """Return the weights of an expert's tokens, from those that the router gives their outputs.

        An error of the expert's output is multiplied by the router's weight, and its square counts. The gradients that
        two-sided factors are made from hold this weight already, so none is left; where tokens are weighted by the norm
        of their gradients, which takes the weight out again, one is.
        """
        if weights is None or (self.two_sided and not self.made_by.weighs_tokens):
            return None
        return weights if self.two_sided else weights.square()

    def _decide(self, target: Target, problem: Problem, choice: Choice, text: _Text) -> None:
        """Store the refit of a module if it lowers the error on held-back text, otherwise its present factors."""
        present = self._factors(target, self.base)

        def made_from(moments: PairMoments, how: Choice) -> Factors:
            damping = self.made_by.damping
            if not target.stack:
                return refitted(problem, moments, how, len(present.sigma), damping=damping)
            left = refitted_left(problem, moments, how, present.right, damping=damping)
            return replace(present, left=left)

        plain, other = made_from(text.fit, NOTHING), made_from(text.fit, choice)
        errors = problem.errors([present, plain, other], text.held)
        if not all(map(math.isfinite, errors)):
            raise ValueError(f"the errors of {target.name} are {errors}: {NOT_FINITE}")
        # Present factors that were also made from the held-back text have too low an error there. The larger of their
        # error and that of ``plain``, which has not seen the text, is the one to beat.
        before, after = max(errors[:2]) if self.overlapping else errors[0], errors[2]
        gain = 1 - after / before if before > 0 else 0.0
        numbers = {"gain": gain, "drift": choice.drift, "damping": choice.damping}
        if problem.has_stream:
            numbers["stream"] = choice.stream
        _log.debug("%s: error %.4g becomes %.4g by %s", target.name, before, after, choice)
        if gain > self.settings.margin:
            self._store(target, made_from(text.both, choice), APPLIED, numbers, unseen=other)
        else:
            self._store(target, present, NO_GAIN, numbers, unseen=plain if self.overlapping else present)

    def _keep_factors(self, members: Sequence[Target], why: str) -> None:
        for target in members:
            self._store(target, self._factors(target, self.base), why, {})

    def _store(
        self,
        target: Target,
        factors: Factors,
        how: str,
        numbers: Mapping[str, float],
        *,
        unseen: Factors | None = None,
    ) -> None:
        """Store the factors of a module, or keep them for the joint refit of its block.

        Args:
            target: The module.
            factors: Its factors.
            how: What the refit did.
            numbers: What to note beside that.
            unseen: The same, made without the held-back text; None for ``factors``.
        """
        name = target.name
        if not all(torch.isfinite(part.float()).all() for part in (factors.left, factors.right)):
            raise ValueError(f"the refitted factors of {name} hold NaN or infinity: {NOT_FINITE}")
        notes = {"refit": how, **{key: f"{value:.6g}" for key, value in numbers.items()}}
        if self.settings.joint is None and not target.stack:
            self._write(name, factors, notes)
        else:
            # In the precision of the store, so that a run that goes on computes the same.
            rounded = Factors(factors.left.float(), factors.right.float(), factors.sigma.double())
            self._pending[name] = _Made(rounded, notes, rounded if unseen is None else unseen)
        if target.stack:
            self._write_stack(target.stack)

    def _write_stack(self, stack: str) -> None:
        """Store the left factors of layers that share the right one, once all of them are there."""
        layers = self.plan.modules[stack].layers
        if any(layer not in self._pending for layer in layers):
            return
        found = [self._pending.pop(layer) for layer in layers]
        left = torch.cat([made.factors.left for made in found])
        self._write(stack, replace(found[0].factors, left=left), _notes_on_all([made.notes for made in found]))

    def _write(self, name: str, factors: Factors, notes: Mapping[str, str]) -> None:
        # The time of the passes counts for the first module of a group, or of a block with a joint refit.
        spent, self._began = time.perf_counter() - self._began, time.perf_counter()
        self.made.add(name, factors, notes={**self.base.notes(name), **notes, "seconds": f"{spent:.4f}"})

    def _output_roots(self) -> Roots | None:
        """Return the roots that the factors' outputs were weighted by; None if errors are not weighted."""
        if not self.two_sided:
            return None
        return Roots.of_factors(self.base, self.model, self.calibration, self.modules)

    def _gradient_norms(self, watched: Sequence[Target]) -> TensorStore | None:
        """Return the norms of output gradients in the dense model, token by token; None if tokens are not weighted."""
        if not (self.two_sided and self.made_by.weighs_tokens):
            return None
        statistics = statistics_of_factors(self.base, self.model, self.calibration)
        return statistics.on(self.sequences).collect("gradient_norms", watched, self.made_by.labels)


def _notes_on_all(notes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return one note on layers that share a factor: how many were refitted, and what most of these compensate.

    If none was, it is the most common reason.
    """
    applied = [note for note in notes if note["refit"] == APPLIED]
    if not applied:
        reasons = [note["refit"] for note in notes]
        return dict(notes[reasons.index(Counter(reasons).most_common(1)[0][0])])
    kinds = {key: Counter(note[key] for note in applied if key in note) for key in ("drift", "stream", "damping")}
    gain = sum(float(note["gain"]) for note in applied) / len(notes)
    most = {key: counts.most_common(1)[0][0] for key, counts in kinds.items() if counts}
    return {"refit": APPLIED, "gain": f"{gain:.6g}", **most, "layers": f"{len(applied)} of {len(notes)}"}


def _weights(norms: Tensor) -> Tensor:
    """Return token weights from the ``norms`` of their gradients, with a mean of 1."""
    return norms / (norms.double().mean().float() or 1.0)


@dataclass(frozen=True)
class _Made:
    """Factors fitted layer by layer, which wait for the joint refit of their block, and what to note beside them.

    Args:
        factors: The factors.
        notes: The notes.
        unseen: The factors of the same rank that were made without the held-back text.
    """

    factors: Factors
    notes: Mapping[str, str]
    unseen: Factors


class _Text(NamedTuple):
    """Mean moments of the fitted sequences, of the held-back sequences, and of both."""

    fit: PairMoments
    held: PairMoments
    both: PairMoments
