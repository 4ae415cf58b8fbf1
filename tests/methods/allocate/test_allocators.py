"""Closed-form allocators against their formulas written again, and what they say when something is missing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.app import main
from lowrank_pl.methods.allocate import ALLOCATORS, Allocator, make_allocator
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.models.targets import Target, Targets
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.resize import nested
from tests.helpers import ROOT

LAYERS = 3
KINDS = {
    "self_attn.q_proj": (24, 24), "self_attn.k_proj": (12, 24), "self_attn.v_proj": (12, 24),
    "self_attn.o_proj": (24, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
}  # fmt: skip
TOKENS = 500


def problem_of(keep=0.5, kinds=KINDS, kind="whitened"):
    """A problem with spectra of its own for every module, and each with another decay."""
    modules, sigmas = [], {}
    generator = torch.Generator().manual_seed(0)
    for block in range(LAYERS):
        for place, (inner, shape) in enumerate(kinds.items()):
            name = f"layers.{block}.{inner}"
            modules.append(Target(name, block, inner, shape, name))
            decay = torch.linspace(0, 1 + block + place / 2, min(shape), dtype=torch.float64)
            noise = torch.rand(min(shape), generator=generator, dtype=torch.float64) * 0.1
            sigmas[name] = ((-decay).exp() * (1 + noise) * (place + 1) / 10).sort(descending=True).values
    shapes = {target.name: target.shape for target in modules}
    factors = SimpleNamespace(
        sigma=sigmas.__getitem__, fingerprint={"kind": kind}, notes=lambda name: {"tokens": str(TOKENS)}
    )
    total = sum(m * n for m, n in shapes.values())
    budget = Budget(storage="factored", keep=keep, shapes=shapes, model_parameters=total)
    return Problem(budget, factors, Targets(tuple(modules), ())), sigmas, shapes


def ranks_near(plan, requested):
    """Assert that ranks are one multiple of the requested ones, rounded down, but for the rest of the budget."""
    fractions = {}
    for name, module in plan.modules.items():
        m, n = module.shape
        top = (m * n - 1) // (m + n)
        if module.rank is not None and 1 < module.rank < top:
            fractions[name] = (module.rank / requested[name], (module.rank + 1) / requested[name])
    assert len(fractions) > len(plan.modules) / 2
    lows = sorted(low for low, _ in fractions.values())
    highs = sorted(high for _, high in fractions.values())
    factor = max(lows[:-1])
    assert sum(not low <= factor <= high for low, high in fractions.values()) <= 2, (lows, highs)


def test_energy_keeps_the_largest_shares():
    problem, sigmas, shapes = problem_of()
    scores = make_allocator("energy").scores(problem)
    for name, sigma in sigmas.items():
        total = sum(value.item() ** 2 for value in sigma)
        assert scores[name].tolist() == pytest.approx([value.item() ** 2 / total for value in sigma])
    for threshold in (0.004, 0.01, 0.02, 0.05):
        ranks = {}
        for name, (m, n) in shapes.items():
            rank = max(1, sum(share > threshold for share in scores[name].tolist()))
            ranks[name] = rank if rank * (m + n) < m * n else None
        kept = sum(m * n if ranks[x] is None else ranks[x] * (m + n) for x, (m, n) in shapes.items())
        plan = make_allocator("energy").plan(problem_of(keep=kept / problem.budget.total)[0])
        assert {name: module.rank for name, module in plan.modules.items()} == ranks


def test_energy_of_a_weight_of_zeros():
    problem, sigmas, _ = problem_of()
    sigmas["layers.0.mlp.up_proj"].zero_()
    plan = make_allocator("energy").plan(problem)
    assert plan.modules["layers.0.mlp.up_proj"].rank == 1


def entropy_rank(sigma):
    shares = [value.item() ** 2 for value in sigma]
    shares = [share / sum(shares) for share in shares]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_drank_over_the_model_by_its_formula(shift):
    problem, sigmas, shapes = problem_of(keep=0.4)
    requested = {n: math.sqrt(entropy_rank(sigma) / (shapes[n][0] + shapes[n][1])) for n, sigma in sigmas.items()}
    for block in range(LAYERS):
        q, k, v = (f"layers.{block}.self_attn.{part}_proj" for part in "qkv")
        freed = shift * (requested[q] * 48 + requested[k] * 36)
        requested[q], requested[k], requested[v] = (
            (1 - shift) * requested[q],
            (1 - shift) * requested[k],
            requested[v] + freed / 36,
        )
    drank = make_allocator("drank", shift=shift, scope="model")
    for name, score in drank.scores(problem).items():
        assert score.tolist() == pytest.approx([requested[name] / j for j in range(1, min(shapes[name]) + 1)])
    plan = drank.plan(problem)
    ranks_near(plan, requested)
    assert plan.notes == (("15% of q and k was moved to v in 3 blocks",) if shift else ())


def test_drank_moves_ranks_as_they_are_where_shapes_are_equal():
    kinds = {f"attn.{part}_proj": (16, 16) for part in "qkv"}
    before, after = (
        make_allocator("drank", shift=shift, scope="model").scores(problem_of(kinds=kinds)[0]) for shift in (0.0, 0.2)
    )
    q, k, v = (f"layers.1.attn.{part}_proj" for part in "qkv")
    assert after[v][0].item() == pytest.approx((before[v] + 0.2 * (before[q] + before[k]))[0].item())


def two_blocks(keep, **spectra):
    """A problem of two blocks whose layers are 16 x 16: a rank costs 32, and 8 ranks as much as dense."""
    problem, sigmas, _ = problem_of(keep=keep, kinds=dict.fromkeys(spectra, (16, 16)))
    problem = replace(
        problem,
        budget=replace(problem.budget, shapes={n: s for n, s in problem.budget.shapes.items() if ".2." not in n}),
    )
    for kind, pair in spectra.items():
        for block, sigma in enumerate(pair):
            sigmas[f"layers.{block}.{kind}"] = torch.tensor(sigma + [0.0] * (16 - len(sigma)))
    return problem


def requested_by(allocator, problem):
    return {name.removeprefix("layers."): scores[0].item() for name, scores in allocator.scores(problem).items()}


def test_drank_adopts_dynamic_ranks_type_by_type_where_they_lose_less():
    # Effective ranks of 4 and 1 share 6 ranks as 4 and 2, which loses nothing; uniform ranks 3 and 3 lose one value.
    better = ([1.0] * 4, [9.0])
    # 3.9 and 2.1 lose a value of the second layer that 3 and 3 keep, and the first hardly counts.
    worse = ([0.01] * 4, [10.0, 1.0, 1.0])
    problem = two_blocks(0.375, up_proj=better, gate_proj=better, down_proj=worse, q_proj=worse)
    drank = make_allocator("drank", shift=0.0)
    found = requested_by(drank, problem)
    assert [found["0.up_proj"], found["1.up_proj"]] == pytest.approx([4.0, 2.0])
    for kind in ("gate_proj", "down_proj"):
        assert [found[f"0.{kind}"], found[f"1.{kind}"]] == pytest.approx([3.0, 3.0]), kind
    # Queries, keys and values take them whatever they lose.
    assert found["0.q_proj"] + found["1.q_proj"] == pytest.approx(6.0)
    assert found["0.q_proj"] > 3.8
    assert drank.plan(problem).notes == ("uniform ranks in gate_proj, down_proj, dynamic ranks in the other types",)


@pytest.mark.parametrize(
    ("keep", "shift", "queries", "values"),
    [
        (0.25, 0.5, 1.0, 4.0),
        # 4 ranks each, of which q and k give 3: values of 10 would cost more than dense, so that 2 a block come back.
        (0.5, 0.75, 2.0, 8.0),
    ],
)
def test_drank_moves_parameters_to_all_values_in_equal_parts(keep, shift, queries, values):
    flat = ([1.0] * 16, [1.0] * 16)
    found = requested_by(make_allocator("drank", shift=shift), two_blocks(keep, q_proj=flat, k_proj=flat, v_proj=flat))
    for block in (0, 1):
        assert [found[f"{block}.{part}_proj"] for part in "qkv"] == pytest.approx([queries, queries, values])


@pytest.mark.parametrize("storage", ["factored", "auto"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_drank_spends_the_budget_of_each_type_within_it(storage, keep):
    problem = problem_of(keep=keep)[0]
    problem = replace(problem, budget=replace(problem.budget, storage=storage))
    plan = make_allocator("drank", shift=0.0).plan(problem)
    for kind in KINDS:
        modules = [module for name, module in plan.modules.items() if name.endswith(kind)]
        spent = sum(module.parameters for module in modules) / sum(math.prod(module.shape) for module in modules)
        # Rounding gives each layer at most one rank more or less.
        assert abs(spent - keep) <= sum(KINDS[kind]) / math.prod(KINDS[kind]), kind


def test_drank_says_where_nothing_can_be_moved():
    kinds = {"attn.c_attn": (72, 24), "mlp.c_fc": (40, 24)}
    plan = make_allocator("drank").plan(problem_of(kinds=kinds)[0])
    assert (
        plan.notes[-1]
        == "no block has q_proj, k_proj and v_proj among its targets: nothing was moved from q and k to v"
    )


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_svdllm_v2_by_its_formula(keep):
    problem, sigmas, _ = problem_of(keep=keep)
    scores = make_allocator("svdllm_v2").scores(problem)
    requested = {}
    for inner, (m, n) in KINDS.items():
        inverse = []
        for block in range(LAYERS):
            sigma = sigmas[f"layers.{block}.{inner}"]
            uniform = int(keep * m * n / (m + n))
            loss = math.sqrt(TOKENS * sum(value.item() ** 2 for value in sigma[uniform:]))
            inverse.append(1 / math.log(math.e + loss))
        removed = [LAYERS * (1 - keep) * value / sum(inverse) for value in inverse]
        # The type as a whole is left what it was given.
        assert sum(removed) == pytest.approx(LAYERS * (1 - keep))
        for block in range(LAYERS):
            requested[f"layers.{block}.{inner}"] = (1 - removed[block]) * m * n / (m + n)
    for name, score in scores.items():
        assert score[0].item() == pytest.approx(requested[name])
        assert (score * torch.arange(1, len(score) + 1)).tolist() == pytest.approx([requested[name]] * len(score))
    ranks_near(make_allocator("svdllm_v2").plan(problem), requested)


def test_svdllm_v2_removes_less_where_more_is_lost():
    problem, sigmas, _ = problem_of(keep=0.5)
    sigmas["layers.1.mlp.up_proj"].mul_(1000)
    ranks = [make_allocator("svdllm_v2").plan(problem).modules[f"layers.{b}.mlp.up_proj"].rank for b in range(LAYERS)]
    assert ranks[1] > max(ranks[0], ranks[2])


def test_svdllm_v2_on_more_tokens_is_nearer_to_uniform():
    apart = []
    for tokens in (10**6, 10**9):
        problem = problem_of(keep=0.5)[0]
        problem.factors.notes = lambda name, tokens=tokens: {"tokens": str(tokens)}
        scores = make_allocator("svdllm_v2").scores(problem)
        kept = [scores[f"layers.{block}.mlp.up_proj"][0].item() for block in range(LAYERS)]
        apart.append(max(kept) - min(kept))
    assert apart[1] < apart[0]


def test_svdllm_v2_of_losses_below_one_by_hand():
    # Two of three layers lose nothing and one loses 1, where the paper's 1 / log(loss) would be infinite.
    problem, sigmas, _ = problem_of(keep=0.5, kinds={"mlp.up_proj": (24, 24)})
    problem.factors.notes = lambda name: {"tokens": "1"}
    for block in range(LAYERS):
        sigmas[f"layers.{block}.mlp.up_proj"] = torch.tensor([9.0] * 6 + [1.0 * (block == 2)] + [0.0] * 17)
    weights = [1.0, 1.0, 1 / math.log(math.e + 1)]
    scores = make_allocator("svdllm_v2").scores(problem)
    for block, weight in enumerate(weights):
        kept = 1 - 0.5 * weight / (sum(weights) / 3)
        assert scores[f"layers.{block}.mlp.up_proj"][0].item() == pytest.approx(12 * kept)


def test_svdllm_v2_notes_modules_of_which_it_would_remove_more_than_there_is():
    problem, sigmas, _ = problem_of(keep=0.3)
    assert make_allocator("svdllm_v2").plan(problem).notes == ("truncation losses over 500 tokens",)
    for block, scale in enumerate((0.0, 1e6, 1e6)):
        sigmas[f"layers.{block}.mlp.up_proj"].mul_(scale)
    plan = make_allocator("svdllm_v2").plan(problem)
    assert plan.notes[1:] == (
        "the rule removes all of 1 modules, which keep the least rank, e.g. layers.0.mlp.up_proj",
    )
    assert plan.modules["layers.0.mlp.up_proj"].rank == 1


@pytest.mark.parametrize("name", ["uniform", "energy", "drank", "svdllm_v2"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1.0])
def test_the_budget_is_met_and_other_sizes_follow(name, keep):
    problem, _, _ = problem_of(keep=keep)
    plan = make_allocator(name).plan(problem)
    steps = [sum(module.shape) for module in plan.modules.values()]
    assert plan.kept_parameters <= keep * plan.targeted_parameters
    assert keep - plan.keep_targeted <= max(steps) / plan.targeted_parameters
    assert (plan.method, plan.order is not None) == (name, True)
    sizes = nested(plan, [0.9, 0.5, 0.2])
    for larger, smaller in ((0.9, 0.5), (0.5, 0.2)):
        for module in plan.modules:
            assert (sizes[smaller].modules[module].rank or 99) <= (sizes[larger].modules[module].rank or 99)


def test_factors_without_output_errors_are_refused():
    with pytest.raises(ValueError, match=r"'svd'.*expected whitened or two_sided or asvd"):
        make_allocator("svdllm_v2").plan(problem_of(kind="svd")[0])


@pytest.mark.parametrize(("given", "what"), [({}, "model"), ({"model": "a model"}, "calibration sequences")])
def test_what_is_measured_on_has_to_be_given(given, what):
    with pytest.raises(ValueError, match=rf"strs was given no {what}.*both model and sequences"):
        make_allocator("strs").plan(replace(problem_of(kind="asvd")[0], **given))


def test_names_are_those_of_the_papers():
    assert list(ALLOCATORS) == ["uniform", "energy", "drank", "svdllm_v2", "strs", "zs_svd", "fisher"]
    assert all(make_allocator(name).name == name for name in ALLOCATORS)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("best", {}, r"'best'.*expected one of uniform, energy, drank"),
        ("zero_sum", {}, r"'zero_sum'.*called zs_svd now"),
        ("energy", {"x": 1}, r"'x'.*expected none, it has no settings"),
        ("drank", {"shifts": 1}, r"'shifts'.*expected one of shift"),
        ("drank", {"scope": "block"}, r"scope is 'block'.*type, model"),
        ("drank", {"shift": 1.0}, r"shift is 1\.0.*in \[0, 1\)"),
        ("drank", {"shift": "x"}, "shift is 'x': expected float"),
        ("zs_svd", {"rounds": 2.5}, r"rounds is 2\.5: expected int"),
        ("strs", {"ratios": "half"}, r"ratios is 'half': expected Sequence\[float\]"),
        ("no_such_module:Mine", {}, r"'no_such_module:Mine'.*MODULE:CLASS of a module that Python finds"),
        ("tests.methods.allocate.test_allocators:NoSuchClass", {}, r"NoSuchClass.*expected MODULE:CLASS"),
        ("tests.methods.allocate.test_allocators:NotOne", {}, r":NotOne'.*derived from .*Allocator"),
        ("tests.methods.allocate.test_allocators:Own", {"powers": 2}, r"'powers'.*expected one of power"),
    ],
)
def test_unknown_names_and_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_allocator(name, **settings)


def test_one_value_stands_for_a_list():
    assert make_allocator("strs", ratios=0.5) == make_allocator("strs", ratios=[0.5])


class NotOne:
    """A class that is no allocator."""


@dataclass(frozen=True)
class Own(Allocator):
    """An allocator of another package."""

    power: float = 1.0
    name: ClassVar[str] = "own"

    def scores(self, problem):
        return {name: problem.factors.sigma(name) ** self.power for name in problem.budget.shapes}


def test_an_allocator_of_another_package_by_module_and_class():
    # Not an instance of the class above where pytest imports this file under another name.
    made = make_allocator("tests.methods.allocate.test_allocators:Own", power=2.0)
    assert (made.name, made.power) == ("own", 2.0)
    assert made.plan(problem_of()[0]).method == "own"


@pytest.mark.parametrize("method", list(ALLOCATORS))
def test_every_method_by_its_name(method, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    kind = "two_sided" if method == "fisher" else "whitened"
    words = ["allocate", "--base", "random:llama", "--method", method, "--keep", "0.5", "--length", "32"]
    words += ["--text", "python-docs::part=0%-10%", "--sequences", "4", "--output", str(tmp_path / "plan.json")]
    words += ["--decomposition.kind", kind]
    words += {"strs": ["--settings.ratios", "[0.5]"], "zs_svd": ["--settings.rounds", "1"]}.get(method, [])
    main(words)
    plan = RankPlan.load(tmp_path / "plan.json")
    assert (plan.method, plan.order is not None) == (method, True)
    assert 0.47 < plan.keep_targeted <= 0.5
    assert plan.origin["base"] == "random:llama"


CONFIGS = sorted((ROOT / "configs" / "allocate").glob("*.yaml"))
SMALL = {"strs": ["--settings.sequences", "1", "--settings.ratios", "[0.5]"]}
BASES = {"asvd": "asvd", "strs": "asvd", "fwsvd": "fwsvd", "fisher": "two_sided"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(path, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    words = ["--base", "random:llama", "--text", "python-docs::part=0%-10%", "--length", "32", "--sequences", "2"]
    words += ["--output", str(tmp_path / "plan.json"), *SMALL.get(path.stem, [])]
    main(["allocate", "-c", str(path), *words])
    plan = RankPlan.load(tmp_path / "plan.json")
    method = {"asvd": "uniform", "fwsvd": "uniform", "zs_svd_corrected": "zs_svd"}.get(path.stem, path.stem)
    assert (plan.method, plan.keep) == (method, 0.8)
    assert plan.origin["decomposition"]["kind"] == BASES.get(path.stem, "whitened")
    assert plan.fingerprint.get("correction", {}).get("rounds", 0) == (5 if path.stem == "zs_svd_corrected" else 0)
    said = path.read_text()
    assert f"lowrank allocate NAME_OR_DIR -c allocate/{path.stem}" in said


def test_every_allocator_and_base_has_a_configuration():
    names = {path.stem for path in CONFIGS}
    assert {*ALLOCATORS, "asvd", "fwsvd", "zs_svd_corrected"} == names


def test_help_names_every_method():
    text = allocate.__doc__
    line = next(line for line in text.splitlines() if "method:" in line)
    assert all(name in line for name in ALLOCATORS)


@pytest.mark.parametrize("name", ["uniform", "energy", "svdllm_v2"])
def test_alike_experts_have_equal_ranks(name):
    kinds = {f"mlp.experts.{expert}.{kind}": (40, 24) for expert in range(3) for kind in ("gate_proj", "up_proj")}
    problem, _, _ = problem_of(kinds=kinds)
    plan = make_allocator(name).plan(replace(problem, budget=replace(problem.budget, alike_experts=True)))
    ranks = {}
    for target, module in plan.modules.items():
        ranks.setdefault((target.split(".")[1], target.rpartition(".")[2]), set()).add(module.rank)
    assert {len(each) for each in ranks.values()} == {1}


@pytest.mark.parametrize(
    ("allocator", "kind"),
    [
        (make_allocator("svdllm_v2"), "whitened"),
        (make_allocator("drank"), "whitened"),
        (make_allocator("drank", scope="model"), "whitened"),
        (make_allocator("fisher"), "two_sided"),
    ],
)
def test_singular_values_and_notes_are_read_once(allocator, kind):
    problem = problem_of(kind=kind)[0]
    problem = replace(problem, budget=replace(problem.budget, drop_experts=allocator.drops_experts))
    reads, factors = Counter(), problem.factors

    def counting(what, read):
        return lambda name: reads.update([(what, name)]) or read(name)

    counted = SimpleNamespace(
        sigma=counting("sigma", factors.sigma), notes=counting("notes", factors.notes), fingerprint=factors.fingerprint
    )
    plan = allocator.plan(replace(problem, factors=counted))
    assert set(reads.values()) == {1}
    alone = problem.budget.select(allocator.scores(problem), method=allocator.name, notes=allocator.notes(problem))
    assert plan.modules == alone.modules
    assert plan.notes[: len(alone.notes)] == alone.notes
