"""Joint refit: derivatives against plain autograd, held-back text as judge, killed runs, what plans say of it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from lowrank_pl.factors.compression import compressed, factored_layer
from lowrank_pl.factors.decomposition import SquareRoot
from lowrank_pl.methods.refit.block import BlockError, BlockWeights
from lowrank_pl.methods.refit.joint import _GaussNewton, fit_jointly
from lowrank_pl.methods.refit.pair import ModelPair
from lowrank_pl.methods.refit.plan import APPLIED, NO_DERIVATIVE, NO_GAIN
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.methods.refit.settings import Joint
from lowrank_pl.models.base import load_base
from lowrank_pl.models.tiny import FAMILIES, tiny_model
from lowrank_pl.plans.plan import TRAINED
from lowrank_pl.report.comparison import comparison_cells
from lowrank_pl.utils.files import canonical_json, sha256_of
from tests.helpers.unchanged import assert_untouched, state
from tests.methods.refit.test_refitting import (
    KilledError,
    all_tensors,
    assert_same_factors,
    distance,
    drawn,
    killing,
    outcomes,
    run,
)

JOINT = Refit(margin=0.0, joint=Joint())
ADAMW = Refit(margin=0.0, joint=Joint("adamw", learning_rate=0.02))


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def on_blocks(plan, made):
    """What came of the joint refit, by block."""
    return {int(notes["block"]): notes["joint"] for name in outcomes(plan, made) for notes in [made.notes(name)]}


def second_block(model, sequences, plan, store, weights=None):
    """The error of the second block's output; the first block is compressed too."""
    layers = {
        name: factored_layer(model.get_submodule(name), store.kept(name, plan.modules[name])) for name in plan.modules
    }
    models = ModelPair(model, torch.split(sequences, 2))
    models.layers.update({name: layer for name, layer in layers.items() if ".0." in name})
    models.start_block(1, {})
    inside = {name: store.kept(name, entry) for name, entry in plan.modules.items() if ".1." in name}
    return BlockError(models, 1, inside, weights or BlockWeights())


def test_the_error_is_that_of_whole_passes(sequences, tokenizer):
    # After the last block hidden states are normalised.
    model = tiny_model("llama", layers=3)
    plan, store, _ = drawn(model, sequences, tokenizer)
    root, counts = torch.randn(32, 32).double(), torch.rand(sequences.shape)
    weights = BlockWeights(SquareRoot(root, "eigen", 0.0), counts)
    error = second_block(model, sequences, plan, store, weights)
    with torch.no_grad():
        dense = model(input_ids=sequences, output_hidden_states=True).hidden_states[2]
        with compressed(model, plan, store):
            cut = model(input_ids=sequences, output_hidden_states=True).hidden_states[2]
    expected = (counts * ((dense - cut).double() @ root).square().sum(-1)).mean()
    assert error.mean(error.values, range(len(error.models.batches))) == pytest.approx(expected.item(), rel=1e-4)


