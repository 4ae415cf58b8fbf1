"""From a base model and calibration sequences to a factor store. Factors that are on disk are not made again."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.embeddings import check_embeddings, decompose_embeddings
from lowrank_pl.calibration.experts import Reached
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import compressed as while_compressed
from lowrank_pl.factors.decomposition import decompose
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.identity import model_fingerprint
from lowrank_pl.models.names import without_expert
from lowrank_pl.models.targets import Target, Targets, dense_weight, droppable
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.convex_hull import predicted_scores
from lowrank_pl.text.sequences import sequences_fingerprint, tokenizer_fingerprint
from lowrank_pl.utils.distributed import is_first, my_balanced_share
from lowrank_pl.utils.files import sha256_of
from lowrank_pl.utils.tensor_store import TensorStore, weight_digest

__all__ = ["build_factors", "build_gradients", "check_finite", "decompose_all", "factor_store", "statistics_of"]

_log = logging.getLogger(__name__)


def build_factors(
    subject: Subject,
    *,
    settings: Decomposition | None = None,
    directory: str | Path | None = None,
    batch_size: int = 1,
    memory: int | None = None,
    gradient_checkpointing: bool = False,
) -> FactorStore:
    """Return a store that holds the factors of every target, making only those that are missing.

    Statistics are kept beside the factors, in stores of their own, so that another decomposition of the same model
    and text starts from them. Where experts may be dropped, what that costs is measured too. Processes that
    work together (``lowrank_pl.utils.distributed.cooperating``) take a share of the sequences and of the decompositions
    each. All need the same folder.

    Args:
        subject: The dense model, its targets, its tokenizer and the calibration sequences.
        settings: How to decompose.
        directory: Folder of the store; by default one named by the fingerprint in the cache.
        batch_size: Sequences per forward.
        memory: Bytes that sums of statistics may take at a time; by default most of the free memory. Larger sums are
            collected block by block (``lowrank_pl.calibration.statistics``). A killed run resumes at its block.
        gradient_checkpointing: Compute each block's activations again in backward passes, to save memory.

    Raises:
        ValueError: ``directory`` holds a store of something else, or a weight or an input is not finite.
    """
    statistics = statistics_of(
        subject, directory=directory, batch_size=batch_size, memory=memory,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    settings = settings or Decomposition()
    store = _factors(subject, statistics, settings, directory)
    if subject.constraints.drop_experts and settings.kind == "two_sided":
        statistics.collect("dropped_losses", droppable(subject.model, subject.targets), settings.labels)
    return store


def factor_store(
    targets: Targets,
    source: Mapping[str, Any],
    settings: Decomposition,
    directory: str | Path | None,
    *,
    batch_size: int = 1,
) -> FactorStore:
    """Return the store for the factors that ``settings`` give of a model and a text, filled or not.

    Args:
        targets: The linear layers to decompose.
        source: Fingerprint of model, tokenizer and sequences.
        settings: How to decompose.
        directory: Its folder; by default one named by the fingerprint in the cache.
        batch_size: Sequences per pass. Gradients are squared, and labels are sampled, batch by batch.

    Raises:
        ValueError: Experts are to share right factors, and ``settings`` are of a kind that can't share them.
    """
    stacks = targets.stacks
    if stacks:
        settings.check_sharing()
    used = {key: source[key] for key in source if settings.needs_text or key in ("model", "config")}
    if batch_size != 1 and settings.needs_gradients:
        used["batch_size"] = batch_size
    if settings.at_keep is not None:
        # The statistics of each module depend on which other modules are compressed.
        used["at_modules"] = sha256_of(*(target.name for target in targets.modules))
    if any(without_expert(skipped.name) in stacks for skipped in targets.skipped):
        # Of all experts of a block a stack's name tells the layers, and of some of them it does not.
        used["stacks"] = sha256_of(*(layer for layers in stacks.values() for layer in layers))
    return FactorStore({**used, **settings.identity()}, directory)


def _factors(
    subject: Subject, statistics: Statistics, settings: Decomposition, directory: str | Path | None
) -> FactorStore:
    targets = subject.targets
    check_embeddings(settings, targets.embeddings, subject.model)
    store = factor_store(targets, statistics.source, settings, directory, batch_size=statistics.passes.batch_size)
    with store.filling(targets.names) as missing:
        _log.info("factors: %d of %d modules to decompose, in %s", len(missing), len(targets.names), store.directory)
        todo = targets.among(set(missing))
        if todo:
            check_finite(subject.model, todo)
            compressed = None
            if settings.at_keep is not None:
                before = None if directory is None else Path(directory) / "dense"
                factors = _factors(subject, statistics, settings.in_dense_model(), before)
                point = settings.point(store.fingerprint["at_modules"])
                compressed = _statistics_compressed(subject, statistics, settings, factors, point)
            roots = Roots(settings, statistics, todo, subject.model.device, compressed)
            decompose_all(subject.model, todo, store, roots)
        embeddings = [target for target in targets.embeddings if target.name in set(missing)]
        if embeddings:
            decompose_embeddings(subject.model, embeddings, store, settings, statistics)
    return store


def _statistics_compressed(
    subject: Subject,
    statistics: Statistics,
    settings: Decomposition,
    factors: FactorStore,
    point: dict[str, Any],
) -> Statistics:
    """Return the statistics of the model compressed to ``settings.at_keep``, collected where they are missing.

    The plan is that of the ``fisher`` allocator on ``factors``, which the same settings give in the dense model, with
    each module stored the cheaper way.
    """
    assert settings.at_keep is not None
    model, targets = subject.model, subject.targets
    budget = Constraints().budget(model, targets, settings.at_keep)
    plan = budget.select(predicted_scores(budget, factors.sigma), method="fisher")
    _log.info("measuring in the model compressed to %.3f of its targeted parameters", plan.keep_targeted)
    with while_compressed(model, plan, factors):
        statistics.compressed(point, can_collect=True).stores(settings.needs, targets.modules, settings.labels)
    return statistics.compressed(point)


def build_gradients(subject: Subject, *, directory: str | Path | None = None) -> TensorStore:
    """Return a store of every target's mean weight gradient ``mean`` ``[out, in]``, making those that are missing.

    Args:
        subject: The dense model, its targets, its tokenizer and the calibration sequences.
        directory: Folder of a factor store whose statistics lie inside it; by default they are in the cache.

    Raises:
        ValueError: A loss or a gradient is not finite.
    """
    statistics = statistics_of(subject, directory=directory)
    return statistics.collect("weight_gradients", subject.targets.modules)


def statistics_of(
    subject: Subject,
    *,
    parameters: Iterable[tuple[str, Tensor]] | None = None,
    directory: str | Path | None = None,
    batch_size: int = 1,
    memory: int | None = None,
    gradient_checkpointing: bool = False,
) -> Statistics:
    """Return the statistics of the subject's model on its sequences: on disk, collected when first needed.

    Arguments are those of ``build_factors`` and ``model_fingerprint``.
    """
    source = {
        **model_fingerprint(subject.model, parameters),
        "tokenizer": tokenizer_fingerprint(subject.tokenizer),
        "text": sequences_fingerprint(subject.sequences),
    }
    passes = Passes(subject.sequences, batch_size, gradient_checkpointing)
    return Statistics(subject.model, passes, source, directory=directory, memory=memory)


def check_finite(model: PreTrainedModel, todo: Sequence[Target]) -> None:
    """Refuse weights that hold NaN or infinity; the statistics would name the modules after them instead.

    Raises:
        ValueError: A weight holds NaN or infinity.
    """
    for target in todo:
        if not torch.isfinite(dense_weight(model.get_submodule(target.name))).all():
            raise ValueError(f"the weight of {target.name} holds NaN or infinity: the checkpoint is damaged")


def decompose_all(
    model: PreTrainedModel,
    todo: Sequence[Target],
    store: FactorStore,
    roots: Roots,
    *,
    loading: Callable[[Sequence[Target]], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Write the factors of ``todo``, linear layers of ``model``, to ``store``, weighted by ``roots``.

    Args:
        model: The model.
        todo: The layers. Processes that work together take a share each.
        store: Where the factors are written.
        roots: The square roots that weight inputs and outputs.
        loading: Loads the weights of some layers for a while, where ``model`` has no weights.
    """
    kinds: Counter[str] = Counter()
    rows: dict[Target, int] = {}
    # Members of a group follow each other in the model's order, so each square root is computed once and dropped.
    alone = [target for target in todo if not target.stack]
    groups = [list(members) for _, members in groupby(alone, key=lambda target: target.group)]
    stacks: dict[str, list[Target]] = defaultdict(list)
    for target in todo:
        if target.stack:
            stacks[target.stack].append(target)
    # What is known of all experts is kept for one block.
    groups = sorted([*groups, *stacks.values()], key=lambda members: members[0].block)
    mine = my_balanced_share(groups, [sum(_svd_cost(target) for target in members) for members in groups])
    bar = tqdm(total=sum(map(len, mine)), desc="decompose", unit="module", disable=not is_first())
    for members in mine:
        with loading(members):
            decompose_members = _decompose_stack if members[0].stack else _decompose_group
            kinds += decompose_members(model, members, store, roots, rows, bar)
    bar.close()
    if kinds["eigen"]:
        _log.warning(
            "%d of %d second moments were not positive definite after damping: their square root was taken by "
            "eigen-decomposition",
            kinds["eigen"],
            kinds.total(),
        )
    for sentence in Reached.of(rows).sentences():
        _log.warning(sentence)


