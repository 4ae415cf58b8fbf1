"""Everything that the folder of a run says of its model; page and model card are made from it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import Any

from safetensors import SafetensorError

from lowrank_pl.export.health.diagnosis import Diagnosis, Finding
from lowrank_pl.export.health.files import check_digests
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_in
from lowrank_pl.factors.components import NestedComponents
from lowrank_pl.models import hf_format
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.evidence import Evidence, HealthCheck, Speed, read_evidence
from lowrank_pl.report.scores import SUMMARY, Row, Summary, read_summary
from lowrank_pl.utils.files import sha256_of
from lowrank_pl.utils.json_files import json_digest

__all__ = ["Exported", "RunRecord", "digests_of", "read_run"]

_log = logging.getLogger(__name__)

CONFIG = "config.yaml"
OF_ONE_RUN = ("plan.json", "model/plan.json", CONFIG)
"""Files that belong to a run's scores. ``summary.json`` holds their digests, since another run may reuse the folder."""

_OUR_FILES = {"plan.json", SUMMARY, "results.json", "protocol.json", "heal.json"}
_TRANSFORMERS_FILES = re.compile(r"(config|.*_config|tokenizer|vocab|.*tokens(_map)?|.*\.index)\.json")


@dataclass(frozen=True)
class Exported:
    """The exported model of a run.

    Args:
        folder: Its folder.
        merged: Whether its weights are dense again: the factors are multiplied out.
        own_code: Whether the base came with modelling code of its own.
        nested_bytes: Bytes of the components for smaller sizes beside the weights; 0 if there are none.
    """

    folder: Path
    merged: bool = False
    own_code: bool = False
    nested_bytes: int = 0


