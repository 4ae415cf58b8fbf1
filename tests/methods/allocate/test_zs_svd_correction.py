"""ZS-SVD's correction: one round by hand, the base untouched, killed runs, and the road to an export."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from filelock import FileLock, Timeout

from lowrank_pl import RankPlan, load_compressed
from lowrank_pl.calibration.build import build_factors, build_gradients
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.export import export
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate import zs_svd_correction as correction
from lowrank_pl.methods.allocate.base import Problem, factors_of_plan
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.methods.allocate.zs_svd import ZSSVD, drop_order
from lowrank_pl.methods.allocate.zs_svd_correction import Rounds, projected_step
from lowrank_pl.models.base import Base
from lowrank_pl.models.targets import dense_weight, find_targets
from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.files import cache_root
from tests.helpers.unchanged import assert_untouched, state

TEXT = "python-docs::part=0%-10%"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


@pytest.fixture
def rounds(monkeypatch):
    """Number of decompositions done by corrections."""
    done = []
    real = correction.decompose

    def counting(*args, **kwargs):
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(correction, "decompose", counting)
    return done


def problem_of(model, sequences, tokenizer, *, keep=0.6, settings=None, directory=None):
    targets = find_targets(model)
    store = build_factors(
        Subject(model, tokenizer, sequences[:4], known_targets=targets), settings=settings, directory=directory
    )
    gradients = build_gradients(Subject(model, tokenizer, sequences[:4], known_targets=targets), directory=directory)
    budget = Constraints().budget(model, targets, keep)
    return Problem(budget, store, targets, model=model, sequences=sequences[:4], gradients=gradients)


def weight_gradients(model, names, sequences):
    """Mean over sequences of the gradient by each weight [out, in], by autograd on the weights themselves."""
    weights = {name: model.get_submodule(name).weight.requires_grad_() for name in names}
    loss = 0.0
    for sequence in sequences:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, sequence[1:]) / len(sequences)
    found = torch.autograd.grad(loss, list(weights.values()))
    return {
        n: g.T if model.get_submodule(n).__class__.__name__ == "Conv1D" else g
        for n, g in zip(names, found, strict=True)
    }


def input_moments(model, names, sequences):
    """Second moment of the inputs of each map."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _, args, __, n=n: seen[n].append(args[0].flatten(0, -2)))
        for n in names
    ]
    with torch.no_grad():
        model(input_ids=sequences)
    for handle in handles:
        handle.remove()
    return {n: (x := torch.cat(parts).double()).T @ x / len(x) for n, parts in seen.items()}


