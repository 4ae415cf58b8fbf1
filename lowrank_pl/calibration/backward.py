"""One backward pass through a model with frozen weights: its loss, and the gradients by outputs of linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lowrank_pl.calibration.measures import Batch, Call, GradientMeasure, located
from lowrank_pl.factors.settings import Labels
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.hf_experts import can_drop
from lowrank_pl.models.names import expert_number
from lowrank_pl.models.settings import NOT_FINITE
from lowrank_pl.models.targets import decoder_blocks, first_argument

__all__ = ["Recorder", "differentiable", "loss_gradient"]


def loss_gradient(logits: Tensor, batch: Batch, labels: Labels) -> tuple[Tensor, Tensor | None]:
    """Return where the backward pass of the summed cross-entropy of all next tokens begins, and the gradient there.

    Args:
        logits: ``[sequences, length, vocabulary]``.
        batch: The token ids, and the number of the batch, which samples labels from its own generator.
        labels: Whose next tokens the loss asks for.

    Returns:
        The loss and None. For sampled labels the logits and the gradient by them, since their probabilities are known
        from sampling: this saves two passes over all logits.

    Raises:
        ValueError: The loss is not finite.
    """
    wide = logits.float()
    if labels == "sampled":
        return wide, _sampled_gradient(wide.detach(), batch)
    loss = functional.cross_entropy(wide[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
    _check_loss(loss, batch)
    return loss, None


def _sampled_gradient(logits: Tensor, batch: Batch) -> Tensor:
    """Return the gradient by ``logits`` of the summed cross-entropy of labels that are sampled from them."""
    gradient = logits.softmax(-1)
    gradient[:, -1] = 0.0
    predicted = gradient[:, :-1]
    generator = torch.Generator().manual_seed(batch.number)
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


_NOTHING = torch.empty(0)
"""In the place of a gradient that is not known yet."""


class Recorder:
    """Hands the inputs and output gradients of linear layers to their measures during backward passes.

    Every gradient is used as soon as it is known, so that those of all layers are never in memory together.

    Args:
        starts: The input of the first block that gradients reach, from ``differentiable``.
    """

    def __init__(self, starts: Sequence[Tensor]) -> None:
        self._starts = starts
        self._calls: list[tuple[str, Call, Tensor]] = []
        self._of_experts: set[str] = set()

    @contextmanager
    def watching(self, model: nn.Module, names: Iterable[str]) -> Iterator[None]:
        """Keep the inputs and outputs of the linear layers ``names`` of ``model`` while the block runs.

        Of modules of experts among them, the weights of the chosen experts are kept.
        """
        names = list(names)
        self._of_experts = {name for name in names if expert_number(name) is not None}

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
                self._calls.append((name, Call(first_argument(args, kwargs).detach(), _NOTHING), output))

            return keep

        def hook_experts(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def keep(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                _, index, weights = (*args, *kwargs.values())
                if not weights.requires_grad:
                    raise ValueError(
                        f"the weights of the experts {name} do not depend on the tokens' hidden states, so it is not "
                        "known what dropping costs: leave drop_experts out"
                    )
                self._calls.append((name, Call(weights.detach(), _NOTHING, index, len(experts)), weights))

            return keep

        with ExitStack() as stack:
            for name in names:
                module = model.get_submodule(name)
                handle = (
                    module.register_forward_pre_hook(hook_experts(name), with_kwargs=True)
                    if can_drop(module)
                    else module.register_forward_hook(hook(name), with_kwargs=True)
                )
                stack.callback(handle.remove)
            yield

    def measure(
        self, measures: Mapping[str, GradientMeasure], batch: Batch, end: Tensor, gradient: Tensor | None
    ) -> Tensor:
        """Run the backward pass, add the calls of each linear layer to its measure, and forget all calls.

        Args:
            measures: The statistic of every linear layer that was watched, by name.
            batch: The batch that was run.
            end: Where the backward pass begins: the loss, or a tensor before it.
            gradient: The gradient of the loss by ``end``; None where ``end`` is the loss.

        Returns:
            The gradient by the input of the first block.

        Raises:
            ValueError: An input or a gradient is not finite, or the loss does not depend on a linear layer, or the
                model does not call one that belongs to no expert. The message names the linear layer.
        """
        waiting = Counter(name for name, _, _ in self._calls)
        uncalled = [name for name in measures if name not in waiting]
        for name in uncalled:
            if name not in self._of_experts:
                raise ValueError(f"the model does not call module {name} on batch {batch.number}: exclude it")
        found: dict[str, list[Call]] = {}

        def take(name: str, call: Call, by_output: Tensor) -> None:
            found.setdefault(name, []).append(call._replace(gradient=by_output))
            waiting[name] -= 1
            if not waiting[name]:
                with located(name, batch):
                    measures[name].add(found.pop(name), batch)

        while self._calls:
            name, call, output = self._calls.pop()
            output.register_hook(partial(take, name, call))  # type: ignore[no-untyped-call]
            del output
        by_start: Tensor = torch.autograd.grad(end, self._starts, gradient)[0]
        unused = [name for name, left in waiting.items() if left]
        if unused:
            raise ValueError(f"the loss does not depend on module {unused[0]}: exclude it")
        for name in uncalled:
            # No token of the batch was routed to this expert.
            measures[name].add([], batch)
        return by_start


@contextmanager
def differentiable(model: PreTrainedModel, first: int) -> Iterator[list[Tensor]]:
    """Let gradients reach the input of block ``first`` while all parameters are frozen, in evaluation mode.

    Yields:
        A list that holds the input of that block during and after each forward pass.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    before = model.get_input_embeddings() if first == 0 else decoder_blocks(model)[1][first - 1]
    starts: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        whole: Tensor = output if isinstance(output, Tensor) else output[0]
        # A view is no leaf. Tools that watch modules, such as torch's FlopCounterMode, refuse to wait for a leaf.
        start = whole.requires_grad_().view_as(whole)
        starts[:] = [start]
        return start if isinstance(output, Tensor) else (start, *output[1:])

    handle = before.register_forward_hook(hook)
    try:
        with evaluating(model), torch.enable_grad():
            yield starts
    finally:
        handle.remove()
        for parameter in asking:
            parameter.requires_grad_(True)
