"""The error of a decoder block's output as a function of its low-rank factors, with derivatives. Float32."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank_pl.factors.compression import factored_layer
from lowrank_pl.factors.decomposition import Factors, SquareRoot
from lowrank_pl.methods.refit.pair import ModelPair
from lowrank_pl.models.targets import decoder_blocks, first_argument, replace_module

__all__ = ["BlockError", "BlockWeights", "Curvature", "Parts"]

Parts = list[Tensor]
"""One tensor per factor: left and right of the first layer, of the second layer, and so on."""


@dataclass(frozen=True)
class BlockWeights:
    """Weights of the error of a block's output.

    Args:
        outputs: Root ``R`` of the second moment of the gradients at the residual stream; None for the identity.
        tokens: ``[sequences, length]`` weights with a mean of 1; None if all are 1.
    """

    outputs: SquareRoot | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Curvature:
    """Second moments of one low-rank layer, means over tokens.

    Args:
        inputs: ``[in, in]`` second moment of the layer's inputs.
        outputs: ``[out, out]`` second moment of the gradients at the layer's outputs, of which the block's output has
            the second moment ``R R'``.
    """

    inputs: Tensor
    outputs: Tensor


class BlockError:
    """``E s |R' (y - d)|^2``: ``y`` and ``d`` are a block's outputs in the compressed and in the dense model.

    The block runs as a copy in float32, on the hidden states that the compressed model feeds it.

    Args:
        models: The two models, of which the block was started.
        block: Number of the block.
        factors: The factors of all low-rank layers of the block, by name.
        weights: Weights of the error.

    Attributes:
        values: The present factors, float32: left and right of each layer.
    """

    def __init__(self, models: ModelPair, block: int, factors: Mapping[str, Factors], weights: BlockWeights) -> None:
        self.models = models
        prefix, blocks = decoder_blocks(models.model)
        self.block = copy.deepcopy(blocks[block]).float().eval().requires_grad_(False)
        self._layers: list[Any] = []
        for name, gone in models.replacements.items():
            if name.startswith(f"{prefix}.{block}."):
                replace_module(self.block, name.removeprefix(f"{prefix}.{block}."), gone)
        for name, made in factors.items():
            inner = name.removeprefix(f"{prefix}.{block}.")
            layer = factored_layer(self.block.get_submodule(inner), made)
            replace_module(self.block, inner, layer)
            self._layers.append(layer)
        device = models.model.device
        self.values: Parts = [part.detach().clone() for layer in self._layers for part in (layer.weight, layer.right)]
        for layer in self._layers:
            # Plain attributes take tensors with tangents, which parameters can't be.
            del layer.weight, layer.right
        root = weights.outputs
        self._root = None if root is None else root.root.to(device, torch.float32)
        self._tokens = weights.tokens

    def errors(self, values: Parts, batch: int) -> Tensor:
        """Return the weighted errors ``[tokens, hidden]`` of one batch, of which the squares sum to its error."""
        for place, layer in enumerate(self._layers):
            layer.weight, layer.right = values[2 * place : 2 * place + 2]
        args, kwargs, dense = self.models.call_of_block(batch)
        # Fused attention has no forward derivative.
        with sdpa_kernel(SDPBackend.MATH):
            output = self.block(*args, **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        error = (hidden - dense).flatten(0, -2)
        if self._root is not None:
            error = error * self._root if self._root.ndim == 1 else error @ self._root
        if self._tokens is not None:
            first, count = self.models.sequences_of(batch)
            roots = self._tokens[first : first + count].to(error).flatten().sqrt()
            error = error * roots[:, None]
        return error

    @torch.no_grad()
    def mean(self, values: Parts, batches: Sequence[int]) -> float:
        """Return the mean error per token of ``batches``; infinite if it isn't finite."""
        total, tokens = 0.0, 0
        for batch in batches:
            errors = self.errors(values, batch)
            total += errors.double().square().sum().item()
            tokens += len(errors)
        return total / tokens if math.isfinite(total) else math.inf

    def gradient(self, values: Parts, batch: int) -> Parts:
        """Return the gradient of half the sum of squared errors of one batch."""
        leaves = [value.detach().requires_grad_() for value in values]
        error = self.errors(leaves, batch).square().sum() / 2
        # No token of the batch may be routed to an expert.
        return list(torch.autograd.grad(error, leaves, materialize_grads=True))

    def gauss_newton_product(self, values: Parts, direction: Parts, batch: int) -> Parts:
        """Return ``J' J direction`` for the errors of one batch, without forming ``J``.

        One pass computes the errors and their change along ``direction``, and a backward pass takes this change back.
        """
        leaves = [value.detach().requires_grad_() for value in values]
        with warnings.catch_warnings(), forward_ad.dual_level():
            # Torch's own code for some derivatives is still written for TorchScript.
            warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
            duals = [
                forward_ad.make_dual(leaf, part)  # type: ignore[no-untyped-call]
                for leaf, part in zip(leaves, direction, strict=True)
            ]
            errors, change = forward_ad.unpack_dual(self.errors(duals, batch))  # type: ignore[no-untyped-call]
        # Outside of the level, where saved tensors have no tangents, whose backward functions would need derivatives.
        return list(torch.autograd.grad(errors, leaves, change.detach(), materialize_grads=True))

    def curvature(self, values: Parts, batches: Sequence[int], *, seed: int) -> list[Curvature]:
        """Return the moments of every low-rank layer, as K-FAC (arXiv 1503.05671) takes them.

        Gradients are those of random errors with the second moment that the block's output is weighted by.

        Args:
            values: The factors.
            batches: Batches to run.
            seed: Seed of the random errors.
        """
        generator = torch.Generator().manual_seed(seed)
        sums: list[tuple[Tensor, Tensor]] = []
        tokens = 0
        for batch in batches:
            leaves = [value.detach().requires_grad_() for value in values]
            seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._layers]
            with ExitStack() as stack:
                for layer, calls in zip(self._layers, seen, strict=True):
                    stack.callback(layer.register_forward_hook(_keep(calls), with_kwargs=True).remove)
                errors = self.errors(leaves, batch)
            noise = torch.randn(errors.shape, generator=generator).to(errors)
            outputs = [output for calls in seen for _, output in calls]
            found = iter(torch.autograd.grad(errors, outputs, noise, allow_unused=True))
            parts = []
            for calls, layer in zip(seen, self._layers, strict=True):
                inputs = torch.zeros(layer.in_features, layer.in_features, device=errors.device)
                back = torch.zeros(layer.out_features, layer.out_features, device=errors.device)
                for given, output in calls:
                    rows, gradient = given.flatten(0, -2), next(found)
                    inputs += rows.mT @ rows
                    if gradient is not None:
                        gradient = gradient.reshape(-1, output.shape[-1])
                        back += gradient.mT @ gradient
                parts.append((inputs, back))
            tokens += len(errors)
            sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, parts, strict=True)] if sums else parts
        return [Curvature(inputs / tokens, outputs / tokens) for inputs, outputs in sums]


def _keep(calls: list[tuple[Tensor, Tensor]]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((first_argument(args, kwargs).detach(), output))

    return hook
