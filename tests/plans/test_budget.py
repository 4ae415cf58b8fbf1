"""Budgets: any requested ranks become ranks that meet the budget to within one step, or an error says why not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.allocate.uniform import Uniform
from lowrank_pl.plans.budget import Budget, check_keep
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.resize import nested

sizes = st.integers(1, 90)
shape_lists = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=7)
requested_rank = st.one_of(st.floats(0, 200), st.just(math.inf), st.just(0.0), st.floats(0, 1e-6))


def named(shapes):
    return {f"block.{i}": shape for i, shape in enumerate(shapes)}


def problem(budget):
    """A problem for allocators that look at nothing but the budget."""
    return Problem(budget, SimpleNamespace(fingerprint={"kind": "whitened"}), None)


def allowed_sizes(shape, multiple, floor, storage="factored"):
    """Every allowed size of a module as (rank or None, parameters), cheapest first, by trying them all.

    A parameter takes two bytes and an index four.
    """
    m, n = shape
    sizes = []
    for k in range(1, min(m, n) + 1):
        factored, pivoted = k * m + k * n, k * n + (m - k) * k + 2 * k
        cost = {"factored": factored, "pivoted": pivoted, "auto": min(factored, pivoted)}[storage]
        granted = factored if storage == "factored" else pivoted
        if k % multiple == 0 and cost < m * n and Fraction(granted, m * n) >= floor - Fraction(1, 10**9):
            sizes.append((k, cost))
    return [*(sizes if floor < 1 else []), (None, m * n)]


@settings(max_examples=200, deadline=None)
@given(
    st.data(),
    shape_lists,
    st.floats(0.02, 1.0),
    st.sampled_from([1, 1, 2, 3, 8]),
    st.booleans(),
    st.sampled_from(["factored", "pivoted", "auto"]),
)
def test_budget_is_met_to_within_one_step(data, shapes, keep, multiple, with_floors, storage):
    shapes = named(shapes)
    floors = {"block.0": data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))} if with_floors else {}
    ladders = {
        name: allowed_sizes(shape, multiple, Fraction(floors.get(name, 0.0)), storage) for name, shape in shapes.items()
    }
    total = sum(m * n for m, n in shapes.values())
    assume(sum(ladder[0][1] for ladder in ladders.values()) <= math.floor(keep * total + 1e-6))
    budget = Budget(
        storage=storage,
        keep=keep,
        shapes=shapes,
        model_parameters=total + 7,
        multiple_of=multiple,
        floors=floors,
        bytes_per_parameter=2,
    )
    requested = {name: data.draw(requested_rank) for name in shapes}
    plan = budget.fit(requested, method="drawn")

    assert list(plan.modules) == list(shapes)
    assert (plan.method, plan.keep, plan.model_parameters, plan.bytes_per_parameter) == ("drawn", keep, total + 7, 2)
    spent, steps = 0, []
    for name, module in plan.modules.items():
        ladder = ladders[name]
        place = [rank for rank, _ in ladder].index(module.rank)
        spent += ladder[place][1]
        if place + 1 < len(ladder):
            steps.append(ladder[place + 1][1] - ladder[place][1])
    assert spent == plan.kept_parameters <= keep * total + 1e-6
    assert not steps or spent + min(steps) > keep * total
    assert steps or plan.keep_targeted == 1.0


def test_requested_ranks_that_fit_exactly_stay():
    shapes = named([(30, 30), (30, 60), (60, 30)])
    requested = dict(zip(shapes, [5.0, 9.0, 2.0], strict=True))
    spent = 5 * 60 + 9 * 90 + 2 * 90
    plan = Budget(storage="factored", keep=spent / 4500, shapes=shapes, model_parameters=4500).fit(
        requested, method="x"
    )
    assert [module.rank for module in plan.modules.values()] == [5, 9, 2]
    assert plan.kept_parameters == spent


def test_scaling_keeps_the_relation_of_requested_ranks():
    shapes = named([(400, 400)] * 3)
    plan = Budget(storage="factored", keep=0.5, shapes=shapes, model_parameters=480_000).fit(
        {"block.0": 10.0, "block.1": 20.0, "block.2": 30.0}, method="x"
    )
    ranks = [module.rank for module in plan.modules.values()]
    assert sum(ranks) == 300  # 0.5 * 480,000 parameters at 800 a component
    assert max(abs(a - b) for a, b in zip(ranks, [50, 100, 150], strict=True)) <= 1


def test_modules_requested_dense_are_dense_and_not_scaled():
    shapes = named([(40, 40)] * 4)
    requested = {"block.0": math.inf, "block.1": 12.0, "block.2": 12.0, "block.3": 12.0}
    plan = Budget(storage="factored", keep=0.6, shapes=shapes, model_parameters=6400).fit(requested, method="x")
    assert plan.dense_modules == ["block.0"]
    assert [plan.modules[f"block.{i}"].rank for i in (1, 2, 3)] == [10, 9, 9]
    assert any("requested ranks scaled by 0.8" in note for note in plan.notes)


def test_modules_requested_dense_beyond_the_budget_are_scaled_and_noted():
    shapes = named([(40, 40)] * 2)
    plan = Budget(storage="factored", keep=0.5, shapes=shapes, model_parameters=3200).fit(
        dict.fromkeys(shapes, math.inf), method="x"
    )
    assert [module.rank for module in plan.modules.values()] == [10, 10]
    assert plan.notes[0] == "2 modules were requested dense, which the budget does not allow: scaled like the rest"


def test_keep_one_is_dense():
    shapes = named([(40, 40), (7, 90)])
    budget = Budget(storage="factored", keep=1.0, shapes=shapes, model_parameters=3200)
    assert budget.fit(dict.fromkeys(shapes, 1.0), method="x").keep_targeted == 1.0
    assert Uniform().plan(problem(budget)).dense_modules == list(shapes)


def test_multiple_of_leaves_small_modules_dense_and_says_so():
    shapes = named([(64, 64), (8, 8)])
    plan = Budget(storage="factored", keep=0.6, shapes=shapes, model_parameters=5000, multiple_of=8).fit(
        dict.fromkeys(shapes, 10.0), method="x"
    )
    assert plan.modules["block.0"].rank == 16
    assert plan.modules["block.1"].rank is None
    assert plan.notes[0] == "block.1: too small for a rank of 8, left dense"


def test_floors_hold():
    shapes = {"a.q_proj": (64, 64), "a.up": (64, 64), "b.q_proj": (64, 64)}
    plan = Budget(
        storage="factored", keep=0.6, shapes=shapes, model_parameters=12288, floors={"*q_proj": 0.7, "a.*": 0.1}
    ).fit({"a.q_proj": 1.0, "a.up": 30.0, "b.q_proj": 1.0}, method="x")
    assert plan.modules["a.q_proj"].rank == plan.modules["b.q_proj"].rank == 23  # ceil(0.7 * 32)
    assert plan.modules["a.up"].rank == 11  # 57 components fit 0.6 of the budget, 46 are taken
    dense = Budget(storage="factored", keep=0.5, shapes=shapes, model_parameters=12288, floors={"a.up": 1.0})
    assert dense.fit(dict.fromkeys(shapes, 1.0), method="x").dense_modules == ["a.up"]


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.0001, math.nan, math.inf])
def test_impossible_keep(keep):
    message = r"keep is .*: expected .* above 0 and at most 1"
    with pytest.raises(ValueError, match=message):
        check_keep(keep)
    with pytest.raises(ValueError, match=message):
        Budget(storage="factored", keep=keep, shapes={"a": (9, 9)}, model_parameters=81)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"multiple_of": 0}, r"multiple_of is 0: expected .* at least 1"),
        ({"floors": {"a": 1.5}}, r"floor of 'a' is 1.5: expected .*\[0, 1\]"),
        ({"floors": {"a": math.nan}}, r"floor of 'a' is nan"),
        ({"floors": {"q*": 0.5}}, r"'q\*' matches none of the 2 modules"),
        (
            {"floors": {"a": 1.0}},
            r"keep 0.5 allows 800 .* 860 \(keep 0.5375\): raise keep",
        ),
        ({"multiple_of": 16}, r"multiple_of 16 .* 1,600 \(keep 1.0000\)"),
        ({"keep": 1e-3}, r"keep 0.001 allows 1 .* 120"),
    ],
)
def test_impossible_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(
            storage="factored",
            **{"keep": 0.5, "shapes": {"a": (20, 40), "b": (40, 20)}, "model_parameters": 1600, **arguments},
        )


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ({}, r"missing for a and 1 more: expected an entry for every module"),
        ({"a": 1.0}, r"missing for b: expected an entry for every module"),
        ({"a": -1.0, "b": 1.0}, r"rank of a is -1.0: expected .* at least 0"),
        ({"a": 1.0, "b": math.nan}, r"rank of b is nan"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"given for c: expected one of the 2 modules, such as a"),
    ],
)
def test_impossible_requested_ranks(requested, message):
    budget = Budget(storage="factored", keep=0.5, shapes={"a": (20, 40), "b": (40, 20)}, model_parameters=1600)
    with pytest.raises(ValueError, match=message):
        budget.fit(requested, method="x")


def test_uniform_keeps_the_same_fraction_everywhere():
    shapes = {"a": (64, 64), "b": (192, 64), "c": (64, 192), "d": (100, 30)}
    plan = make_allocator("uniform").plan(
        problem(Budget(storage="factored", keep=0.6, shapes=shapes, model_parameters=40_000))
    )
    assert plan.method == "uniform"
    for (m, n), module in zip(shapes.values(), plan.modules.values(), strict=True):
        assert abs(module.rank - 0.6 * m * n / (m + n)) <= 1.0
    with pytest.raises(ValueError, match=r"'best': expected one of uniform"):
        make_allocator("best")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": [1.0]}, r"scores missing for b: expected an entry for every module"),
        ({"a": [1.0], "b": [1.0], "c": [1.0]}, r"scores given for c: expected one of the 2 modules"),
        ({"a": [1.0] * 21, "b": [1.0]}, r"a .* has 21 scores: expected 20 or fewer"),
        ({"a": [math.nan], "b": [1.0]}, r"scores of a .* NaN: expected one number a component"),
        ({"a": 1.0, "b": [1.0]}, r"scores of a have shape \(\)"),
    ],
)
def test_impossible_scores(scores, message):
    budget = Budget(storage="factored", keep=0.5, shapes={"a": (20, 40), "b": (40, 20)}, model_parameters=1600)
    with pytest.raises(ValueError, match=message):
        budget.select({name: torch.tensor(values) for name, values in scores.items()}, method="x")


def test_bounds_of_other_plans():
    shapes = {"a": (40, 40), "b": (40, 40)}
    scores = {"a": torch.arange(40, 0, -1.0), "b": torch.arange(40, 0, -1.0) / 100}
    budget = Budget(storage="factored", keep=0.5, shapes=shapes, model_parameters=3200)
    assert [m.rank for m in budget.select(scores, method="x").modules.values()] == [19, 1]
    bound = {"a": ModulePlan((40, 40), 5), "b": ModulePlan((40, 40), 9)}
    assert [m.rank for m in budget.select(scores, method="x", within=bound).modules.values()] == [5, 9]
    assert [m.rank for m in budget.select(scores, method="x", beyond=bound).modules.values()] == [11, 9]
    dense = {"a": ModulePlan((40, 40)), "b": ModulePlan((40, 40), 2)}
    with pytest.raises(ValueError, match=r"160 parameters more than keep 0.5 allows: .* raise keep to 0.55$"):
        budget.select(scores, method="x", beyond=dense)
    raised = Budget(storage="factored", keep=0.55, shapes=shapes, model_parameters=3200).select(
        scores, method="x", beyond=dense
    )
    assert [m.rank for m in raised.modules.values()] == [None, 2]


@settings(max_examples=40, deadline=None)
@given(st.data(), shape_lists, st.floats(0.3, 1.0), st.sampled_from([1, 3]))
def test_sizes_are_those_of_the_selected_plan(data, shapes, keep, multiple):
    shapes = named(shapes)
    total = sum(m * n for m, n in shapes.values())
    least = sum(allowed_sizes(shape, multiple, Fraction(0))[0][1] for shape in shapes.values())
    assume(least <= math.floor(keep * total + 1e-6))
    budget = Budget(storage="factored", keep=keep, shapes=shapes, model_parameters=total, multiple_of=multiple)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = {name: torch.rand(min(shape), generator=generator) for name, shape in shapes.items()}
    plan = budget.select(scores, method="x")
    assert budget.sizes(scores) == {name: module.rank for name, module in plan.modules.items()}


def test_sizes_check_their_scores_and_log_nothing(caplog):
    caplog.set_level("INFO")
    budget = Budget(
        storage="factored", keep=0.6, shapes={"a": (64, 64), "b": (8, 8)}, model_parameters=5000, multiple_of=8
    )
    assert budget.sizes({"a": torch.ones(64), "b": torch.ones(8)}) == {"a": 16, "b": None}
    assert caplog.text == ""
    with pytest.raises(ValueError, match="scores missing for b"):
        budget.sizes({"a": torch.ones(64)})
    with pytest.raises(ValueError, match=r"b .* has 9 scores: expected 8 or fewer"):
        budget.sizes({"a": torch.ones(64), "b": torch.ones(9)})


def test_what_is_left_goes_to_the_largest_rounding_loss():
    # Just below the factor at which the large module would take its 10th component, 60 parameters are left: one step
    # of a small module, and 3.9 lost more to rounding than 3.2.
    shapes = {"small": (20, 20), "other": (20, 20), "large": (100, 100)}
    plan = Budget(storage="factored", keep=2100 / 10_800, shapes=shapes, model_parameters=10_800).fit(
        {"small": 3.2, "other": 3.9, "large": 10.0}, method="x"
    )
    assert [module.rank for module in plan.modules.values()] == [3, 4, 9]


# -- a base that was pruned ----------------------------------------------------------------------------------------

PRUNED = {"shapes": {"a": (8, 8), "b": (8, 8)}, "model_parameters": 300, "left_out": 72, "storage": "factored"}


def test_keep_counts_what_was_pruned():
    budget = Budget(keep=0.5, **PRUNED)
    assert (budget.present, budget.total, budget.limit) == (128, 200, 100)
    assert budget.share == pytest.approx(100 / 128)


def test_a_plan_on_a_pruned_base_counts_what_was_pruned():
    plan = Budget(keep=0.5, **PRUNED).fit({"a": 3.0, "b": 3.0}, method="hand")
    assert plan.kept_parameters <= 100
    assert (plan.targeted_parameters, plan.keep_targeted) == (200, plan.kept_parameters / 200)
    assert plan.kept_model_parameters == 300 - 200 + plan.kept_parameters


def test_the_pruned_base_itself_keeps_less_than_all():
    whole = Budget(keep=0.5, **PRUNED).fit({"a": 3.0, "b": 3.0}, method="hand").dense()
    assert (whole.kept_parameters, whole.keep_targeted, whole.keep_model) == (128, 0.64, 228 / 300)


def test_what_was_pruned_survives_json_and_is_absent_where_nothing_was():
    plan = Budget(keep=0.5, **PRUNED).fit({"a": 3.0, "b": 3.0}, method="hand")
    assert RankPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["parameters"]["left_out"] == 72
    plain = RankPlan("hand", 0.5, {"a": ModulePlan((8, 8), 2)}, 64)
    assert "left_out" not in json.loads(plain.to_json())["parameters"]


def test_a_budget_that_pruning_made_impossible_is_refused():
    with pytest.raises(ValueError, match=r"keep 0\.1 allows 20 parameters, .* at least 32 \(keep 0\.1600\)"):
        Budget(keep=0.1, **PRUNED)


def experts(**more):
    """Two blocks with three experts of two kinds each, and a matrix that is no expert's."""
    names = [f"h.{block}.mlp.{expert}.{kind}" for block in (0, 1) for expert in (0, 1, 2) for kind in ("up", "down")]
    shapes = {name: (8, 12) if name.endswith("up") else (12, 8) for name in names} | {"h.0.q": (8, 8)}
    return Budget(shapes=shapes, model_parameters=2000, storage="factored", alike_experts=True, **{"keep": 0.5, **more})


