"""Masks of one cutoff a module against their papers' formulas, and how they move, stop at their ends and come back."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.dobi_svd import DobiSVD
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.models.base import load_base
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.storage import Storage
from tests.helpers.tiny_training import fit, make_data, make_learner

FACTORED = Storage("factored")

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
SHAPES = [(96, 96), (40, 72), (192, 64), (128, 24), (500, 6), (3, 3), (1, 40)]
METHODS = {"dobi_svd": DobiSVD, "fermi": Fermi}


def spectrum(shape):
    return 0.9 ** torch.arange(min(shape), dtype=torch.float64)


def made(method, shape=(96, 96), keep=0.5, kept=None):
    return method.create(shape, spectrum(shape), keep, kept=kept, storage=FACTORED)


def even(shape):
    return shape[0] * shape[1] / sum(shape)


# -- gates ---------------------------------------------------------------------------------------------------------


def slow_tanh(cutoff, rank, beta):
    """Dobi-SVD's gate with component j (from 1) at j - 1/2."""
    return [0.5 * math.tanh(beta * (cutoff - (j - 0.5))) + 0.5 for j in range(1, rank + 1)]


def slow_fermi(cutoff, rank, temperature):
    return [1 / (1 + math.exp(((j - 0.5) - cutoff) / temperature)) for j in range(1, rank + 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [0.31, 0.8])
def test_dobi_svd_is_the_papers(shape, keep):
    mask = made(DobiSVD(steepness=0.7), shape, keep)
    expected = slow_tanh(keep * even(shape), mask.rank, 0.7)
    torch.testing.assert_close(mask().double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (500, 6)])
@pytest.mark.parametrize("step", [0, 30, 100, 1000])
def test_fermi_is_the_papers_at_its_temperature(shape, step):
    method = Fermi(temperature_start=4.0, temperature_end=0.5, anneal_steps=100, relative=False)
    mask = made(method, shape)
    method.advance({"a": mask}, step, None)
    temperature = 4.0 * (0.5 / 4.0) ** min(1.0, step / 100)
    expected = slow_fermi(0.5 * even(shape), mask.rank, temperature)
    torch.testing.assert_close(mask().double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-5)


def test_relative_temperatures_count_in_break_even_ranks():
    for shape in [(96, 96), (40, 72)]:
        relative = made(Fermi(temperature_start=0.1), shape)
        absolute = made(Fermi(temperature_start=0.1 * even(shape), relative=False), shape)
        torch.testing.assert_close(relative(), absolute())


def test_temperatures_fall_geometrically():
    method = Fermi(temperature_start=1.0, temperature_end=0.01, anneal_steps=4)
    assert [method.temperature_at(step) for step in (0, 1, 2, 4, 9)] == pytest.approx([1, 0.1**0.5, 0.1, 0.01, 0.01])
    assert Fermi(temperature_end=0.01, anneal_steps=0).temperature_at(0) == pytest.approx(0.01)


@pytest.mark.parametrize("method", [DobiSVD(steepness=0.5), Fermi(temperature_start=0.1)])
def test_gradients_are_those_of_finite_differences(method):
    mask = made(method)
    upstream = torch.linspace(-1, 2, mask.rank)
    (mask() * upstream).sum().backward()

    def value(level):
        moved = made(method, keep=level)
        return (moved().double() * upstream.double()).sum().item()

    slope = (value(0.51) - value(0.49)) / 0.02
    assert mask.level.grad.item() == pytest.approx(slope, rel=0.02)


# -- what the number means -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS.values())
@pytest.mark.parametrize("shape", SHAPES)
def test_starts_are_exact(kind, shape):
    for keep in (0.1, 0.5, 0.8, 1.0, 1.7):
        mask = made(kind(), shape, keep)
        assert mask.ratio().item() == pytest.approx(min(keep, 1.0), rel=1e-6)
        assert mask.cutoff().item() == pytest.approx(min(keep, 1.0) * even(shape), rel=1e-5)
        assert mask.rank == ARA().stored_rank(shape, FACTORED)
    for rank in range(1, math.ceil(even(shape))):
        assert made(kind(), shape, rank / even(shape)).kept().sum() == rank
    assert made(kind(), (96, 96), 2 / 48, torch.tensor([3, 9])).kept().nonzero().flatten().tolist() == [0, 1]


