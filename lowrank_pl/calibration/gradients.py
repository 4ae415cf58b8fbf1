"""What a backward pass over calibration text tells of linear maps: moments of output gradients, weight gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.backward import Call, Recorder, check_length, differentiable, loss_of_batch
from lowrank_pl.calibration.input_moments import rows_of
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.forward import activation_checkpointing
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.distributed import is_first, my_share, sum_across_processes, total_across_processes

__all__ = [
    "GradientMoments",
    "OutputMeasure",
    "WeightGradients",
    "by_name",
    "collect_gradients",
    "measure_gradients",
    "merge_all",
    "take_in",
]

Measure = TypeVar("Measure")


class OutputMeasure(Protocol):
    """Something that is measured of the gradients by a map's outputs."""

    def add(self, inputs: Tensor, gradient: Tensor, *, tokens: int, batch: int) -> None:
        """Take in one call of the map.

        Args:
            inputs: ``[..., in]`` what it was fed.
            gradient: ``[..., out]`` of the summed loss, by what it returned.
            tokens: How many labels the loss asked for; 0 where another call of the batch has told.
            batch: Number of the batch.
        """

    def merge_processes(self) -> None:
        """Put together what all processes that work together have seen."""


@dataclass
class GradientMoments:
    """Sum over tokens of ``g g'``, with ``g`` the gradient of the summed loss by one output; two merge by addition.

    Its mean over tokens is the output factor of K-FAC (arXiv 1503.05671): with the inputs' second moment ``C``,
    ``tr(R dW C dW') / 2`` estimates by how many nats a token the loss rises when ``W`` becomes ``W + dW``.

    Args:
        second: ``[out, out]`` sum of outer products, float64.
        tokens: How many tokens had a label.
    """

    second: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, *, device: torch.device | str = "cpu") -> GradientMoments:
        """Return sums of nothing for outputs of ``features`` values."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=device))

    def add(self, inputs: Tensor, gradient: Tensor, *, tokens: int, batch: int) -> None:
        """Add the gradients ``[..., out]`` of a summed loss that asked for ``tokens`` labels; the rest is not used."""
        flat = rows_of(gradient)
        self.second += flat.mT @ flat
        self.tokens += tokens

    def merge(self, other: GradientMoments) -> None:
        """Add the sums of ``other``, from other tokens."""
        self.second += other.second
        self.tokens += other.tokens

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        sum_across_processes(self.second)
        self.tokens = total_across_processes(self.tokens)

    @property
    def second_moment(self) -> Tensor:
        """``[out, out]`` mean of ``g g'`` over tokens with a label."""
        return self.second / max(1, self.tokens)


@dataclass
class WeightGradients:
    """Sums over batches of the gradient of the mean cross-entropy by one weight; two merge by addition.

    Args:
        total: ``[out, in]`` sum of gradients, float32.
        squares: ``[out]`` sum of their squares, added along each row, float64 (the row weights of FWSVD).
        batches: How many batches were summed.
    """

    total: Tensor
    squares: Tensor
    batches: int = 0

    @classmethod
    def empty(cls, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> WeightGradients:
        """Return sums of nothing for a weight of ``shape`` ``(out, in)``."""
        return cls(torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.float64, device=device))

    def update(self, gradient: Tensor) -> None:
        """Add the gradient ``[out, in]`` of one batch."""
        self.total += gradient
        self.squares += gradient.double().square().sum(1)
        self.batches += 1

    def merge(self, other: WeightGradients) -> None:
        """Add the sums of ``other``, from other batches."""
        self.total += other.total
        self.squares += other.squares
        self.batches += other.batches

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        sum_across_processes(self.total)
        sum_across_processes(self.squares)
        self.batches = total_across_processes(self.batches)

    @property
    def mean(self) -> Tensor:
        """``[out, in]`` mean gradient."""
        return self.total / max(1, self.batches)

    @property
    def mean_squares(self) -> Tensor:
        """``[out]`` mean over batches of each row's sum of squared gradients."""
        return self.squares / max(1, self.batches)


def collect_gradients(
    model: PreTrainedModel,
    sequences: Tensor,
    *,
    moments: Sequence[Target] = (),
    weights: Sequence[Target] = (),
    labels: Labels = "sampled",
    batch_size: int = 1,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    progress: str = "gradients",
) -> tuple[dict[str, GradientMoments], dict[str, WeightGradients]]:
    """Return moments of output gradients and mean weight gradients by module name, from one forward pass a batch.

    Weight gradients always come from the text's own next tokens; the moments come from labels of their own, for which
    a second backward pass is made where both are asked for and ``labels`` is ``sampled``. Blocks before the first that
    is watched keep no activations and see no backward pass. Processes that work together take a share of the batches
    each.

    Args:
        model: The model to differentiate; evaluation mode is used and restored, no parameter gets a gradient.
        sequences: ``[sequences, length]`` token ids.
        moments: Maps whose output gradients to watch.
        weights: Maps whose weight gradients to average.
        labels: Whose next tokens the moments' loss asks for.
        batch_size: Sequences per pass.
        seed: Of the sampled labels; each batch draws from a generator of its own.
        gradient_checkpointing: Compute each block's activations again in the backward pass, to save memory.
        progress: Label of the progress bar.

    Raises:
        ValueError: A sequence of less than two tokens, or a loss or a gradient that is not finite.
    """
    device = next(model.parameters()).device
    outputs = {target: GradientMoments.empty(target.shape[0], device=device) for target in moments}
    sums = {target: WeightGradients.empty(target.shape, device=device) for target in weights}
    measure_gradients(
        model, sequences, outputs, sums, labels=labels, batch_size=batch_size, seed=seed,
        gradient_checkpointing=gradient_checkpointing, progress=progress,
    )  # fmt: skip
    return by_name(outputs), by_name(sums)


