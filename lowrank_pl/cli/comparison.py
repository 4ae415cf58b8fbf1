"""One comparison of methods on one model: shared statistics, one budget and one protocol for all of them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import build_factors, statistics_of
from lowrank_pl.calibration.provenance import base_notes, describe_origin
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.likelihood import perplexity
from lowrank_pl.factors.compression import compressed, deployed_plan
from lowrank_pl.factors.settings import Statistic
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.methods.prune.base import pruned_base
from lowrank_pl.methods.quantize.byte_budget import allocate_bytes
from lowrank_pl.methods.quantize.quantizing import quantize
from lowrank_pl.methods.quantize.settings import ByteBudget
from lowrank_pl.methods.recipes import Recipe
from lowrank_pl.methods.refit.refitting import Refit, refit
from lowrank_pl.models.identity import model_fingerprint
from lowrank_pl.models.targets import model_parameters
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.comparison import DENSE, read_results, write_comparison
from lowrank_pl.text.sequences import count_overlapping, sequences_fingerprint
from lowrank_pl.training.short_run import ShortRuns
from lowrank_pl.utils.environment import (
    command_line,
    describe_machine,
    peak_memory,
    reset_peak_memory,
)
from lowrank_pl.utils.files import LOCK, canonical_json, locked, sha256_of, write_json
from lowrank_pl.utils.json_files import read_json
from lowrank_pl.utils.tensor_store import total_seconds
from lowrank_pl.version import __version__

__all__ = ["Comparison", "warn_of_known_text"]


_log = logging.getLogger(__name__)

_Made = tuple[PreTrainedModel, RankPlan, dict[str, float | None]]
"""A model to score, its plan, and the seconds of making it by step."""


def warn_of_known_text(scored: Mapping[str, Tensor], subject: Subject, recipes: Mapping[str, Recipe]) -> None:
    """Warn of sequences to score whose text statistics, learning or a refit see: their perplexity flatters.

    Args:
        scored: ``[sequences, length]`` token ids of every text to score, by its name.
        subject: The calibration text, its tokenizer, and the sequences for statistics.
        recipes: The methods, which say how much of the text they learn from or are fitted to.
    """
    assert subject.calibration is not None
    length = subject.calibration.length
    counts = [method.learning.sequences for method in recipes.values() if method.learning is not None]
    counts += [method.heal.tokens // length for method in recipes.values() if method.heal is not None]
    counts += [method.refit.sequences for method in recipes.values() if method.refit is not None]
    seen = replace(subject.calibration, sequences=max([len(subject.sequences), *counts])).tokens(subject.tokenizer)
    for corpus, sequences in scored.items():
        known = count_overlapping(sequences, [seen], subject.tokenizer)
        if known:
            _log.warning(
                "%d of %d sequences of %s hold text that methods are calibrated on: their perplexity flatters",
                known,
                len(sequences),
                corpus,
            )


@dataclass
class Comparison:
    """A comparison on one model, one calibration text and the texts to score: one stored result per method and size."""

    run: Path
    subject: Subject
    seed: int
    scored: dict[str, Tensor]
    plotted: Sequence[str]

    def results(self, recipes: Mapping[str, Recipe], keeps: Sequence[float]) -> list[dict[str, Any]]:
        """Make missing results; return all results in the folder, including those of earlier calls."""
        self._claim_folder()
        if (DENSE, 1.0) not in self._stored():
            self._store(self._dense())
        dense = self._stored()[DENSE, 1.0]
        # Dense modules with fewer bits have one size.
        sizes = {name: [1.0] if recipe.dense else sorted(keeps, reverse=True) for name, recipe in recipes.items()}
        todo = [(name, keep) for name in recipes for keep in sizes[name]]
        self._warn_of_other_settings(recipes, todo)
        made = False
        for number, (name, keep) in enumerate(todo, 1):
            identity = self._identity(recipes[name], keep)
            if self._is_stored(name, keep, identity):
                _log.info("%d of %d: %s at keep %s is already done", number, len(todo), name, keep)
                continue
            _log.info("%d of %d: %s at keep %s", number, len(todo), name, keep)
            with locked(self._folder(name, keep) / LOCK, f"making {name} at keep {keep:g} in {self.run}"):
                # Asked again, because the run that held the lock may have made it.
                if not self._is_stored(name, keep, identity):
                    self._store(self._result(name, recipes[name], keep, identity, dense))
            made = True
        if not made:
            # The plots may have to show other methods than last time.
            self._store()
        return list(self._stored().values())

    def _warn_of_other_settings(self, recipes: Mapping[str, Recipe], todo: Sequence[tuple[str, float]]) -> None:
        """Warn of results that stay in the table although their method has other settings or another seed now."""
        old = [
            f"{name} at keep {keep}"
            for (name, keep), row in self._stored().items()
            if name in recipes and (name, keep) not in todo and row["identity"] != self._identity(recipes[name], keep)
        ]
        if old:
            _log.warning(
                "%s in %s: made with other settings, another seed or another version, and not made again; add these "
                "sizes to --keep, or name another folder with --run",
                *(", ".join(old), self.run),
            )

    def _stored(self) -> dict[tuple[str, float], dict[str, Any]]:
        """Return the results in the folder by method and size."""
        return {(row["method"], row["keep"]["asked"]): row for row in read_results(self.run)}

    def _is_stored(self, name: str, keep: float, identity: str) -> bool:
        return self._stored().get((name, keep), {}).get("identity") == identity

    def _store(self, *rows: dict[str, Any]) -> None:
        """Add ``rows`` to the results in the folder, in place of those of the same methods and sizes."""
        with locked(self.run / LOCK, f"writing results to {self.run}"):
            stored = self._stored()
            stored.update({(row["method"], row["keep"]["asked"]): row for row in rows})
            write_comparison(self.run, list(stored.values()), command=command_line(), plotted=self.plotted)

    def _claim_folder(self) -> None:
        """Check that the folder's results were made from the same model, calibration and protocol."""
        constraints = self.subject.constraints
        protocol = {
            "base": model_fingerprint(self.subject.model),
            "calibration": sequences_fingerprint(self.subject.sequences),
            "scores": {name: sequences_fingerprint(sequences) for name, sequences in self.scored.items()},
            "options": {
                "include": list(constraints.include),
                "exclude": list(constraints.exclude),
                "multiple_of": constraints.multiple_of,
            },
        }
        path = self.run / "protocol.json"
        with locked(self.run / LOCK, f"claiming {self.run}"):
            if not path.exists():
                write_json(path, protocol)
        theirs = read_json(path, dict[str, Any], what="the settings of a comparison", advice="name another folder")
        differ = [key for key in protocol if theirs.get(key) != protocol[key]]
        if differ:
            raise ValueError(
                f"{self.run} holds a comparison made with other settings ({', '.join(differ)} differ): name another "
                "folder with --run, or delete that one"
            )

    def _folder(self, name: str, keep: float) -> Path:
        return self.run / name / f"keep-{keep:g}"

    def _identity(self, method: Recipe, keep: float) -> str:
        return sha256_of(__version__, canonical_json(method.describe()), str(keep), str(self.seed))

    def _dense(self) -> dict[str, Any]:
        reset_peak_memory(self.subject.model.device)
        nats, seconds = self._score(DENSE, self.subject.model)
        parameters = model_parameters(self.subject.model)
        # The kept fractions are below 1 if the base itself was pruned.
        whole = self.subject.budget(1.0)
        return {
            "method": DENSE,
            "settings": {},
            "identity": "",
            "fingerprint": model_fingerprint(self.subject.model),
            "keep": {
                "asked": 1.0,
                "targeted": whole.present / whole.total,
                "model": parameters / whole.model_parameters,
            },
            "parameters": parameters,
            "bytes": parameters * self.subject.model.dtype.itemsize,
            **_figures(nats, nats),
            "ranks": {},
            "seconds": {"scores": seconds},
            "peak_memory": peak_memory(self.subject.model.device),
            "machine": describe_machine(self.subject.model.device),
        }

    def _result(
        self, name: str, method: Recipe, keep: float, identity: str, dense: Mapping[str, Any]
    ) -> dict[str, Any]:
        if method.prune is None:
            return self._on_base(name, method, keep, identity, dense, {})
        # The pruned model is released before the next one is loaded.
        at, spent = self._pruned(method, keep)
        if at is self and method.only_prunes:
            # At this size nothing is removed, so there is nothing to heal.
            method = replace(method, heal=None)
        return at._on_base(name, method, keep, identity, dense, {"narrowing": spent})

    def _on_base(
        self,
        name: str,
        method: Recipe,
        keep: float,
        identity: str,
        dense: Mapping[str, Any],
        spent: Mapping[str, float | None],
    ) -> dict[str, Any]:
        make = self._only_pruned if method.only_prunes else self._with_factors
        with make(name, method, keep) as (model, plan, costs):
            nats, seconds = self._score(f"{name} at {keep:g}", model)
        return {
            "method": name,
            "settings": method.describe(),
            "identity": identity,
            "fingerprint": dict(plan.fingerprint),
            "keep": {"asked": keep, "targeted": plan.keep_targeted, "model": plan.keep_model},
            "parameters": plan.kept_model_parameters,
            "bytes": plan.bytes,
            **_figures(nats, dense["nats"]),
            "ranks": {module: entry.rank for module, entry in plan.modules.items()},
            **({"bits": plan.bits} if plan.is_rounded else {}),
            "dense_modules": len(plan.dense_modules),
            **({"dropped_experts": len(plan.dropped_experts)} if plan.dropped_modules else {}),
            "notes": list(plan.notes),
            "seconds": {**spent, **costs, "scores": seconds},
            "peak_memory": peak_memory(self.subject.model.device),
            "machine": describe_machine(self.subject.model.device),
        }

    @contextmanager
    def _only_pruned(self, name: str, method: Recipe, keep: float) -> Iterator[_Made]:
        """Yield the pruned base itself, healed where the method asks for it."""
        model, plan, costs = self.subject.model, self._without_ranks(name, keep), dict[str, float | None](plan=0.0)
        reset_peak_memory(model.device)
        if method.heal is not None:
            folder = self._training("healing", self._identity(method, keep), keep)
            model, note, costs["healing"] = self._short_runs.heal_pruned(method.heal, folder)
            plan = replace(plan, notes=(*plan.notes, note))
        yield model, plan, costs

    @contextmanager
    def _with_factors(self, name: str, method: Recipe, keep: float) -> Iterator[_Made]:
        """Yield the base with the factors of the method's plan, refitted, healed and rounded as the method asks."""
        costs = self._prepare(method)
        reset_peak_memory(self.subject.model.device)
        plan, store, costs["plan"] = self._plan(name, method, keep)
        if method.refit is not None:
            plan, store = self._refit(plan, store, method, method.refit)
            # The stored time, because an earlier or killed comparison may have done the refit.
            costs["refit"] = store.seconds(plan.stored_modules)
        if method.heal is not None:
            # Rounding comes after it.
            folder = self._training("healing", self._identity(replace(method, rounding=None), keep), keep)
            plan, store, costs["healing"] = self._short_runs.heal(plan, store, method.heal, folder)
        if method.rounding is not None:
            plan, store = quantize(plan, store, self.subject, settings=method.rounding)
            costs["rounding"] = store.seconds(plan.stored_modules)
        plan.save(self._folder(name, keep) / "plan.json")
        with compressed(self.subject.model, plan, store):
            yield self.subject.model, deployed_plan(self.subject.model, plan), costs

    @property
    def _short_runs(self) -> ShortRuns:
        return ShortRuns(self.subject, self.seed)

    def _training(self, kind: str, identity: str, keep: float) -> Path:
        """Return the folder of a training run, of the kind ``learning`` or ``healing``."""
        return self.run / kind / f"{identity[:12]}-keep-{keep:g}"

    def _without_ranks(self, name: str, keep: float) -> RankPlan:
        """Return the plan that counts what pruning has left, with every linear layer dense."""
        budget = self.subject.budget(keep)
        plan = budget.fit(dict.fromkeys(budget.shapes, math.inf), method=name)
        fingerprint = model_fingerprint(self.subject.model)
        return plan.with_origin(plan.origin, fingerprint, base_notes(self.subject))

    def _pruned(self, method: Recipe, keep: float) -> tuple[Comparison, float | None]:
        """Return this comparison on the pruned base, and the seconds of pruning, possibly in an earlier run."""
        subject = self.subject
        assert subject.base is not None
        assert method.prune is not None
        folder, spent = pruned_base(self._subject_of(method), method.prune, keep=keep)
        if folder == subject.base.name:
            return self, spent
        base = replace(subject.base, name=folder)
        model = base.load().to(subject.model.device)
        return replace(self, subject=replace(subject, base=base, model=model)), spent

    def _prepare(self, method: Recipe) -> dict[str, float | None]:
        """Make the statistics and factors of a method; return their seconds, possibly in an earlier run."""
        settings = method.decomposition
        subject = self._subject_of(method)
        factors = build_factors(subject, settings=settings)
        statistics = statistics_of(self.subject)
        needs: dict[Statistic, None] = dict.fromkeys(settings.needs)
        if method.needs_weight_gradients:
            needs["weight_gradients"] = None
        spent = [statistics.seconds(needs, self.subject.targets.modules, settings.labels)]
        if settings.at_keep is not None:
            there = statistics.compressed(settings.point(factors.fingerprint["at_modules"]))
            spent.append(there.seconds(settings.needs, self.subject.targets.modules, settings.labels))
        return {
            "statistics": total_seconds(spent),
            "factors": factors.seconds(subject.targets.names),
        }

    def _refit(
        self, plan: RankPlan, store: FactorStore, method: Recipe, settings: Refit
    ) -> tuple[RankPlan, FactorStore]:
        assert self.subject.calibration is not None
        text = replace(self.subject.calibration, sequences=settings.sequences)
        sequences = text.tokens(self.subject.tokenizer)
        return refit(plan, store, self._subject_of(method), sequences=sequences, settings=settings)

    def _subject_of(self, method: Recipe) -> Subject:
        """Return the subject under the constraints of ``method``."""
        return replace(self.subject, constraints=method.constrained(self.subject.constraints))

    def _score(self, label: str, model: PreTrainedModel) -> tuple[dict[str, float], float]:
        """Return the nats per token of ``model`` on every text, and the seconds of scoring."""
        began = time.perf_counter()
        nats = {
            corpus: perplexity(model, sequences, progress=f"score {label} on {corpus}").nats
            for corpus, sequences in self.scored.items()
        }
        return nats, time.perf_counter() - began

    def _plan(self, name: str, method: Recipe, keep: float) -> tuple[RankPlan, FactorStore, float]:
        """Return the plan of ``method`` with its origin, the factors that it is for, and the seconds of making it."""
        began = time.perf_counter()
        if method.learning is not None:
            # What comes later does not affect learning, so a method and its +refit share one learning run.
            learned = self._identity(replace(method, refit=None, heal=None, rounding=None), keep)
            return self._short_runs.learn(method, keep, self._training("learning", learned, keep))
        subject = self._subject_of(method)
        if method.in_bytes:
            budget = ByteBudget(keep=keep, **method.settings)
            plan, store = allocate_bytes(subject, budget, decomposition=method.decomposition)
            return plan, store, time.perf_counter() - began
        if method.dense:
            store = build_factors(subject, settings=method.decomposition)
            plan = self._without_ranks(name, keep)
            plan = plan.with_origin(describe_origin(subject, method.decomposition, store), store.fingerprint)
            return plan, store, time.perf_counter() - began
        plan, store = allocate_ranks(
            subject,
            keep=keep,
            allocator=make_allocator(method.allocator, **method.settings),
            decomposition=method.decomposition,
        )
        return plan, store, time.perf_counter() - began


def _figures(nats: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {
        "nats": dict(nats),
        "perplexity": {corpus: float(torch.tensor(value, dtype=torch.float64).exp()) for corpus, value in nats.items()},
        "excess": {corpus: value - dense[corpus] for corpus, value in nats.items()},
    }
