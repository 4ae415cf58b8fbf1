"""The sensitivity search against whole forward passes and ASVD's own sorted list; what is measured is kept."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate import strs as sensitivity
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.methods.allocate.strs import grid_scores
from lowrank_pl.models.forward import block_outputs, forward_from, forward_from_is_exact
from lowrank_pl.models.targets import dense_weight, find_targets
from lowrank_pl.models.tiny import FAMILIES, tiny_model
from lowrank_pl.plans.constraints import Constraints

RATIOS = (0.4, 0.6, 0.9)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


@pytest.fixture
def evaluations(monkeypatch):
    """One entry for each perplexity that was computed."""
    done = []
    real = sensitivity.perplexity

    def counting(*args, **kwargs):
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(sensitivity, "perplexity", counting)
    return done


def problem_of(model, sequences, tokenizer, keep=0.6, **constraints):
    targets = find_targets(model)
    store = build_factors(Subject(model, tokenizer, sequences[:3], known_targets=targets))
    return Problem(
        Constraints(storage="factored", **constraints).budget(model, targets, keep),
        store,
        targets,
        model=model,
        sequences=sequences[:3],
    )


def mean_loss(model, sequences):
    with torch.no_grad():
        logits = model(input_ids=sequences).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).item()


def measured_alone(problem, sequences):
    """Loss by (module, ratio), each from a whole forward pass with a multiplied-out weight."""
    found = {}
    for name, (m, n) in problem.budget.shapes.items():
        weight = dense_weight(problem.model.get_submodule(name))
        before = weight.detach().clone()
        for ratio in RATIOS:
            part = problem.factors.factors(name, int(m * n * ratio / (m + n)))
            with torch.no_grad():
                weight.copy_(part.left @ part.right)
            found[name, ratio] = mean_loss(problem.model, sequences)
        with torch.no_grad():
            weight.copy_(before)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_cut_of_the_sorted_list_is_a_plan(family, sequences, tokenizer):
    model = tiny_model(family, layers=3)
    problem = problem_of(model, sequences, tokenizer)
    drawer = make_allocator("strs", ratios=RATIOS, sequences=2, length=40)
    scores = drawer.scores(problem)
    losses = measured_alone(problem, sequences[:2, :40])
    shapes, total = problem.budget.shapes, problem.budget.total
    ordered = sorted(losses, key=losses.get, reverse=True)
    seen = 0
    for cut in range(len(ordered)):
        ratios = dict.fromkeys(shapes, 1.0)
        for name, ratio in ordered[cut:]:
            ratios[name] = min(ratios[name], ratio)
        ranks = {
            n: None if r == 1.0 else int(shapes[n][0] * shapes[n][1] * r / sum(shapes[n])) for n, r in ratios.items()
        }
        kept = sum(shapes[n][0] * shapes[n][1] if rank is None else rank * sum(shapes[n]) for n, rank in ranks.items())
        budget = Constraints(storage="factored").budget(model, problem.targets, kept / total)
        plan = budget.select(scores, method="strs")
        assert {n: module.rank for n, module in plan.modules.items()} == ranks
        seen += 1
    assert seen == len(shapes) * len(RATIOS)


def test_losses_are_those_of_whole_passes(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    modules = list(llama.modules())
    todo = [(t, [int(t.shape[0] * t.shape[1] * r / sum(t.shape)) for r in RATIOS]) for t in problem.targets.modules]
    known = sensitivity.measure(llama, problem.factors, sequences[:3, :48], todo, batch_size=2)
    assert known[sensitivity.DENSE] == pytest.approx(mean_loss(llama, sequences[:3, :48]), rel=1e-6)
    for (name, ratio), loss in measured_alone(problem, sequences[:3, :48]).items():
        m, n = problem.budget.shapes[name]
        assert known[name, int(m * n * ratio / (m + n))] == pytest.approx(loss, rel=1e-5)
    assert list(llama.modules()) == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())


def test_grid_scores_by_hand():
    # 10 x 10: component j has ratio j / 5, so that 1 and 2 are at or below 0.4, 3 leads to 0.4, 4 to 0.6, 5 to 0.8.
    scores = grid_scores(torch.arange(1, 11, dtype=torch.float64) / 5, (0.4, 0.6, 0.8), (3.0, 4.0, 1.0), 7.0)
    assert scores.tolist() == pytest.approx([9.0, 8.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_budgets_below_the_grid_shrink_all_at_one_rate(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer, keep=0.2)
    plan = make_allocator("strs", sequences=1).plan(problem)
    for module in plan.modules.values():
        m, n = module.shape
        assert abs(module.rank - 0.2 * m * n / (m + n)) <= 1
    assert plan.notes[-1] == "sensitivity measured on 1 sequences of 64 tokens"


def test_nothing_is_measured_twice(llama, sequences, tokenizer, evaluations):
    problem = problem_of(llama, sequences, tokenizer)
    first = make_allocator("strs", ratios=RATIOS).plan(problem)
    assert len(evaluations) == 1 + 14 * 3
    evaluations.clear()
    assert make_allocator("strs", ratios=list(RATIOS)).plan(problem).modules == first.modules
    assert not evaluations
    make_allocator("strs", ratios=[0.5, *RATIOS]).plan(problem)
    assert len(evaluations) == 14
    evaluations.clear()
    make_allocator("strs", ratios=RATIOS, sequences=1).plan(problem)
    assert len(evaluations) == 1 + 14 * 3


def test_a_killed_run_goes_on(llama, sequences, tokenizer, evaluations, monkeypatch):
    problem = problem_of(llama, sequences, tokenizer)
    whole = make_allocator("strs", ratios=RATIOS).plan(problem)
    record = next((problem.factors.directory / "sensitivity").iterdir())
    lines = record.read_text().splitlines(keepends=True)
    record.unlink()
    evaluations.clear()
    counting = sensitivity.perplexity

    def interrupt(*args, **kwargs):
        if len(evaluations) == 20:
            raise KeyboardInterrupt
        return counting(*args, **kwargs)

    monkeypatch.setattr(sensitivity, "perplexity", interrupt)
    modules = dict(llama.named_modules())
    with pytest.raises(KeyboardInterrupt):
        make_allocator("strs", ratios=RATIOS).plan(problem)
    assert dict(llama.named_modules()) == modules
    assert not any("forward" in vars(module) for module in llama.modules())
    with record.open("a") as file:
        file.write('{"module":"model.layers.0.self_at')
    monkeypatch.setattr(sensitivity, "perplexity", counting)
    evaluations.clear()
    assert make_allocator("strs", ratios=RATIOS).plan(problem).modules == whole.modules
    assert len(evaluations) == 1 + 14 * 3 - 20
    assert record.read_text().splitlines(keepends=True) == lines


def test_damaged_record_is_named(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    make_allocator("strs", ratios=[0.5]).plan(problem)
    record = next((problem.factors.directory / "sensitivity").iterdir())
    record.write_text(record.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match=r"\.jsonl is damaged.*delete it"):
        make_allocator("strs", ratios=[0.5]).plan(problem)


def test_modules_that_stay_dense_are_not_measured(llama, sequences, tokenizer, evaluations):
    problem = problem_of(llama, sequences, tokenizer, floors={"*mlp*": 1.0}, keep=0.9)
    plan = make_allocator("strs", ratios=[0.5]).plan(problem)
    assert len(evaluations) == 1 + 8
    assert [name for name in plan.dense_modules if "mlp" in name] == [n for n in plan.modules if "mlp" in n]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resumes_exactly(family, sequences):
    model = tiny_model(family, layers=3)
    assert forward_from_is_exact(model, sequences[:2, :16])
    with torch.no_grad():
        whole = [model(input_ids=sequence[None]).logits for sequence in sequences[:3]]
    outputs = block_outputs(model, sequences[:3], 0, batch_size=1)
    later = block_outputs(model, sequences[:3], 1, batch_size=1, start=1, outputs=outputs)
    runs = []
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad(), forward_from(model, 2, later):
        for sequence, logits in zip(sequences[:3], whole, strict=True):
            assert torch.equal(model(input_ids=sequence[None]).logits, logits)
    handle.remove()
    assert len(runs) == 3
    with torch.no_grad():
        assert torch.equal(model(input_ids=sequences[:1]).logits, whole[0])


def test_families_whose_blocks_share_more_take_whole_passes(llama, sequences, tokenizer, caplog):
    problem = problem_of(llama, sequences, tokenizer)
    exact = make_allocator("strs", ratios=[0.5]).scores(problem)
    record = next((problem.factors.directory / "sensitivity").iterdir())
    record.unlink()
    first, second = llama.model.layers
    kept = {}
    handles = [
        first.mlp.register_forward_hook(lambda _, args, output: kept.update(x=output * 0)),
        second.register_forward_hook(lambda _, args, output: output + kept.pop("x", 1.0)),
    ]
    assert not forward_from_is_exact(llama, sequences[:1, :16])
    with caplog.at_level(logging.INFO):
        scores = make_allocator("strs", ratios=[0.5]).scores(problem)
    for handle in handles:
        handle.remove()
    assert "the blocks of LlamaForCausalLM share more than the hidden state: every loss takes a whole forward" in (
        caplog.text
    )
    assert "minutes to go; a killed run resumes" in caplog.text
    for name, score in scores.items():
        torch.testing.assert_close(score, exact[name], rtol=1e-4, atol=1e-6)


def test_record_is_json_lines_under_what_it_was_made_from(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    make_allocator("strs", ratios=[0.5]).plan(problem)
    record = next((problem.factors.directory / "sensitivity").iterdir())
    head, *rest = [json.loads(line) for line in record.read_text().splitlines()]
    assert head["factors"] == problem.factors.digest
    assert len(rest) == 15
    assert all(math.isfinite(entry["nats"]) for entry in rest)


def test_all_sequences_are_scored_unless_fewer_are_asked_for(llama, sequences, tokenizer, caplog):
    problem = problem_of(llama, sequences, tokenizer)
    known = []
    for settings, used in (({}, sequences[:3]), ({"sequences": 2, "length": 40}, sequences[:2, :40])):
        strs = make_allocator("strs", ratios=[0.5], **settings)
        scores = strs.scores(problem)
        assert strs.notes(problem) == (f"sensitivity measured on {len(used)} sequences of {used.shape[1]} tokens",)
        known.append(scores)
        record = max((problem.factors.directory / "sensitivity").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        dense = json.loads(record.read_text().splitlines()[1])
        assert dense["nats"] == pytest.approx(mean_loss(llama, used), rel=1e-6)
    assert not caplog.messages
    assert make_allocator("strs", ratios=[0.5], sequences=9).scores(problem).keys() == known[0].keys()
    assert caplog.messages == ["sensitivity: 9 sequences were asked for, and the calibration text has 3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": []}, r"ratios are \[\].*one or more fractions between 0 and 1"),
        ({"ratios": [0.5, 1.0]}, r"ratios are \[0\.5, 1\.0\].*between 0 and 1"),
        ({"sequences": 0}, r"sequences is 0.*at least 1 sequence"),
        ({"length": 1}, r"length 1\b.*2 tokens"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_allocator("strs", **settings)


def test_the_model_is_asked_for(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    with pytest.raises(ValueError, match=r"strs was given no model.*give Problem both"):
        make_allocator("strs").plan(Problem(problem.budget, problem.factors, problem.targets))


def test_sequences_are_asked_for(llama, sequences, tokenizer):
    problem = problem_of(llama, sequences, tokenizer)
    with pytest.raises(ValueError, match=r"strs was given no calibration sequences.*give Problem both"):
        make_allocator("strs").plan(Problem(problem.budget, problem.factors, problem.targets, model=llama))
