"""Losses of a model with masked layers: the terms that masks learn from, and the scores of a plan.

The same layers compute with masks, with a plan's components or with their dense weights. One model is therefore the
student, the teacher and the compressed model that validation scores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lowrank_pl.methods.masks.masked_linear import Computation, MaskedLinear, computing_with, planned_computation
from lowrank_pl.methods.masks.objectives import DataTerms, next_token_loss
from lowrank_pl.models.forward import forward_with_activations
from lowrank_pl.models.settings import NOT_FINITE
from lowrank_pl.models.targets import decoder_blocks
from lowrank_pl.plans.plan import RankPlan

__all__ = ["PlanScore", "data_losses", "planned_computations"]


def data_losses(
    model: PreTrainedModel, layers: Mapping[str, MaskedLinear], terms: DataTerms, tokens: Tensor
) -> dict[str, Tensor]:
    """Return the weighted data terms of a batch, by name, each a scalar; layers compute with what is chosen for them.

    Args:
        model: The masked model; computing with its dense weights it is the teacher, where a term needs one.
        layers: Its masked layers by name.
        terms: The terms and their weights.
        tokens: ``[batch, length]`` token ids.
    """
    places = terms.blocks(len(decoder_blocks(model)[1]))
    teacher_logits, teacher_activations = None, None
    if terms.needs_teacher:
        with torch.no_grad(), computing_with(dict(layers), "dense"):
            teacher_logits, teacher_activations = forward_with_activations(model, tokens, places)
    logits, activations = forward_with_activations(model, tokens, places)
    return terms.compute(tokens, logits, activations, teacher_logits, teacher_activations)


def planned_computations(plan: RankPlan, layers: Mapping[str, MaskedLinear]) -> dict[str, Computation]:
    """Return the computations that make masked layers the model of ``plan``, by name."""
    return {name: planned_computation(layers[name], m.rank, m.indices) for name, m in plan.modules.items()}


class PlanScore(nn.Module):
    """Mean nats a token of a plan and, the first time, of the dense model, over all processes.

    Attributes:
        plan: The mean of the last plan that ``begin`` was given.
        dense: The mean of the dense model, kept until it is reset.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan, self.dense = MeanMetric(), MeanMetric()
        self._planned: dict[str, Computation] = {}
        self._need_dense = True

    def begin(self, plan: RankPlan, layers: Mapping[str, MaskedLinear]) -> None:
        """Start anew with ``plan`` on ``layers``; the dense score is kept."""
        self._planned = planned_computations(plan, layers)
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
        self._add(model, layers, tokens, self._planned, self.plan)
        if self._need_dense:
            self._add(model, layers, tokens, "dense", self.dense)

    def _add(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, MaskedLinear],
        tokens: Tensor,
        computations: dict[str, Computation] | Computation,
        nats: MeanMetric,
    ) -> None:
        with computing_with(dict(layers), computations):
            loss = next_token_loss(model(input_ids=tokens, use_cache=False).logits, tokens)
        # Checked for each batch, because the metric would leave a NaN out without an error.
        if not torch.isfinite(loss):
            which = "dense model" if computations == "dense" else "hard plan"
            raise ValueError(
                f"validation of the {which} gave {loss.item()} nats a token: its logits are not finite; {NOT_FINITE}"
            )
        nats.update(loss, weight=tokens[:, 1:].numel())