def scores(budget):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(min(shape), generator=generator).sort(descending=True).values
        for name, shape in budget.shapes.items()
    }


def ranks_by_kind(plan):
    """The ranks of the experts of each block and kind."""
    found = {}
    for name, module in plan.modules.items():
        if ".mlp." in name:
            found.setdefault((name[:3], name.rpartition(".")[2]), set()).add(module.rank)
    return found


def test_alike_experts_have_one_rank_a_kind_and_block():
    plan = experts().select(scores(experts()), method="hand")
    ranks = ranks_by_kind(plan)
    assert {len(each) for each in ranks.values()} == {1}
    assert len({min(each) for each in ranks.values()}) > 1
    assert 0.4 < plan.keep_targeted <= 0.5


def test_alike_experts_get_the_mean_of_requested_ranks():
    # What the mean of the requested ranks costs.
    budget = experts(keep=(12 * 2 * 20 + 16) / (12 * 96 + 64))
    requested = {
        name: float(1 + int(name.split(".")[-2] == "2") * 3) if ".mlp." in name else 1.0 for name in budget.shapes
    }
    plan = budget.fit(requested, method="hand")
    assert ranks_by_kind(plan) == {(block, kind): {2} for block in ("h.0", "h.1") for kind in ("up", "down")}


def test_other_sizes_of_alike_experts_are_alike_after_a_plan_was_stored():
    plan = RankPlan.from_json(experts().select(scores(experts()), method="hand").to_json())
    assert plan.alike_experts
    for sized in nested(plan, [0.3, 0.7]).values():
        assert {len(each) for each in ranks_by_kind(sized).values()} == {1}


