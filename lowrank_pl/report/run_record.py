"""Everything that a run's folder says of its model: what the page and the model card are made from."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lowrank_pl.export.health.diagnosis import Diagnosis, Finding
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_in
from lowrank_pl.models import hf_format
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.evidence import Evidence, Speed, read_evidence
from lowrank_pl.report.scores import SUMMARY, Row, read_summary

__all__ = ["RunRecord", "read_run"]

_log = logging.getLogger(__name__)


_OURS = {"plan.json", SUMMARY, "results.json", "protocol.json"}


_OF_TRANSFORMERS = re.compile(r"(config|.*_config|tokenizer|vocab|.*tokens(_map)?|.*\.index)\.json")


@dataclass(frozen=True)
class RunRecord:
    """What is known of a finished run or of an export.

    Args:
        folder: The folder of the run, or of the export.
        plan: The ranks.
        model: Folder of the exported model; None where there is none.
        rows: The table of scores; empty for an export.
        facts: What else the run noted.
        evidence: What other commands measured.
        command: How it was made, as far as that is known.
        config: Text of ``config.yaml``.
        merged: Whether the exported weights are dense.
        own_code: Whether the base came with code of its own.
        missing: What the folder lacks, each with what would make it.
    """

    folder: Path
    plan: RankPlan
    model: Path | None = None
    rows: tuple[Row, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    evidence: Evidence = Evidence()  # noqa: RUF009 (frozen)
    command: str = ""
    config: str = ""
    merged: bool = False
    own_code: bool = False
    missing: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The model that was compressed, as it was named."""
        return self.plan.named_base or "an unnamed base"

    @property
    def row(self) -> Row | None:
        """The scores of the model itself."""
        return next((row for row in self.rows if row.name == "learned"), None)

    @property
    def dense(self) -> Row | None:
        """The scores of its base."""
        return next((row for row in self.rows if row.name == "dense"), None)

    @property
    def samples(self) -> list[tuple[str, str, str]]:
        """Prompt, dense and compressed continuation; of the run, or else of the doctor."""
        noted = [(str(prompt), str(dense), str(small)) for prompt, dense, small in self.facts.get("samples", ())]
        if noted or self.evidence.diagnosis is None:
            return noted
        said = self.evidence.diagnosis.samples
        return [(one.prompt, one.dense, one.model) for one in said if one.dense is not None]

    @property
    def bytes_on_disk(self) -> int | None:
        """Bytes of the exported weight files."""
        return None if self.model is None else sum(file.stat().st_size for file in self.model.glob("*.safetensors"))

    @property
    def written(self) -> datetime:
        """When the run ended; for an export, when its weights were written."""
        noted = self.facts.get("date")
        if isinstance(noted, str):
            return datetime.fromisoformat(noted)
        return datetime.fromtimestamp(_last_written(self.model or self.folder)).astimezone()

    @property
    def speeds(self) -> list[Speed]:
        """All speeds that were measured: while the run scored, and by other commands."""
        machine = self.facts.get("machine", {})
        place = machine.get("accelerator") or machine.get("processor") or "an unnamed machine"
        rates = self.facts.get("tokens_per_second", {})
        how = f"predicted tokens while the run scored, sequences one at a time, first ones included, on {place}"
        dense = rates.get("dense")
        own = [
            Speed(name, rate, how, rate / dense if dense and name != "dense" else None) for name, rate in rates.items()
        ]
        passes = [
            Speed(one.model, one.tokens_per_second, f"lowrank evaluate, {one.dtype}, {one.source}.json")
            for one in self.evidence.passes
            if one.tokens_per_second is not None
        ]
        return [*own, *passes, *self.evidence.speeds]


