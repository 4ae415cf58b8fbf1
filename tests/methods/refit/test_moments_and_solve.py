"""The rooms of a refit: moments of two models, which maps write to a stream, and the choice of what to make up for."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowrank_pl.factors.decomposition import Factors, decompose, square_root, truncate
from lowrank_pl.methods.refit.moments import PairMoments
from lowrank_pl.methods.refit.pair import Wiring, _buffer_device, find_wiring
from lowrank_pl.methods.refit.solve import NOTHING, Choice, Problem, choose, refitted
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import tiny_model

DAMPINGS, BLENDS = (0.01, 0.3, 2.0), (0.25, 0.5, 1.0)


def raw(out, inputs, *, seed=0, tokens=300, drift=0.4):
    """Dense and compressed inputs, and what the stream lacks, that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(9)) / inputs**0.5
    t = torch.randn(tokens, inputs, generator=generator) @ mix
    x = t + drift * (t @ mix.T + torch.randn(tokens, inputs, generator=generator))
    head = torch.randn(inputs, out, generator=torch.Generator().manual_seed(8)) / inputs**0.5
    e = t @ head + torch.randn(tokens, out, generator=generator)
    return x, t, e


def moments_of(x, t, e=None, *, errors=True, parts=3):
    found = PairMoments.empty(t.shape[1], stream=None if e is None else e.shape[1], errors=errors)
    streams = [None] * parts if e is None else [(piece, torch.zeros_like(piece)) for piece in e.chunk(parts)]
    for one, two, stream in zip(x.chunk(parts), t.chunk(parts), streams, strict=True):
        found.update(one, two, stream)
    return found


def weight_and_root(out, inputs, weighted):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out, inputs, generator=generator)
    gradients = torch.randn(3 * out, out, generator=generator) * torch.linspace(0.1, 3, out)
    return weight, square_root(gradients.T @ gradients) if weighted else None


def slow_target(weight, x, t, e, choice):
    """The regression by least squares on rows of tokens."""
    x, t, e, weight = (part.double() for part in (x, t, e, weight))
    lacking = choice.drift * (x - t) @ weight.T + choice.stream * e
    if not choice.damping:
        return weight
    ridge = (choice.damping * t.square().sum(0)).sqrt().diag()
    rows = torch.cat([lacking, torch.zeros(len(ridge), lacking.shape[1], dtype=torch.float64)])
    return weight + torch.linalg.lstsq(torch.cat([t, ridge]), rows).solution.T


def slow_error(weight, new, x, t, e, root):
    x, t, e, weight = (part.double() for part in (x, t, e, weight))
    out = x @ weight.T + e - t @ new.double().T
    return (out if root is None else out @ root.root).square().sum(1).mean().item()


CASES = list(product([(12, 20), (20, 12)], [False, True], [False, True]))


@pytest.mark.parametrize(("shape", "weighted", "streaming"), CASES)
def test_closed_form_is_least_squares_and_a_decomposition(shape, weighted, streaming):
    weight, root = weight_and_root(*shape, weighted)
    x, t, e = raw(*shape)
    if not streaming:
        e = torch.zeros_like(e)
    problem = Problem(weight, outputs=root, has_stream=streaming)
    fit = moments_of(x, t, e if streaming else None, errors=False).mean_()
    second = square_root(t.double().T @ t.double() / len(t), damping=1e-6)
    for choice in (NOTHING, Choice(1.0, 0.0, 0.1), Choice(0.5, 0.75 if streaming else 0.0, 0.02)):
        target = slow_target(weight, x, t, e, choice)
        expected = truncate(decompose(target, inputs=second, outputs=root), 5)
        found = refitted(problem, fit, choice, 5, damping=1e-6)
        torch.testing.assert_close(found.left @ found.right, expected.left @ expected.right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.sigma, expected.sigma, rtol=1e-4, atol=0.0)
        # As balanced as those of ``decompose``.
        torch.testing.assert_close(found.left.norm(dim=0), expected.left.norm(dim=0), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("shape", "weighted", "streaming"), CASES)
