"""Second moments of the inputs of linear maps, streamed over batches of calibration text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.targets import Target, first_argument
from lowrank_pl.utils.distributed import is_first, my_share, sum_across_processes, total_across_processes

__all__ = ["InputMoments", "collect_input_moments", "product", "rows_of"]


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


_log = logging.getLogger(__name__)


@dataclass
class InputMoments:
    """Sums over tokens of one input: ``x x'`` and ``|x|``; two of them merge by addition.

    Args:
        second: ``[in, in]`` sum of outer products, float64.
        absolute: ``[in]`` sum of absolute values, float64.
        tokens: How many tokens were summed.

    Example:
        >>> moments = InputMoments.empty(2)
        >>> moments.update(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        >>> moments.second_moment.tolist(), moments.tokens
        ([[5.0, 7.0], [7.0, 10.0]], 2)
    """

    second: Tensor
    absolute: Tensor
    tokens: int

    @classmethod
    def empty(cls, features: int, *, device: torch.device | str = "cpu") -> InputMoments:
        """Return sums of nothing for inputs of ``features`` values."""
        second = torch.zeros(features, features, dtype=torch.float64, device=device)
        return cls(second, torch.zeros(features, dtype=torch.float64, device=device), 0)

    def update(self, inputs: Tensor) -> None:
        """Add ``inputs`` ``[..., in]``.

        Raises:
            ValueError: They hold NaN or infinity.
        """
        flat = rows_of(inputs)
        self.second += product(flat, flat, "the inputs hold")
        self.absolute += flat.abs().sum(0, dtype=torch.float64)
        self.tokens += flat.shape[0]

    def merge(self, other: InputMoments) -> None:
        """Add the sums of ``other``, from other tokens of the same input."""
        self.second += other.second
        self.absolute += other.absolute
        self.tokens += other.tokens

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        sum_across_processes(self.second)
        sum_across_processes(self.absolute)
        self.tokens = total_across_processes(self.tokens)

    @property
    def second_moment(self) -> Tensor:
        """``[in, in]`` mean of ``x x'`` over tokens."""
        return self.second / max(1, self.tokens)

    @property
    def mean_absolute(self) -> Tensor:
        """``[in]`` mean of ``|x|`` over tokens."""
        return self.absolute / max(1, self.tokens)


def collect_input_moments(
    model: nn.Module, targets: Sequence[Target], sequences: Tensor, *, batch_size: int = 1
) -> dict[str, InputMoments]:
    """Return the moments of every distinct input of ``targets``, keyed by ``Target.group``.

    Modules that share an input (q/k/v, gate/up) share one entry. The model runs forward once over ``sequences``, of which
    processes that work together take a share each.

    Args:
        model: The dense model; its training flag is restored afterwards.
        targets: Whose inputs to watch.
        sequences: ``[sequences, length]`` token ids.
        batch_size: Sequences per forward.

    Raises:
        ValueError: An input holds NaN or infinity (the message names module and batch).
    """
    leaders = {target.group: target for target in targets}
    # Of a model that is walked block by block, only what is watched has its weights.
    device = next(model.get_submodule(targets[0].name).parameters()).device
    moments = {group: InputMoments.empty(target.shape[1], device=device) for group, target in leaders.items()}
    batches = torch.split(sequences, batch_size)
    with _watching(model, moments) as position, evaluating(model):
        mine = my_share(list(enumerate(batches)))
        for position[0], batch in tqdm(mine, desc="statistics", unit="batch", disable=not is_first()):
            model(input_ids=batch.to(device), use_cache=False)
    for found in moments.values():
        found.merge_processes()
    if is_first():
        _warn_if_short(leaders, moments)
    return moments


@contextmanager
def _watching(model: nn.Module, moments: Mapping[str, InputMoments]) -> Iterator[list[int]]:
    """Feed ``moments`` from the inputs of the modules that they are named after; yields the batch number, to be set."""
    position = [0]

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def update(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                moments[name].update(first_argument(args, kwargs))
            except ValueError as error:
                raise ValueError(
                    f"{error}: at module {name} in calibration batch {position[0]}; "
                    "check the checkpoint, or load it in a wider dtype"
                ) from None

        return update

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in moments]
    try:
        yield position
    finally:
        for handle in handles:
            handle.remove()


def _warn_if_short(leaders: Mapping[str, Target], moments: Mapping[str, InputMoments]) -> None:
    short = [name for name, target in leaders.items() if moments[name].tokens < target.shape[1]]
    if short:
        _log.warning(
            "%d inputs saw fewer tokens than they have features (%s: %d tokens, %d features): their second moment is "
            "singular and rests on damping; give more calibration text",
            len(short),
            short[0],
            moments[short[0]].tokens,
            leaders[short[0]].shape[1],
        )
