"""Recipes by name, under variants, and under the names of earlier versions."""

from __future__ import annotations

import pytest

from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import ALLOCATORS
from lowrank_pl.methods.masks import ARA, ARS, MASK_METHODS, Rescaled
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.methods.quantize.settings import Rounding
from lowrank_pl.methods.recipes import RECIPES, Learning, Recipe, recipe
from lowrank_pl.plans.constraints import Constraints


def test_every_method_has_a_recipe_of_its_name():
    assert {*ALLOCATORS, *MASK_METHODS} <= set(RECIPES)


@pytest.mark.parametrize("name", MASK_METHODS)
def test_the_recipe_of_a_mask_learns_with_it(name):
    assert RECIPES[name].learning.mask.name == name


def test_variants_add_up():
    found = recipe("fisher+prune+pivoted+refit")
    assert (found.storage, found.refit is None, found.prune is None) == ("auto", False, False)
    assert "joint" not in found.describe()["refit"]
    assert recipe("rescaled+alike").constrained(Constraints(multiple_of=8)) == Constraints(
        multiple_of=8, storage="factored", alike_experts=True
    )
    assert recipe("fisher+joint").describe()["refit"]["joint"]["method"] == "gauss_newton"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tanh", r"'tanh'.*tanh is called dobi_svd now"),
        ("zero_sum_corrected", r"zero_sum_corrected is called zs_svd_corrected now"),
        ("ara+narrow", r"'ara\+narrow'.*narrow is called prune now"),
        ("unknown", r"'unknown'.*expected one of svd, .*\+pivoted"),
        ("dense", r"'dense'.*other than dense"),
        ("a/b", r"'a/b'.*letters, digits"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        recipe(name)


def test_names_that_were_never_other_ones_are_not_said_to_be():
    with pytest.raises(ValueError, match="unknown") as caught:
        recipe("unknown")
    assert "is called" not in str(caught.value).partition(":")[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, r"steps .* is 0\b.*at least 1"),
        ({"lr": 0.0}, r"lr .* is 0\.0\b.*above 0"),
        ({"start": "x"}, "'x'"),
    ],
)
def test_impossible_learning(settings, message):
    with pytest.raises(ValueError, match=message):
        Learning(ARA(), **settings)


def test_settings_at_their_first_value_do_not_change_what_results_are_found_by():
    assert "alignment" not in RECIPES["ars"].describe()["learning"]["mask"]
    changed = Recipe(learning=Learning(ARS(alignment="mse")))
    assert changed.describe()["learning"]["mask"]["alignment"] == "mse"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("svd", {"allocator": "fisher"}),
        ("fwsvd", {"allocator": "svdllm_v2"}),
        ("svd", {"allocator": "zs_svd", "settings": {"rounds": 1, "reprofile": True}}),
        ("asvd", {"shared_experts": True}),
        ("whitened", {"learning": Learning(Rescaled())}),
        ("whitened", {"learning": Learning(ARA(), start="fisher")}),
    ],
)
def test_factors_that_a_method_cannot_read_are_refused_at_once(kind, settings):
    with pytest.raises(ValueError, match=rf"{kind}.*(expected|take)"):
        Recipe(Decomposition(kind), **settings)


def test_the_start_of_learning_decides_what_is_measured():
    assert Recipe(learning=Learning(ARA(), start="zs_svd")).needs_weight_gradients
    assert not Recipe(learning=Learning(ARA())).needs_weight_gradients


def test_masks_with_a_start_of_their_own_take_no_other():
    with pytest.raises(ValueError, match="rescaled have a start of their own"):
        Learning(Rescaled(), start="fisher")


@pytest.mark.parametrize("name", ["llm_pruner+refit", "llm_pruner+pivoted"])
def test_where_pruning_reaches_the_size_there_are_no_factors(name):
    with pytest.raises(ValueError, match=r"prunes to the final size.*give prune\.keep"):
        recipe(name)


def test_ranks_on_top_of_llm_pruner_may_be_learned():
    assert not Recipe(prune=LLMPruner(keep=0.9), learning=Learning(ARA())).only_prunes


def test_what_prunes_already_is_not_pruned_in_width():
    with pytest.raises(ValueError, match=r"\+prune stands behind a recipe that prunes already"):
        recipe("llm_pruner+prune")


@pytest.mark.parametrize(
    "settings",
    [
        {"dense": True},
        {"dense": True, "rounding": Rounding(), "prune": WidthPruning()},
        {"dense": True, "rounding": Rounding(), "storage": "auto"},
        {"prune": LLMPruner(), "rounding": Rounding()},
        {"allocator": "bytes"},
        {"allocator": "bytes", "decomposition": Decomposition("two_sided"), "rounding": Rounding()},
    ],
)
def test_bits_without_an_effect_are_refused(settings):
    with pytest.raises(ValueError, match="leave out"):
        Recipe(**settings)


@pytest.mark.parametrize("word", ["shared", "alike"])
def test_experts_are_not_dropped_and_treated_as_one(word):
    with pytest.raises(ValueError, match=f"leave out {word}_experts or drop_experts"):
        recipe(f"fisher+{word}+drop")
