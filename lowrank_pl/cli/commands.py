"""What ``lowrank allocate`` and ``export`` do: plain typed functions, usable from Python too; see also ``scoring``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.export.export import check_destination
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.methods.refit.refitting import refit as run_refit
from lowrank_pl.models.base import Base, DType, load_base, load_tokenizer
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import nested
from lowrank_pl.plans.storage import StorageChoice
from lowrank_pl.report.finish import export_plan
from lowrank_pl.report.rank_map import rank_table
from lowrank_pl.report.scores import Row, row_table
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.environment import pick_device
from lowrank_pl.utils.files import write_json

__all__ = ["allocate", "base_of", "export", "factors_of", "refit"]

_log = logging.getLogger(__name__)


def allocate(
    base: str,
    *,
    method: str = "uniform",
    settings: dict[str, Any] | None = None,
    keep: float = 0.8,
    text: str = "python-docs",
    length: int = 512,
    sequences: int = 256,
    dtype: DType = "float32",
    decomposition: Decomposition | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
    floors: dict[str, float] | None = None,
    storage: StorageChoice = "auto",
    output: Path = Path("plan.json"),
    store: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> RankPlan:
    """Write a rank plan without training, by a closed-form allocator.

    Args:
        base: Hub id, folder, .gguf file, package:NAME or random:FAMILY.
        method: The allocator: uniform, energy, drank, svdllm_v2, strs, zs_svd, or fisher.
        settings: Its settings, such as --settings.rounds 5 for zs_svd; a wrong one lists those that there are.
        keep: Fraction of the targeted parameters to keep.
        text: Calibration text for the factors: file, glob, hub dataset or python-docs.
        length: Tokens of a calibration sequence.
        sequences: How many sequences.
        dtype: Type to load the base in; the export has it too.
        decomposition: How weights are decomposed, such as --decomposition.kind svd; by default two_sided for fisher,
            asvd for strs, else whitened.
        include: Globs of modules to target, on full names or names inside a block.
        exclude: Globs of modules to leave alone; they are not counted in keep.
        multiple_of: Every rank is a multiple of this.
        floors: Least kept fraction by glob on module names; 1.0 keeps these dense.
        storage: How low-rank modules are stored: as two factors, pivoted, or auto for the smaller of both.
        output: Where the plan goes.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.

    Returns:
        The plan.
    """
    # A name or a setting that does not exist is refused before anything is loaded.
    chosen = make_allocator(method, **(settings or {}))
    subject = Subject.load(
        Base(base, dtype, trust_remote_code), Calibration(text, length, sequences),
        Constraints(include, exclude, multiple_of, floors or {}, storage), device=pick_device(device),
    )  # fmt: skip
    drawn, factors = allocate_ranks(subject, keep=keep, allocator=chosen, decomposition=decomposition, store=store)
    drawn.save(output)
    print(f"{_plan_line(drawn)}\n{rank_table(drawn)}\nplan   {output}\nstore  {factors.directory}")
    if json is not None:
        write_json(json, {"plan": str(output), **_plan_figures(drawn)})
    return drawn


def export(
    plan: Path,
    *,
    output: Path = Path("model"),
    keep: Sequence[float] | None = None,
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
        output: Folder of the model; with keep, of the models.
        keep: Other sizes, each with a folder of its own, keep-0.90 and so on: --keep 0.9 0.8. They follow from the
            plan's component order, and each is contained in the larger ones.
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
    # Impossible sizes and places are refused before anything is loaded.
    todo = {output: drawn} if keep is None else _folders(output, nested(drawn, keep))
    base = base_of(drawn, plan, base)
    for folder in todo:
        check_destination(folder)
        if folder.exists() and folder.resolve() == Path(base).resolve():
            raise ValueError(f"{str(folder)!r} is the plan's base, which the export would replace: name another folder")
    dtype = getattr(torch, drawn.origin.get("dtype", "float32"))
    model = load_base(base, dtype=dtype, trust_remote_code=trust_remote_code).to(pick_device(device))
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    factors = factors_of(drawn, model, tokenizer, store)
    rows: list[Row] = []
    figures: list[dict[str, Any]] = []
    try:
        for folder, size in todo.items():
            _log.info("exporting %s, %d of %d", folder, len(rows) + 1, len(todo))
            report, size = export_plan(
                model, tokenizer, size, factors, folder, merge=merge, put_back=len(rows) + 1 < len(todo),
            )  # fmt: skip
            name = "export" if keep is None else folder.name
            rows.append(Row(name, kept_targeted=size.keep_targeted, kept_model=size.keep_model, bytes=report.bytes))
            made = {"model": str(folder), "bytes": report.bytes, "merged": report.merged, "verified": report.verified}
            figures.append({**_plan_figures(size), **made})
    except BaseException:
        if rows:
            _log.warning("whole and checked are: %s", ", ".join(str(folder) for folder in [*todo][: len(rows)]))
        raise
    print(f"{row_table(rows)}\n\n{'model ' if keep is None else 'models'} {output}")
    if json is not None:
        write_json(json, figures[0] if keep is None else figures)
    return output


def refit(
    plan: Path,
    *,
    output: Path = Path("refitted.json"),
    text: str | None = None,
    settings: Refit = Refit(),
    base: str | None = None,
    store: Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> RankPlan:
    """Fit a plan's factors again to what the compressed model itself feeds them, block by block and in closed form.

    Every choice is made module by module on sequences that are held back, and what does not help there is not applied.
    A killed run goes on at the block it was in.

    Args:
        plan: A plan written by ``lowrank allocate`` or ``lowrank fit``.
        output: Where the plan for the refitted factors goes; ``lowrank export`` takes it like any other.
        text: Calibration text; by default the plan's own.
        settings: How to refit, such as --settings.sequences 256; more sequences make better factors, and take longer.
        base: The base, where the plan's own name for it does not lead there from here.
        store: Folder of the plan's factors, likewise.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.

    Returns:
        The plan for the refitted factors.
    """
    drawn = RankPlan.load(plan)
    calibration = drawn.origin.get("calibration")
    if calibration is None:
        raise ValueError(f"{plan} does not say what text it was made from: draw it anew with `lowrank allocate`")
    base = base_of(drawn, plan, base)
    dtype = getattr(torch, drawn.origin.get("dtype", "float32"))
    model = load_base(base, dtype=dtype, trust_remote_code=trust_remote_code).to(pick_device(device))
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    own = Calibration(calibration["text"], calibration["length"], calibration["windows"])
    subject = Subject(model, tokenizer, own.tokens(tokenizer), Constraints(include=list(drawn.modules)))
    made, factors = run_refit(
        drawn,
        factors_of(drawn, model, tokenizer, store),
        subject,
        sequences=replace(own, text=text or own.text, sequences=settings.sequences).tokens(tokenizer),
        settings=settings,
    )
    made.save(output)
    print("\n".join([_plan_line(made), *made.notes, f"plan   {output}", f"store  {factors.directory}"]))
    if json is not None:
        write_json(json, {"plan": str(output), **_plan_figures(made)})
    return made


def _folders(output: Path, sizes: Mapping[float, RankPlan]) -> dict[Path, RankPlan]:
    """Return a folder in ``output`` for each size."""
    if (output / "config.json").exists():
        raise ValueError(f"{str(output)!r} is itself a model: name another folder for the models of several sizes")
    # Two digits, so that they sort, unless that would give two sizes one name.
    return {
        output / f"keep-{keep:.2f}" if round(keep, 2) == keep else output / f"keep-{keep}": plan
        for keep, plan in sizes.items()
    }


def base_of(plan: RankPlan, path: Path, base: str | None) -> str:
    """Return ``base`` or else the plan's own name for its base.

    Raises:
        ValueError: There is neither.
    """
    named = base or plan.origin.get("base")
    if named is None:
        raise ValueError(f"{path} does not say which base it is for: name it with --base")
    return str(named)


def factors_of(
    plan: RankPlan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: Path | None
) -> FactorStore:
    """Return the factors that ``plan`` was drawn for: those on disk, or made again in the cache.

    Args:
        plan: The plan.
        model: Its dense base.
        tokenizer: The base's.
        store: Folder of the factors, where the plan's own name for it does not lead there.

    Raises:
        ValueError: They are gone and the plan does not say how to make them.
    """
    directory = store or Path(plan.origin.get("store", ""))
    if store is not None or (plan.origin.get("store") and (directory / "manifest.json").exists()):
        return FactorStore.existing(directory)
    if "refit" in plan.fingerprint:
        raise ValueError(
            f"the refitted factors at {directory} are gone: refit the plan that they came from again with `lowrank "
            "refit`, or name their folder with --store"
        )
    if "correction" in plan.fingerprint:
        raise ValueError(
            f"the corrected factors at {directory} are gone, and only the whole correction makes them again: draw the "
            f"plan anew with `lowrank allocate --method {plan.method}`, or name their folder with --store"
        )
    if "calibration" not in plan.origin:
        raise ValueError("the plan does not say what its factors were made from: name their folder with --store")
    _log.warning("the factors at %s are gone: making them again from the plan's origin", directory)
    origin = plan.origin["calibration"]
    calibration = Calibration(origin["text"], origin["length"], origin["windows"])
    subject = Subject(model, tokenizer, calibration.tokens(tokenizer), Constraints(include=list(plan.modules)))
    return build_factors(subject, settings=Decomposition.of_fingerprint(plan.origin["decomposition"]))


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
