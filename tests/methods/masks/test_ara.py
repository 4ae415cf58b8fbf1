"""ARA's masks against a literal transcription of the method: the whole (D + 1) x r matrix, loops and floats."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch

from lowrank_pl.methods.masks.ara import ARA, ARAMask, errors_at
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.storage import Storage

FACTORED = Storage("factored")

STEPS = 100
SHAPES = [(96, 96), (40, 72), (72, 40), (192, 64), (128, 24), (24, 128), (500, 6), (6, 500), (3, 3), (1, 40)]


def spectrum(shape, *, decay=0.9):
    return decay ** torch.arange(min(shape), dtype=torch.float64)


def made(shape, keep=0.8, **settings):
    return ARA(**settings).create(shape, spectrum(shape), keep, storage=FACTORED)


def shuffled(mask, *, seed=0, scale=1.0):
    """The mask with random logits."""
    with torch.no_grad():
        mask.logits.copy_(scale * torch.randn(len(mask.logits), generator=torch.Generator().manual_seed(seed)))
    return mask


def top_of(mask):
    """The largest ratio of a mask of factors."""
    m, n = mask.shape
    return mask.longest * (m + n) / (m * n)


class Reference:
    """Section 2 of the method, word for word, in float64."""

    def __init__(self, logits, rank, top):
        exponentials = [math.exp(value) for value in logits.detach().double().tolist()]
        self.alpha = torch.tensor([value / sum(exponentials) for value in exponentials], dtype=torch.float64)
        steps = len(exponentials) - 1
        c = [Fraction(steps - i, steps) for i in range(steps + 1)]
        self.M = torch.zeros(steps + 1, rank, dtype=torch.float64)
        for i in range(steps + 1):
            for j in range(1, rank + 1):
                self.M[i, j - 1] = 1.0 if j <= int(rank * c[i]) else 0.0
        self.rho = sum(float(ci) * ai for ci, ai in zip(c, self.alpha.tolist(), strict=True))
        self.p = self.alpha @ self.M
        self.hard = [1.0 if j <= round(rank * self.rho) else 0.0 for j in range(1, rank + 1)]
        self.ratio = top * self.rho
        # d p_j / d theta_i = alpha_i (M_ij - p_j)
        self.jacobian = self.alpha[:, None] * (self.M - self.p)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [100, 7, 2])
@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_mask_is_the_papers(shape, steps, scale):
    mask = shuffled(made(shape, steps=steps), scale=scale)
    reference = Reference(mask.logits, mask.rank, top_of(mask))
    torch.testing.assert_close(mask.probabilities().double(), reference.p, rtol=1e-5, atol=1e-6)
    assert (mask.probabilities().diff() <= 0).all()
    assert mask.ratio().item() == pytest.approx(reference.ratio, rel=1e-5)
    assert mask.fraction().item() == pytest.approx(reference.rho, rel=1e-5)
    gate = mask()
    assert gate.tolist() == reference.hard
    upstream = torch.randn(mask.rank, generator=torch.Generator().manual_seed(3))
    (gate * upstream).sum().backward()
    expected = reference.jacobian @ upstream.double()
    torch.testing.assert_close(mask.logits.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_every_logit_sees_the_whole_spectrum():
    mask = made((96, 96))
    upstream = torch.zeros(mask.rank)
    upstream[-1] = 1.0  # only the weakest component asks for anything
    (mask() * upstream).sum().backward()
    assert (mask.logits.grad != 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_ratio_gradient(shape):
    mask = shuffled(made(shape))
    reference = Reference(mask.logits, mask.rank, top_of(mask))
    mask.ratio().backward()
    expected = [
        top_of(mask) * a * ((STEPS - i) / STEPS - reference.rho) for i, a in enumerate(reference.alpha.tolist())
    ]
    torch.testing.assert_close(mask.logits.grad, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_start_is_the_papers_number():
    mask = made((576, 576), 0.8)
    logits = mask.logits.detach()
    assert sorted({round(value, 4) for value in logits.tolist()}) == [0.0, 1.3715]
    candidates = [(STEPS - i) / STEPS for i in range(STEPS + 1)]
    assert [value > 0 for value in logits.tolist()] == [c >= 0.8 / 1.2 for c in candidates]
    assert abs(mask.ratio().item() - 0.8) < 1e-6
    assert Reference(logits, mask.rank, 1.2).ratio == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("shape", [(96, 96), (40, 72), (192, 64), (128, 24), (24, 128), (500, 6), (1, 40)])
@pytest.mark.parametrize("keep", [0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_start_hits_the_target(shape, keep):
    mask = made(shape, keep)
    reference = Reference(mask.logits, mask.rank, top_of(mask))
    assert reference.ratio == pytest.approx(keep, abs=2e-6)
    assert len(set(mask.logits.tolist())) == 2
    if mask.rank < min(shape):
        assert top_of(mask) == pytest.approx(1.2)
    else:  # all components together cost less than 1.2 times dense, and the ratio must say so
        assert top_of(mask) == pytest.approx(min(1.2, min(shape) * sum(shape) / (shape[0] * shape[1])))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_start_from_a_plan_has_exactly_its_ranks(shape):
    m, n = shape
    for rank in range(1, (m * n - 1) // (m + n) + 1):
        keep = rank * (m + n) / (m * n)
        mask = ARA().create(shape, spectrum(shape), keep, kept=torch.arange(rank), storage=FACTORED)
        assert mask.kept().sum().item() == mask().sum().item() == rank
        # at most one component away, and only where the length asks for it
        assert mask.ratio().item() == pytest.approx(keep, abs=1.01 * sum(mask.shape) / (mask.shape[0] * mask.shape[1]))
    over = ARA().create((64, 64), spectrum((64, 64)), 40 / 32, kept=torch.arange(40), storage=FACTORED)
    assert over.ratio().item() == pytest.approx(1.0)


@pytest.mark.parametrize("keep", [1e-4, 0.01, 1.7])
def test_start_at_the_ends_of_the_range(keep):
    for shape in SHAPES:
        mask = made(shape, keep)
        assert torch.isfinite(mask.logits).all()
        assert mask.ratio().item() == pytest.approx(min(keep, 1.0), abs=2.5e-3)


def test_rectangular_modules_can_become_dense():
    for shape in SHAPES:
        mask = made(shape)
        with torch.no_grad():
            mask.logits.zero_()[0] = 50.0
        assert mask.ratio().item() >= 1


def test_stored_rank():
    method = ARA()
    for m, n in SHAPES:
        assert method.stored_rank((m, n), FACTORED) == max(1, min(int(1.2 * m * n / (m + n)), m, n))
    assert ARA(top=1.6).stored_rank((100, 100), FACTORED) == 80


def test_only_logits_are_saved_and_they_are_float32():
    mask = made((96, 96))
    assert list(mask.state_dict()) == ["logits"]
    assert mask.logits.dtype == torch.float32
    assert isinstance(mask, ARAMask)


def slow_errors(shape, sigma):
    """The table at s = .01 ... .99: sqrt(tail energy / energy) behind k = int(mn s / (m + n)) components."""
    m, n = shape
    values = sigma.tolist()
    energy = sum(value**2 for value in values)
    table = {}
    for percent in range(1, 100):
        k = int(Fraction(m * n * percent, 100 * (m + n)))
        table[percent] = math.sqrt(sum(value**2 for value in values[k:]) / energy)
    return table


@pytest.mark.parametrize("shape", SHAPES)
def test_error_table(shape):
    sigma = spectrum(shape)
    mask = ARA().create(shape, sigma, 0.8, storage=FACTORED)
    table = slow_errors(shape, sigma)
    torch.testing.assert_close(mask.error.double(), torch.tensor(list(table.values())).double(), rtol=1e-5, atol=1e-7)
    for ratio, percent in [(0.0, 1), (0.334, 33), (0.336, 34), (0.8, 80), (0.999, 99), (1.0, 99), (1.2, 99)]:
        assert errors_at([mask], torch.tensor([ratio])).item() == pytest.approx(table[percent], rel=1e-5, abs=1e-7)


def test_zero_weight_has_a_table():
    mask = ARA().create((8, 8), torch.zeros(8), 0.8, storage=FACTORED)
    assert mask.error.tolist() == [0.0] * 99


def slow_loss(ratios, shapes, tables, target):
    """L of the paper but for the cross-entropy, module by module; also who is guided."""
    kept = [min(ratio, 1.0) for ratio in ratios]
    sizes = [m * n for m, n in shapes]
    share = sum(r * p for r, p in zip(kept, sizes, strict=True)) / sum(sizes)
    budget = 100 * (share - target) ** 2
    guided = []
    for ratio, table in zip(kept, tables, strict=True):
        error = table[min(99, max(1, round(ratio * 100)))]
        guided.append(ratio > 1 - error)
    guidance = 50 * sum((1 - r) for r, on in zip(kept, guided, strict=True) if on) / len(kept)
    return budget, guidance, guided


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_loss_is_the_papers(target):
    shapes = [(96, 96), (40, 72), (192, 64), (128, 24), (64, 64), (64, 64)]
    decays = [0.99, 0.9, 0.97, 0.8, 0.5, 0.999]
    method = ARA()
    masks, tables = {}, []
    for i, (shape, decay) in enumerate(zip(shapes, decays, strict=True)):
        sigma = spectrum(shape, decay=decay)
        mask = method.create(shape, sigma, [0.4, 0.9, 0.7, 0.6, 0.5, 0.8][i], storage=FACTORED)
        if i == 1:  # one module beyond dense, whose ratio counts as 1
            with torch.no_grad():
                mask.logits.zero_()[0] = 20.0
        masks[f"module.{i}"] = mask
        tables.append(slow_errors(shape, sigma))
    ratios = torch.stack([mask.ratio() for mask in masks.values()])
    penalties = method.penalties(masks, ratios, target, 0)
    budget, guidance, guided = slow_loss(ratios.tolist(), shapes, tables, target)
    assert True in guided
    assert False in guided
    assert ratios.max() > 1
    assert list(penalties) == ["budget", "guidance"]
    assert penalties["budget"].item() == pytest.approx(budget, rel=1e-4)
    assert penalties["guidance"].item() == pytest.approx(guidance, rel=1e-4)

    # gradients, by the chain rule: d ratio_l from both terms, none for the module beyond dense
    (penalties["budget"] + penalties["guidance"]).backward()
    sizes = [m * n for m, n in shapes]
    share = sum(min(r, 1.0) * p for r, p in zip(ratios.tolist(), sizes, strict=True)) / sum(sizes)
    for i, mask in enumerate(masks.values()):
        slope = 200 * (share - target) * sizes[i] / sum(sizes) - (50 / len(sizes) if guided[i] else 0.0)
        reference = Reference(mask.logits, mask.rank, top_of(mask))
        if reference.ratio > 1:
            slope = 0.0
        expected = [
            slope * top_of(mask) * a * ((STEPS - k) / STEPS - reference.rho)
            for k, a in enumerate(reference.alpha.tolist())
        ]
        torch.testing.assert_close(mask.logits.grad, torch.tensor(expected), rtol=1e-3, atol=1e-6)


def test_weights_of_the_penalties():
    masks = {"a": made((64, 64), 0.5)}
    ratios = torch.tensor([0.5])
    paper = ARA().penalties(masks, ratios, 0.8, 0)
    other = ARA(budget_weight=7.0, guidance_weight=0.0).penalties(masks, ratios, 0.8, 0)
    assert other["budget"].item() == pytest.approx(0.07 * paper["budget"].item())
    assert other["guidance"].item() == 0


def finalised(ratios, shapes, keep):
    """The plan of masks at given ratios, with the paper's factor and its ranks."""
    method = ARA()
    masks = {f"m.{i}": method.create(shape, spectrum(shape), 0.5, storage=FACTORED) for i, shape in enumerate(shapes)}
    for ratio, mask in zip(ratios, masks.values(), strict=True):
        fraction, candidates = ratio / top_of(mask), [(STEPS - i) / STEPS for i in range(STEPS + 1)]
        if ratio >= 0.99:
            with torch.no_grad():
                # two candidates mixed, for ratios out of the starting formula's reach
                lower = max(i for i, c in enumerate(candidates) if c >= fraction)
                share = (fraction - candidates[lower + 1]) / (candidates[lower] - candidates[lower + 1])
                mask.logits.fill_(-60.0)[lower] = math.log(share + 1e-12)
                mask.logits[lower + 1] = math.log(1 - share + 1e-12)
        else:
            masks[f"m.{list(masks.values()).index(mask)}"] = method.create(
                mask.shape, spectrum(mask.shape), ratio, storage=FACTORED
            )
    sizes = [m * n for m, n in shapes]
    total = sum(sizes)
    budget = Budget(storage="factored", keep=keep, shapes=dict(zip(masks, shapes, strict=True)), model_parameters=total)
    dense = [ratio >= 0.99 for ratio in ratios]
    spent = sum(p * (1.0 if d else r) for p, r, d in zip(sizes, ratios, dense, strict=True)) / total
    compressed = sum(p * r for p, r, d in zip(sizes, ratios, dense, strict=True) if not d)
    factor = 1 - (spent - keep) * total / compressed
    ranks = [
        None if d else max(1, int(factor * (r / top_of(mask)) * mask.rank))
        for r, d, mask in zip(ratios, dense, masks.values(), strict=True)
    ]
    return method.finalise(masks, budget), factor, ranks