def test_products_are_those_of_the_jacobian(llama, sequences, tokenizer):
    plan, store, _ = drawn(llama, sequences[:, :6], tokenizer)
    error = second_block(llama, sequences[:2, :6], plan, store)
    values, sizes = error.values, [value.shape for value in error.values]
    flat = torch.cat([value.flatten() for value in values])

    def of(flat):
        parts = [part.view(size) for part, size in zip(flat.split([s.numel() for s in sizes]), sizes, strict=True)]
        return error.errors(parts, 0).flatten()

    jacobian, errors = torch.autograd.functional.jacobian(of, flat), of(flat)
    direction = [torch.randn(size) for size in sizes]
    along = torch.cat([part.flatten() for part in direction])
    found = torch.cat([part.flatten() for part in error.gauss_newton_product(values, direction, 0)])
    wanted = jacobian.T @ (jacobian @ along)
    # Elements are sums that cancel: what is left of their rounding is relative to the largest ones.
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())
    gradient = torch.cat([part.flatten() for part in error.gradient(values, 0)])
    torch.testing.assert_close(gradient, jacobian.T @ errors, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_every_family(family, sequences, tokenizer):
    model = load_base(f"random:{family}")
    before = state(model)
    plan, store, targets = drawn(model, sequences, tokenizer)
    new, made = run(model, plan, store, targets, sequences, settings=JOINT)
    assert_untouched(model, before)
    assert "gauss_newton" in on_blocks(plan, made).values()
    assert NO_DERIVATIVE not in on_blocks(plan, made).values()
    for name in outcomes(plan, made):
        assert made.factors(name).left.shape == store.kept(name, plan.modules[name]).left.shape
    with compressed(model, new, made), torch.no_grad():
        assert model(input_ids=sequences[:2]).logits.isfinite().all()


@pytest.mark.parametrize("settings", [JOINT, ADAMW])
def test_the_model_comes_nearer_to_the_dense_one_and_trained_factors_are_marked(settings, tokenizer):
    model = tiny_model("llama")
    # A language of few words, of which a tiny model sees enough.
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 256, (12, 4), generator=generator)
    text = words[torch.randint(0, 12, (220, 16), generator=generator)].flatten(1)
    plan, store, targets = drawn(model, text[:200], tokenizer, keep=0.4)
    settings = replace(settings, sequences=200)
    plain = run(model, plan, store, targets, text[:200], settings=replace(settings, joint=None))
    new, made = run(model, plan, store, targets, text[:200], settings=settings)
    assert distance(model, new, made, text[200:]) < 0.97 * distance(model, *plain, text[200:])
    (note,) = [note for note in new.notes if "of 2 blocks, whose outputs' errors" in note]
    trained = settings.joint.method == "adamw"
    assert note.startswith(TRAINED) == trained
    row = {
        "method": "own", "keep": {"asked": 0.5, "targeted": 0.5, "model": 0.5}, "bytes": 1, "perplexity": {"a": 1.0},
        "excess": {"a": 0.0}, "seconds": {}, "peak_memory": 1, "notes": list(new.notes),
    }  # fmt: skip
    assert comparison_cells([row])[1][0][0] == ("own (trained)" if trained else "own")


def test_the_first_fit_starts_from_factors_that_have_not_seen_the_held_back_text(llama, sequences, tokenizer):
    plan, store, _ = drawn(llama, sequences, tokenizer)
    error = second_block(llama, sequences, plan, store)
    unseen = [value * 1.05 for value in error.values]
    found = fit_jointly(error, Joint(damping=1e9), [0], [1], unseen=unseen, seed=0, label="block")
    assert found.before == error.mean(unseen, [1]) > error.mean(error.values, [1])


def test_factors_stay_where_fits_do_better_on_held_back_text_only(llama, sequences, tokenizer, monkeypatch):
    plan, store, _ = drawn(llama, sequences, tokenizer)
    error = second_block(llama, sequences, plan, store)
    # Factors so bad that every step away from them is a gain, and still worse than those that are there.
    unseen = [value * 1.5 for value in error.values]
    monkeypatch.setattr(_GaussNewton, "sweep", lambda self: [[value * 0.99 for value in self.values]])
    found = fit_jointly(error, Joint(), [0], [1], unseen=unseen, seed=0, label="block")
    assert error.mean(found.values, [0, 1]) <= error.mean(error.values, [0, 1])


def test_a_block_that_gains_nothing_keeps_its_factors_and_is_counted(llama, sequences, tokenizer):
    plan, store, targets = drawn(llama, sequences, tokenizer)
    _, plain = run(llama, plan, store, targets, sequences, settings=Refit())
    # Damped so much that nothing moves.
    new, made = run(llama, plan, store, targets, sequences, settings=Refit(joint=Joint(damping=1e9)))
    blocks = len(llama.model.layers)
    assert on_blocks(plan, made) == dict.fromkeys(range(blocks), NO_GAIN)
    assert_same_factors(all_tensors(made, plan.modules), all_tensors(plain, plan.modules))
    assert f"blocks not fitted jointly, {NO_GAIN}: {blocks} of {blocks}, e.g. block 0" in new.notes