def test_alike_experts_need_experts_and_equal_floors():
    with pytest.raises(ValueError, match="alike_experts is true, but no two modules"):
        Budget(keep=0.5, shapes={"h.0.q": (8, 8)}, model_parameters=64, alike_experts=True)
    with pytest.raises(ValueError, match=r"a floor holds for h\.1\.mlp\.0\.up or another expert"):
        experts(floors={"h.1.mlp.2.up": 0.5})


def test_edited_ranks_of_alike_experts_have_to_be_alike():
    plan = experts().select(scores(experts()), method="hand")
    name = "h.1.mlp.0.up"
    edited = replace(plan, modules={**plan.modules, name: ModulePlan((8, 12), 1)})
    with pytest.raises(ValueError, match=r"those of h\.1\.mlp\.0\.up and of other experts"):
        nested(edited, [0.3])


STACKS = {"h.0.mlp.up": tuple(f"h.0.mlp.{number}.up" for number in range(3))}


def sharing(**more):
    """Three experts that share the right factor of their ups, of shape (8, 12), and have downs of their own."""
    shapes = {"h.0.mlp.up": (24, 12), **{f"h.0.mlp.{number}.down": (12, 8) for number in range(3)}}
    return Budget(shapes=shapes, stacks=STACKS, model_parameters=900, **{"keep": 0.5, **more})


