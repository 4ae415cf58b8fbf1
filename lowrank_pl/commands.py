"""What ``lowrank evaluate``, ``allocate`` and ``export`` do: plain typed functions, usable from Python too."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.allocate import Problem, allocator
from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.evaluate import generate_samples, perplexity
from lowrank_pl.export import is_compressed, load_compressed
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.files import write_json
from lowrank_pl.finish import command_line, export_plan
from lowrank_pl.plan import RankPlan
from lowrank_pl.plan_report import rank_table, table
from lowrank_pl.prepare import Decomposition, budget_for, build_factors, build_gradients, describe_origin, preparation_notes
from lowrank_pl.report import Row, row_table
from lowrank_pl.targets import find_targets
from lowrank_pl.windows import token_windows

__all__ = ["allocate", "evaluate", "export", "pick_device"]

_log = logging.getLogger(__name__)
DType = Literal["float32", "bfloat16", "float16"]


def evaluate(
    model: str,
    text: str,
    *,
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
    """Score a compressed folder or any base model: perplexity on a text, and tokens a second.

    Windows do not overlap, each begins with BOS where the tokenizer itself adds it, losses are summed in float64, and
    logits that are not finite are an error.

    Args:
        model: An export, or a base: hub id, folder, .gguf file, package:NAME or random:FAMILY.
        text: File, glob, hub dataset or python-docs, as in the README.
        length: Tokens of a window.
        windows: How many windows; all of the text by default.
        batch_size: Windows per forward.
        dtype: Type to load in; the folder's own by default, float32 for a GGUF file.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        prompts: Texts to continue greedily.
        max_new_tokens: How far.
        trust_remote_code: Run Python code that comes with a base model.
        json: Write the figures there.

    Returns:
        The figures that ``json`` gets.
    """
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
    return _written(figures, json)


def allocate(
    base: str,
    *,
    method: str = "uniform",
    settings: dict[str, Any] | None = None,
    keep: float = 0.8,
    text: str = "python-docs",
    length: int = 512,
    windows: int = 256,
    dtype: DType = "float32",
    decomposition: Decomposition = Decomposition(),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
    floors: dict[str, float] | None = None,
    output: Path = Path("plan.json"),
    store: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> RankPlan:
    """Write a rank plan without training, by a closed-form allocator.

    Args:
        base: Hub id, folder, .gguf file, package:NAME or random:FAMILY.
        method: The allocator: uniform, fisher.
        settings: Its settings, such as --settings.rounds 5 for zero_sum.
        keep: Fraction of the targeted parameters to keep.
        text: Calibration text for the factors: file, glob, hub dataset or python-docs.
        length: Tokens of a calibration window.
        windows: How many windows.
        dtype: Type to load the base in; the export has it too.
        decomposition: How weights are decomposed.
        include: Globs of modules to target, on full names or names inside a block.
        exclude: Globs of modules to leave alone; they are not counted in keep.
        multiple_of: Every rank is a multiple of this.
        floors: Least kept fraction by glob on module names; 1.0 keeps these dense.
        output: Where the plan goes.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.

    Returns:
        The plan.
    """
    drawer = allocator(method, **(settings or {}))
    model = load_base(base, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    targets = find_targets(model, include=include, exclude=exclude)
    budget = budget_for(model, targets, keep, multiple_of=multiple_of, floors=floors)
    tokens = token_windows(text, tokenizer, length=length, windows=windows)
    model.to(pick_device(device))
    factors = build_factors(model, targets, tokens, tokenizer, settings=decomposition, directory=store)
    gradients = build_gradients(model, targets, tokens, tokenizer, directory=store) if drawer.needs_gradients else None
    origin = describe_origin(base=base, dtype=dtype, text=text, windows=tokens, settings=decomposition, store=factors)
    problem = Problem(budget, factors, targets, model=model, windows=tokens, gradients=gradients)
    plan = drawer.plan(problem).with_origin(origin, factors.fingerprint, preparation_notes(targets, factors))
    plan.save(output)
    print(f"{_plan_line(plan)}\n{rank_table(plan)}\nplan   {output}\nstore  {factors.directory}")
    _written({"plan": str(output), **_plan_figures(plan)}, json)
    return plan


def export(
    plan: Path,
    *,
    output: Path = Path("model"),
    base: str | None = None,
    store: Path | None = None,
    merge: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> Path:
    """Turn any plan into a model that transformers loads, checked by a reload in a fresh process.

    Args:
        plan: A plan written by ``lowrank allocate`` or ``lowrank fit``, or edited by hand.
        output: Folder of the model.
        base: The base, where the plan's own name for it does not lead there from here.
        store: Folder of the factors, likewise; factors that are gone are made again from the plan's origin.
        merge: Write dense weights for runtimes that know no factors, instead of factors.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.

    Returns:
        The folder.
    """
    drawn = RankPlan.load(plan)
    base = base or drawn.origin.get("base")
    if base is None:
        raise ValueError(f"{plan} does not say which base it is for: name it with --base")
    dtype = getattr(torch, drawn.origin.get("dtype", "float32"))
    model = load_base(base, dtype=dtype, trust_remote_code=trust_remote_code).to(pick_device(device))
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    factors = _factors_of(drawn, model, tokenizer, store)
    report = export_plan(model, drawn, factors, output, tokenizer=tokenizer, command=command_line(), merge=merge)
    row = Row("export", kept_targeted=drawn.keep_targeted, kept_model=drawn.keep_model, bytes=report.bytes)
    print(f"{row_table([row])}\n\nmodel  {report.directory}")
    figures = {**_plan_figures(drawn), "model": str(report.directory), "bytes": report.bytes, "merged": report.merged}
    _written({**figures, "verified": report.verified}, json)
    return report.directory


def _factors_of(
    plan: RankPlan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: Path | None
) -> FactorStore:
    """Return the factors that ``plan`` was drawn for: those on disk, or made again in the cache."""
    directory = store or Path(plan.origin.get("store", ""))
    if store is not None or (plan.origin.get("store") and (directory / "manifest.json").exists()):
        return FactorStore.existing(directory)
    if "calibration" not in plan.origin:
        raise ValueError("the plan does not say what its factors were made from: name their folder with --store")
    _log.warning("the factors at %s are gone: making them again from the plan's origin", directory)
    calibration = dict(plan.origin["calibration"])
    tokens = token_windows(calibration.pop("text"), tokenizer, **calibration)
    targets = find_targets(model, include=list(plan.modules))
    return build_factors(model, targets, tokens, tokenizer, settings=Decomposition(**plan.origin["decomposition"]))


def _load(
    model: str, dtype: DType | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return an export or a base with its tokenizer."""
    if is_compressed(model):
        settings = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        return load_compressed(model, **settings), AutoTokenizer.from_pretrained(model)
    loaded = load_base(model, dtype=getattr(torch, dtype or "float32"), trust_remote_code=trust_remote_code)
    return loaded, load_tokenizer(model, trust_remote_code=trust_remote_code)


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; for ``auto`` that is ``cuda`` where there is one, else ``cpu``.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # What is raised depends on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} can't be used here ({str(error).splitlines()[0]}): give auto, cpu or cuda"
        ) from None


def _plan_line(plan: RankPlan) -> str:
    return (
        f"{plan.method}: kept {plan.keep_targeted:.4%} of the targeted parameters (asked {plan.keep:.4%}), "
        f"{plan.keep_model:.2%} of the model, {plan.bytes / 1e6:,.1f} MB"
    )


def _plan_figures(plan: RankPlan) -> dict[str, Any]:
    return {
        "method": plan.method,
        "keep": plan.keep,
        "kept_targeted": plan.keep_targeted,
        "kept_model": plan.keep_model,
        "bytes": plan.bytes,
        "dense_modules": len(plan.dense_modules),
        "modules": len(plan.modules),
        "notes": list(plan.notes),
    }


def _written(figures: dict[str, Any], path: Path | None) -> dict[str, Any]:
    if path is not None:
        write_json(path, figures)
    return figures
