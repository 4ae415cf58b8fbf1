"""``lowrank evaluate`` and ``lowrank evaluate-plan``: scores of a model on texts and tasks, or of a plan's sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.cli.plan_parts import PlanParts
from lowrank_pl.evaluate.settings import TaskSettings
from lowrank_pl.models.settings import Base, DType
from lowrank_pl.utils.checks import check_counts, check_unused
from lowrank_pl.utils.files import at_home, check_output_files, is_special
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowrank_pl.plans.plan import RankPlan

__all__ = ["evaluate", "evaluate_plan"]

_log = logging.getLogger(__name__)


def evaluate(
    model: str,
    *,
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    reference: str | None = None,
    keep: float | None = None,
    length: int | None = None,
    sequences: int | None = None,
    batch_size: int | None = None,
    position_bins: int | None = None,
    task_settings: Flat[TaskSettings] = TaskSettings(),
    prompts: Sequence[str] = (),
    max_new_tokens: int | None = None,
    dtype: DType | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Score an export or any base model: perplexity on texts, accuracy on tasks.

    Sequences do not overlap, each begins with BOS where the tokenizer itself adds it, losses are summed in float64, and
    logits that are not finite are an error. With a reference, texts also show KL, top-1 agreement, and the divergence
    along the sequence and after each block, and tasks the difference with its paired standard error.

    Args:
        model: An export, or a base: hub id, folder, .gguf file, package:NAME or random:FAMILY.
        text: Texts to score: file, folder, glob, hub dataset or python-docs; several as NAME=TEXT.
        tasks: Zero-shot tasks, run by lm-eval: its names (piqa,arc_easy), its tasks on local files of their public
            releases (piqa.jsonl or piqa=FILE), .yaml files, folders, or .jsonl files with a query, choices and gold in
            each line, as FILE or NAME=FILE, with ::cue=none to leave the query as it is.
        reference: The dense model, named like a model, to compare with on texts and tasks.
        keep: Score a smaller size of an export, cut from its factors while it is loaded.
        length: Tokens of a sequence; by default 1024.
        sequences: How many sequences of each text; all of it by default.
        batch_size: Sequences of a text per forward, by default one; unused with a reference.
        position_bins: Into how many parts a sequence is divided to show where a model departs from the reference; by
            default 8.
        task_settings: How tasks are run.
        prompts: Texts to continue greedily.
        max_new_tokens: How many tokens each prompt is continued by; by default 40.
        dtype: Type to load in; the folder's own by default, float32 for a GGUF file.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with a base model or a YAML task.
        json: Write the figures there.

    Returns:
        The figures that ``json`` gets.
    """
    from lowrank_pl.evaluate.divergence import score_texts, show_texts
    from lowrank_pl.evaluate.generation import check_prompts, generate_samples
    from lowrank_pl.evaluate.paired import task_table
    from lowrank_pl.evaluate.zero_shot import ZeroShot, figures_of
    from lowrank_pl.models.base import model_files
    from lowrank_pl.models.sequences import check_sequences
    from lowrank_pl.models.targets import model_parameters
    from lowrank_pl.text.sequences import token_windows
    from lowrank_pl.text.sources import named_texts, text_files
    from lowrank_pl.utils.environment import pick_device

    check_output_files(json)
    if not (text or tasks or prompts):
        raise ValueError("there is nothing to score: give --text, --tasks or --prompts")
    counts = {"length": length, "sequences": sequences, "batch_size": batch_size}
    check_counts({**counts, "position_bins": position_bins, "max_new_tokens": max_new_tokens})
    if not text:
        check_unused("evaluate without --text", counts)
    if reference is not None:
        check_unused("evaluate with --reference", {"batch_size": batch_size})
    if not tasks:
        values = {one.name: getattr(task_settings, one.name) for one in fields(TaskSettings)}
        given = {one.name: values[one.name] for one in fields(TaskSettings) if values[one.name] != one.default}
        check_unused("evaluate without --tasks", given)
    if reference is None or not text:
        check_unused("evaluate without --text and --reference", {"position_bins": position_bins})
    if not prompts:
        check_unused("evaluate without --prompts", {"max_new_tokens": max_new_tokens})
    length, batch_size, new_tokens = length or 1024, batch_size or 1, max_new_tokens or 40
    named = named_texts([text] if isinstance(text, str) else list(text))
    # Names that are no task and files that can't be read are refused before anything large is loaded.
    suite = ZeroShot(tasks, task_settings, trust_remote_code=trust_remote_code) if tasks else None
    files = suite.files if suite is not None else []
    check_output_files(
        json, inputs=[*model_files(model), *model_files(reference), *files, *text_files(*named.values())]
    )
    place = pick_device(device)
    network, tokenizer = _load(model, dtype, keep=keep, trust_remote_code=trust_remote_code)
    network.to(place)
    tokens = {name: token_windows(one, tokenizer, length=length, sequences=sequences) for name, one in named.items()}
    check_prompts(tokenizer, prompts, network, max_new_tokens=new_tokens)
    dense = None if reference is None else _reference(reference, network, dtype, trust_remote_code=trust_remote_code)
    for one, windows in product(filter(None, (network, dense)), tokens.values()):
        check_sequences(one, windows, batch_size)
    figures: dict[str, Any] = {
        # Another size is another model: its scores must not become those of the folder.
        "model": model if keep is None else f"{model} at keep {keep:g}",
        "dtype": str(network.dtype).removeprefix("torch."),
        "parameters": model_parameters(network),
    }
    if keep is None and (folder := at_home(model)).is_dir():
        # `lowrank report` knows its model by it, wherever it is run.
        figures["directory"] = str(folder.resolve())
    if dense is not None:
        figures |= {"reference": reference, "reference_parameters": model_parameters(dense)}
    print(_heading(figures))
    heading = len(figures)
    try:
        if tokens:
            scores, diverged = score_texts(
                network, tokens, reference=dense, batch_size=batch_size, bins=position_bins or 8
            )
            figures["texts"] = {name: {"text": named[name], **one} for name, one in scores.items()}
            if len(scores) == 1:
                figures |= next(iter(figures["texts"].values()))
            print(f"\n{show_texts(scores, diverged)}")
        if suite is not None:
            results = suite.results(network, tokenizer)
            others = None if dense is None else suite.results(dense, tokenizer)
            figures["tasks"] = figures_of(results, others)
            print(f"\n{task_table(results, others)}")
        samples = generate_samples(network, tokenizer, prompts, max_new_tokens=new_tokens)
        figures["samples"] = dict(zip(prompts, samples, strict=True))
        for prompt, sample in figures["samples"].items():
            print(f"{prompt!r} -> {sample!r}")
    finally:
        # Scores may have taken hours, and stay where a later part fails.
        if json is not None and len(figures) > heading:
            write_figures(json, figures)
    return figures