def test_a_shared_right_factor_is_counted_once_and_never_pivoted():
    budget = sharing(storage="auto")
    assert budget.cost("h.0.mlp.up", 7) == 7 * (3 * 8 + 12)
    assert budget.top_rank("h.0.mlp.up") == 7  # The next one costs as much as the dense weights.
    plan = budget.select(scores(budget), method="hand")
    assert plan.modules["h.0.mlp.up"].storage == "factored"
    assert plan.modules["h.0.mlp.up"].layers == STACKS["h.0.mlp.up"]
    assert plan.kept_parameters <= 0.5 * 3 * 2 * 96


def test_the_rank_of_a_shared_factor_may_exceed_that_of_each_layer():
    entry = ModulePlan((24, 12), 12, layers=STACKS["h.0.mlp.up"])
    assert (entry.layer_shape, entry.parameters) == ((8, 12), 12 * 36)
    with pytest.raises(ValueError, match=r"rank of 13 was given for shape \(24, 12\): expected 1\.\.12"):
        ModulePlan((24, 12), 13, layers=STACKS["h.0.mlp.up"])


def test_other_sizes_of_a_stored_plan_share_too():
    plan = sharing().select(scores(sharing()), method="hand")
    assert '"schema": 4' in plan.to_json()
    stored = RankPlan.from_json(plan.to_json())
    assert stored == plan
    for sized in nested(stored, [0.3, 0.8]).values():
        assert sized.shares_experts
        assert sized.layers == plan.layers


