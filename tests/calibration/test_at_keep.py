"""Moments measured again in the compressed model, against a slow measurement, and nothing twice."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lowrank_pl.calibration import build as prepare
from lowrank_pl.calibration import statistics as collected
from lowrank_pl.calibration.build import build_factors, build_gradients
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.refit.refitting import Refit, refit
from lowrank_pl.models.targets import dense_weight, find_targets
from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.plans.constraints import Constraints
from tests.helpers.unchanged import assert_untouched, state

TWICE = Decomposition("two_sided", labels="text", at_keep=0.5, at_weight=0.25)
ALIKE = replace(TWICE, token_weights=False)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def plan_at(model, targets, store, keep):
    return make_allocator("fisher").plan(Problem(Constraints().budget(model, targets, keep), store, targets))


def moments(model, targets, sequences, *, weighted):
    """Mean outer products of inputs and of output gradients of the summed loss, by module, one sequence at a time.

    ``weighted``: of each token, times the size of its gradient and divided by it.
    """
    found = {target.name: [0.0, 0.0] for target in targets.modules}
    model.requires_grad_(True)
    for sequence in sequences:
        calls = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, args, output, name=name, calls=calls: calls.update({name: (args[0], output)})
            )
            for name in found
        ]
        logits = model(input_ids=sequence[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], sequence[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [output for _, output in calls.values()])
        for (name, (inputs, _)), gradient in zip(calls.items(), gradients, strict=True):
            x, g = inputs[0].detach().double(), gradient[0].double()
            if weighted:
                # The last token has no label.
                x, g = x[:-1], g[:-1]
                size = g.norm(dim=1)
                found[name][0] += x.T @ (size[:, None] * x) / (len(sequences) * len(x))
                # A first token attends to itself alone: the gradient of its query may be exactly 0, and adds nothing.
                found[name][1] += g.T @ (g / size.clamp_min(1e-300)[:, None]) / (len(sequences) * len(g))
            else:
                found[name][0] += x.T @ x / (len(sequences) * len(sequence))
                found[name][1] += g.T @ g / (len(sequences) * (len(sequence) - 1))
        for handle in handles:
            handle.remove()
    model.requires_grad_(False)
    return found


def damped(moment, damping):
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


@pytest.mark.parametrize("settings", [TWICE, ALIKE], ids=["weighted", "alike"])
def test_factors_weigh_by_the_mean_of_the_moments_before_and_after_compression(llama, sequences, tokenizer, settings):
    llama.requires_grad_(False)
    text, targets = sequences[:4], find_targets(llama)
    before = state(llama)
    store = build_factors(Subject(llama, tokenizer, text, known_targets=targets), settings=settings)
    assert_untouched(llama, before)
    plain = build_factors(Subject(llama, tokenizer, text, known_targets=targets), settings=settings.in_dense_model())
    first = moments(llama, targets, text, weighted=settings.token_weights)
    with compressed(llama, plan_at(llama, targets, plain, 0.5), plain):
        second = moments(llama, targets, text, weighted=settings.token_weights)
    for target in targets.modules:
        inputs, outputs = (
            damped(torch.lerp(one, two, 0.25), damping)
            for one, two, damping in zip(first[target.name], second[target.name], (1e-6, 1e-2), strict=True)
        )
        weight = dense_weight(llama.get_submodule(target.name)).double()
        # Squared singular values of R' W L are the eigenvalues of W C W' R.
        squares = torch.linalg.eigvals(weight @ inputs @ weight.T @ outputs).real.sort(descending=True).values
        sigma = store.sigma(target.name).double()
        torch.testing.assert_close(sigma.square(), squares[: len(sigma)], rtol=2e-3, atol=2e-3 * squares[0].item())
        assert not torch.allclose(plain.sigma(target.name).double(), sigma, rtol=1e-2)


@pytest.mark.parametrize("settings", [TWICE, ALIKE], ids=["weighted", "alike"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_killed_build_goes_on_without_measuring_again(
    llama, sequences, tokenizer, monkeypatch, tmp_path, explicit, settings
):
    options = {"settings": settings, "directory": tmp_path / "store" if explicit else None}
    targets, passes, done = find_targets(llama), [], []
    asked = ["collect_gradients"] if settings.token_weights else ["collect_gradients", "collect_input_moments"]
    for name in ("collect_input_moments", "collect_gradients"):
        real = getattr(collected, name)
        monkeypatch.setattr(
            collected, name, lambda *a, real=real, name=name, **k: (passes.append(name), real(*a, **k))[1]
        )
    real = prepare.decompose

    def dying(*args, **kwargs):
        done.append(1)
        if len(done) == 20:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(prepare, "decompose", dying)
    with pytest.raises(KeyboardInterrupt):
        build_factors(Subject(llama, tokenizer, sequences[:3], known_targets=targets), **options)
    assert sorted(passes) == sorted(2 * asked)
    store = build_factors(Subject(llama, tokenizer, sequences[:3], known_targets=targets), **options)
    assert len(passes) == 2 * len(asked)
    assert len(done) == 14 + 14 + 1
    again = build_factors(Subject(llama, tokenizer, sequences[:3], known_targets=targets), **options)
    assert (again.directory, len(done)) == (store.directory, 29)
    assert store.missing(target.name for target in targets.modules) == []


def test_other_modules_or_fractions_make_other_factors(llama, sequences, tokenizer):
    every, some = find_targets(llama), find_targets(llama, include=("*mlp*",))

    def built(targets, **changes):
        settings = Decomposition(**{"kind": "two_sided", "at_keep": 0.5, **changes})
        return build_factors(
            Subject(llama, tokenizer, sequences[:2], known_targets=targets), settings=settings
        ).directory

    assert len({built(every), built(some), built(every, at_keep=0.6), built(every, at_weight=1.0)}) == 4
    assert built(every) == built(every)


def test_corrections_take_up_the_same_weights_or_say_that_they_are_gone(llama, sequences, tokenizer):
    targets = find_targets(llama)
    store = build_factors(Subject(llama, tokenizer, sequences[:4], known_targets=targets), settings=TWICE)
    plan = plan_at(llama, targets, store, 0.6)

    def refitted():
        subject = Subject(llama, byte_tokenizer(), sequences[:4], known_targets=targets)
        return refit(plan, store, subject, sequences=sequences[:6], settings=Refit(margin=0.0))

    assert "refitted" in " ".join(refitted()[0].notes)
    gradients = build_gradients(Subject(llama, tokenizer, sequences[:4], known_targets=targets))
    drawing = Problem(Constraints().budget(llama, targets, 0.6), store, targets, llama, sequences[:4], gradients)
    assert "weights corrected in 1 rounds" in " ".join(make_allocator("zs_svd", rounds=1).plan(drawing).notes)
    where = collected.statistics_of_factors(store, llama, sequences[:4]).compressed(
        TWICE.point(store.fingerprint["at_modules"])
    )
    shutil.rmtree(where.collect("weighted_moments", targets.modules, "text").directory)
    shutil.rmtree(store.directory / "refit")
    with pytest.raises(
        ValueError,
        match=r"measured in the compressed model is missing in .* for model.layers.0.*: delete the factors .*at_keep",
    ):
        refitted()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "two_sided", "at_keep": 1.0}, r"at_keep is 1.0: expected a fraction above 0 and below 1"),
        ({"kind": "whitened", "at_keep": 0.5}, r"kind 'whitened': only two_sided measures in the compressed model"),
        ({"kind": "two_sided", "at_weight": 0.0}, r"at_weight is 0.0: expected a number above 0 and at most 1"),
        ({"kind": "two_sided", "at_weight": 0.2}, r"at_weight is 0\.2 and at_keep is not given"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Decomposition(**arguments)


def test_identity_is_as_before_where_nothing_is_measured_again():
    assert "at_keep" not in Decomposition("two_sided").identity()
    assert Decomposition.of_fingerprint(TWICE.identity()) == TWICE
    assert Decomposition.of_fingerprint(ALIKE.identity()) == ALIKE


def test_factors_from_before_there_were_token_weights_are_known_to_have_none():
    before = {"kind": "two_sided", "damping": 1e-6, "output_damping": 1e-2, "labels": "sampled"}
    assert Decomposition.of_fingerprint(before).identity() == before
    assert not Decomposition.of_fingerprint(before).weighs_tokens
    assert Decomposition.of_fingerprint(Decomposition("two_sided").identity()).weighs_tokens
    assert Decomposition.of_fingerprint(Decomposition().identity()) == Decomposition()
