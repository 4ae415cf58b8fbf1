"""Products of batches of tokens that moments are summed from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product", "rows_of"]


def rows_of(tensor: Tensor) -> Tensor:
    """Return ``[..., n]`` as float32 rows ``[tokens, n]``, detached."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()


def product(one: Tensor, two: Tensor, what: str) -> Tensor:
    """Return ``one' @ two`` of rows ``[tokens, m]`` and ``[tokens, n]``, float64 where float32 can't hold it.

    One product per batch in float32 keeps matrix-multiply speed; summing the batches in float64 keeps the digits.

    Args:
        one: Rows of float32.
        two: Likewise.
        what: What holds NaN or infinity, if they do.

    Raises:
        ValueError: They hold NaN or infinity.
    """
    found = one.mT @ two
    # A sum shows whatever is not finite, in a fiftieth of the time that looking at every number takes.
    if not torch.isfinite(found.sum()):
        # Massive activations may overflow a float32 square while the inputs themselves are sound.
        found = one.double().mT @ two.double()
        if not torch.isfinite(found).all():
            raise ValueError(f"{what} NaN or infinity")
    return found
