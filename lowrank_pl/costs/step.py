"""The cost of a learning step beside the frozen model's own forward and input-gradient step, in time and in memory.

Both depend on shapes, not on values: the components are random numbers here, so that neither text nor decomposition is
needed, and blocks of models that fit no machine can be measured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.costs.turns import frozen_step, timed_in_turns
from lowrank_pl.factors.decomposition import Factors
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.methods.masks.masked_linear import MaskedLinear, choose_computation
from lowrank_pl.methods.masks.objectives import next_token_loss
from lowrank_pl.models.forward import activation_checkpointing
from lowrank_pl.models.targets import dense_weight, find_targets, replaced
from lowrank_pl.plans.budget import check_keep
from lowrank_pl.plans.storage import Storage

__all__ = ["StepTest", "measure_step"]


@dataclass(frozen=True)
class StepTest:
    """The learning step that is measured.

    Args:
        storage: What ranks cost, and so how many a fraction pays for.
        keep: Fraction of each layer's parameters that masks start at.
        inactive_gate_stride: Every so many-th token gives the gradients of inactive gates.
        gradient_checkpointing: Whether the step computes the activations of each block again in the backward pass.
        method: Makes the masks.

    Raises:
        ValueError: ``keep`` lies outside (0, 1].
    """

    storage: Storage
    keep: float = 0.8
    inactive_gate_stride: int = 8
    gradient_checkpointing: bool = False
    method: MaskMethod = field(default_factory=ARA)

    def __post_init__(self) -> None:
        check_keep(self.keep)


def measure_step(model: PreTrainedModel, tokens: Tensor, test: StepTest, *, repeats: int) -> dict[str, Any]:
    """Return the seconds of a learning step in three forms and of the frozen model's step, and their ratios.

    ``step`` takes gradients of inactive gates from every ``inactive_gate_stride``-th token, ``exact`` from all, and
    ``plain`` multiplies all tokens by all stored components, forward and backward. The frozen model's step computes
    gradients down to the input embeddings, and none of a weight; it keeps all activations. All take turns, and the
    fastest of each counts.

    Args:
        model: The dense model; at the end it is as it was.
        tokens: ``[batch, length]`` token ids.
        test: The learning step.
        repeats: Turns of each, after one to warm up.
    """
    layers = _masked(model, test)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    added = sum(layer.left.nbytes + layer.right.nbytes for layer in layers.values())

    def learning(*, stride: int | None) -> Callable[[], None]:
        def step() -> None:
            choose_computation(layers, test.method.dense_from, stride=stride or 1)
            if stride is None:
                for layer in layers.values():
                    layer.active = None
            with activation_checkpointing(model) if test.gradient_checkpointing else nullcontext():
                logits = model(input_ids=tokens, use_cache=False).logits
                next_token_loss(logits, tokens).backward()  # type: ignore[no-untyped-call]

        return step

    def frozen() -> None:
        for layer in layers.values():
            layer.computation = "dense"
        frozen_step(model, tokens)

    steps = {
        "step": learning(stride=test.inactive_gate_stride),
        "exact": learning(stride=1),
        "plain": learning(stride=None),
    }
    with replaced(model, layers):
        times = timed_in_turns({"frozen": frozen, **steps}, repeats=repeats, device=model.device, label="bench step")
    ratios = {name: times[name].seconds / times["frozen"].seconds for name in steps}
    return {
        "keep": test.keep,
        "storage": test.storage.choice,
        "every": test.inactive_gate_stride,
        "tokens": tokens.numel(),
        **{f"{name}_seconds": time.seconds for name, time in times.items()},
        "ratio_to_frozen": ratios["step"],
        "exact_ratio_to_frozen": ratios["exact"],
        "plain_ratio_to_frozen": ratios["plain"],
        "weights_ratio": (dense_bytes + added) / dense_bytes,
        "gradient_checkpointing": test.gradient_checkpointing,
        **{f"{name}_peak_memory": time.peak_memory for name, time in times.items()},
    }


def _masked(model: PreTrainedModel, test: StepTest) -> dict[str, MaskedLinear]:
    """Return a masked layer of random components for every target of ``model``."""
    layers = {}
    for target in find_targets(model).modules:
        dense = model.get_submodule(target.name)
        rows, columns = target.shape
        sigma = torch.linspace(1, 0.01, min(rows, columns), dtype=torch.float64)
        mask = test.method.create(target.shape, sigma, test.keep, storage=test.storage).to(model.device)
        like = {"dtype": dense_weight(dense).dtype, "device": model.device}
        # Of such sizes that outputs are about as large as inputs: denormal numbers and infinities take longer.
        left = torch.randn(rows, mask.rank, **like) * mask.rank**-0.5
        right = torch.randn(mask.rank, columns, **like) * columns**-0.5
        layers[target.name] = MaskedLinear(dense, Factors(left, right, sigma[: mask.rank]), mask)
    return layers
