"""Pruning of a base: the pruned model is made once and kept in the cache."""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import check_finite, statistics_of
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.export.card import plain_card
from lowrank_pl.export.export import save_compressed
from lowrank_pl.factors.decomposition import SquareRoot
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.prune.llm_pruner import apply_llm_pruner, structures_left
from lowrank_pl.methods.prune.mlp import HiddenNeurons, find_hidden_neurons, prune_model, pruned_config
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.methods.prune.structures import neurons_of
from lowrank_pl.methods.prune.widths import measure_widths
from lowrank_pl.models.digests import changed_files
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import EMBEDDINGS, Target, Targets, find_targets, model_parameters, targeted_parameters
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.utils.distributed import broadcast_from_first
from lowrank_pl.utils.files import cache_root, canonical_json, locked, sha256_of, write_json
from lowrank_pl.utils.formatting import code, escaped
from lowrank_pl.utils.json_files import read_json, sealed
from lowrank_pl.utils.tensor_store import total_seconds

__all__ = ["ChosenWidths", "WidthPruning", "apply_pruning", "pruned_base", "pruned_card"]

_log = logging.getLogger(__name__)


_TWO_SIDED = Decomposition("two_sided")


@dataclass(frozen=True)
class ChosenWidths:
    """The widths that pruning chose.

    Args:
        before: Hidden neurons of each MLP before pruning.
        widths: Hidden neurons of each MLP after pruning; equal to ``before`` if no smaller width is predicted to lose
            less.
        nats: Predicted loss of pruning, in nats per token.
        tried: Predicted loss of pruning and rank allocation together, by the width of all MLPs.
        by_block: The same for ``widths``; None unless each MLP has a width of its own.
    """

    before: int
    widths: tuple[int, ...]
    nats: float = 0.0
    tried: dict[int, float] = field(default_factory=dict)
    by_block: float | None = None

    @property
    def any_pruned(self) -> bool:
        """Whether any MLP was pruned."""
        return min(self.widths) < self.before

    @property
    def one_width(self) -> bool:
        """Whether all MLPs have the same width."""
        return len(set(self.widths)) == 1


def apply_pruning(
    model: PreTrainedModel,
    targets: Targets,
    statistics: Statistics,
    settings: WidthPruning,
    *,
    base: str,
    keep: float | None,
    constraints: Constraints = Constraints(),
) -> ChosenWidths:
    """Prune the MLPs of ``model`` in width, in place, and return the chosen widths.

    Args:
        model: The dense base. Its config records its origin afterwards.
        targets: Its target layers, which include the linear layers of all MLPs.
        statistics: Statistics of the base; cooperating processes collect missing ones together.
        settings: How to prune.
        base: Name of the base.
        keep: Fraction of the unpruned base's targeted parameters that remains after rank allocation; None if
            ``settings.share`` is given.
        constraints: Storage, multiples and floors of the ranks; see ``WidthLosses``.

    Raises:
        ValueError: The model has no MLP that can be pruned, ``keep`` can't be reached, or a floor holds for an MLP.
    """
    hidden, widths = _candidates(model, targets, settings, constraints, base=base, keep=keep)
    present = hidden[0].width
    origin = _origin(model, targets, hidden, base)
    now, left_out = targeted_parameters(targets), origin.left_out(targets)
    to_measure = _targets_to_measure(targets, hidden, settings)
    check_finite(model, to_measure)
    roots = Roots(_TWO_SIDED, statistics, to_measure, model.device)
    chosen, tried, by_block = [widths[0]] * len(hidden), {}, None
    if settings.share is None:
        assert keep is not None
        limit = int(keep * (now + left_out))
        known = measure_widths(
            model, targets, hidden, roots, [present, *widths], damping=settings.damping, constraints=constraints
        )
        tried = known.losses(limit)
        # Of equal losses, the widest.
        chosen = [min(sorted(tried, reverse=True), key=tried.__getitem__)] * len(hidden)
        if settings.by_block:
            chosen, by_block = known.best(limit, chosen[0])
    if min(chosen) == present:
        return ChosenWidths(present, tuple(chosen), tried=tried, by_block=by_block)

    def weights(reader: Target) -> tuple[Tensor, SquareRoot]:
        moment, outputs = roots.moment_of_inputs(reader), roots.of_outputs(reader.name)
        assert moment is not None
        assert outputs is not None
        return moment, outputs

    nats = prune_model(model, hidden, chosen, weights, damping=settings.damping)
    replace(origin, left={mlp.parent: width for mlp, width in zip(hidden, chosen, strict=True)}).write(model)
    return ChosenWidths(present, tuple(chosen), nats, tried, by_block)