def evaluate_plan(
    plan: Path,
    *,
    text: str,
    keep_curve: Sequence[float] | None = None,
    parts: Flat[PlanParts] = PlanParts(),
    length: int = 1024,
    sequences: int | None = None,
    batch_size: int = 1,
    dtype: DType | None = None,
    device: str = "auto",
    output: Path | None = None,
    json: Path | None = None,
) -> dict[str, Any]:
    """Score a plan without exporting it, as it is or in several sizes, beside its dense base.

    Args:
        plan: A plan written by ``lowrank allocate`` or ``lowrank fit``, or edited by hand.
        text: Text to score: file, folder, glob, hub dataset or python-docs.
        keep_curve: Sizes to score the plan in, each from its component order: --keep_curve 0.9 0.8; no number means
            1 .9 .8 .7 .6 .5, as far as the plan goes. Without it the plan is scored as it is.
        parts: Where base and factors are, if they are not where the plan says.
        length: Tokens of a sequence.
        sequences: How many sequences of the text; all of it by default.
        batch_size: Sequences per forward.
        dtype: Type to load the base in; the plan's own by default.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        output: Picture of the curve, a PNG file; by default beside the figures of json.
        json: Write the figures there.

    Returns:
        The figures that ``json`` gets.
    """
    from lowrank_pl.evaluate.likelihood import perplexity
    from lowrank_pl.evaluate.size_curve import curve_plot, curve_table, score_curve
    from lowrank_pl.plans.plan import RankPlan
    from lowrank_pl.text.sequences import token_windows
    from lowrank_pl.text.sources import text_files
    from lowrank_pl.utils.environment import pick_device
    from lowrank_pl.utils.figures import save_figure

    if keep_curve is None:
        check_unused("evaluate-plan without --keep_curve", {"output": output and str(output)})
    beside = None if json is None or is_special(json) else json.with_suffix(".png")
    picture = None if keep_curve is None else output or beside
    check_output_files(picture, json, inputs=[plan, *text_files(text)])
    given = RankPlan.load(plan)
    parts.check_outputs(given, picture, json)
    # Impossible sizes are refused before anything is loaded.
    sizes = [] if keep_curve is None else _sizes(given, keep_curve)
    base = parts.base_of(given, plan)
    base = base if dtype is None else replace(base, dtype=dtype)
    tokenizer = base.tokenizer()
    tokens = token_windows(text, tokenizer, length=length, sequences=sequences)
    model = base.load().to(pick_device(device))
    factors = parts.factors_of(given, model, tokenizer)
    dense = None
    if given.left_out and parts.base is None:
        before = _reference(given.named_base, model, None, trust_remote_code=parts.trust_remote_code)
        dense = perplexity(before, tokens, batch_size=batch_size, progress="score dense")
        del before
    elif given.left_out:
        _log.warning(
            "the dense row is %s, which is pruned; without --base it is the base before pruning, %s",
            parts.base, given.named_base,
        )  # fmt: skip
    curve = score_curve(model, given, sizes, factors, tokens, batch_size=batch_size, dense=dense)
    print(curve_table(curve))
    figures = {
        "plan": str(plan),
        "method": given.method,
        "base": parts.base or given.named_base,
        "text": text,
        "windows": len(tokens),
        "length": length,
        "dtype": base.dtype,
        "dense": curve.dense.to_dict(),
        "sizes": [point.to_dict() for point in curve.points],
    }
    if picture is not None:
        save_figure(curve_plot(curve), picture)
        print(f"\npicture  {picture}")
    if json is not None:
        write_figures(json, figures)
    return figures


