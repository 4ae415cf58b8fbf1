"""What ``lowrank evaluate`` does: scores of a model on texts and tasks, or of a plan's sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.cli.commands import base_of, factors_of
from lowrank_pl.evaluate.divergence import score_texts, show_texts
from lowrank_pl.evaluate.generation import generate_samples
from lowrank_pl.evaluate.likelihood import perplexity
from lowrank_pl.evaluate.paired import task_table
from lowrank_pl.evaluate.size_curve import KEEPS, curve_plot, curve_table, score_curve
from lowrank_pl.evaluate.zero_shot import TaskSettings, ZeroShot, figures_of
from lowrank_pl.export.export import is_compressed, load_compressed
from lowrank_pl.models.base import DType, load_base, load_tokenizer, stored_dtype
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import largest_keep, nested
from lowrank_pl.text.sequences import token_windows
from lowrank_pl.text.sources import named_texts
from lowrank_pl.utils.environment import pick_device
from lowrank_pl.utils.figures import save_figure
from lowrank_pl.utils.files import write_json

__all__ = ["evaluate"]

_log = logging.getLogger(__name__)


def evaluate(
    model: str | None = None,
    *,
    text: str | Sequence[str] = (),
    tasks: Sequence[str] = (),
    reference: str | None = None,
    plan: Path | None = None,
    keep_curve: Sequence[float] | None = None,
    base: str | None = None,
    store: Path | None = None,
    output: Path | None = None,
    length: int = 1024,
    sequences: int | None = None,
    batch_size: int = 1,
    position_bins: int = 8,
    include_path: Sequence[Path] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    seed: int = 1234,
    task_batch_size: str = "auto",
    dtype: DType | None = None,
    device: str = "auto",
    prompts: Sequence[str] = (),
    max_new_tokens: int = 40,
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Score a compressed folder, any base model, or a plan in every size: perplexity on texts, accuracy on tasks.

    Sequences do not overlap, each begins with BOS where the tokenizer itself adds it, losses are summed in float64, and
    logits that are not finite are an error. With a reference, texts also show KL, top-1 agreement, and the divergence
    along the sequence and behind each block, and tasks the difference with its paired standard error.

    Args:
        model: An export, or a base: hub id, folder, .gguf file, package:NAME or random:FAMILY.
        text: File, glob, hub dataset or python-docs, as in the README; several as NAME=TEXT, each behind its own --text
            or all behind one.
        tasks: Zero-shot tasks, run by lm-eval: its names (piqa,arc_easy), .yaml files, folders, or .jsonl files with a
            query, choices and gold in each line, as FILE or NAME=FILE, with ::cue=none to leave the query as it is.
        reference: The dense model, named like a model, to compare with on texts and tasks.
        plan: A plan instead of a model, scored in memory without an export, beside its dense base.
        keep_curve: Sizes to score the plan in, each from its component order: --keep-curve 0.9 0.8; no number means
            1 .9 .8 .7 .6 .5, as far as the plan goes. Without it the plan is scored as it is.
        base: The plan's base, as for export.
        store: Folder of the plan's factors, as for export.
        output: Picture of the curve, a PNG file; by default beside the figures of json.
        length: Tokens of a sequence.
        sequences: How many sequences of each text; all of it by default.
        batch_size: Sequences per forward; one where there is a reference.
        position_bins: Into how many parts a sequence is divided to show where a model departs from the reference.
        include_path: Folders of lm-eval's YAML task files, whose tasks --tasks may then name.
        limit: Rows of a task, its first ones; all by default.
        fewshot: Examples before each question; as many as the task says by default, mostly none.
        seed: Of the choice of these examples.
        task_batch_size: Sequences of a task per forward; auto takes as many as fit on a GPU, as many as help on a CPU.
        dtype: Type to load in; the folder's or the plan's own by default, float32 for a GGUF file.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        prompts: Texts to continue greedily.
        max_new_tokens: How far.
        trust_remote_code: Run Python code that comes with a base model.
        json: Write the figures there.

    Returns:
        The figures that ``json`` gets.
    """
    if (model is None) == (plan is None):
        given = "neither" if model is None else "both"
        raise ValueError(f"{given} of --model and --plan was given: name a model or a plan to score")
    texts = [text] if isinstance(text, str) else list(text)
    if plan is not None:
        wishes = {"prompts": "let it continue texts", "tasks": "run tasks on it", "reference": "compare it"}
        for name, wish in {"prompts": prompts, "tasks": tasks, "reference": reference}.items():
            if wish:
                raise ValueError(f"--{name} goes with --model: export the plan to {wishes[name]}")
        if len(texts) != 1:
            raise ValueError(f"{len(texts)} texts were given: a plan is scored on one --text")
        return _evaluate_plan(
            plan, texts[0], keep_curve, base=base, store=store, output=output, length=length, sequences=sequences,
            batch_size=batch_size, dtype=dtype, device=device, trust_remote_code=trust_remote_code, json=json,
        )  # fmt: skip
    for name, value in {"keep-curve": keep_curve, "base": base, "store": store, "output": output}.items():
        if value is not None:
            raise ValueError(f"--{name} goes with --plan: a model has the one size that it has")
    if not (texts or tasks or prompts):
        raise ValueError("there is nothing to score: give --text, --tasks or --prompts")
    assert model is not None
    named = named_texts(texts)
    # What is no task, or can't be read, is refused before anything large is loaded.
    settings = TaskSettings(include_path, limit=limit, fewshot=fewshot, seed=seed, batch_size=task_batch_size)
    suite = ZeroShot(tasks, settings) if tasks else None
    place = pick_device(device)
    network, tokenizer = _load(model, dtype, trust_remote_code=trust_remote_code)
    network.to(place)
    tokens = {name: token_windows(one, tokenizer, length=length, sequences=sequences) for name, one in named.items()}
    dense = None if reference is None else _reference(reference, network, dtype, trust_remote_code=trust_remote_code)
    figures: dict[str, Any] = {
        "model": model,
        "dtype": str(network.dtype).removeprefix("torch."),
        "parameters": network.num_parameters(),
    }
    if dense is not None:
        figures |= {"reference": reference, "reference_parameters": dense.num_parameters()}
    print(_heading(figures))
    if tokens:
        scores, diverged = score_texts(network, tokens, reference=dense, batch_size=batch_size, bins=position_bins)
        figures["texts"] = {name: {"text": named[name], **one} for name, one in scores.items()}
        if len(scores) == 1:
            figures |= next(iter(figures["texts"].values()))
        print(f"\n{show_texts(scores, diverged)}")
    if suite is not None:
        results = suite.results(network, tokenizer)
        others = None if dense is None else suite.results(dense, tokenizer)
        figures["tasks"] = figures_of(results, others)
        print(f"\n{task_table(results, others)}")
    samples = generate_samples(network, tokenizer, prompts, max_new_tokens=max_new_tokens)
    figures["samples"] = dict(zip(prompts, samples, strict=True))
    for prompt, sample in figures["samples"].items():
        print(f"{prompt!r} -> {sample!r}")
    if json is not None:
        write_json(json, figures)
    return figures


