"""Embeddings and heads as targets: what is counted, what errors cost, and what compressed models compute."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from lowrank_pl.calibration.build import statistics_of
from lowrank_pl.calibration.embeddings import row_metric, smoothed
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.likelihood import divergence
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_of
from lowrank_pl.factors.components import AnySize
from lowrank_pl.factors.compression import compress, compressed, factored_embedding
from lowrank_pl.factors.decomposition import decompose, decompose_rows, diagonal_root, square_root
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import ALLOCATORS, make_allocator
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.methods.quantize import ByteBudget, Rounding, allocate_bytes, quantize
from lowrank_pl.methods.refit import Refit, refit
from lowrank_pl.models.hf_layers import LowRankEmbedding
from lowrank_pl.models.targets import find_embeddings, find_targets, replace_module
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import nested

FAMILIES = ("llama", "tied llama", "gemma3", "gpt2")
TOKENS = torch.arange(12)[None] * 7 + 3


def model_of(family):
    if family != "tied llama":
        return tiny_model(family)
    model = tiny_model("llama")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    tied = type(model)(config).eval()
    tied.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}, strict=False
    )
    return tied


def subject_of(family, *include, **constraints):
    sequences = torch.randint(0, 200, (3, 48), generator=torch.Generator().manual_seed(0))
    limits = Constraints(include or ("*", "embeddings"), **constraints)
    return Subject(model_of(family), byte_tokenizer(), sequences, limits)


def with_rank(plan, rank):
    """The plan that gives embeddings and head a rank, and leaves all other modules dense."""
    dense = plan.dense()
    ranks = {name: replace(dense.modules[name], rank=rank) for name in plan.embedded}
    return replace(dense, modules={**dense.modules, **ranks})


def made(family, rank, store):
    """A compressed model whose embeddings have a rank, its plan, and the factors."""
    subject = subject_of(family)
    plan, factors = allocate_ranks(subject, keep=0.5, store=store)
    plan = with_rank(plan, rank)
    return compress(model_of(family), plan, factors), plan, factors


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_targets_only_where_asked_for(family):
    model = model_of(family)
    default, asked = find_targets(model), find_targets(model, include=["*", "embeddings"])
    assert default.embeddings == ()
    assert asked.modules == default.modules
    assert asked.embeddings == find_embeddings(model)
    assert len(asked.embeddings) == (2 if family == "llama" else 1)


def test_one_of_both_is_asked_for_by_its_name_or_excluded():
    model = tiny_model("llama")
    assert [one.name for one in find_targets(model, include=["*", "lm_head"]).embeddings] == ["lm_head"]
    left = find_targets(model, include=["*", "embeddings"], exclude=["lm_head"])
    assert [one.name for one in left.embeddings] == ["model.embed_tokens"]


def test_tied_ones_are_asked_for_and_excluded_by_either_name():
    model = tiny_model("gpt2")
    assert [one.name for one in find_targets(model, include=["*", "lm_head"]).embeddings] == ["transformer.wte"]
    with pytest.raises(ValueError, match=r"no embeddings are left .* exclude is \['lm_head'\]"):
        find_targets(model, include=["*", "embeddings"], exclude=["lm_head"])


def test_embeddings_alone_are_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"only embeddings were asked for.*--include '\*' embeddings"):
        find_targets(tiny_model("llama"), include=["embeddings"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_tied_embeddings_once(family):
    subject = subject_of(family)
    plan, _ = allocate_ranks(subject, keep=0.6)
    everything = sum(p.numel() for name, p in subject.model.named_parameters() if p.dim() == 2 and "wpe" not in name)
    assert plan.targeted_parameters == everything
    assert plan.kept_model_parameters <= plan.model_parameters - 0.4 * everything + 200
    assert {plan.modules[name].storage for name in plan.embedded} == {"factored"}
    assert RankPlan.from_json(plan.to_json()) == plan


def test_plans_without_embeddings_say_nothing_of_them():
    plan, _ = allocate_ranks(subject_of("llama", "*"), keep=0.6)
    assert '"embeddings"' not in plan.to_json()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_reproduces_the_logits(family):
    subject = subject_of(family)
    _, factors = allocate_ranks(subject, keep=0.9)
    model = model_of(family)
    for target in subject.targets.embeddings:
        if target.embedding is not None:
            for place, module in factored_embedding(model, target.name, factors.factors(target.name)).items():
                replace_module(model, place, module)
    assert isinstance(model.get_input_embeddings(), LowRankEmbedding)
    torch.testing.assert_close(logits(model), logits(subject.model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_reloads_bit_for_bit_and_merges(family, tmp_path):
    model, plan, _ = made(family, 6, tmp_path / "store")
    expected = logits(model)
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=plan, verify=family == "gemma3")
    loaded = load_compressed(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)), expected)
    body = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(body(TOKENS)[0], loaded.base_model(TOKENS)[0])
    entries = loaded.config.quantization_config.modules
    findings = [*check_weights(tensors_of(loaded), entries), *check_plan(plan, tensors_of(loaded), entries)]
    assert {found.health for found in findings} == {"healthy"}
    save_compressed(model, tmp_path / "dense", tokenizer=byte_tokenizer(), plan=plan, merge=True, verify=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lower_rank_is_predicted_to_lose_more_and_does(family, tmp_path):
    subject = subject_of(family)
    plan, factors = allocate_ranks(subject, keep=0.6, store=tmp_path)
    predicted, measured = [], []
    for rank in (2, 20, 30):
        small = with_rank(plan, rank)
        predicted.append(sum(factors.sigma(name)[rank:].square().sum().item() / 2 for name in plan.embedded))
        changed = compress(model_of(family), small, factors)
        measured.append(divergence(changed, subject.model, subject.sequences).kl)
    assert predicted == sorted(predicted, reverse=True)
    assert measured == sorted(measured, reverse=True)


def test_the_size_follows_from_the_plan_and_from_the_export(tmp_path):
    subject = subject_of("tied llama")
    plan, factors = allocate_ranks(subject, keep=0.8, allocator="uniform", decomposition=Decomposition("two_sided"))
    small = nested(plan, [0.5])[0.5]
    name = "model.embed_tokens"
    assert (small.embedded, small.modules[name].storage) == ((name,), "factored")
    model = compress(model_of("tied llama"), plan, factors)
    save_compressed(model, tmp_path / "any", tokenizer=byte_tokenizer(), plan=AnySize(plan, factors), verify=False)
    loaded = load_compressed(tmp_path / "any", keep=0.5)
    assert torch.equal(logits(loaded), logits(compress(model_of("tied llama"), small, factors)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_original_modules_come_back_after_a_trial():
    subject = subject_of("tied llama")
    plan, factors = allocate_ranks(subject, keep=0.5)
    before = logits(subject.model)
    with compressed(subject.model, with_rank(plan, 4), factors) as model:
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(subject.model), before)
    assert subject.model.lm_head.weight is subject.model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("bits", [8, 4])
def test_factors_of_embeddings_are_rounded_to_bits(family, bits, tmp_path):
    subject = subject_of(family)
    plan, factors = allocate_ranks(subject, keep=0.6)
    plan = with_rank(plan, 12)
    small, store = quantize(plan, factors, subject, settings=Rounding(bits=8, embeddings=bits))
    assert small.embeddings == {}
    assert {small.modules[name].grid.bits for name in plan.embedded} == {bits}
    model = compress(model_of(family), small, store)
    error = (logits(model) - logits(compress(model_of(family), plan, factors))).norm() / logits(model).norm()
    assert error < {8: 0.05, 4: 0.6}[bits]
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=small, verify=False)
    assert torch.equal(logits(load_compressed(tmp_path / "out")), logits(model))


def test_a_refit_leaves_embeddings_as_they_are():
    subject = subject_of("tied llama")
    plan, factors = allocate_ranks(subject, keep=0.5, allocator="uniform", decomposition=Decomposition("whitened"))
    again, store = refit(plan, factors, subject, sequences=subject.sequences, settings=Refit(sequences=3))
    name = "model.embed_tokens"
    assert torch.equal(store.factors(name).left, factors.kept(name, plan.modules[name]).left)
    assert any("embeddings and heads stay as they are: 1" in note for note in again.notes)


def test_tall_matrices_are_decomposed_by_their_columns():
    weight, weights = torch.randn(40, 6), torch.rand(40).double()
    moment = torch.randn(9, 6).double()
    root = square_root(moment.mT @ moment)
    tall = decompose_rows(weight, rows=weights, columns=root)
    plain = decompose(weight, inputs=root, outputs=diagonal_root(weights.sqrt(), damping=0.0))
    torch.testing.assert_close(tall.sigma, plain.sigma, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        (tall.left[:, :3] @ tall.right[:3]).double(), plain.left[:, :3] @ plain.right[:3], rtol=1e-4, atol=1e-5
    )


def test_fewer_tokens_than_features_give_as_many_components_as_tokens():
    weight = torch.randn(5, 8)
    root = square_root(torch.eye(8).double() + 1)
    wide = decompose_rows(weight, columns=root)
    assert [tuple(part.shape) for part in (wide.left, wide.right, wide.sigma)] == [(5, 5), (5, 8), (5,)]
    torch.testing.assert_close(wide.left @ wide.right, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.sigma, decompose(weight, inputs=root).sigma, rtol=1e-6, atol=1e-9)


def test_tokens_that_the_text_lacks_are_not_free():
    weights = smoothed(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([3, 1, 0]))
    assert weights[2] > 0
    assert weights.sum() == pytest.approx(4.0)


def test_scaled_embeddings_cost_what_their_scale_makes_of_errors():
    subject = subject_of("gemma3", "*", "embeddings")
    (target,) = subject.targets.embeddings
    alone, settings = replace(target, head=None), Decomposition("two_sided")
    cost = row_metric(settings, statistics_of(subject), alone, device=torch.device("cpu")).cost
    module = subject.model.get_input_embeddings()
    error = torch.ones(module.weight.shape)
    before = cost(error)
    module.embed_scale *= 2
    assert cost(error) == before
    doubled = row_metric(settings, statistics_of(subject), alone, device=torch.device("cpu"))
    assert doubled.cost(error) > before


def test_the_hidden_side_is_damped_once():
    subject = subject_of("llama", "*", "embeddings")
    target = next(target for target in subject.targets.embeddings if target.embedding is None)
    settings, statistics = Decomposition("whitened", damping=0.5), statistics_of(subject)
    root = row_metric(settings, statistics, target, device=torch.device("cpu")).columns.root
    moment = statistics.collect("inputs", target.places).read(target.name, "second_moment").double()
    damped = moment + 0.5 * moment.diagonal().mean() * torch.eye(len(moment))
    torch.testing.assert_close(root @ root.mT, damped / damped.trace())


@pytest.mark.parametrize("kind", ["asvd", "fwsvd"])
def test_kinds_without_a_meaning_are_refused(kind):
    with pytest.raises(ValueError, match=f"kind '{kind}'.*two_sided, whitened, svd.*leave out --include embeddings"):
        allocate_ranks(subject_of("llama"), allocator="uniform", decomposition=Decomposition(kind))


@pytest.mark.parametrize("kind", ["whitened", "svd"])
def test_kinds_without_gradients_give_embeddings_ranks(kind):
    plan, _ = allocate_ranks(subject_of("llama"), keep=0.5, allocator="uniform", decomposition=Decomposition(kind))
    assert all(plan.modules[name].rank for name in plan.embedded)


@pytest.mark.parametrize("name", sorted(name for name, one in ALLOCATORS.items() if not one.takes_embeddings))
def test_allocators_of_blocks_refuse_embeddings(name):
    with pytest.raises(ValueError, match=r"given the embeddings model.embed_tokens.*allocate by fisher"):
        allocate_ranks(subject_of("llama"), allocator=make_allocator(name))


def test_a_budget_in_bytes_refuses_embeddings_as_targets():
    with pytest.raises(ValueError, match=r"gives embeddings bits but no rank.*lowrank quantize"):
        allocate_bytes(subject_of("llama"), ByteBudget(keep=0.5))


def test_pivoted_storage_still_factors_embeddings():
    plan, _ = allocate_ranks(
        subject_of("llama", storage="pivoted"), keep=0.5, allocator="uniform", decomposition=Decomposition("svd")
    )
    assert {plan.modules[name].storage for name in plan.embedded} == {"factored"}
