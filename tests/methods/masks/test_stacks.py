"""The masks of a mixture are computed together, with the results of each alone, for every method."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.methods.masks import MASK_METHODS, ModelMasks
from lowrank_pl.methods.masks import base as masks_base
from lowrank_pl.methods.masks.base import of_each, stacks
from lowrank_pl.plans.budget import Budget

SHAPES = {
    f"layers.{block}.{kind}": (24, 16)
    for block in range(2)
    for kind in ("q_proj", *(f"experts.{number}.up_proj" for number in range(3)))
} | {"layers.0.o_proj": (16, 16)}


def learned(method, *, together, steps, monkeypatch):
    """Return loss terms, gradients and masks after some steps, and the plan."""
    budget = Budget(0.5, SHAPES, model_parameters=sum(rows * columns for rows, columns in SHAPES.values()))
    masks = {}
    for place, (name, shape) in enumerate(SHAPES.items()):
        sigma = torch.linspace(2, 0.1, min(shape), dtype=torch.float64) ** (1 + place / 4)
        masks[name] = method.create(shape, sigma, 0.4 + place / 20, storage=budget.rank_costs)
    masks = ModelMasks(masks, method.shared_module(masks))
    learning = [*masks.values(), *([masks.shared] if masks.shared is not None else [])]
    parameters = [parameter for module in learning for parameter in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    weights = {name: torch.linspace(-1, 2, mask.rank) for name, mask in masks.items()}
    seen = []
    with monkeypatch.context() as patch:
        if not together:
            patch.setattr(masks_base, "expert_number", lambda name: None)
        for step in range(steps):
            method.advance(masks, step, budget)
            groups = stacks(masks)
            assert any(len(names) > 1 for names, _ in groups) == together
            gates = {}
            for names, mask in groups:
                gates |= zip(names, mask() if len(names) > 1 else [mask()], strict=True)
            ratios = of_each(masks, lambda mask: mask.ratio())
            terms = method.penalties(masks, ratios, 0.5, step)
            terms["data"] = sum((gates[name] * weights[name]).sum() for name in masks)
            sum(terms.values()).backward()
            seen += [term.detach().clone() for term in terms.values()]
            seen += [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
            method.observe(masks, step)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        method.advance(masks, steps, budget)
    return seen, [parameter.detach() for parameter in parameters], method.finalise(masks, budget), masks


@pytest.mark.parametrize("method", [*MASK_METHODS.values()], ids=[*MASK_METHODS])
def test_masks_of_a_mixture_learn_the_same_together_as_one_by_one(method, monkeypatch):
    one_by_one = learned(method(), together=False, steps=3, monkeypatch=monkeypatch)
    together = learned(method(), together=True, steps=3, monkeypatch=monkeypatch)
    for place in (0, 1):
        for expected, value in zip(one_by_one[place], together[place], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
    assert together[2].modules == one_by_one[2].modules


@pytest.mark.parametrize("method", [*MASK_METHODS.values()], ids=[*MASK_METHODS])
def test_a_stack_says_what_each_of_its_masks_says(method, monkeypatch):
    *_, masks = learned(method(), together=True, steps=1, monkeypatch=monkeypatch)
    with torch.no_grad():
        for names, stack in stacks(masks):
            if len(names) == 1:
                continue
            for what in ("forward", "soft", "active", "ratio", "kept"):
                values = getattr(stack, what)()
                alone = [getattr(masks[name], what)() for name in names]
                if values is None:
                    assert alone == [None] * len(names)
                else:
                    torch.testing.assert_close(values, torch.stack(alone))


def test_models_without_experts_have_no_stacks():
    method = MASK_METHODS["ara"]()
    budget = Budget(0.5, {"layers.0.a": (8, 8), "layers.1.a": (8, 8)}, model_parameters=128)
    masks = {
        name: method.create(shape, torch.ones(8), 0.5, storage=budget.rank_costs)
        for name, shape in budget.shapes.items()
    }
    assert [(names, mask is masks[names[0]]) for names, mask in stacks(masks)] == [
        (["layers.0.a"], True),
        (["layers.1.a"], True),
    ]
