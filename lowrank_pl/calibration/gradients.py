"""Second moments of output gradients, mean and mean squared weight gradients, from backward passes over text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.calibration.backward import Recorder, differentiable, loss_gradient
from lowrank_pl.calibration.measures import Batch, Call, GradientMeasure, Passes
from lowrank_pl.calibration.symmetric_sum import SymmetricSum, compact, rows_of
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.forward import activation_checkpointing
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.targets import Target
from lowrank_pl.utils.distributed import is_first, sum_across_processes, total_across_processes

__all__ = ["GradientMoments", "WeightFisher", "WeightGradients", "collect_gradients", "measure_batch"]

AnyGradientMeasure = TypeVar("AnyGradientMeasure", bound=GradientMeasure)


class GradientMoments(GradientMeasure):
    """Mean over tokens of ``g g'``, where ``g`` is the gradient of the summed loss by the output of a linear layer.

    It is the output factor of K-FAC (arXiv 1503.05671). With the second moment ``C`` of the inputs,
    ``tr(R dW C dW') / 2`` estimates by how many nats per token the loss rises when ``W`` becomes ``W + dW``.

    Args:
        features: Length of the output.
        routed: Whether the layer belongs to an expert, which sees some of the tokens.
        device: Where the sums are.

    Attributes:
        tokens: How many tokens had a label, whether or not the layer saw them.
        rows: How many of them an expert saw: those with a gradient.
    """

    folder = "output_gradients"
    shrinks_experts = True

    def __init__(self, features: int, *, routed: bool = False, device: torch.device | str = "cpu") -> None:
        self._second = SymmetricSum(features, device=device)
        self.tokens = self.rows = 0
        self._routed = routed

    @classmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return the bytes that the sums of ``target`` take."""
        return SymmetricSum.bytes_of(target.shape[0])

    @classmethod
    def empty(cls, target: Target, passes: Passes, device: torch.device) -> GradientMoments:
        """Return the moments of ``target`` before the first batch."""
        return cls(target.shape[0], routed=bool(target.experts), device=device)

    def add(self, calls: Sequence[Call], batch: Batch) -> None:
        """Add the gradients of one batch. A token counts once, however often the layer was called for it."""
        for call in calls:
            self._second.add(rows_of(call.gradient), "the gradients hold")
        if self._routed:
            self.rows += _reached(calls)
        self.tokens += batch.labels

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        self._second.merge_processes()
        self.tokens = total_across_processes(self.tokens)
        self.rows = total_across_processes(self.rows)

    @property
    def second_moment(self) -> Tensor:
        """``[out, out]`` mean of ``g g'`` over tokens with a label, float64."""
        return self._second.matrix().div_(max(1, self.tokens))

    def tensors(self) -> dict[str, Tensor]:
        """Return ``second_moment`` ``[out, out]``."""
        return {"second_moment": compact(self.second_moment)}

    def notes(self) -> dict[str, str]:
        """Return how many tokens had a label, and how many of them an expert saw."""
        return {"tokens": str(self.tokens), **({"rows": str(self.rows)} if self._routed else {})}


class _ByBatch(GradientMeasure):
    """Something of the gradient of the mean cross-entropy by a weight, for the text's own next tokens, batch by batch.

    Attributes:
        batches: How many batches were summed.
    """

    batches: int

    @classmethod
    def identity(cls, labels: Labels, batch_size: int) -> dict[str, str]:
        """Return the batch size: the mean is over batches, and the last one may be smaller."""
        return {"batch_size": str(batch_size)}

    @classmethod
    def labels(cls, asked: Labels) -> Labels:
        """Return ``text``: sampled labels would give a mean gradient of zero, but for noise."""
        return "text"

    def notes(self) -> dict[str, str]:
        """Return how many batches were summed."""
        return {"batches": str(self.batches)}


class WeightGradients(_ByBatch):
    """Mean over batches of the gradient of the mean cross-entropy by a weight, for the text's own next tokens.

    Args:
        shape: ``(out, in)`` of the weight.
        device: Where the sums are.

    Attributes:
        batches: How many batches were summed.
    """

    folder = "weight_gradients"

    def __init__(self, shape: tuple[int, int], *, device: torch.device | str = "cpu") -> None:
        self._total = torch.zeros(shape, device=device)
        self.batches = 0

    @classmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return the bytes that the sums of ``target`` take."""
        return 4 * target.shape[0] * target.shape[1]

    @classmethod
    def empty(cls, target: Target, passes: Passes, device: torch.device) -> WeightGradients:
        """Return the gradient of the weight of ``target`` before the first batch."""
        return cls(target.shape, device=device)

    def add(self, calls: Sequence[Call], batch: Batch) -> None:
        """Add the gradient of one batch, to which every call of the layer contributes."""
        if calls:
            self._total += _weight_gradient(calls, batch)
        self.batches += 1

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        sum_across_processes(self._total)
        self.batches = total_across_processes(self.batches)

    @property
    def mean(self) -> Tensor:
        """``[out, in]`` mean gradient, float32."""
        return self._total / max(1, self.batches)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` ``[out, in]``."""
        return {"mean": self.mean}


class WeightFisher(_ByBatch):
    """The empirical Fisher information of a weight, summed over its outputs and over its inputs (arXiv 2207.00112).

    The Fisher information of an entry is the mean over batches of its squared gradient of the mean cross-entropy, for
    the text's own next tokens.

    Args:
        shape: ``(out, in)`` of the weight.
        routed: Whether the layer belongs to an expert, which sees some of the tokens.
        device: Where the sums are.

    Attributes:
        batches: How many batches were summed.
        tokens: How many tokens of these had a label.
        rows: How many of the tokens an expert saw: those with a gradient.
    """

    folder = "weight_fisher"
    shrinks_experts = True

    def __init__(self, shape: tuple[int, int], *, routed: bool = False, device: torch.device | str = "cpu") -> None:
        self._outputs, self._inputs = (torch.zeros(size, dtype=torch.float64, device=device) for size in shape)
        self.batches = self.tokens = self.rows = 0
        self._routed = routed

    @classmethod
    def bytes_of(cls, target: Target, passes: Passes) -> int:
        """Return the bytes that the sums of ``target`` take."""
        return 8 * sum(target.shape)

    @classmethod
    def empty(cls, target: Target, passes: Passes, device: torch.device) -> WeightFisher:
        """Return the Fisher information of the weight of ``target`` before the first batch."""
        return cls(target.shape, routed=bool(target.experts), device=device)

    def add(self, calls: Sequence[Call], batch: Batch) -> None:
        """Add the squared gradient of one batch, to which every call of the layer contributes."""
        if calls:
            squares = _weight_gradient(calls, batch).double().square()
            self._outputs += squares.sum(1)
            self._inputs += squares.sum(0)
        if self._routed:
            self.tokens += batch.labels
            self.rows += _reached(calls)
        self.batches += 1

    def merge_processes(self) -> None:
        """Add the sums of all processes that work together."""
        sum_across_processes(self._outputs)
        sum_across_processes(self._inputs)
        self.batches = total_across_processes(self.batches)
        self.tokens, self.rows = total_across_processes(self.tokens), total_across_processes(self.rows)

    def notes(self) -> dict[str, str]:
        """Return how many batches were summed, and how many of their tokens an expert saw."""
        seen = {"tokens": str(self.tokens), "rows": str(self.rows)} if self._routed else {}
        return {**super().notes(), **seen}

    def tensors(self) -> dict[str, Tensor]:
        """Return ``outputs`` ``[out]`` and ``inputs`` ``[in]``: the sums along each row and each column, float64."""
        batches = max(1, self.batches)
        return {"outputs": self._outputs / batches, "inputs": self._inputs / batches}


def _reached(calls: Sequence[Call]) -> int:
    """Return how many rows have a gradient; the last token of a sequence, which has no label, has none."""
    return sum(int(rows_of(call.gradient).any(dim=-1).sum()) for call in calls)


def _weight_gradient(calls: Sequence[Call], batch: Batch) -> Tensor:
    """Return the gradient ``[out, in]`` of the mean cross-entropy of one batch by the weight of a layer.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    parts = [rows_of(call.gradient).mT @ rows_of(call.inputs) for call in calls]
    # The loss is summed. A training step would see the gradient of its mean over tokens.
    gradient = torch.stack(parts).sum(0) / batch.labels
    if not torch.isfinite(gradient).all():
        raise ValueError("the gradient of the weight holds NaN or infinity")
    return gradient


def collect_gradients(
    kind: type[AnyGradientMeasure],
    model: PreTrainedModel,
    targets: Sequence[Target],
    passes: Passes,
    *,
    labels: Labels = "text",
    progress: str = "gradients",
) -> dict[str, AnyGradientMeasure]:
    """Return the statistic ``kind`` of every target by its entry, from one forward and backward pass per batch.

    Blocks before the first target keep no activations and see no backward pass. Processes that work together take a
    share of the batches each.

    Args:
        kind: What to measure.
        model: The model to differentiate. It is in evaluation mode meanwhile, and no parameter gets a gradient.
        targets: The linear layers to measure.
        passes: The sequences, and how they are run.
        labels: Whose next tokens the loss asks for.
        progress: Label of the progress bar.

    Raises:
        ValueError: The model can't be run on the sequences, or a loss or a gradient is not finite.
    """
    check_sequences(model, passes.sequences)
    if not targets:
        return {}
    device = next(model.parameters()).device
    measures = {kind.key(target): kind.empty(target, passes, device) for target in targets}
    first = min(target.block for target in targets)
    labels = kind.labels(labels)
    with (
        differentiable(model, first) as starts,
        activation_checkpointing(model) if passes.gradient_checkpointing else nullcontext(),
    ):
        for batch in tqdm(passes.batches(), desc=progress, unit="batch", disable=not is_first()):
            measure_batch(model, starts, batch.to(device), measures, labels)
    for measure in measures.values():
        measure.merge_processes()
    return measures


def measure_batch(
    model: PreTrainedModel,
    starts: Sequence[Tensor],
    batch: Batch,
    measures: Mapping[str, GradientMeasure],
    labels: Labels,
) -> None:
    """Add the gradients of one batch to ``measures``, by linear layer; inside of ``differentiable``.

    Args:
        model: The model to differentiate.
        starts: The input of the first block that gradients reach, from ``differentiable``.
        batch: The token ids, on the model's device.
        measures: The statistics, by linear layer.
        labels: Whose next tokens the loss asks for.

    Raises:
        ValueError: A loss or a gradient is not finite.
    """
    recorder = Recorder(starts)
    # Hooks are removed before the backward pass, in which checkpointing runs blocks again.
    with recorder.watching(model, measures):
        logits = model(input_ids=batch.tokens, use_cache=False).logits
    end, gradient = loss_gradient(logits, batch, labels)
    recorder.measure(measures, batch, end, gradient)
