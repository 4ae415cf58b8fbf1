"""LLRC's masks against loops in float64, its rules for pressure and end, and what its plans keep."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pl import RankPlan, load_compressed
from lowrank_pl.export.export import save_compressed
from lowrank_pl.factors.compression import compress
from lowrank_pl.methods.masks.base import ModelMasks
from lowrank_pl.methods.masks.gumbel import draw_noise, seeded
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.objectives import DataTerms
from lowrank_pl.methods.recipes import recipe
from lowrank_pl.models.base import load_base
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.plans.storage import Storage
from lowrank_pl.training.checkpointing import read_checkpoint
from tests.helpers.tiny_training import fit, make_data, make_learner, make_trainer

FACTORED = Storage("factored")

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
SHAPES = [(12, 12), (8, 20), (20, 8), (1, 5)]


def spectrum(shape):
    return 0.9 ** torch.arange(min(shape), dtype=torch.float64)


def made(shape=(12, 12), keep=1.0, kept=None, **settings):
    return LLRC(**settings).create(shape, spectrum(shape), keep, kept=kept, storage=FACTORED)


def shuffled(mask, seed=0):
    """The mask with random logits about the threshold and random noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mask.logits.copy_(torch.randn(mask.rank, generator=generator))
        mask.noise.copy_(torch.randn(mask.rank, generator=generator))
    return mask


def slow_gate(mask, *, any_k):
    """The gate and the slope of each value by its own logit, from the formulas."""
    gate, slopes = [], []
    for logit, noise in zip(mask.logits.tolist(), mask.noise.tolist(), strict=True):
        soft = 1 / (1 + math.exp(-(logit + noise) / 0.1))
        gate.append(1.0 if soft > 0.5 else 0.0)
        slopes.append(soft * (1 - soft) / 0.1)
    if not any_k:
        gate = [1.0 if j < sum(gate) else 0.0 for j in range(len(gate))]
    return gate, slopes


# -- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_k", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_is_the_papers(shape, any_k):
    mask = shuffled(made(shape, any_k=any_k))
    gate, slopes = slow_gate(mask, any_k=any_k)
    measured = mask()
    assert measured.tolist() == gate
    upstream = torch.arange(1.0, mask.rank + 1)
    (measured * upstream).sum().backward()
    expected = [up * slope for up, slope in zip(upstream.tolist(), slopes, strict=True)]
    torch.testing.assert_close(mask.logits.grad, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ratio_counts_without_noise_and_has_the_gradient_of_the_soft_count(shape):
    m, n = shape
    mask = shuffled(made(shape))
    on = sum(logit > 0 for logit in mask.logits.tolist())
    ratio = mask.ratio()
    assert ratio.item() == pytest.approx(on * (m + n) / (m * n))
    assert mask.kept().sum() == on
    ratio.backward()

    def soft_count(logits):
        return (m + n) / (m * n) * sum(1 / (1 + math.exp(-logit / 0.1)) for logit in logits)

    for j in range(mask.rank):
        up, down = mask.logits.tolist(), mask.logits.tolist()
        up[j] += 1e-5
        down[j] -= 1e-5
        slope = (soft_count(up) - soft_count(down)) / 2e-5
        assert mask.logits.grad[j].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_a_new_mask_gates_every_component_and_saves_its_logits_alone():
    for shape in SHAPES:
        mask = made(shape)
        assert mask.rank == min(shape)
        assert mask().tolist() == [1.0] * mask.rank
        assert list(mask.state_dict()) == ["logits"]
        assert mask.logits.dtype == torch.float32


# -- noise ---------------------------------------------------------------------------------------------------------


def drawn(kind, step=0, seed=0, count=4):
    masks = {str(i): made((500, 500)) for i in range(count)}
    draw_noise(masks, kind=kind, seed=seed, step=step)
    return torch.stack([mask.noise for mask in masks.values()])


def test_noise_has_the_moments_of_its_distribution():
    gumbel = torch.cat([drawn("gumbel", step) for step in range(20)])
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.05)
    logistic = torch.cat([drawn("logistic", step) for step in range(20)])
    assert logistic.mean().item() == pytest.approx(0, abs=0.03)
    assert logistic.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)
    assert drawn("none").abs().max() == 0


