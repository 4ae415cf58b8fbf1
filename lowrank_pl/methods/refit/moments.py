"""Joint moments of a linear layer's inputs in the dense and in the compressed model, paired token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_pl.calibration.symmetric_sum import product, rows_of

__all__ = ["PairMoments"]

_HELD = "an activation of the dense or the compressed model holds"


@dataclass
class PairMoments:
    """Sums over tokens of products of one layer's inputs: ``t`` in the compressed model, ``t + d`` in the dense one.

    The sums use the difference ``d`` and not the dense input: in early blocks ``d`` is small, and would drown in the
    rounding of the inputs. If the layer's output is added to a residual stream, ``e`` is the error of that stream
    before the addition: dense minus compressed. Tokens may be weighted. All sums are float64.

    Args:
        inputs: ``[in, in]`` sum of ``t t'``.
        cross: ``[in, in]`` sum of ``d t'``.
        stream: ``[out, in]`` sum of ``e t'``; None without a stream.
        drift: ``[in, in]`` sum of ``d d'``; None if only a regression is needed, and not its error.
        stream_drift: ``[out, in]`` sum of ``e d'``; None if ``stream`` or ``drift`` is None.
        stream_second: ``[out, out]`` sum of ``e e'``; None if ``stream`` or ``drift`` is None.
        tokens: Number of summed tokens.

    Example:
        >>> moments = PairMoments.empty(1)
        >>> moments.update(torch.tensor([[3.0], [5.0]]), torch.tensor([[2.0], [3.0]]))
        >>> moments.inputs.item(), moments.cross.item(), moments.drift.item(), moments.tokens
        (13.0, 8.0, 5.0, 2)
    """

    inputs: Tensor
    cross: Tensor
    stream: Tensor | None = None
    drift: Tensor | None = None
    stream_drift: Tensor | None = None
    stream_second: Tensor | None = None
    tokens: int = 0

    @staticmethod
    def bytes_of(features: int) -> int:
        """Return the bytes that the sums for a fit and for its errors take together, without a stream."""
        return 5 * 8 * features**2

    @classmethod
    def empty(
        cls, features: int, *, stream: int | None = None, errors: bool = True, device: torch.device | str = "cpu"
    ) -> PairMoments:
        """Return sums over no tokens.

        Args:
            features: Number of input features.
            stream: Width of the stream; None without a stream.
            errors: Whether to include the sums that only errors need.
            device: Device of the sums.
        """

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=torch.float64, device=device)

        moments = cls(zeros(features, features), zeros(features, features))
        if errors:
            moments.drift = zeros(features, features)
        if stream is not None:
            moments.stream = zeros(stream, features)
            if errors:
                moments.stream_drift, moments.stream_second = zeros(stream, features), zeros(stream, stream)
        return moments

    def update(
        self,
        dense: Tensor,
        compressed: Tensor,
        stream: tuple[Tensor, Tensor] | None = None,
        *,
        weights: Tensor | None = None,
    ) -> None:
        """Add the inputs of the same tokens in both models.

        Args:
            dense: Inputs ``[..., in]`` in the dense model.
            compressed: Inputs ``[..., in]`` in the compressed model.
            stream: Streams ``[..., out]`` of the dense and of the compressed model; required if streams are summed.
            weights: Weights ``[...]`` of the tokens; by default all are 1.

        Raises:
            ValueError: A tensor holds NaN or infinity.
        """
        roots = None if weights is None else weights.to(compressed.device).flatten().float().sqrt()[:, None]

        def counted(rows: Tensor) -> Tensor:
            return rows if roots is None else rows * roots

        inputs = rows_of(compressed)
        inputs, drift = counted(inputs), counted(rows_of(dense) - inputs)
        self.inputs += product(inputs, inputs, _HELD)
        self.cross += product(drift, inputs, _HELD)
        if self.drift is not None:
            self.drift += product(drift, drift, _HELD)
        if self.stream is not None:
            assert stream is not None
            lacking = counted(rows_of(stream[0]) - rows_of(stream[1]))
            self.stream += product(lacking, inputs, _HELD)
            if self.stream_drift is not None and self.stream_second is not None:
                self.stream_drift += product(lacking, drift, _HELD)
                self.stream_second += product(lacking, lacking, _HELD)
        self.tokens += len(inputs)

    def merged(self, other: PairMoments) -> PairMoments:
        """Return the sums over the tokens of both; a sum that is None in one of them is None in the result."""
        return PairMoments(
            self.inputs + other.inputs,
            self.cross + other.cross,
            _sum(self.stream, other.stream),
            _sum(self.drift, other.drift),
            _sum(self.stream_drift, other.stream_drift),
            _sum(self.stream_second, other.stream_second),
            self.tokens + other.tokens,
        )

    def mean_(self) -> PairMoments:
        """Turn the sums, in place, into means over tokens, which are the sums of one token, and return them."""
        sums = (self.inputs, self.cross, self.stream, self.drift, self.stream_drift, self.stream_second)
        for part in sums:
            if part is not None:
                part /= max(1, self.tokens)
        self.tokens = 1
        return self

    @property
    def nothing_lost(self) -> bool:
        """Whether both models computed the same so far, so that there is no error to compensate."""
        parts = (self.cross, self.stream, self.drift, self.stream_second)
        return not any(part is not None and part.any() for part in parts)


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return None if one is None or two is None else one + two
