"""The time and the error of a singular value decomposition by each driver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_pl.factors.decomposition import DRIVERS
from lowrank_pl.utils.environment import timed

__all__ = ["measure_drivers"]

_SLOW = 10.0
"""Seconds from which a driver is not run again."""


def measure_drivers(shapes: Sequence[tuple[int, int]], device: torch.device, *, repeats: int) -> list[dict[str, Any]]:
    """Return seconds and errors of every driver on random matrices of ``shapes``, whose values fall over ten decades.

    ``error`` is the largest entry of the product of the parts less the matrix, relative to the largest singular value;
    ``orthogonality`` is the largest entry of ``U' U - 1``, ``U`` the left vectors. The first turn warms up, and the
    fastest of the others counts.

    Args:
        shapes: ``(m, n)`` of each matrix.
        device: Where the drivers run. On a GPU the CPU beside it is measured as well, transfers included.
        repeats: Turns of each driver that count.
    """
    on_gpu = device.type == "cuda"
    names = ["polar", "lapack", *(["gesvd", "gesvdj", "cpu"] if on_gpu else [])]
    rows = []
    with tqdm(total=len(shapes) * len(names), desc="bench svd", unit="driver") as bar:
        for shape in shapes:
            matrix = _graded(shape).to(device)
            for name in names:
                driver = _on_cpu if name == "cpu" else DRIVERS[name]
                (left, sigma, right), seconds = timed(partial(driver, matrix), device)
                # After a slow driver the time of warming up no longer matters.
                if seconds < _SLOW:
                    seconds = min(timed(partial(driver, matrix), device)[1] for _ in range(repeats))
                identity = torch.eye(left.shape[1], dtype=left.dtype, device=device)
                rows.append({
                    "shape": f"{shape[0]} x {shape[1]}",
                    "driver": name,
                    "seconds": seconds,
                    "error": ((left * sigma @ right - matrix).abs().max() / sigma[0]).item(),
                    "orthogonality": (left.mT @ left - identity).abs().max().item(),
                })  # fmt: skip
                bar.update()
    return rows


def _graded(shape: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -10, shape[1], dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scales


def _on_cpu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, sigma, right = DRIVERS["lapack"](matrix.cpu())
    return left.to(matrix), sigma.to(matrix), right.to(matrix)