@pytest.mark.parametrize("kind", ["gumbel", "logistic"])
def test_noise_follows_from_seed_step_and_module_and_nothing_else(kind):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(kind, step=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(drawn(kind, step=7), first)
    assert torch.equal(drawn(kind, step=7, count=2), first[:2])
    others = [drawn(kind, step=8), drawn(kind, step=7, seed=1)]
    assert not any(torch.isclose(other, first).any(1).all() for other in others)
    assert len({tuple(row.tolist()) for row in first}) == len(first)


def test_noise_stays_within_a_step():
    mask = made()
    for step in (3, 3, 4, 3):
        before = mask.noise.clone()
        draw_noise({"a": mask}, kind="gumbel", seed=0, step=step)
        if step == 4:
            assert not torch.equal(mask.noise, before)
    assert torch.equal(mask.noise, drawn_alone(3))


def drawn_alone(step):
    mask = made()
    draw_noise({"a": mask}, kind="gumbel", seed=0, step=step)
    return mask.noise


def test_seeds_are_told_apart():
    streams = [
        torch.rand(1, generator=seeded(*words)).item() for words in [(0, 11), (0, 1, 1), (1, 0), (0, 1), ("0/1",)]
    ]
    assert len(set(streams)) == 4  # the last two are the same words


# -- the start -----------------------------------------------------------------------------------------------------


def test_the_start_is_the_papers_line():
    logits = made((7, 9)).logits.tolist()
    assert logits == pytest.approx([6 - 3 * j / 6 for j in range(7)])
    assert made((7, 9), start_high=1.0, start_low=0.5).logits.tolist() == pytest.approx(
        [1 - 0.5 * j / 6 for j in range(7)]
    )
    assert LLRC().start_keep(0.3) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_start_from_a_prefix_has_exactly_that_prefix_on(shape):
    m, n = shape
    for rank in range(1, (m * n - 1) // (m + n) + 1):
        mask = made(shape, rank * (m + n) / (m * n))
        assert mask.kept().tolist() == [j < rank for j in range(min(shape))]
        assert (mask.logits.abs() >= 3).all()
        assert mask.ratio().item() == pytest.approx(rank * (m + n) / (m * n))
    assert made(shape, 1.0).kept().all()
    assert made(shape, 1.7).kept().all()


def test_a_start_from_a_subset_has_exactly_that_subset_on():
    mask = made((12, 12), 3 * 24 / 144, torch.tensor([0, 4, 11]))
    assert mask.kept().nonzero().flatten().tolist() == [0, 4, 11]
    assert mask().nonzero().flatten().tolist() == [0, 4, 11]
    off = mask.logits.detach()[~mask.kept()]
    assert (off <= -3).all()
    assert (off.diff() < 0).all()  # the weakest are furthest from coming back
    prefix = made((12, 12), 3 * 24 / 144, torch.tensor([0, 4, 11]), any_k=False)
    assert prefix.kept().nonzero().flatten().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"\[0, 12\].*from 0 to 11"):
        made((12, 12), 0.3, torch.tensor([0, 12]))


# -- the loss ------------------------------------------------------------------------------------------------------


def some_masks(**settings):
    masks = {f"m.{i}": shuffled(made(shape, **settings), i) for i, shape in enumerate(SHAPES)}
    return masks, torch.stack([mask.ratio() for mask in masks.values()])


def slow_share(masks):
    kept = 0
    for mask in masks.values():
        on = sum(logit > 0 for logit in mask.logits.tolist())
        kept += min(on * sum(mask.shape), math.prod(mask.shape))
    return kept / sum(math.prod(mask.shape) for mask in masks.values())


@pytest.mark.parametrize("any_k", [True, False])
def test_the_loss_is_the_papers(any_k):
    method = LLRC(variation_weight=0.3, budget_weight=7.0, pressure_low=0.2, pressure_high=1.4, any_k=any_k)
    masks, ratios = some_masks(any_k=any_k)
    terms = method.penalties(masks, ratios, 0.2, 50)
    assert list(terms) == ["pressure", "variation", "budget"]
    logits = [logit for mask in masks.values() for logit in mask.logits.tolist()]
    weight = 0.2 + 1.2 * (1 - math.cos(2 * math.pi * 50 / 200)) / 2
    assert terms["pressure"].item() == pytest.approx(weight * sum(logits) / len(logits), rel=1e-5)
    steps = []
    for mask in masks.values():
        gate, _ = slow_gate(mask, any_k=any_k)
        steps += [abs(gate[j + 1] - gate[j]) for j in range(len(gate) - 1)]
    assert terms["variation"].item() == pytest.approx(0.3 * sum(steps) / len(steps), rel=1e-5)
    share = slow_share(masks)
    assert share > 0.21
    assert terms["budget"].item() == pytest.approx(7 * (share - 0.2) ** 2, rel=1e-4)
    terms["pressure"].backward()
    for mask in masks.values():
        torch.testing.assert_close(mask.logits.grad, torch.full((mask.rank,), weight / len(logits)))


def test_terms_without_a_weight_are_left_out():
    masks, ratios = some_masks()
    assert list(LLRC(variation_weight=0.0).penalties(masks, ratios, 0.2, 0)) == ["pressure"]


def test_the_pressure_on_layers_weighs_each_layer_alike_whatever_its_width():
    masks, ratios = some_masks()
    terms = LLRC(pressure="layers", pressure_low=2.0, pressure_high=2.0).penalties(masks, ratios, 0.2, 0)
    means = [mask.logits.mean().item() for mask in masks.values()]
    assert terms["pressure"].item() == pytest.approx(2 * sum(means) / 4, rel=1e-5)
    terms["pressure"].backward()
    for mask in masks.values():
        torch.testing.assert_close(mask.logits.grad, torch.full((mask.rank,), 2 / 4 / mask.rank))


def test_the_pressure_on_the_size_is_its_logarithm_over_the_target():
    method = LLRC(pressure="log_ratio", pressure_low=2.0, pressure_high=2.0, start_low=0.5)
    masks, ratios = some_masks()
    share = slow_share(masks)
    pressure = method.penalties(masks, ratios, 0.2, 0)["pressure"]
    assert pressure.item() == pytest.approx(2 * math.log(share / 0.2), rel=1e-5)
    pressure.backward()
    total = sum(math.prod(mask.shape) for mask in masks.values())
    for mask in masks.values():
        soft = [1 / (1 + math.exp(-logit / 0.1)) for logit in mask.logits.tolist()]
        slope = [2 / (share * total) * sum(mask.shape) * s * (1 - s) / 0.1 for s in soft]
        torch.testing.assert_close(mask.logits.grad, torch.tensor(slope), rtol=1e-3, atol=1e-6)
    masks, ratios = some_masks()
    assert method.penalties(masks, ratios, share + 0.1, 0)["pressure"].item() == 0


def test_the_size_under_noise_is_the_noisy_count():
    mask = shuffled(made((12, 12), noisy_count=True))
    gate, slopes = slow_gate(mask, any_k=True)
    assert sum(gate) != mask.kept().sum()
    ratio = mask.ratio()
    assert ratio.item() == pytest.approx(sum(gate) * 24 / 144)
    ratio.backward()
    torch.testing.assert_close(mask.logits.grad, torch.tensor(slopes) * 24 / 144, rtol=1e-4, atol=1e-5)


def test_the_pressure_ends_near_the_target():
    masks, ratios = some_masks()
    share = slow_share(masks)
    for keep, on in [(share - 0.003, True), (share - 0.001, False), (share + 0.001, False), (share + 0.2, False)]:
        pressure = LLRC().penalties(masks, ratios, keep, 0)["pressure"]
        assert (pressure.item() != 0) is on
        assert pressure.requires_grad  # no parameter may drop out of the graph, DDP would wait for it


def test_one_weight_oscillates():
    method = LLRC(pressure_low=1.0, pressure_high=3.0, period=8)
    expected = [2 - math.cos(math.pi * step / 4) for step in range(17)]
    assert [method.pressure_weight(step) for step in range(17)] == pytest.approx(expected)
    saw = LLRC(pressure_low=1.0, pressure_high=3.0, period=4, cycle="triangular")
    assert [saw.pressure_weight(step) for step in range(6)] == [1, 2, 3, 2, 1, 2]
    assert LLRC(pressure_low=1.0, pressure_high=1.0).pressure_weight(77) == 1.0


def test_the_weight_grows_from_cycle_to_cycle_until_the_size_is_met():
    method = LLRC(pressure_low=1.0, pressure_high=1.0, pressure_growth=2.0, period=4, patience=None)
    assert [method.pressure_weight(step) for step in (0, 3, 4, 8)] == pytest.approx([1, 1, 2, 4])
    assert [method.pressure_weight(step, 5) for step in (3, 4, 8, 100)] == pytest.approx([1, 2, 2, 2])
    assert method.pressure_weight(10**6) == pytest.approx(1e6)
    masks = two_masks(method)
    ratios = torch.full((2,), 0.6)
    mean = 1.5 + 3
    assert method.penalties(masks, ratios, 0.5, 9)["pressure"].item() == pytest.approx(4 * mean)
    set_on(masks, 5)
    assert not method.finished(masks, HALF, 4)
    mean = (5 - 15) / 20
    assert method.penalties(masks, ratios, 0.5, 9)["pressure"].item() == pytest.approx(2 * mean)


def test_the_budget_penalty_reaches_components_by_their_soft_count():
    method = LLRC(budget_weight=1.0, variation_weight=0.0)
    masks, ratios = some_masks()
    method.penalties(masks, ratios, 0.2, 0)["budget"].backward()
    share, total = slow_share(masks), sum(math.prod(mask.shape) for mask in masks.values())
    for mask in masks.values():
        soft = [1 / (1 + math.exp(-logit / 0.1)) for logit in mask.logits.tolist()]
        slope = [2 * (share - 0.2) * sum(mask.shape) / total * s * (1 - s) / 0.1 for s in soft]
        torch.testing.assert_close(mask.logits.grad, torch.tensor(slope), rtol=1e-3, atol=1e-6)


# -- the end -------------------------------------------------------------------------------------------------------


HALF = Budget(storage="factored", keep=0.5, shapes={"a": (20, 20), "b": (20, 20)}, model_parameters=800)


def two_masks(method):
    masks = {name: made((20, 20)) for name in HALF.shapes}
    return ModelMasks(masks, method.shared_module(masks))


def set_on(masks, count):
    """Turn on the first components of each mask; 5 of them are half of the parameters."""
    with torch.no_grad():
        for mask in masks.values():
            mask.logits.copy_(torch.where(torch.arange(20) < count, 1.0, -1.0))


def test_learning_goes_on_above_the_budget():
    method = LLRC(patience=5)
    masks = two_masks(method)
    set_on(masks, 6)
    assert not any(method.finished(masks, HALF, step) for step in range(10))
    assert masks.shared.reached == -1


def test_learning_ends_patience_steps_after_the_budget_is_first_met():
    method = LLRC(patience=5)
    masks = two_masks(method)
    set_on(masks, 5)
    assert not method.finished(masks, HALF, 10)
    set_on(masks, 6)  # once met is enough
    assert [method.finished(masks, HALF, step) for step in (11, 14, 15, 16)] == [False, False, True, True]
    assert masks.shared.reached == 10


def test_without_patience_the_trainer_ends_learning():
    method = LLRC(patience=None)
    masks = two_masks(method)
    set_on(masks, 5)
    assert not method.finished(masks, HALF, 10**6)


def test_no_patience_at_all_ends_learning_at_once():
    method = LLRC(patience=0)
    masks = two_masks(method)
    set_on(masks, 5)
    assert method.finished(masks, HALF, 1)


# -- the plan ------------------------------------------------------------------------------------------------------


def planned(logits, keep, *, shape=(20, 20), **settings):
    method = LLRC(**settings)
    masks = {name: method.create(shape, spectrum(shape), 1.0, storage=FACTORED) for name in logits}
    with torch.no_grad():
        for name, values in logits.items():
            masks[name].logits.copy_(torch.tensor(values))
            masks[name].noise.fill_(100.0)  # has no part in it
    budget = Budget(storage="factored", keep=keep, shapes=dict.fromkeys(logits, shape), model_parameters=1000)
    return method.finalise(masks, budget)


def test_the_plan_is_the_threshold_where_that_meets_the_budget():
    a, b = [-1.0] * 20, [-2.0] * 20
    for j in (1, 2, 7):
        a[j] = 1.0
    for j in (0, 1, 2, 3, 4, 5, 19):
        b[j] = 0.5
    plan = planned({"a": a, "b": b}, 0.5)
    assert plan.method == "llrc"
    assert plan.modules["a"] == ModulePlan((20, 20), 3, (1, 2, 7))
    assert plan.modules["b"] == ModulePlan((20, 20), 7, (0, 1, 2, 3, 4, 5, 19))
    assert any("the bare threshold at 0 would have kept 0.5000 of the targeted" in note for note in plan.notes)
    prefix = planned({"a": a, "b": b}, 0.5, any_k=False)
    assert [(entry.rank, entry.indices) for entry in prefix.modules.values()] == [(3, None), (7, None)]


def test_a_prefix_of_the_learned_count_can_be_exported():
    logits = {"a": [-1.0] * 7 + [1.0] * 3 + [-1.0] * 10, "b": [0.5] * 6 + [-2.0] * 13 + [0.5]}
    plan = planned(logits, 0.5, export_prefix=True)
    assert [(entry.rank, entry.indices) for entry in plan.modules.values()] == [(3, None), (7, None)]
    # Only the export: what learns are still subsets.
    mask = shuffled(made(export_prefix=True))
    assert mask().tolist() == slow_gate(mask, any_k=True)[0]


def test_the_plan_moves_the_threshold_to_the_budget_and_says_so():
    logits = {"a": [1.0 - 0.01 * j for j in range(20)], "b": [1.005 - 0.01 * j for j in range(20)]}
    plan = planned(logits, 0.5)
    assert [entry.rank for entry in plan.modules.values()] == [5, 5]
    assert plan.keep_targeted == 0.5
    assert any("would have kept 1.0000" in note for note in plan.notes)
    few = planned({"a": [-1.0 - 0.01 * j for j in range(20)], "b": [-1.005 - 0.01 * j for j in range(20)]}, 0.5)
    assert few.keep_targeted == 0.5
    assert any("would have kept 0.0000" in note for note in few.notes)


def test_a_module_whose_components_cost_as_much_as_its_weight_becomes_dense():
    plan = planned({"a": [5.0] * 20, "b": [1.0] * 2 + [-1.0] * 18}, 0.6)
    assert plan.modules["a"].rank is None
    assert plan.modules["b"].rank == 2


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0\b.*above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"start_low": 0.0}, r"start_low is 0\.0\b.*above 0"),
        ({"start_low": 7.0}, r"start_high is 6\.0\b.*at least 7"),
        ({"start_high": math.inf}, "start_high is inf: expected a finite number"),
        ({"pressure_low": -1.0}, r"pressure_low is -1\.0\b.*at least 0"),
        ({"pressure_low": 2.0}, r"pressure_high is 1\.5\b.*at least 2"),
        ({"pressure_growth": 0.9}, r"pressure_growth is 0\.9\b.*at least 1"),
        ({"period": 0}, r"period is 0\b.*at least 1"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"variation_weight": -0.1}, "variation_weight is -0.1"),
        ({"budget_weight": -0.1}, "budget_weight is -0.1"),
        ({"patience": -1}, r"patience is -1\b.*at least 0"),
        ({"noise": "normal"}, r"'normal'.*gumbel, logistic, none"),
        ({"cycle": "square"}, r"'square'.*cosine, triangular"),
        ({"pressure": "width"}, r"'width'.*layers, log_ratio, logits"),
        ({"pressure": "log_ratio"}, r"logits of 1 here, but start_low is 3: lower it, or choose the pressure layers"),
        ({"pressure": "log_ratio", "noisy_count": True}, r"logits of 2\.5 here, but start_low is 3"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LLRC(**settings)


# -- learning ------------------------------------------------------------------------------------------------------


def quick(**changes):
    """Settings that bring the logits to the threshold in a few steps."""
    return LLRC(**{"start_high": 1.2, "start_low": 0.6, "period": 4, **changes})


def llrc_learner(**changes):
    terms = DataTerms(cross_entropy=0.0, divergence=0.5)
    settings = {"mask": quick(), "data_terms": terms, "optimizer": lambda p: torch.optim.Adam(p, lr=0.1)}
    return make_learner(**{**settings, **changes})


def saving(folder, every=1):
    return ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")


def resume(learner, folder, step):
    callbacks = [saving(folder / f"from {step}")]
    path = folder / f"step={step}.ckpt"
    return fit(learner, max_epochs=10, ckpt_path=path, enable_checkpointing=True, callbacks=callbacks)


def test_a_run_reaches_its_budget_ends_and_exports_any_subset(tmp_path):
    learner = llrc_learner(mask=quick(patience=3))
    trainer = fit(learner, max_epochs=10)
    reached = int(learner.shared.reached)
    assert 0 < reached < 60
    assert trainer.global_step == reached + 3
    assert trainer.should_stop
    plan = learner.plan()
    assert 0.49 < plan.keep_targeted <= 0.5
    assert any(entry.indices is not None for entry in plan.modules.values())
    assert RankPlan.from_json(plan.to_json()) == plan
    model = compress(tiny_model("llama"), plan, learner.store)
    tokens = make_data().train_sequences[:2]
    with torch.no_grad():
        logits = model(tokens).logits
    save_compressed(model, tmp_path / "model", tokenizer=byte_tokenizer(), plan=plan)
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "model")(tokens).logits, logits)