@dataclass(frozen=True)
class RunRecord:
    """A finished run, or an export with its plan.

    Args:
        folder: Folder of the run or of the export.
        plan: The ranks.
        exported: The exported model; None if there is none.
        summary: Scores and facts of the run; empty for an export.
        evidence: Measurements by other commands.
        command: The command that made the model; empty if it is unknown.
        config: Text of ``config.yaml``.
        missing: What the folder lacks, each with the command that makes it.
    """

    folder: Path
    plan: RankPlan
    exported: Exported | None = None
    summary: Summary = Summary()  # noqa: RUF009 (frozen)
    evidence: Evidence = Evidence()  # noqa: RUF009 (frozen)
    command: str = ""
    config: str = ""
    missing: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The model that was compressed, as it was named to the command."""
        return self.plan.named_base or "an unnamed base"

    @property
    def merged(self) -> bool:
        """Whether the exported weights are dense."""
        return self.exported is not None and self.exported.merged

    @property
    def own_code(self) -> bool:
        """Whether the base came with modelling code of its own."""
        return self.exported is not None and self.exported.own_code

    @property
    def learned(self) -> Row | None:
        """The scores of the model itself; one with an adapter beside it was not healed."""
        return self._row("learned") or self._row("healed") or self._row("not healed")

    @property
    def dense(self) -> Row | None:
        """The scores of its base."""
        return self._row("dense")

    def _row(self, name: str) -> Row | None:
        return next((row for row in self.summary.rows if row.name == name), None)

    @property
    def samples(self) -> list[tuple[str, str, str]]:
        """Triples of prompt, dense and compressed continuation, from the run or else from ``lowrank doctor``."""
        samples = self.summary.facts.get("samples", ())
        found = [(str(prompt), str(dense), str(compressed)) for prompt, dense, compressed in samples]
        if found or self.evidence.health is None:
            return found
        by_doctor = self.evidence.health.diagnosis.samples
        return [(one.prompt, one.dense, one.model) for one in by_doctor if one.dense is not None]

    @property
    def bytes_on_disk(self) -> int | None:
        """Bytes of the exported weight files."""
        if self.exported is None:
            return None
        return sum(file.stat().st_size for file in self.exported.folder.glob("*.safetensors"))

    @property
    def written(self) -> datetime:
        """When the run ended; for an export, when its weights were written."""
        date = self.summary.facts.get("date")
        if isinstance(date, str):
            return datetime.fromisoformat(date)
        folder = self.folder if self.exported is None else self.exported.folder
        return datetime.fromtimestamp(_last_written(folder)).astimezone()

    @property
    def speeds(self) -> list[Speed]:
        """All measured speeds: by the run while it scored, and by other commands."""
        machine = self.summary.facts.get("machine", {})
        place = machine.get("accelerator") or machine.get("processor") or "an unnamed machine"
        rates = self.summary.facts.get("tokens_per_second", {})
        how = f"predicted tokens while the run scored, warm-up included, on {place}"
        dense = rates.get("dense")
        own = [
            Speed(name, rate, how, rate / dense if dense and name != "dense" else None) for name, rate in rates.items()
        ]
        by_evaluate = [
            Speed(score.model, score.tokens_per_second, f"lowrank evaluate, {score.dtype}, {score.source}.json")
            for score in self.evidence.texts
            if score.tokens_per_second is not None
        ]
        return [*own, *by_evaluate, *self.evidence.speeds]


def read_run(folder: str | Path, *, scores: Iterable[Path] = (), check: bool = True) -> RunRecord:
    """Return the record of a finished run, or of an export with its plan.

    Args:
        folder: The folder of either.
        scores: More files of measurements; those in the folder itself are found.
        check: Whether to check the exported weights if ``lowrank doctor`` has not; this reads all of them.

    Raises:
        ValueError: The folder holds neither, or a file in it is damaged; the message says what to do.
    """
    folder = Path(folder)
    _require_plan(folder)
    plan = RankPlan.load(folder / "plan.json")
    is_export = (folder / "config.json").is_file()
    model = folder if is_export else folder / "model" if (folder / "model" / "config.json").is_file() else None
    summary = read_summary(folder) if (folder / SUMMARY).exists() else Summary()
    changed = _changed(folder, summary)
    if set(changed) - {CONFIG}:
        raise ValueError(
            f"{folder / changed[0]} is not the file that {folder / SUMMARY} was written for: another run has begun in "
            "this folder and has not finished, or the file was edited. Finish that run with --ckpt_path, or put the "
            "plan of the scores back; `lowrank export` makes a model of an edited one"
        )
    by_age = sorted(_candidates(folder), key=lambda path: (path.stat().st_mtime, path))
    record = RunRecord(
        folder=folder,
        plan=plan,
        summary=summary,
        evidence=read_evidence(scores, by_age, model=model, written=0.0 if model is None else _last_written(model)),
        config="" if CONFIG in changed else _text(folder / CONFIG),
    )
    command = str(record.summary.facts.get("command") or _command_in_card(model))
    record = replace(record, command=command)
    if model is not None:
        entries = _entries(model)
        merged = not entries and (len(plan.dense_modules) < len(plan.modules) or plan.is_rounded)
        nested = NestedComponents.of_export(model, plan).bytes
        record = replace(record, exported=Exported(model, merged, _has_own_code(model), nested))
        if record.evidence.health is None:
            health = _quick_check(record, model, entries, check=check)
            record = replace(record, evidence=replace(record.evidence, health=health))
    missing = _missing(record, is_export=is_export)
    if CONFIG in changed:
        missing.append(f"{CONFIG} is left out: another run has begun in this folder and has not finished")
    return replace(record, missing=tuple(missing))


def digests_of(run: Path) -> dict[str, str]:
    """Return the SHA-256 digests of the files that a run's scores belong to, by their paths in its folder."""
    found = {name: run / name for name in OF_ONE_RUN if (run / name).is_file()}
    return {
        # Of JSON the content, since editors write it in other lines.
        name: json_digest(json.loads(path.read_bytes())) if path.suffix == ".json" else sha256_of(path.read_bytes())
        for name, path in found.items()
    }


def _changed(folder: Path, summary: Summary) -> list[str]:
    """Return the files that are no longer those of the run whose scores ``summary`` holds."""
    before, now = summary.facts.get("digests", {}), digests_of(folder)
    return [name for name in before if name in now and now[name] != before[name]]