def test_rounds_belong_to_one_run_at_a_time(llama, sequences, tokenizer, monkeypatch):
    real = correction._Correction.make

    def make(self, *args):
        with pytest.raises(Timeout):
            FileLock(self.lock).acquire(timeout=0)
        return real(self, *args)

    monkeypatch.setattr(correction._Correction, "make", make)
    make_allocator("zs_svd", rounds=2, batch=2).plan(problem_of(llama, sequences, tokenizer))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_round_by_hand(family, sequences, tokenizer):
    model = tiny_model(family)
    problem = problem_of(model, sequences, tokenizer)
    before = state(model)
    first = make_allocator("zs_svd").plan(problem)
    plan = make_allocator("zs_svd", rounds=1, batch=2).plan(problem)
    assert_untouched(model, before)
    made = factors_of_plan(plan, problem.factors)

    hand = copy.deepcopy(model)
    names = list(first.modules)
    moving = [name for name in names if first.modules[name].rank is not None]
    cut = {}
    for name in moving:
        part = problem.factors.factors(name, first.modules[name].rank)
        cut[name] = part.left.double() @ part.right.double()
        with torch.no_grad():
            dense_weight(hand.get_submodule(name)).copy_(cut[name])
    gradients = weight_gradients(hand, moving, sequences[:2])
    moments = input_moments(model, names, sequences[:4])
    for name in names:
        weight = dense_weight(model.get_submodule(name)).detach().double()
        moved = weight
        if name in moving:
            g = gradients[name].double()
            moved = cut[name] + (g * (weight - cut[name])).sum() / (g * g).sum() * g
        moment = moments[name]
        root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment)).double())
        sigma = torch.linalg.svdvals(moved @ root)
        torch.testing.assert_close(made.sigma(name), sigma, rtol=1e-3, atol=1e-4 * sigma[0].item())
        factors = made.factors(name)
        torch.testing.assert_close(factors.left @ factors.right, moved.float(), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            dense_weight(hand.get_submodule(name)).copy_(moved)
    gradients = weight_gradients(hand, names, sequences[:2])
    changes = {}
    for name in names:
        factors = made.factors(name)
        changes[name] = torch.stack(
            [-(factors.left[:, i] @ gradients[name] @ factors.right[i]) for i in range(len(factors.sigma))]
        )
    again = problem.budget.select(drop_order(changes, dict.fromkeys(names, 1)), method="zs_svd")
    differ = [
        abs((a.rank or 99) - (b.rank or 99)) for a, b in zip(again.modules.values(), plan.modules.values(), strict=True)
    ]
    # Rounding turns a comparison in the greedy order now and then.
    assert sum(differ) <= 4
    assert plan.kept_parameters == pytest.approx(first.kept_parameters, rel=0.01)


def test_a_round_that_measures_again_by_hand(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer, keep=0.8)
    first = make_allocator("zs_svd").plan(problem)
    moving = [name for name, module in first.modules.items() if module.rank is not None]
    assert first.dense_modules
    before = state(llama)
    plan = make_allocator("zs_svd", rounds=1, batch=2, reprofile=True, random_batch=True).plan(problem)
    assert_untouched(llama, before)
    assert plan.notes[-1] == (
        "weights corrected in 1 rounds on 2 sequences drawn at random, statistics measured again in each"
    )
    made = factors_of_plan(plan, problem.factors)
    assert not (made.directory / "measured").exists()

    hand, cut = copy.deepcopy(llama), {}
    for name in moving:
        part = problem.factors.factors(name, first.modules[name].rank)
        cut[name] = part.left.double() @ part.right.double()
        with torch.no_grad():
            hand.get_submodule(name).weight.copy_(cut[name])
    drawn = Rounds(1, 2, random_batch=True).sequences(sequences[:4], 1)
    gradients = weight_gradients(hand, moving, drawn)
    for name in moving:
        g, weight = gradients[name].double(), llama.get_submodule(name).weight.detach().double()
        with torch.no_grad():
            hand.get_submodule(name).weight.copy_(cut[name] + (g * (weight - cut[name])).sum() / (g * g).sum() * g)
    # The moments are those of the model with the moved weights, for the modules that stay dense too.
    for name, moment in input_moments(hand, list(first.modules), sequences[:4]).items():
        root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment)).double())
        sigma = torch.linalg.svdvals(hand.get_submodule(name).weight.detach().double() @ root)
        torch.testing.assert_close(made.sigma(name), sigma, rtol=1e-3, atol=1e-4 * sigma[0].item())


def test_each_round_draws_its_own_sequences_and_the_same_again():
    calibration = torch.arange(20)[:, None]
    rounds = Rounds(5, 3, random_batch=True)
    drawn = [tuple(rounds.sequences(calibration, number)[:, 0].tolist()) for number in range(1, 6)]
    assert len(set(drawn)) == 5
    assert all(len(set(batch)) == 3 for batch in drawn)
    assert rounds.sequences(calibration, 2)[:, 0].tolist() == list(drawn[1])


@pytest.mark.parametrize(
    ("settings", "decomposition", "message"),
    [
        ({"batch": 3}, None, r"batch 3 and rounds 0: expected at least 1 round"),
        ({"reprofile": True}, None, r"reprofile is True.*rounds 0: expected at least 1 round"),
        ({"rounds": 1, "reprofile": True}, Decomposition("svd"), r"of the kind 'svd', which needs none: leave it out"),
    ],
)
def test_measuring_again_needs_rounds_and_statistics(llama, sequences, tokenizer, settings, decomposition, message):
    with pytest.raises(ValueError, match=message):
        make_allocator("zs_svd", **settings).plan(problem_of(llama, sequences, tokenizer, settings=decomposition))


