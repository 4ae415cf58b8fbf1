"""Other sizes of a plan: at the budget, one inside the other, the plan itself at its own size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.allocate.uniform import Uniform
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.component_order import ComponentOrder
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.resize import components_below, cut_plan, largest_keep, nested
from lowrank_pl.plans.storage import Storage

extents = st.integers(1, 40)
shape_lists = st.lists(st.tuples(extents, extents), min_size=1, max_size=5)
keeps = st.floats(0.05, 1.0)
score = st.one_of(
    st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, 2.0, math.inf, -math.inf, 1e-38, -1e38, 1e38])
)


def resize(plan, keep):
    """The plan of one other size."""
    return nested(plan, [keep])[keep]


@st.composite
def plans_of_any_kind(draw):
    """A plan from scores in any order and of any number, or from requested ranks."""
    shapes = {f"block.{i}.x": shape for i, shape in enumerate(draw(shape_lists))}
    total = sum(m * n for m, n in shapes.values())
    multiple = draw(st.sampled_from([1, 1, 2, 4]))
    floors = draw(st.sampled_from([{}, {}, {"block.0.*": 0.5}, {"block.0.*": 1.0}, {"*": 0.2}]))
    try:
        budget = Budget(
            storage=draw(st.sampled_from(["factored", "pivoted", "auto"])),
            keep=draw(keeps),
            shapes=shapes,
            model_parameters=total + 5,
            multiple_of=multiple,
            floors=floors,
        )
    except ValueError:
        assume(False)
    if draw(st.booleans()):
        requested = st.one_of(st.floats(0, 60), st.just(math.inf))
        return budget.fit({name: draw(requested) for name in shapes}, method="requested")
    scores = {name: torch.tensor(draw(st.lists(score, max_size=min(shape)))) for name, shape in shapes.items()}
    return budget.select(scores, method="scored")


def allowed(plan, name):
    """Every allowed size of a module, by trying them all."""
    m, n = plan.modules[name].shape
    # Of the smallest ranks `auto` grants those that pivoting pays for.
    granted = Storage(plan.storage if plan.storage != "auto" else "pivoted", plan.bytes_per_parameter)
    floor = max([f for pattern, f in plan.floors.items() if pattern == "*" or name.startswith(pattern[:-1])], default=0)
    ranks = [k for k in range(1, min(m, n) + 1) if k % plan.multiple_of == 0 and cost(plan, name, k) < m * n]
    return [*([k for k in ranks if granted.cost((m, n), k) >= floor * m * n - 1e-6] if floor < 1 else []), None]


def cost(plan, name, rank):
    m, n = plan.modules[name].shape
    return m * n if rank is None else Storage(plan.storage, plan.bytes_per_parameter).cost((m, n), rank)


def order_of(size):
    return math.inf if size is None else size


def contained(small, large):
    """Whether every component of one plan is in the other."""
    for name, module in small.modules.items():
        other = large.modules[name]
        if other.rank is None:
            continue
        if module.rank is None:
            return False
        mine = set(module.indices or range(module.rank))
        if not mine <= set(other.indices or range(other.rank)):
            return False
    return True


def possible(plan, keep):
    total = plan.targeted_parameters
    least = sum(cost(plan, name, allowed(plan, name)[0]) for name in plan.modules)
    return least <= math.floor(keep * total + 1e-6)


def unspent_step(plan, keep, larger=None):
    """Whether another step of some module, within a larger plan, would still have fitted."""
    for name, module in plan.modules.items():
        sizes = allowed(plan, name)
        place = sizes.index(module.rank)
        if place + 1 == len(sizes):
            continue
        following = sizes[place + 1]
        if larger is not None and order_of(following) > order_of(larger.modules[name].rank):
            continue
        step = cost(plan, name, following) - cost(plan, name, module.rank)
        if plan.kept_parameters + step <= keep * plan.targeted_parameters + 1e-6:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(plans_of_any_kind())
def test_at_its_own_size_a_plan_is_itself(plan):
    assert resize(plan, plan.keep) is plan


@settings(max_examples=300, deadline=None)
@given(plans_of_any_kind(), st.lists(keeps, min_size=1, max_size=4))
def test_sizes_meet_their_budgets_and_contain_each_other(plan, asked):
    asked = [keep for keep in asked if possible(plan, keep)]
    assume(asked)
    plans = nested(plan, asked)
    assert list(plans) == sorted(set(asked), reverse=True)
    around = [*plans.values(), plan]
    larger = None
    for keep, sized in plans.items():
        assert sized.keep == keep
        assert sized.kept_parameters <= keep * sized.targeted_parameters + 1e-6
        inside = larger
        if sized.kept_parameters < plan.kept_parameters and contained(sized, plan):
            inside = plan if larger is None or contained(plan, larger) else larger
        assert not unspent_step(sized, keep, inside)
        assert all(module.rank in allowed(plan, name) for name, module in sized.modules.items())
        larger = sized
    for one in around:
        for other in around:
            if one.keep <= other.keep and one is not other:
                assert contained(one, other)


@settings(max_examples=200, deadline=None)
@given(plans_of_any_kind(), keeps)
def test_resizing_to_the_same_size_again_changes_nothing(plan, keep):
    assume(possible(plan, keep))
    assert resize(resize(plan, keep), keep) == resize(plan, keep)


@settings(max_examples=200, deadline=None)
@given(plans_of_any_kind())
def test_plans_with_orders_survive_json(plan):
    again = RankPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert resize(again, plan.keep) is again
    assert list(json.loads(plan.to_json()))[-1] == "order"


@settings(max_examples=300, deadline=None)
@given(plans_of_any_kind(), st.floats(0.2, 0.99))
def test_components_below_are_all_that_smaller_sizes_keep_of_layers_without_components(plan, share):
    keep = share * plan.keep
    assume(possible(plan, keep))
    smaller, below = resize(plan, keep), components_below(plan)
    for name, entry in smaller.modules.items():
        own = plan.modules[name]
        if entry.rank != own.rank and (own.rank is None or "pivoted" in (own.storage, entry.storage)):
            held = below[name].indices or range(below[name].rank)
            assert set(entry.indices or range(entry.rank)) <= set(held)
    assert cut_plan(plan, keep, below) == smaller


def test_components_below_need_scores_of_every_module():
    plan = uniform_plan({"a": (8, 8), "b": (6, 20)}, keep=1.0)
    rest = {name: scores for name, scores in plan.order.scores.items() if name != "a"}
    with pytest.raises(ValueError, match="scores missing for a: expected an entry for every module"):
        components_below(replace(plan, order=ComponentOrder(rest)))


def test_everything_is_dense_at_keep_one():
    plan = uniform_plan({"a": (8, 8), "b": (6, 20)}, keep=0.4)
    assert resize(plan, 1.0).dense_modules == ["a", "b"]
    assert resize(plan, 1.0).keep_targeted == 1.0


def uniform_plan(shapes, keep, **budget):
    problem = Budget(storage="factored", keep=keep, shapes=shapes, model_parameters=10_000, **budget)
    return Uniform().plan(Problem(problem, SimpleNamespace(fingerprint={}), None))


def test_a_module_requested_dense_shrinks_with_the_rest_at_smaller_sizes():
    shapes = {"a": (40, 40), "b": (40, 40), "c": (40, 40)}
    plan = Budget(storage="factored", keep=0.6, shapes=shapes, model_parameters=4800).fit(
        {"a": math.inf, "b": 8.0, "c": 8.0}, method="x"
    )
    assert plan.dense_modules == ["a"]
    assert [module.rank for module in resize(plan, 0.8).modules.values()] == [None, 14, 14]
    # Half the budget, half the ranks: 20 * 0.5 and 8 * 0.5, where an infinite score would have left 1 and 1.
    assert [module.rank for module in resize(plan, 0.3).modules.values()] == [10, 4, 4]


def test_what_has_equal_scores_is_kept_evenly():
    shapes = {"a": (40, 40), "b": (40, 40)}
    budget = Budget(storage="factored", keep=0.5, shapes=shapes, model_parameters=3200)
    plan = budget.select({"a": torch.full((40,), math.inf), "b": torch.full((40,), math.inf)}, method="x")
    assert [module.rank for module in plan.modules.values()] == [10, 10]
    unscored = budget.select({"a": torch.tensor([1.0]), "b": torch.tensor([])}, method="x")
    assert [module.rank for module in unscored.modules.values()] == [10, 10]


def test_any_components_stay_nested():
    shapes = {"a": (30, 30), "b": (30, 30)}
    scores = {name: torch.rand(30, generator=torch.Generator().manual_seed(3)) for name in shapes}
    plan = Budget(storage="factored", keep=0.5, shapes=shapes, model_parameters=1800).select(scores, method="x")
    small = resize(plan, 0.2)
    assert plan.any_k_modules == ["a", "b"]
    assert set(small.modules["a"].indices) < set(plan.modules["a"].indices)
    best = scores["a"].argsort(descending=True)[: small.modules["a"].rank]
    assert small.modules["a"].indices == tuple(sorted(best.tolist()))


def test_constraints_origin_and_notes_are_inherited():
    shapes = {"a.q": (64, 64), "a.up": (64, 64), "tiny": (4, 4)}
    plan = uniform_plan(shapes, 0.7, multiple_of=8, floors={"*.q": 0.5})
    plan = plan.with_origin({"base": "b"}, {"model": "x"}, ["damped"])
    small = resize(plan, 0.5)
    assert (small.origin, small.fingerprint, small.method) == ({"base": "b"}, {"model": "x"}, "uniform")
    assert small.notes == (
        "resized from the plan of uniform at keep 0.7, by its component order",
        "damped",
        "tiny: too small for a rank of 8, left dense",
    )
    assert [module.rank for module in small.modules.values()] == [16, 8, None]
    assert resize(small, 0.6).notes == small.notes, "the order is still that of the first plan"
    with pytest.raises(ValueError, match=r"keep 0.2 allows .* multiple_of 8"):
        resize(plan, 0.2)


def test_notes_about_the_old_size_are_left_out():
    plan = Budget(storage="factored", keep=0.5, shapes={"a": (40, 40), "b": (40, 40)}, model_parameters=3200).fit(
        {"a": 9.0, "b": 8.0}, method="x"
    )
    assert "requested ranks scaled by" in plan.notes[0]
    assert resize(plan, 0.3).notes == ("resized from the plan of x at keep 0.5, by its component order",)


def test_ranks_edited_by_hand_are_bounds_even_where_the_constraints_forbid_them():
    plan = uniform_plan({"a": (64, 64), "b": (64, 64), "c": (64, 64)}, 0.5, multiple_of=4, floors={"c": 0.4})
    edited = replace(
        plan, modules={"a": ModulePlan((64, 64), 3), "b": ModulePlan((64, 64)), "c": ModulePlan((64, 64), 1)}
    )
    large, small = resize(edited, 0.9), resize(edited, 0.26)
    assert [module.rank for module in large.modules.values()] == [28, None, 24]
    assert [module.rank for module in small.modules.values()] == [3, 20, 1]
    assert [m.rank for m in resize(edited, 1.0).modules.values()] == [None, None, None]
    beyond_break_even = replace(edited, modules={**edited.modules, "a": ModulePlan((64, 64), 40)})
    assert resize(beyond_break_even, 0.99).modules["a"].rank == 40
    assert resize(beyond_break_even, 0.7).modules["a"].rank == 28
    assert resize(replace(plan, modules={**plan.modules, "a": ModulePlan((64, 64), 40)}), 1.0).modules["a"].rank == 40


def test_plans_that_have_one_size_only():
    plan = uniform_plan({"a": (8, 8), "b": (8, 8)}, 0.5)
    with pytest.raises(ValueError, match=r"method uniform.* no component order.*: .*`lowrank allocate`"):
        resize(replace(plan, order=None), 0.5)
    with pytest.raises(ValueError, match="no size was given: expected one or more fractions"):
        nested(plan, [])
    with pytest.raises(ValueError, match=r"keep is 1.5: expected"):
        nested(plan, [0.5, 1.5])
    edited = replace(plan, modules={**plan.modules, "b": ModulePlan((8, 8), 2, (0, 3))})
    with pytest.raises(ValueError, match=r"other components of b .*: restore its"):
        resize(edited, 0.4)
    spelled_out = replace(plan, modules={**plan.modules, "b": ModulePlan((8, 8), 2, (0, 1))})
    assert resize(spelled_out, 0.25).modules["b"].rank == 1
    added = replace(plan, modules={**plan.modules, "c": ModulePlan((8, 8), 2)})
    with pytest.raises(ValueError, match="scores missing for c"):
        resize(added, 0.4)
    fewer = replace(plan, modules={"a": plan.modules["a"]})
    assert list(resize(fewer, 0.3).modules) == ["a"]


def test_weights_that_were_corrected_for_a_size_serve_smaller_ones_only():
    plan = uniform_plan({"a": (64, 64), "b": (64, 64)}, 0.5)
    plan = replace(plan, fingerprint={"kind": "whitened", "correction": {"keep": 0.5, "round": 1}})
    assert (largest_keep(plan), largest_keep(replace(plan, fingerprint={"kind": "whitened"}))) == (0.5, 1.0)
    message = r"keep is 0.6, .* keep 0.5: .*`lowrank allocate`"
    with pytest.raises(ValueError, match=message):
        resize(plan, 0.6)
    with pytest.raises(ValueError, match=message):
        nested(plan, [0.3, 0.6])
    small = resize(plan, 0.25)
    assert contained(small, plan)
    assert small.fingerprint == plan.fingerprint
    # The factors of a smaller size are the same ones, and it grows as far as they go.
    assert resize(small, 0.5).modules == plan.modules
    with pytest.raises(ValueError, match=message):
        resize(small, 0.6)
    read = RankPlan.from_json(plan.to_json())
    with pytest.raises(ValueError, match=message):
        resize(read, 0.6)


@given(plan=plans_of_any_kind(), keep=keeps)
def test_a_size_cut_from_an_export_is_the_resized_plan_or_refused(plan, keep):
    assume(keep <= plan.keep)
    try:
        sized = resize(plan, keep)
    except ValueError:
        return  # too small for the floors
    cut = {name for name, entry in sized.modules.items() if entry.rank != plan.modules[name].rank}
    if cut & {*plan.dense_modules, *plan.pivoted_modules}:
        with pytest.raises(ValueError, match=r"the export holds no components of these: make this size from the plan"):
            cut_plan(plan, keep)
    else:
        assert cut_plan(plan, keep) == sized