def test_errors_are_those_of_all_tokens(shape, weighted, streaming):
    weight, root = weight_and_root(*shape, weighted)
    x, t, e = raw(*shape)
    if not streaming:
        e = torch.zeros_like(e)
    problem = Problem(weight, outputs=root, has_stream=streaming)
    held = moments_of(x, t, e if streaming else None).mean_()
    generator = torch.Generator().manual_seed(5)
    candidates = [
        Factors(
            torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1], generator=generator), torch.ones(4)
        )
        for _ in range(2)
    ]
    expected = [slow_error(weight, c.left.double() @ c.right.double(), x, t, e, root) for c in candidates]
    assert problem.errors(candidates, held) == pytest.approx(expected, rel=1e-5)
    assert problem.unavoidable(held) == pytest.approx(slow_error(weight, weight, x, t, e, root), rel=1e-5)


@pytest.mark.parametrize(("shape", "weighted", "streaming"), CASES)
def test_choice_is_the_best_of_all_on_held_back_text(shape, weighted, streaming):
    weight, root = weight_and_root(*shape, weighted)
    train, test = raw(*shape, tokens=40), raw(*shape, seed=1)
    if not streaming:
        train, test = ((x, t, torch.zeros_like(e)) for x, t, e in (train, test))
    problem = Problem(weight, outputs=root, has_stream=streaming)
    fit, held = (moments_of(x, t, e if streaming else None).mean_() for x, t, e in (train, test))
    (found,) = choose([problem], fit, held, blends=BLENDS, dampings=DAMPINGS)
    parts = (0.0, *BLENDS)
    tried = {
        choice: slow_error(weight, slow_target(weight, *train, choice), *test, root)
        for choice in (Choice(*both) for both in product(parts, parts if streaming else [0.0], DAMPINGS))
    }
    assert found.damping in DAMPINGS
    assert tried[found] == pytest.approx(min(tried.values()), rel=1e-6)
    assert tried[found] < slow_error(weight, weight, *test, root)


def test_nothing_is_made_up_for_where_all_does_harm():
    weight, _ = weight_and_root(12, 20, False)
    x, t, _ = raw(12, 20)
    fit = moments_of(x, t, errors=False).mean_()
    # In the other text the inputs have moved the other way.
    held = moments_of(2 * t - x, t).mean_()
    assert choose([Problem(weight)], fit, held, blends=BLENDS, dampings=DAMPINGS) == [NOTHING]


def test_damping_leads_back_to_the_dense_weight():
    weight, _ = weight_and_root(12, 20, False)
    x, t, _ = raw(12, 20, tokens=5)
    fit = moments_of(x, t, errors=False).mean_()
    problem = Problem(weight)
    whole = [refitted(problem, fit, Choice(1.0, 0.0, damping), 12, damping=1e-6) for damping in (0.01, 1.0, 1e6)]
    moved = [(factors.left @ factors.right - weight.double()).norm().item() for factors in whole]
    assert moved[0] > moved[1] > 1
    assert moved[2] < 1e-4


def test_features_that_are_always_zero_and_ranks_beyond_the_inputs():
    weight, _ = weight_and_root(12, 20, False)
    x, t, _ = raw(12, 20, tokens=3)
    x[:, :3] = t[:, :3] = 0
    fit = moments_of(x, t, errors=False).mean_()
    factors = refitted(Problem(weight), fit, Choice(1.0, 0.0, 0.1), 10, damping=0.0)
    assert all(part.isfinite().all() for part in (factors.left, factors.right, factors.sigma))
    nothing = PairMoments.empty(20, errors=False)
    nothing.update(torch.zeros(4, 20), torch.zeros(4, 20))
    factors = refitted(Problem(weight), nothing.mean_(), Choice(1.0, 0.0, 0.1), 10, damping=1e-6)
    assert all(part.isfinite().all() for part in (factors.left, factors.right, factors.sigma))


