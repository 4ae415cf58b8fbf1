"""The zero-sum order against the paper's loop with the paper's own accounting, written again without heaps."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lowrank_pl.calibration.build import build_factors, build_gradients
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.allocate.zs_svd import drop_order, first_order_changes
from lowrank_pl.models.base import load_base
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints

SHAPES = {"a": (9, 12), "b": (10, 10), "c": (4, 30), "d": (12, 7), "e": (8, 8)}
TOTAL = sum(m * n for m, n in SHAPES.values())


def paper_loop(changes, keep, keep_rank_ratio):
    """Return ranks (None is dense), what is removed, and the running sum."""
    stars = {name: (m * n - 1) // (m + n) for name, (m, n) in SHAPES.items()}
    floors = {name: max(1, math.ceil(keep_rank_ratio * stars[name])) for name in SHAPES}
    ranks = {name: min(shape) for name, shape in SHAPES.items()}
    quota, removed, total = TOTAL - math.floor(keep * TOTAL + 1e-6), 0, 0.0
    while removed < quota:
        offers = [(abs(changes[n][ranks[n] - 1]), changes[n][ranks[n] - 1], n) for n in SHAPES if ranks[n] > floors[n]]
        if not offers:
            break
        wanted = [offer for offer in offers if (offer[1] >= 0) == (total <= 0)]
        _, change, name = min(wanted or offers)
        total += change
        ranks[name] -= 1
        m, n = SHAPES[name]
        if ranks[name] == stars[name]:
            removed += m * n - stars[name] * (m + n)
        elif ranks[name] < stars[name]:
            removed += m + n
    return {n: None if ranks[n] > stars[n] else ranks[n] for n in SHAPES}, removed


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("keep_rank_ratio", [0.0, 0.5])
def test_ranks_are_those_of_the_papers_loop(seed, keep_rank_ratio):
    generator = torch.Generator().manual_seed(seed)
    changes = {
        n: torch.randn(min(s), generator=generator, dtype=torch.float64)
        * torch.linspace(2, 0.1, min(s), dtype=torch.float64)
        for n, s in SHAPES.items()
    }
    for asked in (0.9, 0.7, 0.55, 0.4, 0.25):
        ranks, removed = paper_loop({n: c.tolist() for n, c in changes.items()}, asked, keep_rank_ratio)
        keep = (TOTAL - removed) / TOTAL
        budget = Budget(storage="factored", keep=keep, shapes=SHAPES, model_parameters=TOTAL)
        floors = {n: max(1, math.ceil(keep_rank_ratio * ((m * k - 1) // (m + k)))) for n, (m, k) in SHAPES.items()}
        plan = budget.select(drop_order(changes, floors), method="zs_svd")
        assert plan.kept_parameters == TOTAL - removed
        assert {n: module.rank for n, module in plan.modules.items()} == ranks
        # What the paper's last drop gave back too much goes to components whose steps still fit.
        wider = Budget(storage="factored", keep=max(asked, keep), shapes=SHAPES, model_parameters=TOTAL)
        filled = wider.select(drop_order(changes, floors), method="zs_svd")
        assert all((filled.modules[n].rank or 99) >= (rank or 99) for n, rank in ranks.items())
        assert filled.kept_parameters <= max(asked, keep) * TOTAL


def test_running_sum_stays_near_zero():
    generator = torch.Generator().manual_seed(3)
    changes = {f"m{i}": torch.randn(40, generator=generator, dtype=torch.float64) for i in range(20)}
    order = drop_order(changes, dict.fromkeys(changes, 1))
    sequence = sorted(
        (place.item(), changes[n][i].item()) for n, s in order.items() for i, place in enumerate(s[1:], 1)
    )
    running = torch.tensor([change for _, change in sequence], dtype=torch.float64).cumsum(0)
    assert [place for place, _ in sequence] == list(range(20 * 39))
    assert running[:400].abs().max() < max(change.abs().max() for change in changes.values())
    for scores in order.values():
        assert (scores.diff() < 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["svd", "whitened", "two_sided", "asvd", "fwsvd"])
def test_changes_are_the_derivatives_of_the_loss(family, kind, sequences, tokenizer, tmp_path):
    model = tiny_model(family)
    targets = find_targets(model)
    store = build_factors(
        Subject(model, tokenizer, sequences[:3], known_targets=targets),
        settings=Decomposition(kind=kind),
        directory=tmp_path / "s",
    )
    gradients = build_gradients(
        Subject(model, tokenizer, sequences[:3], known_targets=targets), directory=tmp_path / "s"
    )
    problem = Problem(Constraints().budget(model, targets, 0.5), store, targets, gradients=gradients)
    for target in (targets.modules[0], targets.modules[-1]):
        changes = first_order_changes(problem, target.name)
        factors = store.factors(target.name)
        scales = torch.ones(len(changes), requires_grad=True)
        module = model.get_submodule(target.name)

        def forward(x, scales=scales, factors=factors, bias=module.bias):
            return torch.nn.functional.linear(x, factors.left * scales @ factors.right, bias)

        module.forward = forward
        loss = 0.0
        for sequence in sequences[:3]:
            logits = model(input_ids=sequence[None]).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, sequence[1:]) / 3
        expected = -torch.autograd.grad(loss, scales)[0].double()
        del module.forward
        torch.testing.assert_close(changes, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_plan_notes_the_sum_and_keeps_floors(llama, sequences, tokenizer):
    targets = find_targets(llama)
    store = build_factors(Subject(llama, tokenizer, sequences[:2], known_targets=targets))
    gradients = build_gradients(Subject(llama, tokenizer, sequences[:2], known_targets=targets))
    problem = Problem(Constraints().budget(llama, targets, 0.6), store, targets, gradients=gradients)
    plan = make_allocator("zs_svd", keep_rank_ratio=0.5).plan(problem)
    for module in plan.modules.values():
        m, n = module.shape
        assert module.rank is None or module.rank >= math.ceil(0.5 * ((m * n - 1) // (m + n)))
    total = sum(
        first_order_changes(problem, n)[module.rank :].sum().item() for n, module in plan.modules.items() if module.rank
    )
    assert plan.notes[-1] == f"first-order changes of the loss sum to {total:.3g} nats"
    assert (plan.origin, plan.fingerprint) == ({}, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_rank_ratio": 1.5}, r"keep_rank_ratio is 1\.5.*in \[0, 1\]"),
        ({"rounds": -1}, r"rounds is -1.*at least 0 rounds"),
        ({"batch": 0}, r"batch 0\b.*1 sequence"),
        ({"round": 1}, r"'round'.*keep_rank_ratio, rounds, batch"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_allocator("zs_svd", **settings)


def test_what_it_needs_is_asked_for():
    budget = Budget(storage="factored", keep=0.5, shapes=SHAPES, model_parameters=TOTAL)
    problem = Problem(budget, SimpleNamespace(fingerprint={"kind": "whitened"}), None)
    with pytest.raises(ValueError, match=r"zs_svd was given no weight gradients.*build_gradients"):
        make_allocator("zs_svd").plan(problem)
    with pytest.raises(ValueError, match=r"zs_svd was given no model.*give Problem both"):
        make_allocator("zs_svd", rounds=1).plan(problem)


def test_the_mean_of_a_blocks_experts_stands_in_for_one_without_tokens(sequences, tokenizer):
    model = load_base("random:mixtral")
    model.model.layers[1].mlp.gate.register_forward_hook(
        lambda _, __, output: (*output[:2], torch.where(output[2] == 2, 1, output[2]))
    )
    targets = find_targets(model)
    subject = Subject(model, tokenizer, sequences[:2], known_targets=targets)
    store, gradients = build_factors(subject, settings=Decomposition("svd")), build_gradients(subject)
    problem = Problem(Constraints().budget(model, targets, 0.6), store, targets, model, gradients=gradients)
    name = "model.layers.1.mlp.experts.2.up_proj"
    mean = sum(gradients.read(name.replace("experts.2", f"experts.{number}"), "mean") for number in range(4)) / 4
    assert not gradients.read(name, "mean").any()
    factors = store.factors(name)
    expected = -((factors.left.mT @ mean) * factors.right).sum(1).double()
    torch.testing.assert_close(first_order_changes(problem, name), expected, rtol=1e-3, atol=1e-8)
    plan = make_allocator("zs_svd").plan(problem)
    assert any(note.startswith("3 layers of experts that no calibration token reached") for note in plan.notes)
