"""One backward pass through a model with frozen weights: its loss, and the gradients by outputs of linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank_pl.calibration.measures import Batch, Call, GradientMeasure, located
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.settings import NOT_FINITE
from lowrank_pl.models.targets import decoder_blocks, first_argument

__all__ = ["Recorder", "check_length", "differentiable", "loss_gradient"]


def check_length(sequences: Tensor) -> None:
    """Raise ``ValueError`` where ``sequences`` ``[sequences, length]`` are too short for a token to follow another."""
    if sequences.shape[1] < 2:
        raise ValueError(
            f"sequences of {sequences.shape[1]} tokens were given: gradients need at least two, since the loss "
            "predicts each token from those before it; raise the length"
        )


def loss_gradient(logits: Tensor, batch: Batch, labels: Labels, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return where the backward pass of the summed cross-entropy of all next tokens begins, and the gradient there.

    Args:
        logits: ``[sequences, length, vocabulary]``.
        batch: The token ids, and the number of the batch, which samples labels from its own generator.
        labels: Whose next tokens the loss asks for.
        seed: Seed of sampled labels.

    Returns:
        The loss and None. For sampled labels the logits and the gradient by them, since their probabilities are known
        from sampling: this saves two passes over all logits.

    Raises:
        ValueError: The loss is not finite.
    """
    wide = logits.float()
    if labels == "sampled":
        return wide, _sampled_gradient(wide.detach(), batch, seed)
    loss = functional.cross_entropy(wide[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
    _check_loss(loss, batch)
    return loss, None


def _sampled_gradient(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """Return the gradient by ``logits`` of the summed cross-entropy of labels that are sampled from them."""
    gradient = logits.softmax(-1)
    gradient[:, -1] = 0.0
    predicted = gradient[:, :-1]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + batch.number)
    labels, totals = _sample(predicted, generator)
    _check_loss(totals.sum(), batch)
    predicted.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
    return gradient


def _sample(probabilities: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a token for each row of ``probabilities`` and the sum of the row, both ``[..., 1]``.

    The CPU generates the random numbers, so that all devices sample the same tokens.
    """
    cumulative = probabilities.cumsum(-1)
    totals = cumulative[..., -1:]
    rows = totals.shape[:-1]
    chances = torch.rand(rows.numel(), 1, generator=generator).view(*rows, 1).to(cumulative)
    # The first token above the chance: a token of probability 0 is never sampled.
    found = torch.searchsorted(cumulative, chances * totals, right=True)
    return found.clamp_max(probabilities.shape[-1] - 1), totals


def _check_loss(loss: Tensor, batch: Batch) -> None:
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of calibration batch {batch.number} is {loss.item()}: {NOT_FINITE}")


class Recorder:
    """Inputs and outputs of linear layers in one forward pass, for the gradients by these outputs."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Tensor, Tensor]] = []

    @contextmanager
    def watching(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Keep the inputs and outputs of the linear layers ``names`` of ``model`` while the block runs."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                self._calls.append((name, first_argument(args, kwargs).detach(), output))

            return keep

        with ExitStack() as stack:
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def measure(
        self,
        measures: Mapping[str, GradientMeasure],
        batch: Batch,
        end: Tensor,
        gradient: Tensor | None,
        *,
        start: Tensor | None = None,
    ) -> Tensor | None:
        """Run the backward pass, add the calls of each linear layer to its measure, and forget all calls.

        Args:
            measures: The statistic of every linear layer that was watched, by name.
            batch: The batch that was run.
            end: Where the backward pass begins: the loss, or a tensor before it.
            gradient: The gradient of the loss by ``end``; None where ``end`` is the loss.
            start: A tensor whose gradient is wanted too.

        Returns:
            The gradient by ``start``.

        Raises:
            ValueError: An input or a gradient is not finite. The message names the linear layer and the batch.
        """
        calls, self._calls = self._calls, []
        wanted = [output for _, _, output in calls] + ([] if start is None else [start])
        gradients = torch.autograd.grad(end, wanted, gradient)
        by_name: dict[str, list[Call]] = {}
        for (name, inputs, _), found in zip(calls, gradients, strict=False):
            by_name.setdefault(name, []).append(Call(inputs, found))
        for name, found_calls in by_name.items():
            with located(name, batch):
                measures[name].add(found_calls, batch)
        return None if start is None else gradients[-1]


@contextmanager
def differentiable(model: PreTrainedModel, first: int) -> Iterator[None]:
    """Let gradients reach the input of block ``first`` while all parameters are frozen, in evaluation mode."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with evaluating(model), torch.enable_grad(), _inputs_with_gradient(model, first):
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _inputs_with_gradient(model: PreTrainedModel, first: int) -> Iterator[None]:
    """Let the input of block ``first`` require a gradient while the block runs."""
    before = model.get_input_embeddings() if first == 0 else decoder_blocks(model)[1][first - 1]

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        (output if isinstance(output, Tensor) else output[0]).requires_grad_()

    handle = before.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