def _decompose_group(
    model: PreTrainedModel,
    members: Sequence[Target],
    store: FactorStore,
    roots: Roots,
    rows: dict[Target, int],
    bar: Any,
) -> Counter[str]:
    """Write the factors of layers that share an input; return how often each kind of square root was taken.

    How many tokens the layers of experts saw is added to ``rows``.
    """
    kinds: Counter[str] = Counter()
    began = time.perf_counter()
    for inputs, sharing in roots.by_inputs(members):
        if inputs is not None:
            kinds[inputs.kind] += 1
        for target in sharing:
            weight = dense_weight(model.get_submodule(target.name)).detach()
            outputs = roots.of_outputs(target.name)
            if outputs is not None:
                kinds[outputs.kind] += 1
            factors = decompose(weight, inputs=inputs, outputs=outputs)
            # The time of a shared square root counts for the first layer that uses it.
            spent, began = time.perf_counter() - began, time.perf_counter()
            made = roots.notes(target, inputs, outputs)
            store.add(target.name, factors, notes={"weight": weight_digest(weight), "seconds": f"{spent:.4f}", **made})
            if "rows" in made:
                rows[target] = int(made["rows"])
            bar.update()
    return kinds


def _decompose_stack(
    model: PreTrainedModel,
    members: Sequence[Target],
    store: FactorStore,
    roots: Roots,
    rows: dict[Target, int],
    bar: Any,
) -> Counter[str]:
    """Write the factors of layers that share the right one, as ``_decompose_group`` does for layers by themselves."""
    began = time.perf_counter()
    weight = torch.cat([dense_weight(model.get_submodule(target.name)).detach() for target in members])
    found = roots.of_stack(members)
    factors = decompose(weight, inputs=found.inputs, outputs=found.outputs)
    made = {
        target: roots.notes(target, found.inputs, root)
        for target, root in zip(members, found.outputs.roots, strict=True)
    }
    kinds: Counter[str] = Counter(root.kind for root in (found.inputs, *found.outputs.roots) if root is not None)
    seen = {target: int(notes["rows"]) for target, notes in made.items() if "rows" in notes}
    notes = {key: value for key, value in made[members[0]].items() if key != "rows"}
    if "eigen" in kinds:
        notes["square_root"] = "eigen"
    if seen:
        notes["rows_of_layers"] = json.dumps([*seen.values()])
    spent = time.perf_counter() - began
    digest = {"weight": weight_digest(weight), "seconds": f"{spent:.4f}"}
    store.add(members[0].stack, factors, notes={**notes, **digest})
    rows |= seen
    bar.update(len(members))
    return kinds


def _svd_cost(target: Target) -> int:
    """Return a number that the operations of the decomposition are proportional to."""
    m, n = target.shape
    return m * n * min(m, n)