def test_alike_experts_are_those_that_share_nothing():
    budget = sharing(alike_experts=True)
    assert [len(unit) for unit in budget.units] == [1, 3]


def test_floors_of_experts_that_share_a_factor_have_to_be_equal():
    assert sharing(keep=0.9, floors={"*.up": 1.0}).least_rank("h.0.mlp.up") is None
    with pytest.raises(ValueError, match=r"some of the layers of h\.0\.mlp\.up only.*leave shared_experts out"):
        sharing(floors={"h.0.mlp.1.up": 0.5})


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"layers": ("a",)}, "two or more different layers"),
        ({"layers": ("a", "a")}, "two or more different layers"),
        ({"layers": tuple("abcde")}, "equal numbers of rows"),
        ({"layers": ("a", "b"), "storage": "pivoted"}, "leave storage and bits out"),
    ],
)
def test_impossible_layers_of_a_module_are_refused(more, text):
    with pytest.raises(ValueError, match=text):
        ModulePlan((24, 12), 3, **more)


def test_a_plan_that_names_a_layer_twice_is_refused():
    plan = sharing().select(scores(sharing()), method="hand")
    text = plan.to_json().replace('"h.0.mlp.1.up"', '"h.0.mlp.0.down"')
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.0\.down twice"):
        RankPlan.from_json(text)
