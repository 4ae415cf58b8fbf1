"""The end of every run: export, reload in a fresh process, score beside the baselines, write it all down."""

from __future__ import annotations

import json
import logging
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.generation import generate_samples
from lowrank_pl.evaluate.likelihood import Score, excess_nats, perplexity
from lowrank_pl.export.export import ExportReport, save_compressed
from lowrank_pl.export.reload import ExportError
from lowrank_pl.factors.compression import compress, compressed, deployed_plan
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate import allocator
from lowrank_pl.methods.allocate.base import drawn_on
from lowrank_pl.methods.allocate.run import draw
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.methods.refit.refitting import refit as refit_factors
from lowrank_pl.models import hf_format
from lowrank_pl.models.identity import base_class
from lowrank_pl.models.offload import TOGETHER, streamed
from lowrank_pl.models.targets import find_targets
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.model_card import model_card, refresh_card
from lowrank_pl.report.page import write_page
from lowrank_pl.report.rank_map import rank_map
from lowrank_pl.report.run_record import read_run
from lowrank_pl.report.scores import Row, row_table, write_summary
from lowrank_pl.utils.environment import describe_machine
from lowrank_pl.utils.files import write_json
from lowrank_pl.utils.formatting import save_figure
from lowrank_pl.version import __version__

