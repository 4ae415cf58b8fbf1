"""The end of every run: export, reload in a fresh process, scores with the baselines, and the report."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.generation import generate_samples
from lowrank_pl.evaluate.likelihood import Score, excess_nats, perplexity
from lowrank_pl.export.export import ExportReport, load_cut, save_compressed
from lowrank_pl.export.reload import ExportError
from lowrank_pl.export.reload_probe import end_with_parent
from lowrank_pl.factors.components import AnySize
from lowrank_pl.factors.compression import compress, compressed, deployed_plan
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import factors_of_plan
from lowrank_pl.methods.allocate.run import allocate_on
from lowrank_pl.methods.quantize.quantizing import quantize
from lowrank_pl.methods.quantize.settings import Rounding
from lowrank_pl.methods.refit.refitting import Refit, refit
from lowrank_pl.models import hf_format
from lowrank_pl.models.identity import base_class
from lowrank_pl.models.offload import STREAMED_BATCH_SIZE, streamed
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import component_bytes
from lowrank_pl.report.model_card import model_card, refresh_card
from lowrank_pl.report.page import write_page
from lowrank_pl.report.rank_map import rank_map
from lowrank_pl.report.run_record import Exported, RunRecord, digests_of, read_run
from lowrank_pl.report.scores import Row, bits_and_memory, row_table, write_summary
from lowrank_pl.utils.environment import command_line, describe_machine
from lowrank_pl.utils.figures import save_figure
from lowrank_pl.utils.files import atomic_write, write_json
from lowrank_pl.version import __version__

__all__ = [
    "Ending",
    "ExportForm",
    "Finished",
    "Learned",
    "Protocol",
    "export_cut",
    "export_plan",
    "finish_healing",
    "finish_run",
    "score_in_fresh_process",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """Text and prompts that models are scored on; the same for every row of a table.

    Args:
        text: Name of the text, for the record.
        sequences: Token ids ``[sequences, length]``.
        prompts: Prompts for sample continuations.
        max_new_tokens: Maximum length of a continuation.
    """

    text: str
    sequences: Tensor
    prompts: Sequence[str] = ()
    max_new_tokens: int = 40

    def describe(self) -> dict[str, Any]:
        """Return the protocol as JSON values."""
        count, length = self.sequences.shape
        return {"text": self.text, "windows": count, "length": length}


@dataclass(frozen=True)
class Finished:
    """The results of a finished run.

    Args:
        rows: Scores of each model.
        samples: Prompt, dense continuation and compressed continuation.
        report: The report of the export.
    """

    rows: list[Row]
    samples: list[tuple[str, str, str]]
    report: ExportReport

    def text(self, run: Path) -> str:
        """Return the table, the continuations and the paths of all results, for a terminal."""
        parts = [row_table(self.rows)]
        for prompt, dense, small in self.samples:
            parts.append(f"prompt      {prompt!r}\n  dense     {dense!r}\n  compressed {small!r}")
        places = {
            "model": self.report.directory,
            "plan": run / "plan.json",
            "scores": run / "summary.json",
            "rank map": run / "rank_map.png",
            "report": run / "report.html",
            "TensorBoard": f"tensorboard --logdir {run}",
        }
        parts.append("\n".join(f"{name:12} {place}" for name, place in places.items()))
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Learned:
    """The result of learning.

    Args:
        subject: The dense base, its tokenizer, its targets, and the sequences that the factors were made from.
        plan: The learned plan.
        factors: The factors that the plan is for.
        budget: The budget of the plan; the baselines get the same.
        seconds: Time spent so far, by part: ``factors``, ``learning`` and, for width pruning, ``narrowing``.
        store: The factors' folder if one was named; weight gradients are then kept beside the factors.
        unpruned: Loads the base without pruning; None if it was not pruned. The dense row then is of the unpruned
            model, and the table has one more row for the pruned one.
    """

    subject: Subject
    plan: RankPlan
    factors: FactorStore
    budget: Budget
    seconds: Mapping[str, float]
    store: Path | None = None
    unpruned: Callable[[], PreTrainedModel] | None = None


@dataclass(frozen=True)
class ExportForm:
    """What an export holds.

    Args:
        merge: Dense weights, for runtimes that do not know factors.
        any_size: Beside the weights, components from which every smaller size is cut.

    Raises:
        ValueError: Both are given.
    """

    merge: bool = False
    any_size: bool = False

    def __post_init__(self) -> None:
        if self.merge and self.any_size:
            raise ValueError("merge writes dense weights, which smaller sizes are not cut from: leave out any_size")


@dataclass(frozen=True)
class Ending:
    """Settings of the end of a run.

    Args:
        protocol: Text and prompts that models are scored on.
        baselines: Names of the allocators to compare with.
        form: What the export holds.
        refit: How to refit the factors to the compressed model's own inputs; the table then also has a row without the
            refit. None does not refit.
        refit_sequences: Token ids ``[sequences, length]`` for the refit.
        rounding: How to round the matrices to a few bits; the table then also has a row before rounding. None does not
            round.
        streamed_on: A device that the models do not fit on. They stay in main memory and are scored on it one layer at
            a time (``lowrank_pl.models.offload``). Prompts are not continued, because every token would read all
            weights.
    """

    protocol: Protocol
    baselines: Sequence[str] = ("uniform",)
    form: ExportForm = ExportForm()
    refit: Refit | None = None
    refit_sequences: Tensor | None = None
    rounding: Rounding | None = None
    streamed_on: torch.device | None = None


def export_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: RankPlan,
    factors: FactorStore,
    directory: str | Path,
    *,
    form: ExportForm = ExportForm(),
    put_back: bool = False,
    device: torch.device | None = None,
) -> tuple[ExportReport, RankPlan]:
    """Compress ``model`` in place, write it to ``directory``, and check it by a reload in a fresh process.

    Returns the report of the export, and the plan with the storage form that each layer really has
    (``lowrank_pl.factors.compression.deployed_plan``).

    Args:
        model: The dense base, or the masked model that learned the plan.
        tokenizer: Saved with the weights.
        plan: The plan.
        factors: The factors that the plan is for.
        directory: Folder of the export.
        form: What it holds.
        put_back: Restore the modules of ``model`` afterwards, for the next size; this takes memory for both.
        device: Device on which pivots are chosen.

    Raises:
        ValueError: The plan does not fit the model or the factors, or no smaller size follows from it.
        ExportError: The reloaded model differs; nothing is left at ``directory`` then.
    """
    where = {"device": device}
    with (
        compressed(model, plan, factors, **where) if put_back else nullcontext(compress(model, plan, factors, **where))
    ):
        plan = deployed_plan(model, plan)
        held = AnySize(plan, factors) if form.any_size else plan
        return _save(model, tokenizer, held, directory, merge=form.merge), plan


def export_cut(
    source: Path,
    keep: float,
    directory: str | Path,
    *,
    merge: bool = False,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[ExportReport, RankPlan]:
    """Cut a smaller size from the export in ``source``, write it to ``directory``, and check it by a reload.

    Returns the report of the export and its plan, as :func:`export_plan` does.

    Args:
        source: The folder of the export.
        keep: Fraction of the targeted parameters to keep.
        directory: Folder of the smaller export.
        merge: Write dense weights that any runtime loads, instead of factors.
        device: Device of the model.
        trust_remote_code: Whether to run code that came with the base.

    Raises:
        ValueError: No such size can be cut from the export.
        ExportError: The reloaded model differs; nothing is left at ``directory`` then.
    """
    model, plan = load_cut(source, keep, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return _save(model.to(device), tokenizer, plan, directory, merge=merge), plan


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: RankPlan | AnySize,
    directory: str | Path,
    *,
    merge: bool,
) -> ExportReport:
    """Export a compressed model with its card."""
    ranks, more = (plan.plan, component_bytes(plan.plan)) if isinstance(plan, AnySize) else (plan, 0)
    exported = Exported(Path(directory), merged=merge, own_code=base_class(model) is None, nested_bytes=more)
    card = model_card(RunRecord(exported.folder, ranks, exported, command=command_line()))
    return save_compressed(model, directory, tokenizer=tokenizer, plan=plan, card=card, merge=merge)


def finish_run(run: Path, learned: Learned, ending: Ending) -> Finished:
    """Write plan, export, scores and rank map of a run to its folder, and return the results.

    The dense model and the baselines are scored in memory. The learned model is scored in a fresh process from the
    exported folder, as its user will run it.

    Args:
        run: The run's folder.
        learned: The result of learning; its model is compressed in place.
        ending: Settings of the end of the run.

    Raises:
        ValueError: A baseline can't read these factors.
        ExportError: The export fails its check or can't be scored.
    """
    if ending.streamed_on is not None:
        ending = replace(ending, protocol=replace(ending.protocol, prompts=()))
    subject, protocol, seconds = learned.subject, ending.protocol, learned.seconds
    device = ending.streamed_on or subject.model.device
    table, texts = _score_dense(learned, ending)
    _score_baselines(table, learned, ending)
    plan, factors, spent = learned.plan, learned.factors, sum(seconds.values())
    if ending.refit is not None:
        assert ending.refit_sequences is not None
        score = _score_compressed(learned, ending, plan, factors, "learned ranks")
        table.add("learned, no refit", score, plan, plan.bytes, spent)
        began = time.perf_counter()
        plan, factors = refit(plan, factors, subject, sequences=ending.refit_sequences, settings=ending.refit)
        spent += time.perf_counter() - began
    if ending.rounding is not None:
        score = _score_compressed(learned, ending, plan, factors, "before rounding")
        table.add("learned, not rounded", score, plan, plan.bytes, spent)
        began = time.perf_counter()
        plan, factors = quantize(plan, factors, subject, settings=ending.rounding)
        spent += time.perf_counter() - began
    report, plan = export_plan(
        subject.model, subject.tokenizer, plan, factors, run / "model", form=ending.form, device=ending.streamed_on
    )
    plan.save(run / "plan.json")
    own_code = base_class(subject.model) is None
    score, small = score_in_fresh_process(
        report.directory, protocol, device=device, stream=ending.streamed_on is not None, trust=own_code
    )
    table.add("learned", score, plan, report.bytes, spent, rounded=not report.merged)
    samples = list(zip(protocol.prompts, texts, small, strict=True))
    save_figure(rank_map(plan), run / "rank_map.png")
    write_summary(
        run, table.rows, method=plan.method, keep=plan.keep, command=command_line(), protocol=protocol.describe(),
        seconds=dict(seconds), samples=[list(sample) for sample in samples], notes=list(plan.notes),
        date=datetime.now().astimezone().isoformat(timespec="seconds"), versions=_versions(),
        machine=describe_machine(device), tokens_per_second=table.rates, verified=report.verified,
        digests=digests_of(run),
    )  # fmt: skip
    _write_reports(run)
    return Finished(table.rows, samples, report)


def finish_healing(
    run: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: RankPlan,
    rows: Sequence[Row],
    protocol: Protocol,
    *,
    facts: Mapping[str, Any],
) -> None:
    """Write plan, export, scores, rank map and page of a healed model to the folder of its run.

    Args:
        run: The run's folder.
        model: The compressed model.
        tokenizer: Saved with the weights.
        plan: Its plan, whose notes say what was trained.
        rows: Its scores, beside those of the dense model and of the model before healing.
        protocol: What they were measured on.
        facts: What else ``summary.json`` records, as JSON values.

    Raises:
        ExportError: The reloaded model differs; no model is left then.
    """
    # Before the export, whose failure then does not lose the factors.
    plan.save(run / "plan.json")
    report = _save(model, tokenizer, plan, run / "model", merge=False)
    save_figure(rank_map(plan), run / "rank_map.png")
    write_summary(
        run, rows, method=plan.method, keep=plan.keep, command=command_line(), protocol=protocol.describe(),
        notes=list(plan.notes), versions=_versions(), machine=describe_machine(model.device),
        verified=report.verified, digests=digests_of(run), **facts,
    )  # fmt: skip
    _write_reports(run)


def _write_reports(run: Path) -> None:
    """Write the card and the page of a run whose export has just been checked, and need not be read again."""
    record = read_run(run, check=False)
    refresh_card(record)
    write_page(record, run / "report.html")


class _Table:
    """The rows of a run's table, and the scoring speed of each model."""

    def __init__(self, dense: Score) -> None:
        self.dense = dense
        self.rows: list[Row] = []
        self.rates: dict[str, float] = {}

    def add(self, name: str, score: Score, plan: RankPlan, size: int, seconds: float, *, rounded: bool = True) -> None:
        """Add the row of a model with ``plan`` and of ``size`` bytes; a merged model has no bits of its plan."""
        excess = excess_nats(score, self.dense)
        kept = plan.keep_targeted, plan.keep_model
        bits = bits_and_memory(plan) if rounded else (None, None)
        self.add_row(Row(name, score.perplexity, excess, *kept, size, seconds, *bits), score)

    def add_row(self, row: Row, score: Score) -> None:
        """Add a row."""
        self.rows.append(row)
        self.rates[row.name] = score.tokens_per_second


