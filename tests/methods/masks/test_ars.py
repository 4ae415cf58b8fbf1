"""ARS's masks against loops, and their shared network, which is registered once and evaluated once a step."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lowrank_pl import load_compressed
from lowrank_pl.export.export import save_compressed
from lowrank_pl.factors.compression import compress
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.ars import ARS, HyperNetwork
from lowrank_pl.methods.masks.base import ModelMasks
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.models.base import load_base
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.storage import Storage
from lowrank_pl.training.checkpointing import read_checkpoint
from tests.helpers.tiny_training import fit, make_data, make_learner
from tests.helpers.two_processes import as_torchrun_says, in_two_processes

FACTORED = Storage("factored")

SHAPES = [(12, 12), (8, 20), (20, 8), (1, 5)]
# The writer of TensorBoard is closed by the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def spectrum(shape, decay=0.9):
    return decay ** torch.arange(min(shape), dtype=torch.float64)


def some(method=None, keep=1.0):
    """Masks of every shape whose network has random heads, with noise drawn."""
    method = method or ARS()
    masks = {f"m.{i}": method.create(shape, spectrum(shape), keep, storage=FACTORED) for i, shape in enumerate(SHAPES)}
    masks = ModelMasks(masks, method.shared_module(masks))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in masks.shared.heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    method.advance(masks, 5, None)
    return method, masks


def with_network(method, masks):
    return ModelMasks(masks, method.shared_module(masks))


# -- gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_k", [True, False])
def test_the_gate_is_the_papers(any_k):
    _, masks = some(ARS(any_k=any_k))
    for mask in masks.values():
        logits = [3.0 + value for value in mask.learned.tolist()]
        soft = [1 / (1 + math.exp(-(a + b) / 0.4)) for a, b in zip(logits, mask.noise.tolist(), strict=True)]
        gate = [1.0 if value > 0.5 else 0.0 for value in soft]
        measured = mask()
        assert measured.tolist() == gate
        upstream = torch.arange(1.0, mask.rank + 1)
        (slopes,) = torch.autograd.grad((measured * upstream).sum(), mask.learned)
        expected = [u * s * (1 - s) / 0.4 for u, s in zip(upstream.tolist(), soft, strict=True)]
        torch.testing.assert_close(slopes, torch.tensor(expected), rtol=1e-3, atol=1e-5)
    assert 0 < sum(mask().sum().item() for mask in masks.values()) < sum(mask.rank for mask in masks.values())


def slow_gru(inputs, gru):
    """A bidirectional GRU by its equations, one time step after the other, in float64."""
    weights = {name: value.detach().double() for name, value in gru.named_parameters()}
    width = gru.hidden_size

    def run(sequence, suffix):
        hidden, states = torch.zeros(width).double(), []
        w, u = weights[f"weight_ih_l0{suffix}"], weights[f"weight_hh_l0{suffix}"]
        b, c = weights[f"bias_ih_l0{suffix}"], weights[f"bias_hh_l0{suffix}"]
        for x in sequence:
            gates, recurrent = w @ x + b, u @ hidden + c
            reset = torch.sigmoid(gates[:width] + recurrent[:width])
            update = torch.sigmoid(gates[width : 2 * width] + recurrent[width : 2 * width])
            new = torch.tanh(gates[2 * width :] + reset * recurrent[2 * width :])
            hidden = (1 - update) * new + update * hidden
            states.append(hidden)
        return states

    forward, backward = run(list(inputs), ""), run(list(inputs)[::-1], "_reverse")[::-1]
    return [torch.cat(pair) for pair in zip(forward, backward, strict=True)]


def test_the_network_is_a_bidirectional_gru_with_a_head_a_module():
    network = some()[1].shared
    for state, head, row in zip(
        slow_gru(network.inputs.double(), network.recurrent), network.heads, network(), strict=True
    ):
        normal = (state - state.mean()) / (state.var(unbiased=False) + 1e-5).sqrt()
        active = normal * 0.5 * (1 + torch.erf(normal / 2**0.5))
        expected = head.weight.double() @ active + head.bias.double()
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_network_follows_from_its_seed():
    before = torch.get_rng_state()
    one, same, other = (HyperNetwork([4, 6], inputs=8, width=5, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["recurrent.weight_hh_l0"], other["recurrent.weight_hh_l0"])
    assert not torch.equal(one["inputs"], other["inputs"])


# -- start ---------------------------------------------------------------------------------------------------------


def test_starts_are_exact():
    method = ARS()
    assert method.start_keep(0.3) == 1.0
    for shape in SHAPES:
        m, n = shape
        mask = method.create(shape, spectrum(shape), 1.0, storage=FACTORED)
        assert mask.gate_logits().tolist() == [3.0] * min(shape)
        for rank in range(1, (m * n - 1) // (m + n) + 1):
            mask = method.create(shape, spectrum(shape), rank * (m + n) / (m * n), storage=FACTORED)
            assert mask.kept().tolist() == [j < rank for j in range(min(shape))]
            assert mask.ratio().item() == pytest.approx(rank * (m + n) / (m * n))
    free = ARS(any_k=True)
    mask = free.create((12, 12), spectrum((12, 12)), 0.5, kept=torch.tensor([0, 5]), storage=FACTORED)
    assert mask.kept().nonzero().flatten().tolist() == [0, 5]
    mask = method.create((12, 12), spectrum((12, 12)), 2 * 24 / 144, kept=torch.tensor([0, 5]), storage=FACTORED)
    assert mask.kept().nonzero().flatten().tolist() == [0, 1]


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_k", [True, False])
def test_the_loss_is_the_papers(any_k):
    method, masks = some(ARS(budget_weight=16.0, alignment_weight=2.0, any_k=any_k))
    ratios = torch.stack([mask.ratio() for mask in masks.values()])
    terms = method.penalties(masks, ratios, 0.25, 5)
    gates = [mask().tolist() for mask in masks.values()]
    kept = sum(min(sum(gate) * sum(shape), math.prod(shape)) for gate, shape in zip(gates, SHAPES, strict=True))
    target = 0.25 * sum(math.prod(shape) for shape in SHAPES)
    assert kept > target
    assert list(terms) == ["budget", "alignment"]
    assert terms["budget"].item() == pytest.approx(16 * math.log(max(kept, target) / target), rel=1e-4)
    apart = []
    for gate, shape in zip(gates, SHAPES, strict=True):
        sigma = spectrum(shape).tolist()
        scale = math.sqrt(sum(s * s for s in sigma) / len(sigma))
        top = [1.0 if j < sum(gate) else 0.0 for j in range(len(gate))]
        squares = [(g * s / scale - t * s / scale) ** 2 for g, t, s in zip(gate, top, sigma, strict=True)]
        apart.append(sum(squares) / len(squares))
    assert terms["alignment"].item() == pytest.approx(2 * sum(apart) / len(apart), rel=1e-4, abs=1e-7)
    assert terms["alignment"].item() > 0
    assert method.penalties(masks, ratios, 1.0, 5)["budget"].item() == 0


def test_the_alignment_does_not_depend_on_the_scale_of_the_spectrum():
    method, masks = some(ARS(any_k=True))
    ratios = torch.stack([mask.ratio() for mask in masks.values()])
    before = method.penalties(masks, ratios, 0.5, 5)["alignment"].item()
    for mask in masks.values():
        mask.sigma.mul_(37.0)
    assert method.penalties(masks, ratios, 0.5, 5)["alignment"].item() == pytest.approx(before, rel=1e-5)
    for mask in masks.values():
        mask.sigma.zero_()
    assert method.penalties(masks, ratios, 0.5, 5)["alignment"].item() == 0


def test_the_unnormalised_alignment_by_hand():
    method = ARS(any_k=True, alignment="mse", noise="none", alignment_weight=3.0)
    masks = with_network(method, {"a": method.create((4, 4), torch.tensor([4.0, 3, 2, 1]), 1.0, storage=FACTORED)})
    method.advance(masks, 0, None)
    masks["a"].learned = torch.tensor([0.0, -9.0, 0.0, -9.0])
    # On are components 1 and 3, the prefix is 1 and 2: (3^2 + 2^2) / 4.
    terms = method.penalties(masks, torch.stack([masks["a"].ratio()]), 1.0, 0)
    assert terms["alignment"].item() == pytest.approx(3 * 13 / 4)


@pytest.mark.parametrize(("noise", "mean"), [("gumbel", 0.5772), ("logistic", 0.0)])
def test_noise_is_one_gumbel_draw_or_the_difference_of_two(noise, mean):
    method = ARS(noise=noise)
    masks = with_network(method, {"a": method.create((4000, 4000), torch.ones(4000), 1.0, storage=FACTORED)})
    method.advance(masks, 0, None)
    drawn = masks["a"].noise
    assert drawn.mean().item() == pytest.approx(mean, abs=0.1)
    # The variance of a Gumbel variable is pi^2 / 6.
    assert drawn.var().item() == pytest.approx(math.pi**2 / (6 if noise == "gumbel" else 3), rel=0.1)


def test_the_budget_reaches_modules_that_cost_more_than_dense():
    method = ARS()
    masks = with_network(method, {"a": method.create((12, 12), spectrum((12, 12)), 1.0, storage=FACTORED)})
    method.advance(masks, 0, None)
    method.penalties(masks, torch.stack([masks["a"].ratio()]), 0.5, 0)["budget"].backward()
    assert masks["a"].ratio() > 1
    assert (masks.shared.heads[0].bias.grad > 0).all()


# -- the plan ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_k", [True, False])
def test_the_plan_has_no_noise_and_the_present_network(any_k):
    method = ARS(any_k=any_k)
    shape = (20, 20)
    masks = with_network(
        method, {name: method.create(shape, spectrum(shape), 1.0, storage=FACTORED) for name in ("a", "b")}
    )
    method.advance(masks, 0, None)
    with torch.no_grad():  # as an optimizer would, without another evaluation
        for head, on in zip(masks.shared.heads, ([0, 3, 4], [0, 1, 2, 3, 4, 5, 9]), strict=True):
            head.bias.fill_(-5.0)
            head.bias[on] = 1.0
    plan = method.finalise(
        masks, Budget(storage="factored", keep=0.5, shapes=dict.fromkeys(masks, shape), model_parameters=1000)
    )
    assert plan.method == "ars"
    assert [entry.rank for entry in plan.modules.values()] == [3, 7]
    indices = [entry.indices for entry in plan.modules.values()]
    assert indices == ([(0, 3, 4), (0, 1, 2, 3, 4, 5, 9)] if any_k else [None, None])
    assert any("the bare threshold at 0 would have kept 0.5000" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature is 0\.0\b.*above 0"),
        ({"start": -1.0}, r"start is -1\.0\b.*above 0"),
        ({"budget_weight": -1.0}, r"budget_weight is -1\.0\b.*at least 0"),
        ({"alignment_weight": math.nan}, "alignment_weight is nan"),
        ({"width": 0}, r"width is 0\b.*at least 1"),
        ({"inputs": 0}, r"inputs is 0\b.*at least 1"),
        ({"noise": "normal"}, r"'normal'.*gumbel, logistic, none"),
        ({"alignment": "sum"}, r"alignment is 'sum': expected one of share, mse"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ARS(**settings)


# -- learning ------------------------------------------------------------------------------------------------------


def ars_learner(**changes):
    settings = {"mask": ARS(width=8, inputs=4), "optimizer": lambda p: torch.optim.Adam(p, lr=0.02)}
    return make_learner(**{**settings, **changes})


def saving(folder):
    return ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")


def test_the_network_is_once_in_optimizer_and_checkpoint_and_evaluated_once_a_step(tmp_path, monkeypatch):
    learner, calls = ars_learner(), []
    plain = HyperNetwork.forward
    monkeypatch.setattr(HyperNetwork, "forward", lambda self: calls.append(torch.is_grad_enabled()) or plain(self))
    trainer = fit(learner, max_steps=3, enable_checkpointing=True, callbacks=[saving(tmp_path)])
    assert sum(calls) == 3
    (group,) = trainer.optimizers[0].param_groups
    assert len({id(p) for p in group["params"]}) == len(group["params"]) == len(list(learner.shared.parameters()))
    saved = read_checkpoint(tmp_path / "step=3.ckpt")["state_dict"]
    assert set(saved) == {f"shared.{name}" for name in learner.shared.state_dict()}
    assert not any(name.startswith("model.") for name, p in learner.named_parameters() if p.requires_grad)


def test_a_run_meets_its_budget_and_exports(tmp_path):
    learner = ars_learner(mask=ARS(width=8, inputs=4, any_k=True), optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    trainer = fit(learner, max_epochs=10)
    # The penalty has no lower side, so that large steps overshoot; the plan is at the budget all the same.
    assert trainer.callback_metrics["keep/expected"].item() < 0.6
    assert {"loss/budget", "loss/alignment", "loss/cross_entropy"} <= set(trainer.callback_metrics)
    plan = learner.plan()
    assert 0.49 < plan.keep_targeted <= 0.5
    assert any(entry.indices is not None for entry in plan.modules.values())
    model = compress(tiny_model("llama"), plan, learner.store)
    tokens = make_data().train_sequences[:2]
    with torch.no_grad():
        logits = model(tokens).logits
    save_compressed(model, tmp_path / "model", tokenizer=byte_tokenizer(), plan=plan)
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "model")(tokens).logits, logits)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    whole, rest = ars_learner(), ars_learner()
    fit(whole, max_steps=7, enable_checkpointing=True, callbacks=[saving(tmp_path)])
    torch.manual_seed(5)
    path = tmp_path / "step=3.ckpt"
    fit(rest, max_steps=7, ckpt_path=path, enable_checkpointing=True, callbacks=[saving(tmp_path / "rest")])
    for name, value in rest.shared.state_dict().items():
        assert torch.equal(value, whole.shared.state_dict()[name])
    assert rest.plan() == whole.plan()


def test_a_checkpoint_of_another_width_is_refused(tmp_path):
    fit(ars_learner(), max_steps=3, enable_checkpointing=True, callbacks=[saving(tmp_path)])
    other = ars_learner(mask=ARS(width=9, inputs=4))
    other.build(load_base("random:llama"), make_data())
    with pytest.raises(
        ValueError, match=r"shared\.recurrent\.weight_ih_l0: \[24, 4\] there, \[27, 4\] here.*start anew"
    ):
        other.on_load_checkpoint(read_checkpoint(tmp_path / "step=3.ckpt"))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}])
def test_gradient_checkpointing_changes_nothing(changes):
    one, other = ars_learner(), ars_learner(**changes)
    for learner in (one, other):
        fit(learner, max_steps=3)
    for name, value in one.shared.state_dict().items():
        assert torch.equal(value, other.shared.state_dict()[name])


def test_accumulated_batches_share_noise_and_make_the_step_of_one_large_batch():
    large, small = ars_learner(), ars_learner()
    fit(large, make_data(batch_size=2), max_steps=2)
    fit(small, make_data(batch_size=1), max_steps=2, accumulate_grad_batches=2)
    for name, value in large.shared.state_dict().items():
        torch.testing.assert_close(small.shared.state_dict()[name], value, rtol=1e-2, atol=2e-3)


def test_mixed_precision_leaves_the_logits_float32():
    learner = ars_learner()
    fit(learner, max_steps=1, precision="bf16-mixed")
    assert {mask.learned.dtype for mask in learner.masks.values()} == {torch.float32}


# -- two processes -------------------------------------------------------------------------------------------------

WAYS = ("copied", "sharded")
LEARNERS = {
    "ars": {"mask": ARS(width=8)},
    "rescaled": {"mask": Rescaled(warmup=1), "decomposition": Decomposition("two_sided")},
    "llrc": {"mask": LLRC(start_high=0.4, start_low=0.2)},
}


def two_processes(rank, folder):
    """Learn with every kind of mask on a copied and on a sharded base; write what came of it."""
    for name, settings in LEARNERS.items():
        for way, strategy in zip(WAYS, ("ddp", ModelParallelStrategy(save_distributed_checkpoint=False)), strict=True):
            learner = make_learner(**settings)
            with as_torchrun_says(rank):
                fit(learner, strategy=strategy, devices=2, max_steps=4, accumulate_grad_batches=2)
            torch.save([learner.state_dict(), learner.plan().to_json()], folder / f"{name}-{way}-{rank}.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    in_two_processes(two_processes, folder)
    return folder


@pytest.mark.parametrize("name", LEARNERS)
def test_two_processes_learn_the_same_whether_the_base_is_copied_or_sharded(pair, name):
    (state, plan), *others = (torch.load(pair / f"{name}-{way}-{rank}.pt") for way in WAYS for rank in range(2))
    for other, drawn in others:
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())
        assert drawn == plan
    assert name != "rescaled" or state["shared.counted"] == 4