@pytest.mark.parametrize(
    ("allocator", "kind"), [(ZSSVD(rounds=1, reprofile=True), "svd"), ("fisher", "whitened"), ("svdllm_v2", "fwsvd")]
)
def test_a_wrong_kind_of_factors_is_refused_before_any_are_built(llama, sequences, tokenizer, allocator, kind):
    subject = Subject(llama, tokenizer, sequences[:2])
    with pytest.raises(ValueError, match=f"of the kind '{kind}'"):
        allocate_ranks(subject, allocator=allocator, decomposition=Decomposition(kind))
    assert not [*cache_root().rglob("*.safetensors")]


def test_plan_names_the_factors_that_it_is_for(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    plan = make_allocator("zs_svd", rounds=2, batch=3).plan(problem)
    made = factors_of_plan(plan, problem.factors)
    assert plan.origin == {"store": str(made.directory)}
    assert plan.fingerprint == made.fingerprint
    assert made.directory.parent == problem.factors.directory / "correction"
    same = {key: value for key, value in made.fingerprint.items() if key != "correction"}
    assert same == problem.factors.fingerprint
    assert (made.fingerprint["correction"]["round"], made.fingerprint["correction"]["rounds"]) == (2, 2)
    assert plan.notes[-1] == "weights corrected in 2 rounds on 3 sequences"
    for name in plan.modules:
        assert made.notes(name) == problem.factors.notes(name)
    # Only the last round is kept, and it serves the base itself.
    assert [path.name for path in made.directory.parent.iterdir()] == [made.directory.name]
    with compressed(llama, plan, made), torch.no_grad():
        assert llama(input_ids=sequences[:1]).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"correction differ"):
        compressed(llama, plan, problem.factors).__enter__()
    plain = make_allocator("zs_svd").plan(problem)
    assert factors_of_plan(plain, problem.factors) is problem.factors


def test_dense_modules_keep_their_weight(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer, keep=0.9)
    first = make_allocator("zs_svd").plan(problem)
    assert first.dense_modules
    made = factors_of_plan(make_allocator("zs_svd", rounds=1).plan(problem), problem.factors)
    for name, module in first.modules.items():
        same = torch.equal(made.factors(name).left, problem.factors.factors(name).left)
        assert same == (module.rank is None)


@pytest.mark.parametrize("kind", ["svd", "two_sided", "asvd", "fwsvd"])
@pytest.mark.parametrize("explicit", [False, True])
def test_every_kind_of_factors_uses_the_statistics_on_disk(
    llama, sequences, tokenizer, tmp_path, kind, explicit, monkeypatch
):
    directory = tmp_path / "store" if explicit else None
    problem = problem_of(llama, sequences, tokenizer, settings=Decomposition(kind=kind), directory=directory)
    plan = make_allocator("zs_svd", rounds=1, batch=1).plan(problem)
    made = factors_of_plan(plan, problem.factors)
    from lowrank_pl.calibration import statistics as collected

    for name in ("collect_input_moments", "collect_gradients"):
        monkeypatch.setattr(collected, name, lambda *_, **__: pytest.fail("statistics were collected again"))
    shutil.rmtree(made.directory)
    again = make_allocator("zs_svd", rounds=1, batch=1).plan(problem)
    assert again.modules == plan.modules
    assert factors_of_plan(again, problem.factors).directory == made.directory