def test_the_sum_of_the_gates_is_the_cutoff():
    for method in (DobiSVD(steepness=1.0), Fermi(temperature_start=0.02)):
        assert made(method, keep=0.53)().sum().item() == pytest.approx(0.53 * 48, abs=0.01)


@pytest.mark.parametrize("kind", METHODS.values())
def test_one_step_of_adam_moves_every_module_by_the_same_share(kind):
    masks = {str(shape): made(kind(), shape) for shape in SHAPES}
    optimizer = torch.optim.Adam([mask.level for mask in masks.values()], lr=0.01)
    ratios = torch.stack([mask.ratio() for mask in masks.values()])
    sum(kind().penalties(masks, ratios, 0.2, 0).values()).backward()
    optimizer.step()
    assert [mask.ratio().item() for mask in masks.values()] == pytest.approx([0.49] * len(SHAPES))


def test_only_the_number_is_saved():
    assert list(made(DobiSVD()).state_dict()) == ["level"]
    assert made(DobiSVD()).level.dtype == torch.float32


# -- budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS.values())
def test_the_penalty_is_aras_and_reaches_dense_modules(kind):
    levels = {(96, 96): 0.4, (40, 72): 1.1, (192, 64): 0.9}
    masks = {str(shape): made(kind(), shape) for shape in levels}
    with torch.no_grad():
        for mask, level in zip(masks.values(), levels.values(), strict=True):
            mask.level.fill_(level)
    ratios = torch.stack([mask.ratio() for mask in masks.values()])
    terms = kind(budget_weight=30.0).penalties(masks, ratios, 0.5, 0)
    total = sum(m * n for m, n in levels)
    share = sum(min(level, 1.0) * m * n for (m, n), level in levels.items()) / total
    assert list(terms) == ["budget"]
    assert terms["budget"].item() == pytest.approx(30 * (share - 0.5) ** 2, rel=1e-4)
    terms["budget"].backward()
    for mask, (m, n) in zip(masks.values(), levels, strict=True):
        assert mask.level.grad.item() == pytest.approx(60 * (share - 0.5) * m * n / total, rel=1e-4)


def test_cutoffs_stay_in_reach():
    method = DobiSVD()
    masks = {"a": made(method), "b": made(method), "c": made(method, (500, 6))}
    with torch.no_grad():
        for mask, level in zip(masks.values(), (-0.3, 1.5, 1.5), strict=True):
            mask.level.fill_(level)
    method.advance(masks, 3, None)
    assert [mask.level.item() for mask in masks.values()] == pytest.approx([0.0, 1.2, 6 * 506 / 3000])


