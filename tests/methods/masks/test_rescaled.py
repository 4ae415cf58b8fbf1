"""Rescaled masks: the fisher plan at scale 1, the loss's slope at the cut, and scales that balance savings."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.masks.base import ModelMasks
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.storage import Storage
from tests.helpers.tiny_training import fit, make_data, make_learner

FACTORED = Storage("factored")

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using")
SHAPES = {"a": (48, 48), "b": (48, 96), "c": (96, 32)}
BUDGET_OF_FOUR = Budget(storage="factored", keep=0.5, shapes={**SHAPES, "d": (4, 4)}, model_parameters=12_000)
BUDGET = Budget(storage="factored", keep=0.5, shapes=SHAPES, model_parameters=12_000)


def sigma_of(name):
    return {"a": 1.0, "b": 0.5, "c": 2.0}[name] * 0.93 ** torch.arange(min(SHAPES[name]), dtype=torch.float64)


class Store:
    fingerprint = {"kind": "two_sided"}
    sigma = staticmethod(sigma_of)


@pytest.fixture
def method():
    return Rescaled(warmup=0)


def made(method, budget=BUDGET):
    masks = {name: method.create(shape, sigma_of(name), 0.5, storage=FACTORED) for name, shape in SHAPES.items()}
    masks = ModelMasks(masks, method.shared_module(masks))
    method.advance(masks, 0, budget)
    return masks


@pytest.fixture
def masks(method):
    return made(method)


def ranks(masks):
    return {name: mask.length for name, mask in masks.items()}


@pytest.mark.parametrize(
    "constraints",
    [{}, {"multiple_of": 8}, {"floors": {"b": 0.8}}, {"floors": {"c": 1.0}}, {"multiple_of": 8, "floors": {"b": 0.6}}],
)
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
def test_scale_one_is_the_fisher_plan(method, constraints, keep):
    budget = Budget(
        storage="factored",
        keep=keep + 0.3 * len(constraints.get("floors", ())),
        shapes=SHAPES,
        model_parameters=12_000,
        **constraints,
    )
    plan = make_allocator("fisher").plan(Problem(budget, Store(), None))
    # A plan can be asked for before the first step: a checkpoint that is exported.
    fresh = {name: method.create(shape, sigma_of(name), 0.5, storage=FACTORED) for name, shape in SHAPES.items()}
    assert method.finalise(fresh, budget).modules == plan.modules
    masks = made(method, budget)
    assert ranks(masks) == {name: module.rank for name, module in plan.modules.items()}
    for mask in masks.values():
        expected = mask.rank if mask.length is None else mask.length
        assert mask().sum().item() == expected
        assert mask.kept().sum().item() == expected


def test_a_larger_scale_gets_more(masks, method):
    before = ranks(masks)
    masks["b"].log_scale.data.fill_(1.0)
    method.advance(masks, 0, BUDGET)
    after = ranks(masks)
    assert after["b"] is None or after["b"] > before["b"]
    assert after["a"] < before["a"]
    # At the optimum of the rescaled sum all truncated modules lose the same by one parameter less.
    savings = [mask.predicted() / sum(mask.shape) for mask in masks.values() if mask.length]
    assert max(savings) / min(savings) < 1.25


@pytest.mark.parametrize("width", [0.05, 0.4])
def test_the_gradient_is_the_mean_slope_around_the_end(width):
    mask = made(Rescaled(width=width))["a"]
    slopes = torch.arange(mask.rank).float().square()
    (mask() * slopes).sum().backward()
    near = min(max(3, math.ceil(width * mask.length)), mask.length, mask.rank - mask.length)
    expected = sum(j * j for j in range(mask.length - near, mask.length + near)) / (2 * near)
    assert mask.log_scale.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("width", [0.05, 0.3, 2.0])
def test_a_quadratic_loss_is_measured_exactly_at_every_length(width):
    mask = made(Rescaled(width=width))["b"]
    for length in range(1, mask.rank + 1):
        mask.length, mask.log_scale.grad = length, None
        # A component whose gate is 0 instead of 1 costs .5.
        ((1 - mask()).square().sum() / 2).backward()
        if length < mask.rank:
            assert mask.log_scale.grad.item() == pytest.approx(-0.5)
            assert mask.predicted() > 0
        else:
            assert mask.log_scale.grad.item() == mask.predicted() == 0.0


def test_the_average_is_learned_and_cancels(masks, method):
    """Where the loss falls by three times the prediction everywhere, nothing moves any more once that is known."""
    for step in range(1, 4):
        for mask in masks.values():
            mask.log_scale.grad = None
        penalty = method.penalties(masks, None, 0.5, step - 1)["balance"]
        (penalty + saving(masks, 3.0)).backward()
        last = [mask.log_scale.grad.item() / mask.predicted() for mask in masks.values() if mask.length]
        method.observe(masks, step - 1)
        method.advance(masks, step, BUDGET)
    assert last == pytest.approx([0.0] * len(last), abs=1e-4)
    balance = masks.shared
    assert balance.ratio() == pytest.approx(3.0, rel=1e-4)
    assert int(balance.counted) == 3


def saving(masks, ratio):
    """A loss that the next component of every module lowers by ``ratio`` times what is predicted."""
    return sum(-ratio * mask.predicted() * (mask.log_scale - mask.log_scale.detach()) for mask in masks.values())


def test_windows_of_any_length_count_alike(masks, method):
    balance, batches = masks.shared, (4, 1, 3, 2)
    for step, count in enumerate(batches):
        for mask in masks.values():
            mask.log_scale.grad = None
        for _ in range(count):
            penalty = method.penalties(masks, None, 0.5, step)["balance"]
            ((penalty + saving(masks, 1.0 + step)) / 4).backward()
        before = balance.measured.item(), balance.predicted.item()
        method.observe(masks, step, accumulated=4)
        measured, predicted = balance.measured.item() - before[0], balance.predicted.item() - before[1]
        assert measured / predicted == pytest.approx(1.0 + step, rel=1e-4)
        assert predicted == pytest.approx(sum(mask.predicted() for mask in masks.values()))


def test_gradients_that_overflow_are_not_counted(masks, method):
    method.penalties(masks, None, 0.5, 0)["balance"].backward()
    masks["a"].log_scale.grad.fill_(math.inf)
    method.observe(masks, 0)
    balance = masks.shared
    assert (balance.measured.item(), balance.predicted.item(), int(balance.counted)) == (0.0, 0.0, 1)


def test_warm_up_only_measures(masks):
    method = Rescaled(warmup=2)
    for step, expected in ((1, 0.0), (2, 0.0), (3, 0.5)):
        masks["a"].log_scale.data.fill_(0.5)
        method.advance(masks, step, BUDGET)
        assert masks["a"].log_scale.item() == expected


@pytest.mark.parametrize("end", ["dense", "full"])
def test_what_has_no_end_to_measure_keeps_its_scale_to_the_bit(masks, method, end):
    optimizer = torch.optim.AdamW([mask.log_scale for mask in masks.values()], lr=0.1, weight_decay=0.1)

    def step(number):
        optimizer.zero_grad()
        method.penalties(masks, None, 0.5, number)["balance"].backward()
        method.observe(masks, number)
        optimizer.step()

    step(0)
    before = {name: mask.log_scale.item() for name, mask in masks.items()}
    assert before["b"] != 0.0
    masks["b"].length = None if end == "dense" else masks["b"].rank
    assert masks["b"].kept().all()
    assert end == "full" or masks["b"].ratio().item() == 1.0
    momentum = optimizer.state[masks["b"].log_scale]["exp_avg"].item()
    predicted = masks.shared.predicted.item()
    step(1)
    assert masks["b"].log_scale.item() == before["b"]
    assert optimizer.state[masks["b"].log_scale]["exp_avg"].item() == momentum
    assert masks["a"].log_scale.item() != before["a"]
    added = masks.shared.predicted.item() - predicted
    assert added == pytest.approx(masks["a"].predicted())


def test_one_allocation_a_step_without_a_word(masks, method, monkeypatch, caplog):
    calls, plain = [], Budget.sizes
    monkeypatch.setattr(Budget, "sizes", lambda self, scores, **rest: calls.append(self.keep) or plain(self, scores))
    caplog.set_level(logging.INFO)
    budget = Budget(
        storage="factored", keep=0.9, shapes={**SHAPES, "d": (4, 4)}, model_parameters=12_000, multiple_of=8
    )
    masks["d"] = method.create((4, 4), torch.ones(4), 0.5, storage=FACTORED)
    for _ in range(3):
        method.advance(masks, 1, replace(budget))
    assert calls == [0.9]
    assert caplog.text == ""
    masks["a"].log_scale.data.fill_(0.5)
    method.advance(masks, 2, budget)
    method.advance(masks, 2, BUDGET_OF_FOUR)
    assert calls == [0.9, 0.9, 0.5]
    assert "d: too small for a rank of 8" in str(method.finalise(masks, budget).notes)


def learner_of(**changes):
    settings = {
        "mask": Rescaled(warmup=1),
        "decomposition": Decomposition("two_sided"),
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.1),
    }
    return make_learner(**{**settings, **changes})


def test_a_run_that_only_warms_up_is_warned_of(caplog):
    fit(learner_of(mask=Rescaled(warmup=2)), max_steps=2)
    assert "the run has 2 steps, and rescaled learns nothing in its first 2" in caplog.text


def test_learning_starts_at_fisher_and_meets_the_budget():
    learner = learner_of()
    fit(learner, max_steps=6)
    plan = learner.plan()
    assert plan.method == "rescaled"
    assert 0.49 < plan.keep_targeted <= 0.5
    assert any("predicted losses rescaled by" in note for note in plan.notes)
    assert len({mask.log_scale.item() for mask in learner.masks.values()}) > 3
    start = make_allocator("fisher").plan(Problem(learner.budget, learner.store, None))
    for mask in learner.masks.values():
        mask.log_scale.data.zero_()
    assert learner.plan().modules == start.modules


@pytest.mark.parametrize("floors", [{}, {"*.layers.0.mlp.*": 1.0}])
def test_learning_starts_at_fisher_with_multiples_and_floors(floors):
    settings = {"multiple_of": 8, "floors": {"*.layers.1.self_attn.o_proj": 0.6, **floors}, "keep": 0.8}
    learner = learner_of(**settings)
    fit(learner, max_steps=1)  # which only warms up
    start = make_allocator("fisher").plan(Problem(learner.budget, learner.store, None))
    assert learner.plan().modules == start.modules
    assert ranks(learner.masks) == {name: module.rank for name, module in start.modules.items()}
    assert all(mask.log_scale.item() == 0.0 for mask in learner.masks.values())


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.01, "accumulate_grad_batches": 3}])
def test_resumes_to_the_same_bits(tmp_path, settings):
    whole = learner_of()
    fit(whole, max_steps=6, **settings)
    first = learner_of()
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(first, max_steps=3, enable_checkpointing=True, callbacks=[checkpoints], **settings)
    again = learner_of()
    fit(again, max_steps=6, ckpt_path=next(tmp_path.glob("*step=3*")), **settings)
    for name, mask in whole.masks.items():
        assert torch.equal(mask.log_scale, again.masks[name].log_scale)
    assert torch.equal(whole.shared.measured, again.shared.measured)
    assert whole.plan().modules == again.plan().modules


class Measured(Callback):
    """What every optimizer step adds to the sum of measured savings."""

    def __init__(self):
        self.sums, self.steps = [0.0], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.steps):
            self.sums.append(pl_module.shared.measured.item())
            self.steps.append(self.sums[-1] - self.sums[-2])


def measured(**settings):
    """The savings measured in each step of an epoch of three batches, while nothing moves."""
    spy = Measured()
    learner = learner_of(mask=Rescaled(warmup=0), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    fit(learner, make_data(sequences=3), max_epochs=1, callbacks=[spy], **settings)
    assert int(learner.shared.counted) == len(spy.steps)
    return spy.steps


def test_what_is_measured_does_not_depend_on_clipping_and_accumulation():
    plain = measured()
    assert len(plain) == 3
    assert max(plain) > 1.1 * abs(plain[2]) > 0
    assert measured(gradient_clip_val=1e-6) == plain
    # Two batches make a step, and the third one alone makes the last.
    assert measured(accumulate_grad_batches=2) == pytest.approx([(plain[0] + plain[1]) / 2, plain[2]], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0.0}, r"width is 0\.0\b.*above 0"),
        ({"warmup": -1}, r"warmup is -1\b.*at least 0"),
        ({"top": 1.0}, r"top is 1\.0\b.*above 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Rescaled(**settings)


def test_other_factors_and_other_starts_are_refused():
    with pytest.raises(ValueError, match=r"'whitened'.*expected two_sided"):
        make_learner(mask=Rescaled())
    with pytest.raises(ValueError, match=r"masks of rescaled .*leave it out"):
        fit(learner_of(start="fisher"), make_data(), max_steps=1)