def _score_dense(learned: Learned, ending: Ending) -> tuple[_Table, list[str]]:
    """Return the table with its dense rows, and the dense model's continuations."""
    protocol, subject, plan = ending.protocol, learned.subject, learned.plan
    # The unpruned base is released before the next model is scored.
    model = subject.model if learned.unpruned is None else learned.unpruned()
    dense = _score(model, protocol.sequences, "dense", ending.streamed_on)
    prompts, most = protocol.prompts, protocol.max_new_tokens
    texts = generate_samples(model, subject.tokenizer, prompts, max_new_tokens=most)
    del model
    table, whole, pruning = _Table(dense), plan.dense(), learned.seconds.get("narrowing", 0.0)
    if learned.unpruned is None:
        table.add("dense", dense, whole, whole.bytes, pruning)
        return table, texts
    table.add_row(Row("dense", dense.perplexity, 0.0, 1.0, 1.0, plan.dense_bytes, 0.0), dense)
    score = _score(subject.model, protocol.sequences, "pruned", ending.streamed_on)
    table.add("pruned", score, whole, whole.bytes, pruning)
    return table, texts


def _score_baselines(table: _Table, learned: Learned, ending: Ending) -> None:
    """Add the rows of the baselines, which get the same factors and the same budget."""
    prepared = learned.seconds["factors"] + learned.seconds.get("narrowing", 0.0)
    for name in ending.baselines:
        began = time.perf_counter()
        method = make_allocator(name)
        plan = allocate_on(learned.factors, learned.subject, learned.budget, method, directory=learned.store)
        spent = prepared + time.perf_counter() - began
        score = _score_compressed(learned, ending, plan, factors_of_plan(plan, learned.factors), name)
        table.add(name, score, plan, plan.bytes, spent)