def read_run(folder: str | Path, *, scores: Iterable[Path] = (), look: bool = True) -> RunRecord:
    """Return what the folder of a finished run, or of an export with its plan, says.

    Args:
        folder: The folder.
        scores: Files of more scores; those in the folder itself are found.
        look: Whether to check the exported weights where ``lowrank doctor`` has not; that reads them all.

    Raises:
        ValueError: The folder is none of both, or something in it is damaged; the message says what to do.
    """
    folder = Path(folder)
    _check_folder(folder)
    plan = RankPlan.load(folder / "plan.json")
    is_export = (folder / "config.json").is_file()
    model = folder if is_export else folder / "model" if (folder / "model" / "config.json").is_file() else None
    rows, facts = read_summary(folder) if (folder / SUMMARY).exists() else ([], {})
    entries = {} if model is None else _entries(model)
    by_age = sorted(_candidates(folder), key=lambda path: (path.stat().st_mtime, path))
    evidence = read_evidence(scores, by_age, model=model, written=0.0 if model is None else _last_written(model))
    if evidence.diagnosis is None and model is not None:
        evidence = _checked(evidence, model, plan, entries, facts, look=look)
    record = RunRecord(
        folder=folder,
        plan=plan,
        model=model,
        rows=tuple(rows),
        facts=facts,
        evidence=evidence,
        command=str(facts.get("command") or _command_in_card(model)),
        config=_text(folder / "config.yaml"),
        merged=model is not None and not entries and len(plan.dense_modules) < len(plan.modules),
        own_code=model is not None and _has_own_code(model),
    )
    return replace(record, missing=tuple(_missing(record, is_export=is_export)))


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file: give the folder of a run or of an export")
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}: give that of a run or of an export")
    if (folder / "plan.json").is_file():
        return
    if (folder / "checkpoints").is_dir():
        last = folder / "checkpoints" / "last.ckpt"
        advice = f"go on with `lowrank fit ... --ckpt_path {last}`" if last.exists() else "run it again"
        raise ValueError(f"the run in {str(folder)!r} has not ended, there is no plan.json yet: {advice}")
    inside = sorted(path.parent.name for path in folder.glob("*/plan.json"))
    if inside:
        more = f" or {len(inside) - 1} more" if len(inside) > 1 else ""
        raise ValueError(f"{str(folder)!r} holds several models and is none: give {folder / inside[0]}{more}")
    if (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is a model without plan.json: copy its plan there, or try `lowrank doctor`")
    raise ValueError(
        f"{str(folder)!r} is no run: expected plan.json, as `lowrank fit` and `lowrank export` write it, or "
        "results.json of `lowrank compare`"
    )


def _candidates(folder: Path) -> list[Path]:
    """Return the JSON files of a folder that may hold scores."""
    return [
        path for path in folder.glob("*.json") if path.name not in _OURS and not _OF_TRANSFORMERS.fullmatch(path.name)
    ]


def _last_written(folder: Path) -> float:
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.json")]
    return max(file.stat().st_mtime for file in files)


def _entries(model: Path) -> dict[str, Any]:
    """Return what the config says of each low-rank module; nothing in a merged model's."""
    path = model / "config.json"
    try:
        said = _config(model).get("quantization_config") or {}
        return dict(said["modules"]) if said.get("quant_method") == hf_format.METHOD else {}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy the folder again or export it again") from None


def _has_own_code(model: Path) -> bool:
    """Return whether the config names code other than this package's, which exports of known classes bring."""
    named = _config(model).get("auto_map") or {}
    return any(not str(name).startswith(f"{Path(hf_format.__file__).stem}.") for name in named.values())


def _config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config


def _checked(
    evidence: Evidence, model: Path, plan: RankPlan, entries: dict[str, Any], facts: Mapping[str, Any], *, look: bool
) -> Evidence:
    """Return ``evidence`` with the checks that need no text; those that the export made are not made again."""
    findings = []
    if facts.get("verified"):
        said = "a fresh process loaded it with transformers alone, to the same logits; values, ranks, counts and tokens"
        findings.append(Finding("export", "healthy", f"{said} were checked when it was written"))
    by = "the export"
    if look:
        by = f"{by}, lowrank report" if findings else "lowrank report"
        _log.info("looking through the weights in %s", model)
        try:
            tensors = tensors_in(model)
        except SafetensorError as error:
            damaged = Finding("weights", "broken", f"the weight files can't be read: {error}", {}, "export it again")
            return replace(evidence, diagnosis=Diagnosis(str(model), [*findings, damaged]), checked_by=by)
        findings += check_weights(tensors, entries)
        if all(f"{name}.weight" in tensors for name in plan.modules):
            # Counts are the model's, and files hold tied tensors once or twice: for that it has to be loaded.
            findings.append(check_plan(plan, tensors, entries)[0])
    return replace(evidence, diagnosis=Diagnosis(str(model), findings), checked_by=by) if findings else evidence


def _command_in_card(model: Path | None) -> str:
    """Return the command that a model card of ours gives."""
    found = re.search(
        r"^## How it was made\n.*?^```bash\n(.*?)\n```$", _text(model and model / "README.md"), re.M | re.S
    )
    return found[1] if found else ""


def _text(path: Path | None) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""


def _missing(record: RunRecord, *, is_export: bool) -> list[str]:
    """Return what a reader will look for in vain, and what makes it."""
    said = []
    place = record.model
    if place is None:
        said.append(f"No model is exported: lowrank export --plan {record.folder / 'plan.json'} --output DIR")
    if not record.rows and not record.evidence.own_passes:
        why = "An export has no table of scores" if is_export else "There is no summary.json"
        said.append(
            f"{why}: lowrank evaluate --model {place or 'DIR'} --text TEXT --json {record.folder / 'score.json'}"
        )
    if place is not None and not record.evidence.thorough:
        said.append(
            "The model was not compared with its base, KL divergence and agreement are not known: "
            f"lowrank doctor {place} --json {record.folder / 'doctor.json'}"
        )
    if place is not None and not record.evidence.tasks:
        said.append(
            f"No tasks were scored: lowrank evaluate --model {place} --reference BASE --tasks piqa,arc_easy --json "
            f"{record.folder / 'tasks.json'}"
        )
    return said
