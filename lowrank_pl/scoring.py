"""What ``lowrank evaluate`` does: scores of a model or of a plan's sizes; a plain typed function."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.commands import DType, base_of, factors_of, pick_device
from lowrank_pl.curve import KEEPS, curve_plot, curve_table, score_curve
from lowrank_pl.evaluate import perplexity
from lowrank_pl.export import is_compressed, load_compressed
from lowrank_pl.files import write_json
from lowrank_pl.generation import generate_samples
from lowrank_pl.plan import RankPlan
from lowrank_pl.plan_report import save_figure, table
from lowrank_pl.sizes import largest_keep, nested
from lowrank_pl.windows import token_windows

__all__ = ["evaluate"]

_log = logging.getLogger(__name__)


def evaluate(
    model: str | None = None,
    *,
    text: str,
    plan: Path | None = None,
    keep_curve: Sequence[float] | None = None,
    base: str | None = None,
    store: Path | None = None,
    output: Path | None = None,
    length: int = 1024,
    windows: int | None = None,
    batch_size: int = 1,
    dtype: DType | None = None,
    device: str = "auto",
    prompts: Sequence[str] = (),
    max_new_tokens: int = 40,
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Score a compressed folder, any base model, or a plan in every size: perplexity on a text.

    Windows do not overlap, each begins with BOS where the tokenizer itself adds it, losses are summed in float64, and
    logits that are not finite are an error.

    Args:
        model: An export, or a base: hub id, folder, .gguf file, package:NAME or random:FAMILY.
        text: File, glob, hub dataset or python-docs, as in the README.
        plan: A plan instead of a model, scored in memory without an export, beside its dense base.
        keep_curve: Sizes to score the plan in, each from its component order: --keep-curve 0.9 0.8; no number means
            1 .9 .8 .7 .6 .5, as far as the plan goes. Without it the plan is scored as it is.
        base: The plan's base, as for export.
        store: Folder of the plan's factors, as for export.
        output: Picture of the curve, a PNG file; by default beside the figures of json.
        length: Tokens of a window.
        windows: How many windows; all of the text by default.
        batch_size: Windows per forward.
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
    if plan is not None:
        if prompts:
            raise ValueError("--prompts goes with --model: export the plan to let it continue texts")
        return _evaluate_plan(
            plan, text, keep_curve, base=base, store=store, output=output, length=length, windows=windows,
            batch_size=batch_size, dtype=dtype, device=device, trust_remote_code=trust_remote_code, json=json,
        )  # fmt: skip
    for name, value in {"keep-curve": keep_curve, "base": base, "store": store, "output": output}.items():
        if value is not None:
            raise ValueError(f"--{name} goes with --plan: a model has the one size that it has")
    assert model is not None
    network, tokenizer = _load(model, dtype, trust_remote_code=trust_remote_code)
    network.to(pick_device(device))
    tokens = token_windows(text, tokenizer, length=length, windows=windows)
    score = perplexity(network, tokens, batch_size=batch_size, progress="score")
    figures: dict[str, Any] = {
        "model": model,
        "text": text,
        "windows": len(tokens),
        "length": length,
        "dtype": str(network.dtype).removeprefix("torch."),
        "parameters": network.num_parameters(),
        **score.to_dict(),
        "samples": dict(
            zip(prompts, generate_samples(network, tokenizer, prompts, max_new_tokens=max_new_tokens), strict=True)
        ),
    }
    head = ("model", "perplexity", "nats/token", "tokens", "tokens/s", "parameters")
    body = (model, f"{score.perplexity:.4f}", f"{score.nats:.5f}", f"{score.tokens:,}",
            f"{score.tokens_per_second:,.0f}", f"{figures['parameters']:,}")  # fmt: skip
    print(table(head, [body], "simple"))
    for prompt, sample in figures["samples"].items():
        print(f"{prompt!r} -> {sample!r}")
    if json is not None:
        write_json(json, figures)
    return figures


def _evaluate_plan(
    path: Path,
    text: str,
    keeps: Sequence[float] | None,
    *,
    base: str | None,
    store: Path | None,
    output: Path | None,
    length: int,
    windows: int | None,
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
    tokens = token_windows(text, tokenizer, length=length, windows=windows)
    kind = dtype or drawn.origin.get("dtype", "float32")
    model = load_base(named, dtype=getattr(torch, kind), trust_remote_code=trust_remote_code).to(pick_device(device))
    factors = factors_of(drawn, model, tokenizer, store)
    curve = score_curve(model, drawn, sizes, factors, tokens, batch_size=batch_size)
    print(curve_table(curve))
    figures = {
        "plan": str(path),
        "method": drawn.method,
        "base": named,
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
        return load_compressed(model, **settings), AutoTokenizer.from_pretrained(model)
    loaded = load_base(model, dtype=getattr(torch, dtype or "float32"), trust_remote_code=trust_remote_code)
    return loaded, load_tokenizer(model, trust_remote_code=trust_remote_code)