def measure_gradients(
    model: PreTrainedModel,
    sequences: Tensor,
    outputs: Mapping[Target, OutputMeasure],
    weights: Mapping[Target, WeightGradients] = MappingProxyType({}),
    *,
    labels: Labels = "sampled",
    batch_size: int = 1,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    progress: str = "gradients",
) -> None:
    """Let what is measured of maps see the gradients by their outputs and weights; the rest as ``collect_gradients``.

    Raises:
        ValueError: A sequence of less than two tokens, or a loss or a gradient that is not finite.
    """
    check_length(sequences)
    device = next(model.parameters()).device
    seen, sums, recorder = by_name(outputs), by_name(weights), Recorder()
    first = min((target.block for target in (*outputs, *weights)), default=0)
    with differentiable(model, first), activation_checkpointing(model) if gradient_checkpointing else nullcontext():
        # A batch keeps its number, and so its sampled labels, whichever process it goes to.
        mine = my_share(list(enumerate(torch.split(sequences, batch_size))))
        for number, batch in tqdm(mine, desc=progress, unit="batch", disable=not is_first()):
            tokens = batch.to(device)
            # Not in the backward pass, where blocks may be run again.
            with recorder.watching(model, dict.fromkeys([*seen, *sums])):
                logits = model(input_ids=tokens, use_cache=False).logits
            _backward(logits, tokens, seen, sums, recorder, labels, seed=seed, number=number)
            recorder.clear()
    merge_all(seen, sums)


def by_name(measures: Mapping[Target, Measure]) -> dict[str, Measure]:
    """Return what is measured, keyed by the names of the maps."""
    return {target.name: measure for target, measure in measures.items()}


def merge_all(seen: Mapping[str, OutputMeasure], sums: Mapping[str, WeightGradients]) -> None:
    """Put together what all processes that work together have measured, map by map."""
    for measure in seen.values():
        measure.merge_processes()
    for gradients in sums.values():
        gradients.merge_processes()


def _backward(
    logits: Tensor,
    tokens: Tensor,
    seen: Mapping[str, OutputMeasure],
    sums: Mapping[str, WeightGradients],
    recorder: Recorder,
    labels: Labels,
    *,
    seed: int,
    number: int,
) -> None:
    """Run the backward passes of one batch: the text's labels once if anything asks for them, sampled ones likewise."""
    count = tokens[:, 1:].numel()
    again = bool(seen) and labels != "text"
    if sums or labels == "text":
        loss = loss_of_batch(logits, tokens, "text", seed=seed, number=number)
        take_in(recorder.gradients(loss, again=again), {} if again else seen, sums, count, number)
    if again:
        loss = loss_of_batch(logits, tokens, "sampled", seed=seed, number=number)
        take_in(recorder.gradients(loss), seen, {}, count, number)


def take_in(
    found: Iterable[tuple[str, list[Call]]],
    seen: Mapping[str, OutputMeasure],
    sums: Mapping[str, WeightGradients],
    count: int,
    number: int,
) -> None:
    """Let what is measured take in the gradients of one batch.

    Args:
        found: Names of maps and the calls of each (``Recorder.gradients``).
        seen: What is measured of gradients by outputs, by map.
        sums: Sums of gradients by weights, by map.
        count: How many labels the loss asked for.
        number: Of the batch.

    Raises:
        ValueError: A gradient is not finite.
    """
    for name, calls in found:
        if name in sums:
            weight = torch.stack([_weight_gradient(inputs, gradient) for inputs, gradient in calls]).sum(0)
            _check(weight, name, number)
            # The loss is summed; its mean over tokens is what a step of training would see.
            sums[name].update(weight / count)
        if name in seen:
            _update(seen[name], calls, count, name, number)


def _weight_gradient(inputs: Tensor, gradient: Tensor) -> Tensor:
    return gradient.flatten(0, -2).float().mT @ inputs.flatten(0, -2).float()


def _update(measure: OutputMeasure, calls: Sequence[Call], tokens: int, name: str, number: int) -> None:
    # A map that is called more than once for a token adds up what each call does, and the token counts once.
    for place, (inputs, gradient) in enumerate(calls):
        _check(gradient, name, number)
        try:
            measure.add(inputs, gradient, tokens=tokens if place == 0 else 0, batch=number)
        except ValueError as error:
            raise ValueError(
                f"{error}: at module {name} in calibration batch {number}; "
                "check the checkpoint, or load it in a wider dtype"
            ) from None


def _check(gradient: Tensor, name: str, number: int) -> None:
    if not torch.isfinite(gradient).all():
        raise ValueError(
            f"the gradient at module {name} in calibration batch {number} holds NaN or infinity: "
            "check the checkpoint, or load it in a wider dtype"
        )