def assert_budget_is_spent(plan, keep):
    dense = sum(m * n for m, n in (module.shape for module in plan.modules.values()))
    steps = []
    for module in plan.modules.values():
        m, n = module.shape
        if module.rank is not None:
            up = (module.rank + 1) * (m + n)
            steps.append((up if up < m * n else m * n) - module.rank * (m + n))
    assert keep * dense - min(steps) < plan.kept_parameters <= keep * dense + 1e-6


@pytest.mark.parametrize(
    ("ratios", "keep"),
    [
        ([0.9, 1.1, 0.7, 0.5], 0.7),
        ([0.6, 0.6, 0.6, 0.6], 0.6),
        ([1.0, 0.9, 0.95, 0.991], 0.9),
        ([0.4, 0.3, 0.5, 0.6], 0.5),
    ],
)
def test_finalise_is_the_papers_up_to_the_last_step(ratios, keep):
    shapes = [(576, 576), (576, 1536), (1536, 576), (192, 576)]
    plan, factor, ranks = finalised(ratios, shapes, keep)
    assert plan.method == "ara"
    assert [module.rank is None for module in plan.modules.values()] == [ratio >= 0.99 for ratio in ratios]
    noted = float(re.search(r"requested ranks scaled by ([\d.]+)", " ".join(plan.notes)).group(1))
    assert noted == pytest.approx(factor, rel=0.01)
    for module, rank in zip(plan.modules.values(), ranks, strict=True):
        assert (module.rank is None) == (rank is None)
        if rank is not None:
            assert abs(module.rank - rank) <= max(2, 0.01 * rank)
    assert_budget_is_spent(plan, keep)