def _candidates(
    model: PreTrainedModel,
    targets: Targets,
    settings: WidthPruning,
    constraints: Constraints,
    *,
    base: str,
    keep: float | None,
) -> tuple[Sequence[HiddenNeurons], list[int]]:
    """Return the MLPs and their candidate widths, ascending, before anything is measured.

    Raises:
        ValueError: The model has no MLP that can be pruned, too few parameters are left for ``keep``, no ranks are
            small enough for it, or a floor holds for an MLP.
    """
    hidden = find_hidden_neurons(model, targets)
    _refuse_floors(constraints, (target.name for mlp in hidden for target in (*mlp.writers, mlp.reader)))
    present = hidden[0].width
    origin = _origin(model, targets, hidden, base)
    widths = settings.widths(present)
    if not settings.by_block:
        pruned_config(model, hidden, widths[0])
    now, left_out = targeted_parameters(targets), origin.left_out(targets)
    if keep is not None and keep * (now + left_out) > now:
        raise ValueError(
            f"keep is {keep}, but earlier width pruning has left only {now / (now + left_out):.4f} of the targeted "
            f"parameters of {origin.base}: lower keep, or prune {origin.base} itself"
        )
    if keep is not None and settings.share is not None:
        gone = sum(neurons_of(mlp).parameters for mlp in hidden) * (present - widths[0])
        left = (now - gone) / (now + left_out)
        if left < keep:
            raise ValueError(
                f"MLPs pruned to a share of {settings.share} leave {left:.4f} of the targeted parameters, less than "
                f"keep {keep}: raise the share or lower keep"
            )
    if keep is not None and settings.share is None:
        constraints.budget(model, targets, keep)
    return hidden, widths


def _refuse_floors(constraints: Constraints, pruned: Iterable[str]) -> None:
    """Refuse floors of layers that are to be pruned: pruning would leave less of them than the floors say."""
    for name in pruned:
        for pattern, floor in constraints.floors.items():
            if floor > 0 and fnmatchcase(name, pattern):
                raise ValueError(
                    f"the floor {floor} of {pattern!r} holds for {name}, which pruning makes smaller: give a pattern "
                    "that matches no pruned layer, or leave pruning out"
                )


def _targets_to_measure(
    targets: Targets, hidden: Sequence[HiddenNeurons], settings: WidthPruning
) -> tuple[Target, ...]:
    # The choice of a width needs the spectra of all linear layers, a fixed share only the moments of the neurons.
    return targets.modules if settings.share is None else tuple(mlp.reader for mlp in hidden)


def _origin(model: PreTrainedModel, targets: Targets, hidden: Sequence[HiddenNeurons], base: str) -> Origin:
    kinds = tuple(dict.fromkeys(target.kind for mlp in hidden for target in (*mlp.writers, mlp.reader)))
    found = Origin.of(model)
    if found is None:
        return Origin(base, targeted_parameters(targets), model_parameters(model), hidden[0].width, {}, kinds)
    # Heads alone may have been pruned before.
    return found if found.width else replace(found, width=hidden[0].width, maps=kinds)


