"""Losses of a model with masked layers: what masks learn from, and a hard plan beside the dense model.

The same layers compute with masks, with a plan's components or with their dense weights, so one model is student,
teacher and what validation scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lowrank_pl.methods.masks.masked_linear import Choice, MaskedLinear, chosen, plan_choice
from lowrank_pl.methods.masks.objectives import DataTerms, next_token_loss
from lowrank_pl.models.forward import forward_with_activations
from lowrank_pl.models.targets import decoder_blocks
from lowrank_pl.plans.plan import RankPlan

__all__ = ["PlanScore", "choices_of", "data_losses"]


def data_losses(
    model: PreTrainedModel, layers: Mapping[str, MaskedLinear], terms: DataTerms, tokens: Tensor
) -> dict[str, Tensor]:
    """Return the weighted data terms of a batch under the present choices, by name, each a scalar.

    Args:
        model: The masked model; with its dense weights it is the teacher, where a term needs one.
        layers: Its masked layers by name.
        terms: Which terms.
        tokens: ``[batch, length]`` token ids.
    """
    places = terms.blocks(len(decoder_blocks(model)[1]))
    teacher_logits, teacher_activations = None, None
    if terms.needs_teacher:
        with torch.no_grad(), chosen(dict(layers), "dense"):
            teacher_logits, teacher_activations = forward_with_activations(model, tokens, places)
    logits, activations = forward_with_activations(model, tokens, places)
    return terms.compute(tokens, logits, activations, teacher_logits, teacher_activations)


def choices_of(plan: RankPlan, layers: Mapping[str, MaskedLinear]) -> dict[str, Choice]:
    """Return what masked layers have to compute with to be the model of ``plan``, by name."""
    return {name: plan_choice(layers[name], m.rank, m.indices) for name, m in plan.modules.items()}


class PlanScore(nn.Module):
    """Mean nats a token of a plan, and of the dense model the first time; over all processes.

    Attributes:
        plan: The mean of the plan that ``begin`` was given last.
        dense: The mean of the dense model, kept until it is reset.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.dense = MeanMetric(), MeanMetric()
        self._choices: dict[str, Choice] = {}
        self._need_dense = True

    def begin(self, plan: RankPlan, layers: Mapping[str, MaskedLinear]) -> None:
        """Start anew with ``plan`` on ``layers``; the dense score is kept."""
        self._choices = choices_of(plan, layers)
        self._need_dense = self.dense.update_count == 0
        self.plan.reset()

    def add(self, model: PreTrainedModel, layers: Mapping[str, MaskedLinear], tokens: Tensor) -> None:
        """Score one batch of token ids ``[batch, length]``.

        Args:
            model: The masked model.
            layers: Its masked layers by name.
            tokens: The batch.

        Raises:
            ValueError: A score is not finite.
        """
        self._add(model, layers, tokens, self._choices, self.plan)
        if self._need_dense:
            self._add(model, layers, tokens, "dense", self.dense)

    def _add(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, MaskedLinear],
        tokens: Tensor,
        choices: dict[str, Choice] | Choice,
        nats: MeanMetric,
    ) -> None:
        with chosen(dict(layers), choices):
            loss = next_token_loss(model(input_ids=tokens, use_cache=False).logits, tokens)
        # Asked of each batch: the metric would leave a NaN out and say little.
        if not torch.isfinite(loss):
            which = "dense model" if choices == "dense" else "hard plan"
            raise ValueError(
                f"validation of the {which} gave {loss.item()} nats a token: its logits are not finite; "
                "load the base in a wider type or check the weights"
            )
        nats.update(loss, weight=tokens[:, 1:].numel())
