"""Which experts are dropped: those that cost least, as long as that lowers the predicted loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.convex_hull import hull_of, predicted_scores
from lowrank_pl.plans.expert_dropping import PREDICTED, ExpertLosses, choose_dropped
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.resize import nested

SHAPE = (16, 24)
COUNT = 4
MATRICES = {number: tuple(f"m.0.experts.{number}.{kind}" for kind in ("up", "down")) for number in range(COUNT)}
SHAPES = {"m.0.q": SHAPE} | {name: SHAPE for names in MATRICES.values() for name in names}


def sigma(name):
    """Singular values of a layer, the same for all but in their order of size."""
    return 0.7 ** torch.arange(16, dtype=torch.float64) * (1 + 0.1 * list(SHAPES).index(name))


def budget(keep, **options):
    return Budget(keep=keep, shapes=SHAPES, model_parameters=4000, drop_experts=True, **options)


def losses(*single, both=0.0, chosen=1):
    pairs = both * (1 - np.eye(COUNT))
    return {"m.0.experts": ExpertLosses(np.array(single), pairs, chosen, MATRICES)}


def loss(plan):
    return sum(
        float(sigma(name)[module.rank :].square().sum()) / 2 for name, module in plan.modules.items() if module.rank
    )


def planned(size, found):
    rest = replace(size, dropped=found.modules)
    return rest.select(predicted_scores(rest, sigma), method="fisher")


def test_a_cheap_expert_is_dropped_and_its_parameters_go_to_the_others():
    found = choose_dropped(budget(0.5), sigma, losses(9.0, 1e-6, 9.0, 9.0))
    assert found.modules == {*MATRICES[1]}
    plan, before = planned(budget(0.5), found), planned(budget(0.5), replace(found, modules=frozenset()))
    assert plan.dropped_experts == ["m.0.experts.1"]
    assert 0.45 < plan.keep_targeted <= 0.5
    assert all(plan.modules[name].rank > before.modules[name].rank for name in MATRICES[0])
    assert found.loss == pytest.approx(loss(plan) + 1e-6)
    assert found.loss_without == pytest.approx(loss(before))


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_no_expert_is_dropped_that_loses_more_than_it_can_save(keep):
    assert not choose_dropped(budget(keep), sigma, losses(9.0, 9.0, 9.0, 9.0)).modules


def test_nothing_is_dropped_where_nothing_has_to_be_saved():
    assert not choose_dropped(budget(1.0), sigma, losses(0.0, 1e-9, 1.0, 1.0)).modules


def test_the_choice_is_the_best_of_all_sets_that_leave_as_many_as_a_token_chooses():
    single = (0.05, 0.2, 0.1, 0.4)
    for keep in (0.2, 0.35, 0.5, 0.7):
        found = choose_dropped(budget(keep), sigma, losses(*single, chosen=2))
        expected = []
        for mask in range(2**COUNT):
            gone = [number for number in range(COUNT) if mask >> number & 1]
            if len(gone) <= 2:
                size = replace(budget(keep), dropped=frozenset(name for n in gone for name in MATRICES[n]))
                plan = size.select(predicted_scores(size, sigma), method="fisher")
                expected.append(loss(plan) + sum(single[number] for number in gone))
        assert found.loss == pytest.approx(min(expected), rel=0.02)


def test_experts_that_tokens_chose_together_are_not_both_dropped():
    cheap = (1e-6, 1e-6, 9.0, 9.0)
    assert choose_dropped(budget(0.3), sigma, losses(*cheap)).experts == 2
    assert choose_dropped(budget(0.3), sigma, losses(*cheap, both=9.0)).experts == 1


def test_experts_with_a_floor_and_as_many_as_a_token_chooses_are_kept():
    free = (1e-9,) * COUNT
    assert choose_dropped(budget(0.2), sigma, losses(*free, chosen=3)).experts == 1
    floors = {"*experts.0.*": 0.1}
    found = choose_dropped(budget(0.3, floors=floors), sigma, losses(*free))
    assert found.experts > 0
    assert not found.modules & {*MATRICES[0]}


def test_the_least_of_loss_and_multiplier_times_parameters_is_that_over_all_sizes():
    size = budget(0.5, multiple_of=2)
    hull = hull_of(size, "m.0.q", sigma("m.0.q"))
    multipliers = np.array([0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1.0])
    expected = (hull.losses[:, None] + multipliers * hull.costs[:, None]).min(axis=0)
    np.testing.assert_allclose(hull.least(multipliers), expected)


def dropping_plan():
    size = budget(0.5)
    return planned(size, choose_dropped(size, sigma, losses(9.0, 1e-6, 9.0, 9.0)))


def test_a_plan_that_drops_experts_is_read_again_and_older_versions_refuse_it():
    plan = dropping_plan()
    text = plan.to_json()
    assert RankPlan.from_json(text) == plan
    assert '"schema": 4' in text
    assert '"rank": "dropped"' in text
    assert '"schema": 2' in planned(budget(0.5), choose_dropped(budget(0.5), sigma, losses(*[9.0] * 4))).to_json()
    gone = plan.modules[MATRICES[1][0]]
    assert (gone.parameters, gone.bytes(4), gone.matrices, gone.is_prefix) == (0, 0, [], True)
    with pytest.raises(ValueError, match=r'rank is 0: .*"dropped"'):
        RankPlan.from_json(text.replace('"rank": "dropped"', '"rank": 0'))
    with pytest.raises(ValueError, match="leave them out"):
        ModulePlan(SHAPE, 0, storage="pivoted")


def test_smaller_sizes_drop_the_same_experts_and_larger_ones_are_refused():
    plan = replace(dropping_plan(), notes=(f"{PREDICTED} 0.2 in all",))
    small = nested(plan, [0.3, 0.5])
    assert small[0.5] is plan
    assert small[0.3].dropped_experts == plan.dropped_experts
    assert 0.25 < small[0.3].keep_targeted <= 0.3
    assert not any(note.startswith(PREDICTED) for note in small[0.3].notes)
    with pytest.raises(ValueError, match=r"keep is 0\.7, but the plan drops 1 experts .* --drop_experts true"):
        nested(plan, [0.7])


def test_experts_are_not_alike_and_dropped_at_once():
    with pytest.raises(ValueError, match="leave out alike_experts or drop_experts"):
        budget(0.5, alike_experts=True)