def _heading(figures: Mapping[str, Any]) -> str:
    """Return which models are scored, in one line."""
    said = f"{figures['model']}: {figures['parameters']:,} parameters, {figures['dtype']}"
    if "reference" in figures:
        said += f"; beside {figures['reference']}: {figures['reference_parameters']:,} parameters"
    return said


def _reference(name: str, model: PreTrainedModel, dtype: DType | None, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return the dense model in the type and on the device of ``model``, unless told otherwise."""
    own: Any = dtype or str(model.dtype).removeprefix("torch.")
    found = _load(name, own, trust_remote_code=trust_remote_code)[0]
    return found.to(model.device)


def _evaluate_plan(
    path: Path,
    text: str,
    keeps: Sequence[float] | None,
    *,
    base: str | None,
    store: Path | None,
    output: Path | None,
    length: int,
    sequences: int | None,
    batch_size: int,
    dtype: DType | None,
    device: str,
    trust_remote_code: bool,
    json: Path | None,
) -> dict[str, Any]:
    drawn = RankPlan.load(path)
    # Impossible sizes are refused before anything is loaded.
    sizes = [] if keeps is None else _sizes(drawn, keeps)
    named = base_of(drawn, path, base)
    tokenizer = load_tokenizer(named, trust_remote_code=trust_remote_code)
    tokens = token_windows(text, tokenizer, length=length, sequences=sequences)
    kind = dtype or drawn.origin.get("dtype", "float32")
    model = load_base(named, dtype=getattr(torch, kind), trust_remote_code=trust_remote_code).to(pick_device(device))
    factors = factors_of(drawn, model, tokenizer, store)
    dense = None
    if drawn.left_out and base is None:
        before = _reference(drawn.named_base, model, None, trust_remote_code=trust_remote_code)
        dense = perplexity(before, tokens, batch_size=batch_size, progress="score dense")
        del before
    elif drawn.left_out:
        _log.warning("what is called dense is %s, which was narrowed; without --base it is %s", base, drawn.named_base)
    curve = score_curve(model, drawn, sizes, factors, tokens, batch_size=batch_size, dense=dense)
    print(curve_table(curve))
    figures = {
        "plan": str(path),
        "method": drawn.method,
        "base": base or drawn.named_base,
        "text": text,
        "windows": len(tokens),
        "length": length,
        "dtype": kind,
        "dense": curve.dense.to_dict(),
        "sizes": [point.to_dict() for point in curve.points],
    }
    picture = output or (json and json.with_suffix(".png"))
    if keeps is not None and picture is not None:
        save_figure(curve_plot(curve), picture)
        print(f"\npicture  {picture}")
    if json is not None:
        write_json(json, figures)
    return figures


def _sizes(plan: RankPlan, keeps: Sequence[float]) -> list[RankPlan]:
    """Return the plans of ``keeps``; where none were named, of those of the usual sizes that the plan has."""
    most = largest_keep(plan)
    if not keeps and most < max(KEEPS):
        _log.info("the weights were changed for keep %g: the curve has no larger sizes", most)
    # Its own size stands for a corrected plan that has none of the usual ones.
    usual = [keep for keep in KEEPS if keep <= most] or [plan.keep]
    return list(nested(plan, keeps or usual).values())


def _load(
    model: str, dtype: DType | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return an export or a base with its tokenizer."""
    if is_compressed(model):
        settings = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        loaded = load_compressed(model, trust_remote_code=trust_remote_code, **settings)
        return loaded, AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    kind = stored_dtype(model, trust_remote_code=trust_remote_code) if dtype is None else getattr(torch, dtype)
    loaded = load_base(model, dtype=kind, trust_remote_code=trust_remote_code)
    return loaded, load_tokenizer(model, trust_remote_code=trust_remote_code)
