"""A base with narrower MLPs instead of the one that was named, made once and kept in the cache."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import check_finite, statistics_of
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.export.export import save_compressed
from lowrank_pl.factors.decomposition import SquareRoot
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.prune.mlp import Hidden, find_hidden, prune_model, pruned_config
from lowrank_pl.methods.prune.settings import WidthPruning
from lowrank_pl.methods.prune.widths import measured_widths
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Target, Targets, find_targets, model_parameters, targeted_parameters
from lowrank_pl.utils.distributed import broadcast_from_first
from lowrank_pl.utils.files import cache_root, canonical_json, locked, sha256_of, write_json
from lowrank_pl.utils.tensor_store import total_seconds

__all__ = ["Found", "WidthPruning", "apply_pruning", "pruned_base", "pruned_card"]

_log = logging.getLogger(__name__)


_TWO_SIDED = Decomposition("two_sided")


@dataclass(frozen=True)
class Found:
    """How wide MLPs became.

    Args:
        before: Their hidden features before.
        widths: Those that are left in each, as many as before where no narrower ones are predicted to lose less.
        nats: The loss that this is predicted to cost, in nats a token.
        tried: By one width for all, what is predicted with ranks.
        by_block: What is predicted with ranks for ``widths``, where these may differ.
    """

    before: int
    widths: tuple[int, ...]
    nats: float = 0.0
    tried: dict[int, float] = field(default_factory=dict)
    by_block: float | None = None

    @property
    def narrower(self) -> bool:
        """Whether anything was left out."""
        return min(self.widths) < self.before

    @property
    def one_width(self) -> bool:
        """Whether all MLPs have the same."""
        return len(set(self.widths)) == 1


def apply_pruning(
    model: PreTrainedModel,
    targets: Targets,
    statistics: Statistics,
    settings: WidthPruning,
    *,
    base: str,
    keep: float | None,
) -> Found:
    """Narrow the MLPs of ``model``, in place, and return how far.

    Args:
        model: The dense base; its config then says what it was.
        targets: Its linear maps, those of all MLPs among them.
        statistics: Of it; what is missing is collected, by all processes that work together.
        settings: How.
        base: Its name.
        keep: Fraction of the targeted parameters of the first base that ranks are to leave; None where a share is set.

    Raises:
        ValueError: There is no MLP that can be narrowed, or what is to be kept of it is impossible.
    """
    hidden = find_hidden(model, targets)
    present = hidden[0].width
    origin = Origin.of(model) or _origin(model, targets, hidden, base)
    widths = settings.widths(present)
    if not settings.by_block:
        pruned_config(model, hidden, widths[0])
    now, left_out = targeted_parameters(targets), origin.left_out(targets)
    if keep is not None and keep * (now + left_out) > now:
        raise ValueError(
            f"keep is {keep}, and of the targeted parameters of {origin.base} an earlier narrowing has left "
            f"{now / (now + left_out):.4f}: lower keep, or narrow {origin.base} itself"
        )
    measured = _measured(targets, hidden, settings)
    check_finite(model, measured)
    roots = Roots(_TWO_SIDED, statistics, measured, model.device)
    chosen, tried, by_block = [widths[0]] * len(hidden), {}, None
    if settings.share is None:
        assert keep is not None
        limit = int(keep * (now + left_out))
        known = measured_widths(model, targets, hidden, roots, [present, *widths], damping=settings.damping)
        tried = known.losses(limit)
        # Of equals the widest.
        chosen = [min(sorted(tried, reverse=True), key=tried.__getitem__)] * len(hidden)
        if settings.by_block:
            chosen = known.best(limit)
            by_block = known.loss(chosen, limit)
    if min(chosen) == present:
        return Found(present, tuple(chosen), tried=tried, by_block=by_block)

    def weights(reader: Target) -> tuple[Tensor, SquareRoot]:
        moment, outputs = roots.moment_of_inputs(reader), roots.of_outputs(reader.name)
        assert moment is not None
        assert outputs is not None
        return moment, outputs

    nats = prune_model(model, hidden, chosen, weights, damping=settings.damping)
    replace(origin, left={mlp.parent: width for mlp, width in zip(hidden, chosen, strict=True)}).write(model)
    return Found(present, tuple(chosen), nats, tried, by_block)


def _measured(targets: Targets, hidden: Sequence[Hidden], settings: WidthPruning) -> tuple[Target, ...]:
    # What the width is chosen by are the spectra of all maps.
    return targets.modules if settings.share is None else tuple(mlp.reader for mlp in hidden)


def _origin(model: PreTrainedModel, targets: Targets, hidden: Sequence[Hidden], base: str) -> Origin:
    kinds = dict.fromkeys(target.kind for mlp in hidden for target in (*mlp.writers, mlp.reader))
    width = hidden[0].width
    return Origin(base, targeted_parameters(targets), model_parameters(model), width, {}, tuple(kinds))


def pruned_base(subject: Subject, settings: WidthPruning, *, keep: float) -> tuple[str, float | None]:
    """Return the folder of ``base`` with narrower MLPs, made if it is not in the cache, and the seconds that it took.

    Processes that work together share the statistics; the first one narrows and writes, while the others wait.

    Args:
        subject: The base, left as it was, and the calibration sequences. Its name is returned where no narrower MLPs
            are predicted to lose less.
        settings: How to prune.
        keep: Fraction of the targeted parameters that ranks are to leave in the end.

    Raises:
        ValueError: As in ``apply_pruning``, or a share that leaves less than ``keep``.
        ExportError: The folder does not reload as what was written.
    """
    assert subject.base is not None
    base, targets, globs = subject.base.name, subject.targets, subject.constraints
    statistics = statistics_of(subject)
    asked = {**asdict(settings), "keep": keep if settings.share is None else None, "include": list(globs.include)}
    key = sha256_of(canonical_json({**asked, "exclude": list(globs.exclude), **statistics.source}))[:20]
    folder = cache_root() / "narrowed" / key
    record = folder.with_suffix(".json")
    done = broadcast_from_first(lambda: _read(record, folder))
    if done is None:
        measured = _measured(targets, find_hidden(subject.model, targets), settings)
        # By all processes, which then wait for the first one; it finds them on disk.
        spent = statistics.seconds(_TWO_SIDED.needs, measured, _TWO_SIDED.labels)

        def make() -> dict[str, Any]:
            with locked(folder.with_suffix(".lock"), f"narrowing {base}"):
                # Another run that was at it may have made it in the meantime.
                noted = _read(record, folder)
                if noted is None:
                    noted = _make(subject, statistics, settings, keep, folder)
                    noted["seconds"] = total_seconds([spent, noted["seconds"]])
                    write_json(record, noted)
            return noted

        done = broadcast_from_first(make)
    if not done["narrower"]:
        _log.info("at keep %g no narrower MLPs are predicted to lose less than those of %s", keep, base)
        return base, done["seconds"]
    if settings.share is not None and done["left"] < keep:
        raise ValueError(
            f"MLPs with a share of {settings.share} of their hidden features leave {done['left']:.4f} of the targeted "
            f"parameters, less than keep {keep}: raise the share or lower keep"
        )
    _log.info("the base is %s with MLPs of %s hidden features instead of %d: %s", base, *done["width"], folder)
    return str(folder), done["seconds"]


def _read(record: Path, folder: Path) -> dict[str, Any] | None:
    """Return what was noted of an earlier narrowing, if all of it is there."""
    if not record.exists():
        return None
    noted: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return noted if not noted["narrower"] or (folder / "config.json").exists() else None


def _make(
    subject: Subject, statistics: Statistics, settings: WidthPruning, keep: float, folder: Path
) -> dict[str, Any]:
    """Write the narrowed base to ``folder``, and return what is to be noted of it."""
    began = time.perf_counter()
    # Modules are replaced and no number is written to, so that both have the same tensors.
    assert subject.base is not None
    base, targets, model = subject.base.name, subject.targets, subject.model
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    found = apply_pruning(model, targets, statistics, settings, base=base, keep=keep)
    noted: dict[str, Any] = {"base": base, "narrower": found.narrower}
    if noted["narrower"]:
        origin = Origin.of(model)
        assert origin is not None
        # Something of it may be there yet.
        shutil.rmtree(folder, ignore_errors=True)
        save_compressed(model, folder, tokenizer=subject.tokenizer, merge=found.one_width, card=pruned_card(origin))
        after = find_targets(model, include=[target.name for target in targets.modules])
        now = targeted_parameters(after)
        noted |= {
            "width": [origin.widths, found.before],
            "widths": found.widths,
            "left": now / (now + origin.left_out(after)),
        }
    noted |= {"predicted_nats": found.nats, "predicted_nats_with_ranks": found.tried, "by_block": found.by_block}
    return {**noted, "seconds": time.perf_counter() - began}


def pruned_card(origin: Origin) -> str:
    """Return the model card of a narrowed base."""
    loads = (
        "It loads like its base." if origin.one_width else "It loads with `import lowrank_pl` or `trust_remote_code`."
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lowrank_pl\n---\n\n"
        f"# {origin.base.rstrip('/').rsplit('/', 1)[-1]} with narrower MLPs\n\n"
        f"`{origin.base}` narrowed by lowrank_pl: of {origin.width:,} hidden features {origin.widths} are left in "
        f"every MLP, whose last map makes up for the others in closed form. Nothing was fine-tuned. {loads}\n"
    )