def _require_plan(folder: Path) -> None:
    """Raise unless the folder holds a plan; the message depends on what it holds instead."""
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file: give the folder of a run or of an export")
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}: give the folder of a run or of an export")
    if (folder / "plan.json").is_file():
        return
    for name, made in (("heal.json", "healing, which was dropped or made an adapter"), ("upcycle.json", "upcycling")):
        if (folder / name).is_file():
            raise ValueError(
                f"{str(folder)!r} is a finished run of {made}, with its figures in {name}: it has no plan to report on"
            )
    if (folder / "checkpoints").is_dir():
        last = folder / "checkpoints" / "last.ckpt"
        advice = f"resume its command with --ckpt_path {quote(str(last))}" if last.exists() else "run it again"
        raise ValueError(f"the run in {str(folder)!r} has not finished and has no plan.json yet: {advice}")
    inside = sorted(path.parent.name for path in folder.glob("*/plan.json"))
    if inside:
        more = f" or {len(inside) - 1} more" if len(inside) > 1 else ""
        raise ValueError(f"{str(folder)!r} is a folder of several models: give {folder / inside[0]}{more}")
    if (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is a model without plan.json: copy its plan there, or try `lowrank doctor`")
    raise ValueError(
        f"{str(folder)!r} is not a run: expected plan.json, as `lowrank fit` and `lowrank export` write it, or "
        "results.json of `lowrank compare`"
    )


def _candidates(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that may hold measurements."""
    return [
        path
        for path in folder.glob("*.json")
        if path.name not in _OUR_FILES and not _TRANSFORMERS_FILES.fullmatch(path.name)
    ]


def _last_written(folder: Path) -> float:
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.json")]
    return max(file.stat().st_mtime for file in files)


def _entries(model: Path) -> dict[str, Any]:
    """Return the low-rank modules in the model's config; none if the model is merged."""
    path = model / "config.json"
    try:
        stored = _config(model).get("quantization_config") or {}
        return dict(stored["modules"]) if stored.get("quant_method") == hf_format.METHOD else {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy the folder again or export it again") from None


def _has_own_code(model: Path) -> bool:
    """Return whether the config names modelling code other than this package's, which most exports carry."""
    named = _config(model).get("auto_map") or {}
    return any(not str(name).startswith(f"{Path(hf_format.__file__).stem}.") for name in named.values())


def _config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config


def _quick_check(record: RunRecord, model: Path, entries: dict[str, Any], *, check: bool) -> HealthCheck | None:
    """Return the findings of the checks that need no text; checks that the export made are not repeated.

    Args:
        record: The run.
        model: Folder of the exported model.
        entries: Its low-rank modules.
        check: Whether to read the weights.
    """
    findings = []
    if record.summary.facts.get("verified"):
        what = "values, ranks, counts and tokens were checked when it was written"
        said = f"a fresh process loaded it with transformers alone and got the same logits; {what}"
        findings.append(Finding("export", "healthy", said))
    if not check:
        return HealthCheck(Diagnosis(str(model), findings), "the export") if findings else None
    by = "the export, lowrank report" if findings else "lowrank report"
    _log.info("checking the weights in %s", model)
    # Exports of earlier versions have none.
    digests = check_digests(model, expected=False)
    findings += [] if digests is None else [digests]
    try:
        tensors = tensors_in(model)
    except SafetensorError as error:
        said = f"the weight files can't be read: {error}"
        findings.append(Finding("weights", "broken", said, advice="export it again"))
        return HealthCheck(Diagnosis(str(model), findings), by)
    findings += check_weights(tensors, entries, record.plan.zero_modules)
    if all(f"{name}.weight" in tensors for name in record.plan.stored_layers):
        # The second finding counts parameters. Files may hold tied tensors once or twice, so only a loaded model tells.
        findings.append(check_plan(record.plan, tensors, entries)[0])
    return HealthCheck(Diagnosis(str(model), findings), by)


def _command_in_card(model: Path | None) -> str:
    """Return the command in a model card of this package."""
    card = _text(model and model / "README.md")
    found = re.search(r"^## How it was made\n.*?^(`{3,})bash\n(.*?)\n\1$", card, re.M | re.S)
    return found[2] if found else ""


def _text(path: Path | None) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""


def _missing(record: RunRecord, *, is_export: bool) -> list[str]:
    """Return what a reader may look for in vain, each with the command that makes it."""
    folder, evidence = record.folder, record.evidence
    missing = []
    exported = record.exported
    plan, score, doctor, tasks = (quote(str(folder / f"{name}.json")) for name in ("plan", "score", "doctor", "tasks"))
    model = None if exported is None else quote(str(exported.folder))
    if model is None:
        missing.append(f"No model is exported: lowrank export {plan} --output DIR")
    if not record.summary.rows and not evidence.own_texts:
        why = "An export has no table of scores" if is_export else "There is no summary.json"
        missing.append(f"{why}: lowrank evaluate {model or 'DIR'} --text TEXT --json {score}")
    if model is not None and (evidence.health is None or not evidence.health.thorough):
        why = "The model was not examined"
        if evidence.agreement is None:
            why = "The model was not compared with its base, so KL divergence and agreement are unknown"
        missing.append(f"{why}: lowrank doctor {model} --json {doctor}")
    if model is not None and not evidence.tasks:
        missing.append(
            f"No tasks were scored: lowrank evaluate {model} --reference BASE --tasks piqa,arc_easy --json {tasks}"
        )
    return missing
