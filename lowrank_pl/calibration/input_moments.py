"""Second moments of the inputs of linear layers, summed over batches of calibration text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.calibration.experts import ROUTING_WEIGHT
from lowrank_pl.calibration.measures import Batch, Measure, Passes, located
from lowrank_pl.calibration.symmetric_sum import SymmetricSum, compact, rows_of
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.targets import Target, first_argument
from lowrank_pl.utils.distributed import is_first, sum_across_processes, total_across_processes

__all__ = ["InputMoments", "collect_input_moments"]

_log = logging.getLogger(__name__)


class InputMoments(Measure):
    """Means of ``x x'`` and of ``|x|`` over the tokens of one input ``x``, which linear layers may share.

    Means of an expert are over all tokens too, those that it doesn't see counting as zeros. Each ``x`` is multiplied by
    the weight that the router gives the expert's output: an error there counts as often, and as much, as it shows.

    Args:
        features: Length of the input.
        routed: Whether the layers belong to an expert, which sees some of the tokens.
        device: Where the sums are.

    Attributes:
        tokens: How many tokens the means are over.
        rows: How many of them an expert saw.

    Example:
        >>> moments = InputMoments(2)
        >>> moments.add(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        >>> moments.second_moment.tolist(), moments.tokens
        ([[5.0, 7.0], [7.0, 10.0]], 2)
    """

    folder = "statistics"
    shrinks_experts = True

    def __init__(self, features: int, *, routed: bool = False, device: torch.device | str = "cpu") -> None:
        self._second = SymmetricSum(features, device=device)
        self._absolute = torch.zeros(features, dtype=torch.float64, device=device)
        self._weights = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = self.rows = 0
        self._routed = routed

    @classmethod
    def key(cls, target: Target) -> str:
        """Return the name of the input of ``target``, which linear layers may share."""
        return target.group

    @classmethod
    def identity(cls, labels: Labels, batch_size: int) -> dict[str, str]:
        """Return nothing: neither labels nor batches change the moments of inputs."""
        return {}

    @classmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return the bytes that the sums of ``target`` take."""
        return SymmetricSum.bytes_of(target.shape[1])

    @classmethod
    def empty(cls, target: Target, passes: Passes, device: torch.device) -> InputMoments:
        """Return the moments of the input of ``target`` before the first batch."""
        return cls(target.shape[1], routed=bool(target.experts), device=device)

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Add ``inputs`` ``[..., in]``.

        Args:
            inputs: The inputs.
            weights: ``[...]`` weights that the router gives an expert's outputs; None is 1.

        Raises:
            ValueError: An input holds NaN or infinity.
        """
        rows = rows_of(inputs)
        factors = rows.new_ones(len(rows)) if weights is None else weights.detach().reshape(-1).float()
        if self._routed:
            rows = rows * factors[:, None]
        self._second.add(rows, "the inputs hold")
        self._absolute += rows.abs().sum(0, dtype=torch.float64)
        if self._routed:
            self._weights += factors.square().sum(dtype=torch.float64)
            self.rows += len(rows)
        else:
            self.tokens += len(rows)

    def pass_over(self, tokens: int) -> None:
        """Count ``tokens`` of a batch, of which an expert has seen those that were added."""
        if self._routed:
            self.tokens += tokens

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        self._second.merge_processes()
        sum_across_processes(self._absolute)
        self.tokens = total_across_processes(self.tokens)
        if self._routed:
            sum_across_processes(self._weights)
            self.rows = total_across_processes(self.rows)

    @property
    def second_moment(self) -> Tensor:
        """``[in, in]`` mean of ``x x'`` over tokens, float64."""
        return self._second.matrix().div_(max(1, self.tokens))

    @property
    def mean_absolute(self) -> Tensor:
        """``[in]`` mean of ``|x|`` over tokens, float64."""
        return self._absolute / max(1, self.tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``second_moment`` ``[in, in]`` and ``mean_absolute`` ``[in]``."""
        return {"second_moment": compact(self.second_moment), "mean_absolute": self.mean_absolute.float()}

    def notes(self) -> dict[str, str]:
        """Return how many tokens the means are over; of an expert, how many it saw, and their mean squared weight."""
        if not self._routed:
            return {"tokens": str(self.tokens)}
        weight = self._weights.item() / max(1, self.tokens)
        return {"tokens": str(self.tokens), "rows": str(self.rows), ROUTING_WEIGHT: repr(weight)}


def collect_input_moments(model: nn.Module, targets: Sequence[Target], passes: Passes) -> dict[str, InputMoments]:
    """Return the moments of every distinct input of ``targets``, keyed by ``Target.group``.

    Linear layers that share an input (q/k/v, gate/up) share one entry. The model runs forward once over the sequences.
    Processes that work together take a share of the batches each.

    Args:
        model: The dense model; its training flag is restored afterwards.
        targets: The linear layers.
        passes: The sequences, and how many at a time.

    Raises:
        ValueError: An input holds NaN or infinity. The message names the linear layer and the batch.
    """
    leaders = {target.group: target for target in targets}
    # In a block-wise pass only the layers of the current block have their weights.
    device = next(model.get_submodule(targets[0].name).parameters()).device
    moments = {group: InputMoments.empty(target, passes, device) for group, target in leaders.items()}
    with evaluating(model):
        for batch in tqdm(passes.batches(), desc="statistics", unit="batch", disable=not is_first()):
            with _watching(model, moments, batch):
                model(input_ids=batch.tokens.to(device), use_cache=False)
            for found in moments.values():
                found.pass_over(batch.tokens.numel())
    for found in moments.values():
        found.merge_processes()
    if is_first():
        _warn_if_short(leaders, moments)
    return moments


@contextmanager
def _watching(model: nn.Module, moments: Mapping[str, InputMoments], batch: Batch) -> Iterator[None]:
    """Add to ``moments`` the inputs of the layers that they are named after, while the block runs on ``batch``."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        owner: Any = model.get_submodule(name.rpartition(".")[0])

        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with located(name, batch):
                moments[name].add(first_argument(args, kwargs), getattr(owner, "routing_weights", None))

        return add

    with ExitStack() as stack:
        for name in moments:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _warn_if_short(leaders: Mapping[str, Target], moments: Mapping[str, InputMoments]) -> None:
    dense = {name: target for name, target in leaders.items() if not target.experts}
    short = [name for name, target in dense.items() if moments[name].tokens < target.shape[1]]
    if short:
        _log.warning(
            "%d inputs saw fewer tokens than they have features (%s: %d tokens, %d features): their second moment is "
            "singular and rests on damping; give more calibration text",
            len(short),
            short[0],
            moments[short[0]].tokens,
            leaders[short[0]].shape[1],
        )