def pruned_base(subject: Subject, settings: WidthPruning | LLMPruner, *, keep: float) -> tuple[str, float | None]:
    """Return the cached folder of the pruned base, made if it is absent, and the seconds that pruning took.

    If no smaller width is predicted to lose less, the name of the base itself is returned. Cooperating processes
    collect the statistics together. The first process then prunes and writes, while the others wait.

    Args:
        subject: The base, which stays unchanged, and the calibration sequences.
        settings: How to prune.
        keep: Fraction of the targeted parameters that remains after rank allocation, if ranks are allocated.

    Raises:
        ValueError: As in ``apply_pruning`` and ``apply_llm_pruner``, or the settings leave fewer parameters than
            ``keep``.
        ExportError: The reloaded folder differs from the pruned model.
    """
    if subject.base is None:
        raise ValueError(
            "a base was asked to be pruned, but the subject names none, and the pruned model records what it was made "
            "from: give Subject its base, or use apply_pruning"
        )
    if subject.targets.embeddings:
        raise ValueError(
            "a base was asked to be pruned for a plan with embeddings among its targets, whose ranks pruning does not "
            f"foresee: prune it with `lowrank prune` first, or leave out --include {EMBEDDINGS}"
        )
    base, targets, globs = subject.base.name, subject.targets, subject.constraints
    statistics = statistics_of(subject)
    asked = settings.describe()
    by_pruning = keep
    if isinstance(settings, LLMPruner):
        by_pruning = asked["keep"] = keep if settings.keep is None else settings.keep
        if by_pruning < keep:
            raise ValueError(f"keep of llm_pruner is {by_pruning}, less than keep {keep}: raise it, or lower keep")
        prunable, _ = structures_left(subject.model, targets, settings, by_pruning)
        _refuse_floors(globs, (layer.name for layer in prunable.layers))
        collect = partial(statistics.seconds, ["weight_gradients"], prunable.layers, "text")
    else:
        asked["keep"] = keep if settings.share is None else None
        hidden, _ = _candidates(subject.model, targets, settings, globs, base=base, keep=keep)
        to_measure = _targets_to_measure(targets, hidden, settings)
        collect = partial(statistics.seconds, _TWO_SIDED.needs, to_measure, _TWO_SIDED.labels)
        if settings.share is None:
            asked |= _rank_costs(globs, subject.model)
    targeted = {"include": list(globs.include), "exclude": list(globs.exclude)}
    key = sha256_of(canonical_json({**asked, **targeted, **statistics.source}))[:20]
    folder = cache_root() / "narrowed" / key
    record = folder.with_suffix(".json")
    done = broadcast_from_first(lambda: _read(record, folder))
    if done is None:
        # All processes collect the statistics; the first one then finds them on disk.
        spent = collect()

        def make() -> dict[str, Any]:
            with locked(folder.with_suffix(".lock"), f"pruning {base}"):
                # Another run that held the lock may have finished the folder in the meantime.
                noted = _read(record, folder)
                if noted is None:
                    noted = _make(subject, statistics, settings, by_pruning, folder)
                    noted["seconds"] = total_seconds([spent, noted["seconds"]])
                    write_json(record, sealed(noted))
            return noted

        done = broadcast_from_first(make)
    if not done["narrower"]:
        _log.info("at keep %g no smaller MLP width is predicted to lose less than that of %s", keep, base)
        return base, done["seconds"]
    if isinstance(settings, LLMPruner):
        _log.info("the base is %s, pruned by llm_pruner to %s: %s", base, done["described"], folder)
        return str(folder), done["seconds"]
    _log.info("the base is %s, pruned to %s of %d hidden neurons per MLP: %s", base, *done["width"], folder)
    return str(folder), done["seconds"]


