"""One backward pass through a model with frozen weights: its loss, and the gradients by what watched maps return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.targets import decoder_blocks, first_argument

__all__ = ["Call", "Recorder", "check_length", "differentiable", "loss_of_batch"]

Call = tuple[Tensor, Tensor]
"""Input of one call of a map, and the gradient by its output."""


def check_length(sequences: Tensor) -> None:
    """Raise ``ValueError`` where ``sequences`` ``[sequences, length]`` are too short for a token to follow another."""
    if sequences.shape[1] < 2:
        raise ValueError(f"windows of {sequences.shape[1]} tokens were given: a loss needs at least two")


def loss_of_batch(logits: Tensor, tokens: Tensor, labels: Labels, *, seed: int, number: int) -> Tensor:
    """Return the summed cross-entropy of all tokens of a batch but the last ones.

    Args:
        logits: ``[sequences, length, vocabulary]``.
        tokens: ``[sequences, length]``.
        labels: Whose next tokens it asks for; sampled ones come from a generator that the batch has for itself.
        seed: Of that.
        number: Of the batch.

    Raises:
        ValueError: The loss is not finite.
    """
    wide, following = logits[:, :-1].float(), tokens[:, 1:]
    if labels == "sampled":
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        following = _drawn(wide.detach().flatten(0, 1), generator).view_as(following)
    loss = functional.cross_entropy(wide.flatten(0, 1), following.flatten(), reduction="sum")
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss of calibration batch {number} is {loss.item()}: "
            "check the checkpoint, or load it in a wider dtype"
        )
    return loss


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token for each row of ``logits`` by chances that the CPU draws, so that devices draw alike."""
    cumulative = logits.softmax(-1).cumsum(-1)
    chances = torch.rand(len(logits), 1, generator=generator).to(cumulative)
    # The first token that lies above the chance: one of probability 0 never does.
    found = torch.searchsorted(cumulative, chances * cumulative[:, -1:], right=True)
    return found.clamp_max(logits.shape[-1] - 1)


class Recorder:
    """Inputs and outputs of watched maps in one forward pass, and the gradients by these outputs."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Tensor, Tensor]] = []

    @contextmanager
    def watching(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Keep what the maps ``names`` of ``model`` are fed and return, while the block runs."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                self.keep(name, first_argument(args, kwargs).detach(), output)

            return keep

        with ExitStack() as stack:
            for name in names:
                handle = model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def keep(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Keep one call: what ``name`` was fed, and what it returned."""
        self._calls.append((name, inputs, output))

    def gradients(
        self, end: Tensor, by: Tensor | None = None, *, again: bool = False
    ) -> Iterator[tuple[str, list[Call]]]:
        """Yield for every name its calls, each an input and a gradient by its output.

        Args:
            end: The loss, or something that comes before it.
            by: The gradient of the loss by that.
            again: Keep the graph.
        """
        outputs = [output for _, _, output in self._calls]
        found = torch.autograd.grad(end, outputs, by, retain_graph=again)
        calls: dict[str, list[Call]] = {}
        for (name, inputs, _), gradient in zip(self._calls, found, strict=True):
            calls.setdefault(name, []).append((inputs, gradient))
        yield from calls.items()

    def clear(self) -> None:
        """Forget all calls, and with them the graph that they hold."""
        self._calls.clear()


@contextmanager
def differentiable(model: PreTrainedModel, first: int) -> Iterator[None]:
    """Let gradients flow from block ``first`` up while no parameter takes one, in evaluation mode; then as before."""
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
    """Let gradients reach what block ``first`` of ``model`` is fed, while all weights are frozen, for a while."""
    before = model.get_input_embeddings() if first == 0 else decoder_blocks(model)[1][first - 1]

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        (output if isinstance(output, Tensor) else output[0]).requires_grad_()

    handle = before.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