__all__ = ["Finished", "Protocol", "export_plan", "finish_run", "score_in_fresh_process"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """What models are scored on; the same for every row of a table.

    Args:
        text: Name of the text, for the record.
        sequences: ``[sequences, length]`` token ids.
        prompts: What to continue, to show what the models sound like.
        max_new_tokens: How far to continue.
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
    """What a finished run has to show.

    Args:
        rows: Scores by model.
        samples: Prompt, dense continuation, compressed continuation.
        report: What was exported.
    """

    rows: list[Row]
    samples: list[tuple[str, str, str]]
    report: ExportReport

    def text(self, run: Path) -> str:
        """Return the table, the continuations and where everything lies, for a terminal."""
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


def export_plan(
    model: PreTrainedModel,
    plan: RankPlan,
    store: FactorStore,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    command: str,
    merge: bool = False,
    put_back: bool = False,
    device: torch.device | None = None,
) -> tuple[ExportReport, RankPlan]:
    """Compress ``model`` by ``plan``, in place, and write it to ``directory``, checked by a reload in a fresh process.

    Returns what was written, and the plan as its layers are really stored (``lowrank_pl.compress.deployed_plan``).

    Args:
        model: The dense base, or the masked model that learned the plan.
        plan: Which ranks.
        store: The factors.
        directory: Folder of the export.
        tokenizer: Saved beside the weights.
        command: How the model card says that it was made.
        merge: Write dense weights that any runtime loads, instead of factors.
        put_back: Whether to give ``model`` its modules back afterwards, for the next size; takes memory for both.
        device: Where pivots are chosen (``lowrank_pl.compress.compress``).

    Raises:
        ValueError: The plan does not fit the model or the store.
        ExportError: The reloaded model differs; nothing is left at ``directory`` then.
    """
    where = {"device": device}
    with compressed(model, plan, store, **where) if put_back else nullcontext(compress(model, plan, store, **where)):
        plan = deployed_plan(model, plan)
        card = model_card(
            plan, (), base=plan.named_base, command=command, merged=merge,
            own_code=base_class(model) is None,
        )  # fmt: skip
        return save_compressed(model, directory, tokenizer=tokenizer, plan=plan, card=card, merge=merge), plan


def finish_run(
    run: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: RankPlan,
    store: FactorStore,
    budget: Budget,
    protocol: Protocol,
    *,
    statistics: Tensor,
    directory: Path | None = None,
    baselines: Sequence[str] = ("uniform",),
    seconds: Mapping[str, float],
    command: str,
    merge: bool = False,
    refit: Refit | None = None,
    refit_sequences: Tensor | None = None,
    named_base: Callable[[], PreTrainedModel] | None = None,
    streamed_on: torch.device | None = None,
) -> Finished:
    """Write plan, export, scores and rank map of a run to its folder, and return what they say.

    The dense model and the baselines are scored from memory. The learned model is scored in a fresh process from the
    exported folder, as its user will run it.

    Args:
        run: The run's folder.
        model: The dense base; compressed afterwards.
        tokenizer: The base's.
        plan: What was learned.
        store: The factors.
        budget: What the plan was drawn for; the baselines get the same.
        protocol: What to score on.
        statistics: ``[sequences, length]`` token ids that the factors were made from; baselines measure on them.
        directory: The store's folder where it was named, as for ``lowrank_pl.draw.draw``.
        baselines: Allocators to compare with.
        seconds: Time spent so far on ``factors`` and ``learning``.
        command: How the run was started.
        merge: Export dense weights.
        refit: How to fit the factors again to the compressed model's own inputs, if that is wished for. The table then
            has a row for the plan without it.
        refit_sequences: ``[sequences, length]`` token ids to do that on.
        named_base: Loads what ``model`` was before it was narrowed, where it was: the dense row is of that then, and
            the table has one more for the narrowed model.
        streamed_on: A device without room for the models, which lie in main memory then: all of them are scored on it
            a layer at a time (``lowrank_pl.streaming``), and nothing is continued, since every token would read all
            weights.

    Raises:
        ValueError: A baseline can't be drawn on these factors.
        ExportError: The export failed its check or can't be scored.
    """
    if streamed_on is not None:
        protocol = replace(protocol, prompts=())
    # What was named is out of memory again before anything else is scored.
    dense, texts = _score_dense(model if named_base is None else named_base(), tokenizer, protocol, streamed_on)
    rows, rates, score, whole = [], {"dense": dense.tokens_per_second}, dense, plan.dense()
    if named_base is not None:
        rows.append(Row("dense", dense.perplexity, 0.0, 1.0, 1.0, plan.dense_bytes, 0.0))
        score = _score(model, protocol.sequences, "narrowed", streamed_on)
        rates["narrowed"] = score.tokens_per_second
    name = "dense" if named_base is None else "narrowed"
    rows.append(_row(name, score, dense, whole, whole.bytes, seconds.get("narrowing", 0.0)))
    prepared = seconds["factors"] + seconds.get("narrowing", 0.0)
    targets = find_targets(model, include=list(plan.modules))
    for name in baselines:
        began = time.perf_counter()
        baseline = draw(allocator(name), budget, store, targets, model, statistics, tokenizer, directory=directory)
        spent = prepared + time.perf_counter() - began
        with compressed(model, baseline, drawn_on(baseline, store), device=streamed_on):
            score = _score(model, protocol.sequences, name, streamed_on)
        rows.append(_row(name, score, dense, baseline, baseline.bytes, spent))
        rates[name] = score.tokens_per_second
    spent = sum(seconds.values())
    if refit is not None:
        assert refit_sequences is not None
        with compressed(model, plan, store, device=streamed_on):
            score = _score(model, protocol.sequences, "learned ranks", streamed_on)
        rows.append(_row("learned, no refit", score, dense, plan, plan.bytes, spent))
        rates["learned, no refit"] = score.tokens_per_second
        began = time.perf_counter()
        plan, store = refit_factors(
            plan, store, model=model, targets=targets, sequences=refit_sequences, calibration=statistics, settings=refit
        )
        spent += time.perf_counter() - began
    began = time.perf_counter()
    report, plan = export_plan(
        model, plan, store, run / "model", tokenizer=tokenizer, command=command, merge=merge, device=streamed_on
    )
    plan.save(run / "plan.json")
    spent += time.perf_counter() - began
    device = streamed_on or model.device
    score, small = score_in_fresh_process(
        report.directory, protocol, device=device, stream=streamed_on is not None, trust=base_class(model) is None
    )
    rows.append(_row("learned", score, dense, plan, report.bytes, spent))
    rates["learned"] = score.tokens_per_second
    samples = list(zip(protocol.prompts, texts, small, strict=True))
    save_figure(rank_map(plan), run / "rank_map.png")
    write_summary(
        run, rows, method=plan.method, keep=plan.keep, command=command, protocol=protocol.describe(),
        seconds=dict(seconds), samples=[list(sample) for sample in samples], notes=list(plan.notes),
        date=datetime.now().astimezone().isoformat(timespec="seconds"), versions=_versions(),
        machine=describe_machine(device), tokens_per_second=rates, verified=report.verified,
    )  # fmt: skip
    # The export has just been checked, and its weights need not be read for that again.
    record = read_run(run, look=False)
    refresh_card(record)
    write_page(record, run / "report.html")
    return Finished(rows, samples, report)


def _score_dense(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: Protocol, streamed_on: torch.device | None
) -> tuple[Score, list[str]]:
    score = _score(model, protocol.sequences, "dense", streamed_on)
    return score, generate_samples(model, tokenizer, protocol.prompts, max_new_tokens=protocol.max_new_tokens)


def _score(model: PreTrainedModel, sequences: Tensor, name: str, streamed_on: torch.device | None) -> Score:
    """Return the score of ``model``, where it is or, from main memory, a layer at a time on ``streamed_on``."""
    cooperating = 1 if streamed_on is None else TOGETHER
    with streamed(model, streamed_on):
        return perplexity(model, sequences, batch_size=cooperating, progress=f"score {name}")


def _versions() -> dict[str, str]:
    return {"lowrank_pl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _row(name: str, score: Score, dense: Score, plan: RankPlan, size: int, seconds: float) -> Row:
    return Row(name, score.perplexity, excess_nats(score, dense), plan.keep_targeted, plan.keep_model, size, seconds)


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
        directory: An export.
        protocol: What to score on and which prompts to continue.
        device: Where to run.
        stream: Whether the weights stay in main memory, and come to the device a layer at a time.
        trust: Run the code that came with the base.

    Raises:
        ExportError: The process failed; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, sequences, result = (Path(folder) / name for name in ("job.json", "windows.safetensors", "result.json"))
        save_file({"windows": protocol.sequences.contiguous()}, sequences)
        settings = {"prompts": list(protocol.prompts), "max_new_tokens": protocol.max_new_tokens}
        settings |= {"stream": stream, "trust": trust}
        write_json(job, {"directory": str(directory), "device": str(device), "windows": str(sequences), **settings})
        # stderr goes to the terminal, where its progress bar belongs.
        code = subprocess.run([sys.executable, "-m", "lowrank_pl.report.finish", str(job), str(result)]).returncode
        if code != 0 or not result.exists():
            raise ExportError(f"scoring {directory} in a fresh process failed with exit code {code}; see above")
        data = json.loads(result.read_text())
    return Score(**data["score"]), data["continuations"]


def _score_job(job: Path, result: Path) -> None:
    """Do in this process what ``score_in_fresh_process`` asked for."""
    settings = json.loads(job.read_text())
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


if __name__ == "__main__":
    try:
        _score_job(Path(sys.argv[1]), Path(sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit(130)  # the process that waits for this one says it