@pytest.mark.parametrize(("name", "after"), [("refitted", 9), ("fit_jointly", 2)])
def test_a_killed_run_goes_on_bit_for_bit(llama, sequences, tokenizer, monkeypatch, name, after):
    plan, store, targets = drawn(llama, sequences, tokenizer)
    new, made = run(llama, plan, store, targets, sequences, settings=JOINT)
    whole = all_tensors(made, plan.modules)
    shutil.rmtree(made.directory)
    with monkeypatch.context() as patch:
        killing(patch, name, after)
        with pytest.raises(KilledError):
            run(llama, plan, store, targets, sequences, settings=JOINT)
    again, resumed = run(llama, plan, store, targets, sequences, settings=JOINT)
    assert_same_factors(all_tensors(resumed, plan.modules), whole)
    assert again == new


def test_a_run_killed_while_it_stores_a_block_makes_the_block_anew(llama, sequences, tokenizer, monkeypatch):
    plan, store, targets = drawn(llama, sequences, tokenizer)
    _, made = run(llama, plan, store, targets, sequences, settings=JOINT)
    whole = all_tensors(made, plan.modules)
    for name in ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]:
        made.path(name).unlink()
    calls = killing(monkeypatch, "fit_jointly", -1)
    _, resumed = run(llama, plan, store, targets, sequences, settings=JOINT)
    assert len(calls) == 1
    assert_same_factors(all_tensors(resumed, plan.modules), whole)


def test_stores_without_a_joint_refit_keep_their_fingerprint():
    # The digest of the settings when there was no joint refit.
    assert sha256_of(canonical_json(Refit().identity()))[:12] == "584e6e7711f3"
    assert Refit(joint=Joint(sweeps=3)).identity()["joint"]["sweeps"] == 3


def test_half_precision_and_mlps_of_other_widths(llama, sequences, tokenizer):
    mlp = llama.model.layers[1].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight, layer.out_features = nn.Parameter(layer.weight[:40]), 40
    mlp.down_proj.weight, mlp.down_proj.in_features = nn.Parameter(mlp.down_proj.weight[:, :40]), 40
    model = llama.bfloat16()
    plan, store, targets = drawn(model, sequences, tokenizer)
    new, made = run(model, plan, store, targets, sequences, settings=JOINT)
    assert "gauss_newton" in on_blocks(plan, made).values()
    assert distance(model, new, made, sequences) < distance(model, plan, store, sequences)


def test_a_block_without_a_derivative_is_left_and_counted(llama, sequences, tokenizer):
    class NoTangent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Odd(nn.Module):
        def forward(self, x):
            return nn.functional.silu(NoTangent.apply(x))

    llama.model.layers[1].mlp.act_fn = Odd()
    plan, store, targets = drawn(llama, sequences, tokenizer)
    new, made = run(llama, plan, store, targets, sequences, settings=JOINT)
    assert on_blocks(plan, made) == {0: "gauss_newton", 1: NO_DERIVATIVE}
    assert APPLIED in outcomes(plan, made).values()
    assert f"blocks not fitted jointly, {NO_DERIVATIVE}: 1 of 2, e.g. block 1" in new.notes


def test_models_whose_blocks_share_more_than_the_hidden_state_are_refused(llama, sequences, tokenizer, monkeypatch):
    plan, store, targets = drawn(llama, sequences, tokenizer)
    monkeypatch.setattr("lowrank_pl.methods.refit.pair.forward_from_is_exact", lambda *_: False)
    with pytest.raises(ValueError, match=r"blocks of LlamaForCausalLM share more than .*: leave the joint refit out"):
        run(llama, plan, store, targets, sequences, settings=JOINT)


@pytest.mark.parametrize(
    "wrong", [{"method": "sgd"}, {"sweeps": 0}, {"iterations": 0}, {"damping": 0.0}, {"learning_rate": float("nan")}]
)
def test_settings_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} is '?{value}'?: expected"):
        Joint(**wrong)
