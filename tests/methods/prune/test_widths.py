"""Which width each MLP should have, against a search over all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from lowrank_pl.methods.prune.widths import Spectrum, WidthLosses, WidthOption
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.convex_hull import predicted_scores


@pytest.fixture(params=[Constraints(), Constraints(storage="factored", multiple_of=2)])
def known(request):
    """Three MLPs at three widths each, beside one linear layer of no MLP."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows, columns):
        sigma = torch.rand(min(rows, columns), generator=generator).sort(descending=True).values
        return Spectrum((rows, columns), sigma)

    options = [
        {
            width: WidthOption(lost * scale, {f"{place}.up": drawn(width, 12), f"{place}.down": drawn(12, width)})
            for width, lost in ((24, 0.0), (16, 0.4), (10, 1.5))
        }
        for place, scale in enumerate((0.2, 1.0, 3.0))
    ]
    return WidthLosses({"q": drawn(12, 12)}, options, request.param)


@pytest.mark.parametrize("limit", [1200, 900, 600])
def test_the_best_widths_are_those_of_a_search_over_all(known, limit):
    losses = [known.loss(widths, limit) for widths in product((24, 16, 10), repeat=3)]
    widths, loss = best(known, limit)
    assert loss == known.loss(widths, limit) <= 1.03 * min(losses)


@pytest.mark.parametrize("limit", [1850, 1800, 1700, 1500])
def test_close_to_the_full_size_widths_of_their_own_are_no_worse_and_leave_enough(known, limit):
    widths, loss = best(known, limit)
    assert loss <= min(known.losses(limit).values())
    assert 144 + 24 * sum(widths) >= limit


def best(known, limit):
    losses = known.losses(limit)
    return known.best(limit, min(losses, key=losses.__getitem__))


@pytest.mark.parametrize("limit", [1200, 900, 600])
def test_one_width_for_all_loses_what_three_of_it_lose(known, limit):
    assert known.losses(limit)[24] == known.loss((24, 24, 24), limit)


def test_the_loss_is_that_of_the_plan_of_the_run(known):
    layers = known._layers((24, 16, 10))
    constraints = known.constraints
    total = sum(rows * columns for rows, columns in (entry.shape for entry in layers.values()))
    budget = Budget(
        600 / total, {name: entry.shape for name, entry in layers.items()}, total,
        multiple_of=constraints.multiple_of, storage=constraints.storage,
    )  # fmt: skip
    sigma = {name: entry.sigma for name, entry in layers.items()}
    plan = budget.select(predicted_scores(budget, sigma.__getitem__), method="fisher")
    cut = [sigma[name][module.rank :] for name, module in plan.modules.items() if module.rank]
    assert known.loss((24, 16, 10), 600) == pytest.approx(
        0.4 + 4.5 + sum(rest.square().sum().item() / 2 for rest in cut)
    )


def test_widths_whose_smallest_ranks_are_too_large_are_no_choice(known):
    coarse = replace(known, constraints=Constraints(storage="factored", multiple_of=4))
    assert coarse.losses(250) == {}


def test_a_width_that_leaves_less_than_is_to_be_kept_is_no_choice(known):
    assert set(known.losses(1500)) == {24}


@pytest.mark.parametrize("floor", [0.9, 1.0])
def test_floors_leave_less_to_the_mlps(known, floor):
    held = replace(known, constraints=replace(known.constraints, floors={"q": floor, "*.up": 0.0}))
    assert known.loss((16, 16, 16), 400) < held.loss((16, 16, 16), 400)
    losses = [held.loss(widths, 600) for widths in product((24, 16, 10), repeat=3)]
    assert best(held, 600)[1] <= 1.03 * min(losses)
