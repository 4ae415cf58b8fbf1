"""One budget in bytes for ranks and bits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from lowrank_pl import allocate_ranks
from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.likelihood import divergence
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.quantize import ByteBudget, Rounding, allocate_bytes, byte_budget, quantize
from lowrank_pl.methods.quantize.byte_budget import size_options
from lowrank_pl.models.base import load_base
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints


@pytest.fixture
def subject(sequences):
    return Subject(tiny_model("llama"), byte_tokenizer(), sequences[:4])


def kl(subject, plan, factors):
    with compressed(subject.model, plan, factors):
        return divergence(subject.model, tiny_model("llama"), subject.sequences).kl


@pytest.mark.parametrize("keep", [0.18, 0.3, 0.6])
def test_the_budget_is_met_and_nearly_used(subject, keep):
    plan, _ = allocate_bytes(subject, ByteBudget(keep=keep, sequences=1))
    assert keep * 0.93 < plan.keep_bytes <= keep


def test_a_budget_for_the_dense_model_leaves_it_alone(subject):
    plan, _ = allocate_bytes(subject, ByteBudget(keep=1.0, bits=[8], sequences=1))
    assert plan.keep_bytes > 0.5
    assert all(module.rank is None for module in plan.modules.values())


def test_one_budget_loses_no_more_than_the_same_bits_everywhere(subject):
    plan, factors = allocate_ranks(subject, keep=1.0, decomposition=Decomposition("two_sided"))
    alike, made = quantize(plan, factors, subject, settings=Rounding(bits=4, embeddings=4))
    budget = ByteBudget(size=str(alike.bytes), sequences=1)
    assert kl(subject, *allocate_bytes(subject, budget)) < kl(subject, alike, made)


def test_a_size_may_be_named_in_bytes(subject):
    plan, _ = allocate_bytes(subject, ByteBudget(size="40KB", sequences=1))
    assert plan.bytes <= 40_000


def test_too_small_a_budget_says_what_is_possible_before_factors_are_built(subject, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(byte_budget, "build_factors", lambda *_, **__: pytest.fail("factors were built"))
        with pytest.raises(
            ValueError, match=r"a budget of 1,000 bytes was given: the smallest size takes [\d,]+ "
        ) as caught:
            allocate_bytes(subject, ByteBudget(size="1KB", sequences=1))
    least = int(re.search(r"takes ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert allocate_bytes(subject, ByteBudget(size=str(least), sequences=1))[0].bytes == least


def test_given_factors_name_their_own_decomposition_and_the_head_is_measured_once(subject, monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path))
    measured = []
    real = Statistics.collect

    def collect(self, statistic, targets, *rest, **options):
        measured.extend(t.name for t in targets if statistic == "inputs" and self.missing(statistic, [t], "text"))
        return real(self, statistic, targets, *rest, **options)

    monkeypatch.setattr(Statistics, "collect", collect)
    factors = build_factors(subject, settings=Decomposition("two_sided", labels="text"))
    plan, made = allocate_bytes(subject, ByteBudget(keep=0.2, bits=(3,), sequences=1), store=factors)
    assert plan.origin["decomposition"]["labels"] == "text"
    assert {"rounding", "labels"} <= set(made.fingerprint)
    assert measured == ["lm_head"]


def test_budgets_under_other_constraints_share_their_rounding_costs(subject):
    found = [
        allocate_bytes(replace(subject, constraints=constraints), ByteBudget(keep=0.2, sequences=1))[0]
        for constraints in (Constraints(storage="factored", multiple_of=4), Constraints(storage="auto"))
    ]
    assert all(plan.keep_bytes <= 0.2 for plan in found)


def test_only_two_sided_factors_have_losses_that_compare(subject, monkeypatch):
    factors = build_factors(subject, settings=Decomposition("whitened"))
    with pytest.raises(ValueError, match="factors of the kind 'whitened': expected two_sided"):
        size_options(subject, factors, ByteBudget(keep=0.5))
    monkeypatch.setattr(byte_budget, "build_factors", lambda *_, **__: pytest.fail("factors were built"))
    with pytest.raises(ValueError, match="factors of the kind 'whitened': expected two_sided"):
        allocate_bytes(subject, ByteBudget(keep=0.5), decomposition=Decomposition("whitened"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected one of them"),
        ({"keep": 0.5, "size": "1MB"}, "expected one of them"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"size": "much"}, "'much' is no amount of memory"),
        ({"keep": 0.5, "bits": [9]}, "9 bits were given"),
        ({"keep": 0.5, "bits": 4.5}, "bits is 4.5"),
        ({"keep": 0.5, "bits": [4, "x"]}, r"bits is \[4, 'x'\]: expected Sequence\[int\] \| int"),
        ({"keep": 0.5, "sequences": "abc"}, "sequences is 'abc'"),
    ],
)
def test_impossible_budgets_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ByteBudget(**settings)


def test_alike_experts_are_refused_before_factors_are_made(sequences):
    subject = Subject(tiny_model("llama"), byte_tokenizer(), sequences[:1], Constraints(alike_experts=True))
    with pytest.raises(ValueError, match=r"alike_experts is true.*lowrank quantize"):
        allocate_bytes(subject, ByteBudget(keep=0.2))


def test_shared_factors_are_refused_before_factors_are_made(sequences):
    constraints = Constraints(shared_experts=True)
    subject = Subject(load_base("random:mixtral"), byte_tokenizer(), sequences[:1], constraints)
    with pytest.raises(ValueError, match=r"shared_experts is true, .* choose ranks alone with keep"):
        allocate_bytes(subject, ByteBudget(keep=0.5))
