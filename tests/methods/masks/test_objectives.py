"""Loss terms against slow loops in plain Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_pl.methods.masks.objectives import (
    DataTerms,
    activation_divergence,
    budget_penalty,
    guidance_penalty,
    logit_kl,
    next_token_loss,
)

BATCH, LENGTH, VOCABULARY, FEATURES = 2, 4, 5, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def logits():
    return 3 * normal(BATCH, LENGTH, VOCABULARY)


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def slow_cross_entropy(logits, tokens):
    nats = []
    for b in range(BATCH):
        for t in range(LENGTH - 1):
            nats.append(-math.log(softmax(logits[b, t].tolist())[tokens[b, t + 1]]))
    return sum(nats) / len(nats)


def slow_kl(student, teacher):
    total = 0.0
    for b in range(BATCH):
        for t in range(LENGTH):
            p, q = softmax(teacher[b, t].tolist()), softmax(student[b, t].tolist())
            total += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True))
    return total / (BATCH * LENGTH)


def slow_divergence(student, teacher, kind):
    rows = list(zip(student.reshape(-1, FEATURES).tolist(), teacher.reshape(-1, FEATURES).tolist(), strict=True))
    if kind == "cosine":
        similarities = [
            sum(a * b for a, b in zip(s, t, strict=True)) / math.hypot(*s) / math.hypot(*t) for s, t in rows
        ]
        return 1 - sum(similarities) / len(rows)
    if kind == "token_normalised_mse":
        errors = [sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / sum(b**2 for b in t) for s, t in rows]
        return sum(errors) / len(rows)
    count = len(rows) * FEATURES
    error = sum((a - b) ** 2 for s, t in rows for a, b in zip(s, t, strict=True)) / count
    return error / (sum(b**2 for _, t in rows for b in t) / count) if kind == "normalised_mse" else error


def test_next_token_loss(logits, tokens):
    assert next_token_loss(logits, tokens).item() == pytest.approx(slow_cross_entropy(logits, tokens), rel=1e-6)
    assert next_token_loss(logits.bfloat16(), tokens).dtype == torch.float32


def test_kl(logits):
    other = logits + normal(BATCH, LENGTH, VOCABULARY, seed=2)
    assert logit_kl(other, logits).item() == pytest.approx(slow_kl(other, logits), rel=1e-5)
    assert logit_kl(logits, logits).item() == 0
    assert logit_kl(other, logits).item() != pytest.approx(logit_kl(logits, other).item(), rel=1e-3)
    assert logit_kl(other.bfloat16(), logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["mse", "cosine", "normalised_mse", "token_normalised_mse"])
def test_divergence(kind):
    teacher = normal(BATCH, LENGTH, FEATURES)
    student = teacher + 0.3 * normal(BATCH, LENGTH, FEATURES, seed=3)
    measured = activation_divergence(student, teacher, kind)
    assert measured.item() == pytest.approx(slow_divergence(student, teacher, kind), rel=1e-5)
    assert activation_divergence(teacher, teacher, kind).item() == pytest.approx(0, abs=1e-6)
    assert activation_divergence(student.bfloat16(), teacher.bfloat16(), kind).dtype == torch.float32
    if kind != "mse":
        scaled = activation_divergence(7 * student, 7 * teacher, kind)
        assert scaled.item() == pytest.approx(measured.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "token_normalised_mse"])
def test_a_token_of_a_large_norm_weighs_as_much_as_any_other(kind):
    teacher = normal(BATCH, LENGTH, FEATURES)
    student = teacher + 0.3 * normal(BATCH, LENGTH, FEATURES, seed=3)
    sink = torch.ones(BATCH, LENGTH, 1)
    sink[:, 0] = 1000.0
    measured = activation_divergence(sink * student, sink * teacher, kind)
    assert measured.item() == pytest.approx(activation_divergence(student, teacher, kind).item(), rel=1e-5)


def test_a_token_of_norm_0_gives_a_finite_divergence():
    assert torch.isfinite(activation_divergence(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), "token_normalised_mse"))


def test_budget_penalty():
    ratios, sizes, keep = [0.3, 0.9, 1.0], [100, 700, 40], 0.6
    kept = sum(r * s for r, s in zip(ratios, sizes, strict=True)) / sum(sizes)
    penalty = budget_penalty(torch.tensor(ratios), torch.tensor(sizes), keep)
    assert penalty.item() == pytest.approx((kept - keep) ** 2, rel=1e-5)


def test_budget_penalty_of_billions_of_parameters():
    sizes = torch.full((224,), 4096 * 11008)
    penalty = budget_penalty(torch.full((224,), 0.7), sizes, 0.8)
    assert penalty.item() == pytest.approx(0.01, rel=1e-4)


def test_guidance_pulls_only_wasteful_modules_to_dense():
    ratios = torch.tensor([0.9, 0.9, 0.5, 1.0], requires_grad=True)
    errors = torch.tensor([0.2, 0.05, 0.4, 0.0])
    expected = sum(
        (1 - r) * (1.0 if r > 1 - e else 0.0) for r, e in zip([0.9, 0.9, 0.5, 1.0], [0.2, 0.05, 0.4, 0.0], strict=True)
    )
    penalty = guidance_penalty(ratios, errors)
    assert penalty.item() == pytest.approx(expected / 4, rel=1e-6)
    penalty.backward()
    assert ratios.grad.tolist() == [-0.25, 0.0, 0.0, 0.0]


def test_terms_are_weighted_and_unwanted_ones_absent(logits, tokens):
    teacher = logits + 1
    seen = {"middle": normal(BATCH, LENGTH, FEATURES), "last": normal(BATCH, LENGTH, FEATURES, seed=5)}
    theirs = {place: value + 0.5 * (i + 1) for i, (place, value) in enumerate(seen.items())}
    assert list(DataTerms().compute(tokens, logits, {})) == ["cross_entropy"]
    terms = DataTerms(cross_entropy=0.5, kl=2.0, divergence=3.0).compute(tokens, logits, seen, teacher * 0.5, theirs)
    assert list(terms) == ["cross_entropy", "kl", "divergence"]
    assert terms["cross_entropy"].item() == pytest.approx(0.5 * slow_cross_entropy(logits, tokens), rel=1e-6)
    assert terms["kl"].item() == pytest.approx(2 * slow_kl(logits, teacher * 0.5), rel=1e-4)
    assert terms["divergence"].item() == pytest.approx(3 * (0.25 + 1.0) / 2, rel=1e-5)
    only = DataTerms(cross_entropy=0, divergence=1.0, divergence_kind="cosine").compute(
        tokens, logits, seen, None, theirs
    )
    assert list(only) == ["divergence"]


def test_who_needs_a_teacher():
    assert not DataTerms().needs_teacher
    assert DataTerms(kl=0.1).needs_teacher
    assert DataTerms(cross_entropy=0, divergence=0.1).needs_teacher


def test_places():
    terms = DataTerms(divergence=1.0, divergence_at=("middle", "last", "0", "5"))
    assert terms.blocks(6) == {"middle": 3, "last": None, "0": 0, "5": 5}
    assert DataTerms(divergence_at=("nowhere",)).blocks(6) == {}
    for place in ("6", "-1", "first", "1.5", "²"):
        with pytest.raises(ValueError, match=rf"'{place}'.*middle, last or a block .* 5"):
            DataTerms(divergence=1.0, divergence_at=(place,)).blocks(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_entropy": -1.0}, r"-1\.0.*none below 0"),
        ({"cross_entropy": 0.0}, r"'cross_entropy': 0\.0.*at least one above 0"),
        ({"kl": -0.1}, r"-0\.1.*none below 0"),
        ({"divergence": 1.0, "divergence_at": ()}, r"divergence is 1\.0.*give middle, last"),
        ({"divergence_kind": "l2"}, r"'l2'.*mse, cosine, normalised_mse, token_normalised_mse"),
    ],
)
def test_impossible_terms(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataTerms(**arguments)