def test_moments_add_up():
    x, t, e = raw(6, 8)
    whole = moments_of(x, t, e)
    assert whole.tokens == 300
    d = (x - t).double()
    for found, expected in (
        (whole.inputs, t.double().T @ t.double()),
        (whole.cross, d.T @ t.double()),
        (whole.drift, d.T @ d),
        (whole.stream, e.double().T @ t.double()),
        (whole.stream_drift, e.double().T @ d),
        (whole.stream_second, e.double().T @ e.double()),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    halves = moments_of(x[:150], t[:150], e[:150]).merged(moments_of(x[150:], t[150:], e[150:])).mean_()
    torch.testing.assert_close(halves.stream_drift, whole.mean_().stream_drift, rtol=1e-4, atol=1e-5)
    assert moments_of(x, t, e, errors=False).merged(whole).drift is None
    assert moments_of(x, t).merged(whole).stream is None
    assert not whole.nothing_lost
    assert moments_of(t, t, torch.zeros_like(e)).nothing_lost
    assert not moments_of(t, t, e).nothing_lost


def test_large_inputs_and_those_that_are_not_finite():
    x, t, _ = raw(6, 8)
    t[0, 0] = 1e25
    assert moments_of(x, t).inputs[0, 0].item() == pytest.approx(1e50, rel=1e-6)
    t[0, 0] = torch.nan
    with pytest.raises(ValueError, match="dense or the compressed model holds NaN or infinity"):
        moments_of(x, t)


def streams_of(family):
    model = tiny_model(family)
    targets = find_targets(model).modules
    places = find_wiring(model, targets, torch.arange(24).view(2, 12))
    assert all(place.every_token for place in places.values())
    return {t.kind: places[t.name].stream for t in targets if t.block == 1 and places[t.name].stream is not None}


def test_maps_that_write_to_a_stream_are_found_by_what_they_do():
    for family in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        expected = {
            "self_attn.o_proj": "model.layers.1",
            "mlp.down_proj": "model.layers.1.post_attention_layernorm",
        }
        assert streams_of(family) == expected
    assert streams_of("gpt2") == {"attn.c_proj": "transformer.h.1", "mlp.c_proj": "transformer.h.1.ln_2"}
    assert streams_of("opt") == {
        "self_attn.out_proj": "model.decoder.layers.1",
        "fc2": "model.decoder.layers.1.final_layer_norm",
    }
    for family in ("gemma2", "gemma3", "gpt_neox"):
        assert streams_of(family) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_found_in_half_precision(dtype):
    model = tiny_model("llama").to(dtype)
    targets = find_targets(model).modules
    places = find_wiring(model, targets, torch.arange(24).view(2, 12))
    assert sum(place.stream is not None for place in places.values()) == 4


def test_maps_that_run_twice_or_never_have_no_place(llama):
    targets = find_targets(llama).modules
    gate, up = (llama.model.layers[0].mlp.get_submodule(name) for name in ("gate_proj", "up_proj"))
    old = gate.forward
    gate.forward = lambda x: old(x) + up(x)
    llama.model.layers[1].mlp.forward = lambda x: x
    places = find_wiring(llama, targets, torch.arange(12)[None])
    assert places["model.layers.0.mlp.up_proj"] == Wiring(False, None)
    assert places["model.layers.0.mlp.gate_proj"] == Wiring(True, None)
    assert places["model.layers.1.mlp.gate_proj"] == Wiring(False, None)


@pytest.mark.parametrize(("free", "place"), [(10_000_000, "cuda"), (102_400, "cpu")])
def test_hidden_states_wait_on_a_gpu_that_has_room(free, place, llama, monkeypatch):
    monkeypatch.setattr(type(llama), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert _buffer_device(llama, 51_200).type == place


def test_hidden_states_wait_on_the_cpu(llama):
    assert _buffer_device(llama, 51_200).type == "cpu"