def _score_compressed(learned: Learned, ending: Ending, plan: RankPlan, factors: FactorStore, name: str) -> Score:
    model = learned.subject.model
    with compressed(model, plan, factors, device=ending.streamed_on):
        return _score(model, ending.protocol.sequences, name, ending.streamed_on)


def _score(model: PreTrainedModel, sequences: Tensor, name: str, streamed_on: torch.device | None) -> Score:
    """Return the score of ``model`` on its own device, or one layer at a time on ``streamed_on``."""
    batch = 1 if streamed_on is None else STREAMED_BATCH_SIZE
    with streamed(model, streamed_on):
        return perplexity(model, sequences, batch_size=batch, progress=f"score {name}")


def _versions() -> dict[str, str]:
    return {"lowrank_pl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


# The package's own place comes last on the path, for a package that is run from its source without being installed.
_SCORE = """
import sys
sys.path.append(sys.argv[1])
try:
    from lowrank_pl.report.finish import score_job
    score_job(*sys.argv[2:])
except KeyboardInterrupt:
    sys.exit(130)  # the waiting process reports the interrupt
"""


def score_in_fresh_process(
    directory: Path,
    protocol: Protocol,
    *,
    device: torch.device | str = "cpu",
    stream: bool = False,
    trust: bool = False,
) -> tuple[Score, list[str]]:
    """Return score and continuations of the model in ``directory``, loaded by plain transformers in a new process.

    Args:
        directory: The folder of an export.
        protocol: Text to score on and prompts to continue.
        device: Device of the new process.
        stream: Whether weights stay in main memory and are moved to the device one layer at a time.
        trust: Whether to run code that came with the base.

    Raises:
        ExportError: The process failed; its own message is on the terminal.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, sequences, result = (Path(folder) / name for name in ("job.json", "windows.safetensors", "result.json"))
        atomic_write(sequences, save({"windows": protocol.sequences.contiguous()}))
        settings = {"prompts": list(protocol.prompts), "max_new_tokens": protocol.max_new_tokens}
        settings |= {"stream": stream, "trust": trust, "parent": os.getpid()}
        settings |= {"directory": str(directory.resolve()), "device": str(device), "windows": str(sequences)}
        write_json(job, settings)
        # The process keeps the terminal's stderr, for its progress bar. Its current folder is private, so that no file
        # of the user's folder shadows a module.
        words = [sys.executable, "-c", _SCORE, str(Path(__file__).parents[2]), str(job), str(result)]
        code = subprocess.run(words, cwd=folder).returncode
        if code != 0 or not result.exists():
            raise ExportError(f"scoring {directory} in a fresh process failed with exit code {code}; see above")
        data = json.loads(result.read_text(encoding="utf-8"))
    return Score(**data["score"]), data["continuations"]


def score_job(job: str, result: str) -> None:
    """Do the job of ``score_in_fresh_process`` in this process."""
    settings = json.loads(Path(job).read_text(encoding="utf-8"))
    end_with_parent(settings["parent"])
    assert hf_format.METHOD == "lowrank"  # the import has registered the format
    where, trust = settings["directory"], settings["trust"]
    model = AutoModelForCausalLM.from_pretrained(where, trust_remote_code=trust).eval()
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust)
    device = torch.device(settings["device"])
    if not settings["stream"]:
        model.to(device)
    sequences = load_file(settings["windows"])["windows"]
    score = _score(model, sequences, "export", device if settings["stream"] else None)
    continuations = generate_samples(model, tokenizer, settings["prompts"], max_new_tokens=settings["max_new_tokens"])
    figures = {"perplexity": score.perplexity, "nats": score.nats, "tokens": score.tokens, "seconds": score.seconds}
    write_json(result, {"score": figures, "continuations": continuations})
