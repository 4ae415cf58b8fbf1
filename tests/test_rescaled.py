"""Rescaled masks: the fisher plan at scale 1, the loss's slope at the cut, and scales that balance prices."""

from __future__ import annotations

import math

import pytest
import torch
from learning import fit, make_data, make_learner
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl.allocate import Problem, allocator
from lowrank_pl.budget import Budget
from lowrank_pl.decomposition import Decomposition
from lowrank_pl.masks import Rescaled

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using")
SHAPES = {"a": (48, 48), "b": (48, 96), "c": (96, 32)}
BUDGET = Budget(keep=0.5, shapes=SHAPES, model_parameters=12_000)


def sigma_of(name):
    return {"a": 1.0, "b": 0.5, "c": 2.0}[name] * 0.93 ** torch.arange(min(SHAPES[name]), dtype=torch.float64)


class Store:
    fingerprint = {"kind": "two_sided"}
    sigma = staticmethod(sigma_of)


@pytest.fixture
def method():
    return Rescaled(warmup=0)


@pytest.fixture
def masks(method):
    made = {name: method.create(shape, sigma_of(name), 0.5) for name, shape in SHAPES.items()}
    method.share(made)
    method.advance(made, 0, BUDGET)
    return made


def ranks(masks):
    return {name: mask.length for name, mask in masks.items()}


def fisher_ranks():
    plan = allocator("fisher").plan(Problem(BUDGET, Store(), None))
    return {name: module.rank for name, module in plan.modules.items()}


def test_scale_one_is_the_fisher_plan(masks, method):
    assert ranks(masks) == fisher_ranks()
    assert {n: m.rank for n, m in method.finalise(masks, BUDGET).modules.items()} == fisher_ranks()
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
    # At the optimum of the rescaled sum all lower modules give up their last component at one price a parameter.
    prices = [mask.predicted() / sum(mask.shape) for mask in masks.values() if mask.length]
    assert max(prices) / min(prices) < 1.25


def test_the_gradient_is_the_mean_slope_around_the_end(masks):
    mask = masks["a"]
    slopes = torch.arange(mask.rank).float()
    (mask() * slopes).sum().backward()
    near = max(3, math.ceil(0.05 * mask.length))
    expected = sum(range(mask.length - near, mask.length + near)) / (2 * near)
    assert mask.log_scale.grad.item() == pytest.approx(expected)


def test_the_average_is_learned_and_cancels(masks, method):
    """Where the loss falls by three times the prediction everywhere, nothing moves any more once that is known."""
    for step in range(1, 4):
        for mask in masks.values():
            mask.log_scale.grad = None
        penalty = method.penalties(masks, None, 0.5, step)["balance"]
        data = sum(-3.0 * mask.predicted() * (mask.log_scale - mask.log_scale.detach()) for mask in masks.values())
        (penalty + data).backward()
        last = [mask.log_scale.grad.item() / mask.predicted() for mask in masks.values() if mask.length]
        method.advance(masks, step, BUDGET)
    assert last == pytest.approx([0.0] * len(last), abs=1e-4)
    balance = masks["a"].remembered[0]
    assert balance.ratio() == pytest.approx(3.0, rel=1e-4)
    assert int(balance.counted) == 3


def test_warm_up_only_measures(masks):
    method = Rescaled(warmup=2)
    for step, expected in ((1, 0.0), (2, 0.0), (3, 0.5)):
        masks["a"].log_scale.data.fill_(0.5)
        method.advance(masks, step, BUDGET)
        assert masks["a"].log_scale.item() == expected


def test_dense_modules_compute_densely_and_keep_their_scale(method):
    budget = Budget(keep=0.5, shapes=SHAPES, model_parameters=12_000, floors={"c": 1.0})
    masks = {name: method.create(shape, sigma_of(name), 0.5) for name, shape in SHAPES.items()}
    method.share(masks)
    method.advance(masks, 0, budget)
    assert masks["c"].length is None
    assert masks["c"].ratio().item() == 1.0
    method.penalties(masks, None, 0.5, 0)["balance"].backward()
    assert masks["c"].log_scale.grad.item() == 0.0
    assert masks["a"].log_scale.grad.item() > 0.0


def learner_of(**changes):
    settings = {
        "mask": Rescaled(warmup=1),
        "decomposition": Decomposition("two_sided"),
        "optimizer": lambda p: torch.optim.Adam(p, lr=0.1),
    }
    return make_learner(**{**settings, **changes})


def test_learning_starts_at_fisher_and_meets_the_budget():
    learner = learner_of()
    fit(learner, max_steps=6)
    plan = learner.plan()
    assert plan.method == "rescaled"
    assert 0.49 < plan.keep_targeted <= 0.5
    assert any("predicted losses rescaled by" in note for note in plan.notes)
    assert len({mask.log_scale.item() for mask in learner.masks.values()}) > 3
    start = allocator("fisher").plan(Problem(learner.budget, learner.store, None))
    for mask in learner.masks.values():
        mask.log_scale.data.zero_()
    assert learner.plan().modules == start.modules


def test_resumes_to_the_same_bits(tmp_path):
    whole = learner_of()
    fit(whole, max_steps=6)
    first = learner_of()
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(first, max_steps=3, enable_checkpointing=True, callbacks=[checkpoints])
    again = learner_of()
    fit(again, max_steps=6, ckpt_path=next(tmp_path.glob("*step=3*")))
    for name, mask in whole.masks.items():
        assert torch.equal(mask.log_scale, again.masks[name].log_scale)
    assert torch.equal(whole.shared.measured, again.shared.measured)
    assert whole.plan().modules == again.plan().modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0.0}, "width is 0.0: expected a finite number above 0"),
        ({"warmup": -1}, "warmup is -1: expected a finite number of at least 0"),
        ({"top": 1.0}, "top is 1.0: expected a finite number above 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Rescaled(**settings)


def test_other_factors_and_other_starts_are_refused():
    with pytest.raises(ValueError, match=r"masks of rescaled were given factors of the kind 'whitened': expected two"):
        make_learner(mask=Rescaled())
    with pytest.raises(ValueError, match="masks of rescaled have a start of their own: leave it out"):
        fit(learner_of(start="fisher"), make_data(), max_steps=1)