def test_a_killed_run_goes_on_after_the_last_finished_round(llama, sequences, tokenizer, rounds, monkeypatch):
    problem = problem_of(llama, sequences, tokenizer)
    drawer = make_allocator("zs_svd", rounds=3, batch=1)
    whole = drawer.plan(problem)
    all_of_it = len(rounds)
    folder = problem.factors.directory / "correction"
    shutil.rmtree(folder)
    before = state(llama)
    counting = correction.decompose
    rounds.clear()

    def interrupt(*args, **kwargs):
        if len(rounds) == all_of_it // 2:
            raise KeyboardInterrupt
        return counting(*args, **kwargs)

    monkeypatch.setattr(correction, "decompose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        drawer.plan(problem)
    assert_untouched(llama, before)
    finished = [path for path in folder.iterdir() if (path / "manifest.json").exists()]
    assert len(finished) == len(list(folder.iterdir())) == 1
    manifest = json.loads((finished[0] / "manifest.json").read_text())
    assert manifest["fingerprint"]["correction"]["round"] == 1
    monkeypatch.setattr(correction, "decompose", counting)
    rounds.clear()
    assert drawer.plan(problem).modules == whole.modules
    assert 0 < len(rounds) < all_of_it
    rounds.clear()
    assert drawer.plan(problem).modules == whole.modules
    assert not rounds


def test_a_run_killed_between_two_rounds_leaves_one_set_of_factors(llama, sequences, tokenizer, monkeypatch):
    problem = problem_of(llama, sequences, tokenizer)
    drawer = make_allocator("zs_svd", rounds=2, batch=1)

    def interrupt(self, number):
        if number > 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(correction._Correction, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            drawer.plan(problem)
    made = factors_of_plan(drawer.plan(problem), problem.factors)
    assert [*(problem.factors.directory / "correction").iterdir()] == [made.directory]


def test_runs_of_fewer_rounds_stay(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    one = factors_of_plan(make_allocator("zs_svd", rounds=1).plan(problem), problem.factors)
    two = factors_of_plan(make_allocator("zs_svd", rounds=2).plan(problem), problem.factors)
    assert one.directory != two.directory
    assert one.sigma("model.layers.0.mlp.up_proj").isfinite().all()


@pytest.mark.parametrize("stop", [1, 2])
def test_base_is_untouched_after_an_error(llama, sequences, tokenizer, monkeypatch, stop):
    problem = problem_of(llama, sequences, tokenizer)
    before = state(llama)
    real, calls = correction.collect_gradients, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop:
            raise ValueError("the loss of calibration batch 0 is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(correction, "collect_gradients", fail)
    with pytest.raises(ValueError, match="the loss of calibration batch 0 is nan"):
        make_allocator("zs_svd", rounds=1).plan(problem)
    assert_untouched(llama, before)
    assert not list((problem.factors.directory / "correction").iterdir())


def test_step_is_the_projection_of_what_was_lost():
    generator = torch.Generator().manual_seed(0)
    weight, cut, gradient = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    moved = projected_step(weight, cut, gradient)
    assert ((weight - moved) * gradient).sum().abs() < 1e-12
    ratio = (moved - cut) / gradient
    torch.testing.assert_close(ratio, ratio[0, 0].expand(5, 4))
    assert torch.equal(projected_step(weight, cut, torch.zeros(5, 4)), cut)


def test_allocate_and_export_are_one_road(tmp_path):
    plan_file = tmp_path / "plan.json"
    plan = allocate(
        Base("random:llama"),
        method="zs_svd",
        settings={"rounds": 1, "batch": 2},
        keep=0.5,
        output=plan_file,
        calibration=Calibration(TEXT, 32, 4),
    )
    assert RankPlan.load(plan_file).origin["store"].split("/")[-2] == "correction"
    folder = export(plan_file, output=tmp_path / "model")
    tokens = torch.arange(64)[None]
    model = tiny_model("llama")
    with torch.no_grad(), compressed(model, plan, factors_of_plan(plan, None)):
        expected = model(input_ids=tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(load_compressed(folder)(input_ids=tokens).logits, expected)
    shutil.rmtree(plan.origin["store"])
    with pytest.raises(ValueError, match=r"the corrected factors at .* are gone, .*`lowrank allocate --method zs_svd`"):
        export(plan_file, output=tmp_path / "again")
