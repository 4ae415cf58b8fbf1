"""What a learning step costs beside the frozen model's own forward and input-gradient step, in time and in memory.

Both depend on shapes, not on values: the components are random numbers here, so that neither text nor decomposition is
needed, and blocks of models that fit no machine can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.methods.masks.masked_linear import MaskedLinear, choose_computation
from lowrank_pl.methods.masks.objectives import next_token_loss
from lowrank_pl.models.forward import activation_checkpointing
from lowrank_pl.models.targets import dense_weight, find_targets, replaced
from lowrank_pl.plans.storage import Storage
from lowrank_pl.utils.environment import peak_memory, reset_peak_memory, timed

__all__ = ["measure_step"]


def measure_step(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    keep: float,
    prices: Storage,
    every: int,
    repeats: int,
    gradient_checkpointing: bool = False,
    method: MaskMethod | None = None,
) -> dict[str, Any]:
    """Return the seconds of a learning step in three forms and of the frozen model's, and their ratios.

    ``step`` takes gradients of gates that are off from every ``every``-th token, ``exact`` from all, and ``plain``
    multiplies all tokens by all stored components, forward and backward. The frozen model's step computes gradients
    down to the input embeddings, and no weight's. All take turns, and the fastest of each counts.

    Args:
        model: The dense model; at the end it is as it was.
        tokens: ``[batch, length]`` token ids.
        keep: Fraction of each layer's parameters that masks start at.
        prices: What ranks cost, and so how many a fraction pays for.
        every: As above.
        repeats: Turns of each, after one to warm up.
        gradient_checkpointing: Whether learning steps compute the activations of each block again in the backward
            pass; the frozen step keeps them.
        method: Makes the masks; ARA's by default.
    """
    method = method or ARA()
    layers = _masked(model, method, keep, prices)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    added = sum(layer.left.nbytes + layer.right.nbytes for layer in layers.values())

    def learning(*, every: int | None) -> Callable[[], None]:
        def step() -> None:
            choose_computation(layers, method.dense_from, stride=every or 1)
            if every is None:
                for layer in layers.values():
                    layer.active = None
            with activation_checkpointing(model) if gradient_checkpointing else nullcontext():
                _loss(model(input_ids=tokens, use_cache=False).logits, tokens)

        return step

    def frozen() -> None:
        for layer in layers.values():
            layer.computation = "dense"
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        _loss(model(inputs_embeds=embeddings, use_cache=False).logits, tokens)

    steps = {"step": learning(every=every), "exact": learning(every=1), "plain": learning(every=None)}
    with replaced(model, layers):
        seconds, peaks = _fastest({"frozen": frozen, **steps}, repeats, model.device)
    ratios = {name: seconds[name] / seconds["frozen"] for name in steps}
    return {
        "keep": keep,
        "storage": prices.choice,
        "every": every,
        "tokens": tokens.numel(),
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio_to_frozen": ratios["step"],
        "exact_ratio_to_frozen": ratios["exact"],
        "plain_ratio_to_frozen": ratios["plain"],
        "weights_ratio": (dense_bytes + added) / dense_bytes,
        "gradient_checkpointing": gradient_checkpointing,
        **{f"{name}_peak_memory": value for name, value in peaks.items()},
    }


def _masked(model: PreTrainedModel, method: MaskMethod, keep: float, prices: Storage) -> dict[str, MaskedLinear]:
    """Return a masked layer of random components for every target of ``model``."""
    layers = {}
    for target in find_targets(model).modules:
        dense = model.get_submodule(target.name)
        rows, columns = target.shape
        sigma = torch.linspace(1, 0.01, min(rows, columns), dtype=torch.float64)
        mask = method.create(target.shape, sigma, keep, storage=prices).to(model.device)
        like = {"dtype": dense_weight(dense).dtype, "device": model.device}
        # Of such sizes that outputs are about as large as inputs: slow denormal numbers and infinities would mislead.
        left = torch.randn(rows, mask.rank, **like) * mask.rank**-0.5
        right = torch.randn(mask.rank, columns, **like) * columns**-0.5
        layers[target.name] = MaskedLinear(dense, Factors(left, right, sigma[: mask.rank]), mask)
    return layers


def _loss(logits: Tensor, tokens: Tensor) -> None:
    next_token_loss(logits, tokens).backward()  # type: ignore[no-untyped-call]


def _fastest(
    actions: Mapping[str, Callable[[], None]], repeats: int, device: torch.device
) -> tuple[dict[str, float], dict[str, int]]:
    """Return each action's fastest time in seconds, and the most bytes that were in use during its first turn.

    They take turns, so that all meet the same disturbances.
    """
    best, peaks = dict.fromkeys(actions, float("inf")), {}
    with tqdm(total=(repeats + 1) * len(actions), desc="bench step", unit="step") as bar:
        for turn in range(repeats + 1):
            for name, action in actions.items():
                reset_peak_memory(device)
                _, seconds = timed(action, device)
                if turn:
                    best[name] = min(best[name], seconds)
                else:
                    peaks[name] = peak_memory(device)
                bar.update()
    return best, peaks