def _rank_costs(constraints: Constraints, model: PreTrainedModel) -> dict[str, Any]:
    """Return what else the choice of a width depends on, as JSON values.

    Values that earlier versions always used are left out, so that the bases that they pruned are found again.
    """
    given = {
        "storage": constraints.storage,
        "rank_multiple_of": constraints.multiple_of,
        "bytes_per_parameter": model.dtype.itemsize,
        "floors": dict(constraints.floors),
    }
    first = {"storage": "auto", "rank_multiple_of": 1, "bytes_per_parameter": 4, "floors": {}}
    return {name: value for name, value in given.items() if value != first[name]}


@dataclass(frozen=True)
class PrunedRecord:
    """What is read again of the record of a pruned base."""

    base: str
    narrower: bool
    seconds: float | None
    left: float = 1.0
    width: tuple[str, int] = ("", 0)
    described: str = ""


def _read(record: Path, folder: Path) -> dict[str, Any] | None:
    """Return the record of an earlier pruning; None if the record or the model is absent.

    Raises:
        ValueError: The record or a file of the model is damaged.
    """
    if not record.exists():
        return None
    what, advice = "the record of a pruned base", "delete it, so that the base is pruned again"
    noted: dict[str, Any] = read_json(record, PrunedRecord, what=what, advice=advice)
    if not noted["narrower"]:
        return noted
    if not (folder / "config.json").exists():
        return None
    changed = changed_files(folder)
    if changed:
        raise ValueError(f"{folder} is damaged ({', '.join(changed)} changed): delete the folder and run again")
    return noted


def _make(
    subject: Subject, statistics: Statistics, settings: WidthPruning | LLMPruner, keep: float, folder: Path
) -> dict[str, Any]:
    """Write the pruned base to ``folder`` and return its record."""
    began = time.perf_counter()
    # Pruning replaces modules and writes to no tensor, so the copy can share the tensors of the base.
    assert subject.base is not None
    base, targets, model = subject.base.name, subject.targets, subject.model
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    noted: dict[str, Any] = {"base": base, "narrower": True}
    if isinstance(settings, LLMPruner):
        apply_llm_pruner(model, targets, statistics, settings, base=base, keep=keep)
    else:
        found = apply_pruning(
            model, targets, statistics, settings, base=base, keep=keep, constraints=subject.constraints
        )
        noted["narrower"] = found.any_pruned
        if found.any_pruned:
            noted |= {"widths": found.widths}
        noted |= {"predicted_nats": found.nats, "predicted_nats_with_ranks": found.tried, "by_block": found.by_block}
    if noted["narrower"]:
        origin = Origin.of(model)
        assert origin is not None
        # A killed run may have left part of the folder.
        shutil.rmtree(folder, ignore_errors=True)
        save_compressed(model, folder, tokenizer=subject.tokenizer, merge=origin.one_width, card=pruned_card(origin))
        after = find_targets(model, include=[target.name for target in targets.modules])
        now = targeted_parameters(after)
        noted |= {
            "width": [origin.widths, origin.width],
            "described": origin.described,
            "left": now / (now + origin.left_out(after)),
        }
    return {**noted, "seconds": time.perf_counter() - began}


def pruned_card(origin: Origin) -> str:
    """Return the model card of a pruned base."""
    loads = (
        "It loads like its base." if origin.one_width else "It loads with `import lowrank_pl` or `trust_remote_code`."
    )
    name = escaped(origin.base.rstrip("/").rsplit("/", 1)[-1])
    if origin.method:
        return plain_card(
            f"{name}, pruned by {origin.method}",
            f"{code(origin.base)} pruned by lowrank_pl as in LLM-Pruner (arXiv 2305.11627), to {origin.described}. The "
            f"weights that are left are those of the base, and nothing was fine-tuned. {loads}",
        )
    return plain_card(
        f"{name} with pruned MLPs",
        f"{code(origin.base)} pruned by lowrank_pl: {origin.widths} of {origin.width:,} hidden neurons are left in "
        "every MLP, and its down-projection was updated in closed form to compensate. Nothing was fine-tuned. "
        f"{loads}",
    )
