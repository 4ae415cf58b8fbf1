"""Plans whose matrices are rounded, and the stores that hold them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowrank_pl import allocate_ranks
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.likelihood import divergence
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.quantize import Rounding, quantize
from lowrank_pl.methods.quantize.quantizing import round_embedding
from lowrank_pl.methods.refit import Refit, refit
from lowrank_pl.models.hf_quantized import Grid, is_quantized
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import nested
from tests.helpers.unchanged import assert_untouched, state


@pytest.fixture
def subject(sequences):
    return Subject(tiny_model("llama"), byte_tokenizer(), sequences[:4])


def kl(subject, plan, factors):
    dense = tiny_model("llama")
    with compressed(subject.model, plan, factors):
        return divergence(subject.model, dense, subject.sequences).kl


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_rounding_adds_little_at_8_bits_and_more_at_4(subject, storage):
    subject = replace(subject, constraints=Constraints(storage=storage))
    plan, factors = allocate_ranks(subject, keep=0.5)
    found = [kl(subject, plan, factors)]
    for bits in (8, 3):
        found.append(kl(subject, *quantize(plan, factors, subject, settings=Rounding(bits=bits))))
    assert found[1] < 1.05 * found[0] < 1.05 * found[2]


def test_dense_modules_and_embeddings_are_rounded_too(subject):
    plan, factors = allocate_ranks(subject, keep=1.0)
    rounded, made = quantize(plan, factors, subject, settings=Rounding(bits=4))
    assert len(rounded.dense_modules) == 14
    before = state(subject.model)
    with compressed(subject.model, rounded, made):
        names = [name for name, module in subject.model.named_modules() if is_quantized(module)]
    assert len(names) == 16
    assert {"model.embed_tokens", "lm_head"} <= set(names)
    assert_untouched(subject.model, before)
    assert rounded.keep_bytes < 0.25


def test_compensation_loses_less_than_rounding_to_nearest(subject):
    plan, factors = allocate_ranks(subject, keep=1.0)
    found = [
        kl(subject, *quantize(plan, factors, subject, settings=Rounding(3, embeddings=None, compensate=on)))
        for on in (True, False)
    ]
    assert found[0] < found[1]


def test_factors_of_every_kind_are_rounded(subject):
    for kind in ("svd", "asvd", "whitened"):
        plan, factors = allocate_ranks(subject, keep=0.5, allocator="uniform", decomposition=Decomposition(kind))
        rounded, made = quantize(plan, factors, subject, settings=Rounding(bits=8))
        assert rounded.bits == {"8 bits": 14}
        assert len(made.missing(plan.modules)) == 0


def test_refitted_factors_are_rounded(subject, sequences):
    plan, factors = allocate_ranks(subject, keep=0.5)
    again = refit(plan, factors, subject, sequences=sequences, settings=Refit(sequences=8))
    rounded, made = quantize(*again, subject, settings=Rounding(bits=8))
    assert kl(subject, rounded, made) < 1.1 * kl(subject, *again)
    with pytest.raises(ValueError, match="rounded already"):
        quantize(rounded, made, subject, settings=Rounding(bits=8))


def test_a_plan_keeps_its_bits_in_its_file(subject, tmp_path):
    rounded, made = quantize(*allocate_ranks(subject, keep=0.5), subject, settings=Rounding(bits=5))
    rounded.save(tmp_path / "plan.json")
    again = RankPlan.load(tmp_path / "plan.json")
    assert again == rounded
    assert kl(subject, again, FactorStore.existing(again.origin["store"])) == kl(subject, rounded, made)


def test_a_killed_rounding_goes_on(subject, monkeypatch):
    from lowrank_pl.methods.quantize import quantizing

    plan, factors = allocate_ranks(subject, keep=0.5)
    whole = quantize(plan, factors, subject, settings=Rounding(bits=4))
    done = {name: whole[1].rounded(name)[0]["weight"].packed for name in plan.modules}
    for name in list(plan.modules)[5:]:
        next(whole[1].directory.glob(f"{name}*.safetensors")).unlink()
    calls = []
    original = quantizing._rounded
    monkeypatch.setattr(quantizing, "_rounded", lambda *args: calls.append(1) or original(*args))
    _, made = quantize(plan, factors, subject, settings=Rounding(bits=4))
    assert len(calls) == 9
    assert all(torch.equal(made.rounded(name)[0]["weight"].packed, codes) for name, codes in done.items())


def test_a_plan_without_bits_says_so(subject):
    with pytest.raises(ValueError, match="no module any bits"):
        quantize(*allocate_ranks(subject, keep=0.5), subject)


def test_impossible_bits_are_refused():
    with pytest.raises(ValueError, match="1 bits were given: expected a whole number from 2 to 8"):
        Rounding(bits=1)
    with pytest.raises(ValueError, match="the group 12 was given: expected a multiple of 8"):
        Rounding(group=12)


@pytest.fixture
def rounded(subject):
    plan, made = quantize(*allocate_ranks(subject, keep=0.5), subject, settings=Rounding(bits=4))
    return plan, made, next(iter(plan.modules))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": Grid(8)}, "can't be edited after rounding"),
        ({"grid": None}, "is rounded in .* but the plan gives it no bits"),
        ({"rank": 1}, "can't be edited after rounding"),
    ],
)
def test_an_edited_plan_does_not_get_the_old_codes(subject, rounded, change, message):
    plan, made, name = rounded
    edited = replace(plan, modules={**plan.modules, name: replace(plan.modules[name], **change)})
    with pytest.raises(ValueError, match=message):
        kl(subject, edited, made)


def test_embeddings_of_another_base_are_refused(subject, rounded):
    with torch.no_grad():
        subject.model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ValueError, match=r"embed_tokens .* were made from another weight than the model has"):
        kl(subject, *rounded[:2])


def test_eight_bits_of_a_head_cost_what_their_rounding_does():
    weight, moment = torch.randn(12, 8), torch.randn(20, 8)
    rounded = (round_embedding(weight, Grid(8), seen).dense() for seen in (None, moment.T @ moment))
    assert torch.equal(*rounded)


def test_embeddings_in_few_bits_follow_the_text(subject):
    codes = []
    for one in (subject, replace(subject, sequences=subject.sequences.flip(1))):
        plan, factors = allocate_ranks(one, keep=0.5, decomposition=Decomposition("svd"), allocator="uniform")
        _, made = quantize(plan, factors, one, settings=Rounding(embeddings=3))
        codes.append(made.rounded("lm_head")[0]["weight"].packed)
    assert not torch.equal(*codes)


def test_no_other_size_follows_from_a_rounded_plan(rounded):
    with pytest.raises(ValueError, match="rounded to a few bits, so no other size follows"):
        nested(rounded[0], [0.3])