def test_ratios_just_below_dense_are_compressed():
    plan, _, _ = finalised([0.98, 0.995, 0.3], [(96, 96)] * 3, 0.7)
    assert [module.rank is None for module in plan.modules.values()] == [False, True, False]


def test_every_rank_is_at_least_one():
    plan, _, ranks = finalised([0.002, 0.9, 0.9], [(64, 64), (64, 64), (64, 64)], 0.3)
    assert ranks[0] == 1
    assert plan.modules["m.0"].rank == 1
    assert_budget_is_spent(plan, 0.3)


def test_dense_modules_that_the_budget_cannot_pay_are_compressed_and_noted():
    plan, _, _ = finalised([1.1, 1.1, 0.5], [(64, 64)] * 3, 0.5)
    assert None not in [module.rank for module in plan.modules.values()]
    assert "2 modules were requested dense, which the budget does not allow" in plan.notes[0]
    assert_budget_is_spent(plan, 0.5)


def test_finalise_follows_multiples_and_floors():
    method = ARA()
    masks = {name: method.create((64, 64), spectrum((64, 64)), 0.5, storage=FACTORED) for name in ("a", "b")}
    shapes = {"a": (64, 64), "b": (64, 64)}
    budget = Budget(
        storage="factored", keep=0.5, shapes=shapes, model_parameters=8192, multiple_of=4, floors={"b": 0.6}
    )
    plan = method.finalise(masks, budget)
    assert (plan.modules["a"].rank, plan.modules["b"].rank) == (12, 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, r"steps is 1\b.*at least 2"),
        ({"top": 1.0}, r"top is 1\.0\b.*above 1"),
        ({"top": float("nan")}, r"top is nan\b.*above 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ARA(**settings)


def test_lengths_go_beyond_what_is_stored_with_pivoted_storage():
    mask = ARA().create((60, 60), spectrum((60, 60)), 0.9, storage=Storage("pivoted"))
    assert (mask.rank, mask.span) == (47, 60)
    for length, kept in ((30, 30), (47, 47), (55, 47), (60, 47)):
        with torch.no_grad():
            mask.logits.copy_(-((mask.candidates - length / 60).abs() * 1e4))
        assert mask.fraction().item() == pytest.approx(length / 60, abs=0.01)
        assert mask.kept().sum().item() == kept
        plan = ARA().finalise({"a": mask}, Budget(keep=1.0, shapes={"a": (60, 60)}, model_parameters=3600))
        assert (plan.modules["a"].rank or 60) >= length


def test_a_layer_of_one_number_may_start_from_a_plan():
    mask = ARA().create((1, 1), spectrum((1, 1)), 0.5, storage=FACTORED, kept=torch.tensor([0]))
    assert (mask.rank, mask.span) == (1, 1)
    assert mask.kept().tolist() == [True]