def test_the_plan_rounds_the_cutoffs():
    method = Fermi()
    shapes = {"a": (96, 96), "b": (96, 96), "c": (40, 72)}
    masks = {name: made(method, shape) for name, shape in shapes.items()}
    with torch.no_grad():
        for name, level in (("a", 0.25), ("b", 1.0), ("c", -0.1)):
            masks[name].level.fill_(level)
    budget = Budget(storage="factored", keep=0.6, shapes=shapes, model_parameters=30_000)
    plan = method.finalise(masks, budget)
    assert plan.method == "fermi"
    assert plan.modules["b"].rank is None
    assert plan.modules["c"].rank == 1
    # what the dense module and the smallest leave of 0.6
    assert plan.modules["a"].rank == (int(0.6 * 21312) - 9216 - 112) // 192
    assert plan.keep_targeted <= 0.6


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DobiSVD, {"top": 1.0}, r"top is 1\.0\b.*above 1"),
        (DobiSVD, {"top": math.nan}, "top is nan"),
        (DobiSVD, {"steepness": 0.0}, r"steepness is 0\.0\b.*above 0"),
        (DobiSVD, {"budget_weight": -1.0}, r"budget_weight is -1\.0\b.*at least 0"),
        (Fermi, {"budget_weight": -1.0}, "budget_weight is -1.0"),
        (Fermi, {"temperature_end": 0.0}, r"temperature_end is 0\.0\b.*above 0"),
        (Fermi, {"temperature_start": 0.001}, r"temperature_start is 0\.001\b.*at least 0\.002"),
        (Fermi, {"anneal_steps": -1}, r"anneal_steps is -1\b.*at least 0"),
    ],
)
def test_impossible_settings(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


# -- learning ------------------------------------------------------------------------------------------------------


def learner_of(name, **changes):
    method = Fermi(anneal_steps=6) if name == "fermi" else DobiSVD(steepness=0.5)
    return make_learner(**{"mask": method, "optimizer": lambda p: torch.optim.Adam(p, lr=0.03), **changes})


@pytest.mark.parametrize("name", METHODS)
def test_cutoffs_learn_at_the_budget(name):
    learner = learner_of(name)
    trainer = fit(learner, max_steps=12)
    levels = [mask.level.item() for mask in learner.masks.values()]
    assert max(levels) - min(levels) > 0.05
    assert trainer.callback_metrics["keep/expected"].item() == pytest.approx(0.5, abs=0.05)
    plan = learner.plan()
    assert plan.method == name
    assert 0.49 < plan.keep_targeted <= 0.5
    assert len({entry.rank for entry in plan.modules.values()}) > 2


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, name):
    def saving(folder):
        return ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")

    whole, rest = learner_of(name), learner_of(name)
    fit(whole, max_steps=10, enable_checkpointing=True, callbacks=[saving(tmp_path)])
    path = tmp_path / "step=4.ckpt"
    fit(rest, max_steps=10, ckpt_path=path, enable_checkpointing=True, callbacks=[saving(tmp_path / "rest")])
    for key, mask in rest.masks.items():
        assert torch.equal(mask.level, whole.masks[key].level)
        assert torch.equal(mask.slope, whole.masks[key].slope)


def test_dense_modules_come_back():
    # All start dense and nothing but the budget moves them.
    learner = learner_of("dobi_svd", keep_start=1.0, keep_steps=2)
    fit(learner, max_steps=10)
    assert max(mask.ratio().item() for mask in learner.masks.values()) < 0.9


def test_a_start_from_a_plan(tmp_path):
    first = learner_of("dobi_svd")
    first.build(load_base("random:llama"), data := make_data())
    requested = {name: 3.0 + number for number, name in enumerate(first.masks)}
    plan = first.budget.fit(requested, method="hand")
    learner = learner_of("dobi_svd", start=plan.save(tmp_path / "plan.json"))
    learner.build(load_base("random:llama"), data)
    for name, mask in learner.masks.items():
        entry = plan.modules[name]
        assert mask.ratio().item() == pytest.approx(entry.numbers(4) / entry.dense_parameters, rel=1e-5)
        assert entry.rank is None or mask.kept().sum() == entry.rank


def test_a_checkpoint_with_the_former_name_of_the_method_is_read():
    learner = learner_of("dobi_svd")
    learner.build(load_base("random:llama"), make_data())
    checkpoint = {}
    learner.on_save_checkpoint(checkpoint)
    checkpoint["lowrank_pl"]["mask"] = "tanh"
    learner.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_method_is_refused():
    learner = learner_of("dobi_svd")
    learner.build(load_base("random:llama"), make_data())
    checkpoint = {}
    learner.on_save_checkpoint(checkpoint)
    checkpoint["lowrank_pl"]["mask"] = "fermi"
    with pytest.raises(ValueError, match=r"mask is 'fermi' there and 'dobi_svd' here.*start anew"):
        learner.on_load_checkpoint(checkpoint)
