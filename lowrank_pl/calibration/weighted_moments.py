"""Moments in which tokens count by the size of their gradient, and these sizes.

A loss's curvature by a weight is ``E[x x' (x) g g']``, and two second moments can stand for it only as far as a token's
input and its gradient have nothing to do with each other. They have where much depends on few tokens: in the values and
keys of attention sinks, gradients are a hundred times what they are elsewhere, and all for one input. Splitting the
size of each token's gradient evenly over both sides keeps such tokens from standing for all. It is no exact product
either, but an estimate that is lower than the curvature where sizes vary much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.calibration.input_moments import product, rows_of
from lowrank_pl.utils.distributed import sum_across_processes, total_across_processes

__all__ = ["TokenNorms", "WeightedMoments"]


@dataclass
class WeightedMoments:
    """Sums over tokens of ``|g| x x'`` and of ``g g' / |g|``, ``x`` an input and ``g`` the gradient by its output.

    Args:
        inputs: ``[in, in]`` sum of the former, float64.
        outputs: ``[out, out]`` sum of the latter, float64.
        tokens: How many tokens had a label.

    Example:
        >>> moments = WeightedMoments.empty((1, 1))
        >>> moments.add(torch.tensor([[2.0], [3.0]]), torch.tensor([[-5.0], [0.0]]), tokens=2, batch=0)
        >>> moments.mean_inputs.item(), moments.mean_outputs.item()
        (10.0, 2.5)
    """

    inputs: Tensor
    outputs: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> WeightedMoments:
        """Return sums of nothing for a weight of ``shape`` ``(out, in)``."""
        rows, columns = (torch.zeros(size, size, dtype=torch.float64, device=device) for size in shape)
        return cls(columns, rows)

    def add(self, inputs: Tensor, gradient: Tensor, *, tokens: int, batch: int) -> None:
        """Add one call of the map: ``inputs`` ``[..., in]`` and ``gradient`` ``[..., out]`` of the same tokens.

        Args:
            inputs: What it was fed.
            gradient: Of a summed loss, by what it returned.
            tokens: How many labels the loss asked for.
            batch: Not used.

        Raises:
            ValueError: The inputs hold NaN or infinity.
        """
        gradients = rows_of(gradient)
        roots = _norms(gradients).sqrt()[:, None]
        weighted = rows_of(inputs) * roots
        # A token without a gradient has nothing to share out.
        shared = torch.where(roots > 0, gradients / roots, 0.0)
        self.inputs += product(weighted, weighted, "the inputs hold")
        self.outputs += product(shared, shared, "the gradients hold")
        self.tokens += tokens

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        sum_across_processes(self.inputs)
        sum_across_processes(self.outputs)
        self.tokens = total_across_processes(self.tokens)

    @property
    def mean_inputs(self) -> Tensor:
        """``[in, in]`` mean of ``|g| x x'`` over tokens with a label."""
        return self.inputs / max(1, self.tokens)

    @property
    def mean_outputs(self) -> Tensor:
        """``[out, out]`` mean of ``g g' / |g|`` over tokens with a label."""
        return self.outputs / max(1, self.tokens)


@dataclass
class TokenNorms:
    """How large the gradient by a map's output is, for every token.

    Args:
        norms: ``[sequences, length]``, float32; 0 where the map was not called.
        batch_size: Sequences in a batch.

    Example:
        >>> norms = TokenNorms.empty(2, 1)
        >>> norms.add(torch.zeros(1, 1, 8), torch.tensor([[[3.0, 4.0]]]), tokens=1, batch=1)
        >>> norms.norms.tolist()
        [[0.0], [5.0]]
    """

    norms: Tensor
    batch_size: int = 1

    @classmethod
    def empty(cls, sequences: int, length: int, *, batch_size: int = 1) -> TokenNorms:
        """Return the norms of no gradient for ``sequences`` of ``length`` tokens."""
        return cls(torch.zeros(sequences, length), batch_size)

    def add(self, inputs: Tensor, gradient: Tensor, *, tokens: int, batch: int) -> None:
        """Take the norms of ``gradient`` ``[..., out]``, of all tokens of batch number ``batch``.

        Args:
            inputs: Not used.
            gradient: Of a summed loss, by what the map returned.
            tokens: Not used.
            batch: Number of the batch.

        Raises:
            ValueError: The map is not called once for every token.
        """
        first = batch * self.batch_size
        part = self.norms[first : first + self.batch_size]
        found = _norms(rows_of(gradient))
        if found.numel() != part.numel():
            raise ValueError(f"a map was called for {found.numel()} tokens of the {part.numel()} that there are")
        part.copy_(found.view_as(part))

    def merge_processes(self) -> None:
        """Put together what all processes that work together have seen."""
        sum_across_processes(self.norms)


def _norms(rows: Tensor) -> Tensor:
    # The squares of faint gradients lie below what float32 can hold.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms.float()