@pytest.mark.parametrize("name", ["llrc", "llrc_whitened", "llrc_two_sided"])
def test_the_recipe_reaches_its_size_by_its_own_threshold(name):
    found = recipe(name)
    learning = found.learning
    # A fifth of the steps, each five times as long.
    mask = LLRC(**{**vars(learning.mask), "period": learning.mask.period // 5})
    steps, lr = learning.steps // 5, 5 * learning.lr
    learner = make_learner(
        mask=mask, keep=0.8, storage=found.storage, decomposition=found.decomposition, data_terms=learning.data_terms,
        optimizer=lambda p: torch.optim.Adam(p, lr=lr),
    )  # fmt: skip
    fit(learner, max_epochs=-1, max_steps=steps)
    assert 0 < learner.shared.reached < steps


def test_the_penalties_are_logged():
    trainer = fit(llrc_learner(mask=quick(budget_weight=1.0)), max_steps=1)
    logged = {name for name in trainer.callback_metrics if name.startswith("loss/")}
    assert logged == {"loss/divergence", "loss/pressure", "loss/variation", "loss/budget", "loss/total"}


def growing():
    return quick(patience=4, pressure="layers", pressure_growth=1.5)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits_and_the_same_end(tmp_path):
    # The first run counts on the last, the checkpoint lies between reaching the budget and the end.
    whole = llrc_learner(mask=growing())
    end = fit(whole, max_epochs=10, enable_checkpointing=True, callbacks=[saving(tmp_path)]).global_step
    for step in (end - 6, end - 2):
        torch.manual_seed(99)
        rest = llrc_learner(mask=growing())
        trainer = resume(rest, tmp_path, step)
        assert trainer.global_step == end
        assert rest.shared.reached == whole.shared.reached
        for name, mask in rest.masks.items():
            assert torch.equal(mask.logits, whole.masks[name].logits)
    saved = read_checkpoint(tmp_path / f"step={end}.ckpt")["state_dict"]
    assert set(saved) == {"shared.reached", *(f"model.{name}.mask.logits" for name in whole.masks)}
    # a run that had ended has no more steps to go
    ended = llrc_learner(mask=growing())
    assert resume(ended, tmp_path, end).global_step == end


def test_noise_is_the_same_when_gradient_checkpointing_computes_again():
    learners = [llrc_learner(gradient_checkpointing=again) for again in (False, True)]
    for learner in learners:
        fit(learner, max_steps=3)
    for name, mask in learners[0].masks.items():
        assert torch.equal(learners[1].masks[name].logits, mask.logits)


def test_masks_never_compute_densely():
    learner = llrc_learner()
    trainer = make_trainer(max_steps=1)
    trainer.fit(learner, make_data())
    assert all(mask.ratio() > 1 for mask in learner.masks.values())
    assert {layer.computation for layer in learner.layers.values()} == {"mask"}


def test_a_start_from_a_plan_of_subsets(tmp_path):
    first = llrc_learner()
    first.build(load_base("random:llama"), make_data())
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(min(shape), generator=generator) for name, shape in first.budget.shapes.items()}
    plan = first.budget.select(scores, method="hand")
    learner = llrc_learner(start=plan.save(tmp_path / "plan.json"))
    learner.build(load_base("random:llama"), make_data())
    for name, entry in learner.plan().modules.items():
        assert (entry.rank, entry.indices) == (plan.modules[name].rank, plan.modules[name].indices)