def _heading(figures: Mapping[str, Any]) -> str:
    """Return which models are scored, in one line."""
    heading = f"{figures['model']}: {figures['parameters']:,} parameters, {figures['dtype']}"
    if "reference" in figures:
        heading += f"; beside {figures['reference']}: {figures['reference_parameters']:,} parameters"
    return heading


def _reference(name: str, model: PreTrainedModel, dtype: DType | None, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return the dense model on the device of ``model``, and in its type unless ``dtype`` is another."""
    own: Any = dtype or str(model.dtype).removeprefix("torch.")
    found = _load(name, own, trust_remote_code=trust_remote_code)[0]
    return found.to(model.device)


def _sizes(plan: RankPlan, keeps: Sequence[float]) -> list[RankPlan]:
    """Return the plans of ``keeps``; where there are none, of those of the usual sizes that the plan has."""
    from lowrank_pl.evaluate.size_curve import KEEPS
    from lowrank_pl.plans.resize import largest_keep, nested

    most = largest_keep(plan)
    if not keeps and most < max(KEEPS):
        _log.info("the weights were changed for keep %g: the curve has no larger sizes", most)
    # A corrected plan that has none of the usual sizes is scored in its own.
    usual = [keep for keep in KEEPS if keep <= most] or [plan.keep]
    return list(nested(plan, keeps or usual).values())


def _load(
    model: str, dtype: DType | None, *, keep: float | None = None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return an export, cut to ``keep`` if that is given, or a base with its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from lowrank_pl.export.export import is_compressed, load_compressed
    from lowrank_pl.models.base import load_base, stored_dtype

    if is_compressed(model):
        settings = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        loaded = load_compressed(model, keep=keep, trust_remote_code=trust_remote_code, **settings)
        return loaded, AutoTokenizer.from_pretrained(at_home(model), trust_remote_code=trust_remote_code)
    if keep is not None:
        raise ValueError(f"{model!r} is no export of factors, so --keep can't cut it: leave --keep out")
    kind = stored_dtype(model, trust_remote_code=trust_remote_code) if dtype is None else getattr(torch, dtype)
    base = Base(model, trust_remote_code=trust_remote_code)
    return load_base(model, dtype=kind, trust_remote_code=trust_remote_code), base.tokenizer()
