"""Rank plans: their counts, their JSON, and what a hand-edited file may and may not say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_pl.plans.component_order import ComponentOrder
from lowrank_pl.plans.plan import ModulePlan, RankPlan
from lowrank_pl.plans.resize import largest_keep


@pytest.fixture
def plan():
    return RankPlan(
        method="hand",
        keep=0.6,
        modules={
            "z.last": ModulePlan((10, 20), 3),
            "a.first": ModulePlan((20, 10)),
            "m.some": ModulePlan((8, 8), 2, (0, 5)),
        },
        model_parameters=1000,
        bytes_per_parameter=2,
        origin={"base": "here", "calibration": {"text": "t", "length": 8, "windows": 4}},
        fingerprint={"model": "abc"},
        notes=("größer", "second"),
    )


def edited(plan, change) -> str:
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


def test_counts(plan):
    kept = 3 * 30 + 200 + 2 * 16
    assert plan.targeted_parameters == 200 + 200 + 64
    assert plan.kept_parameters == kept
    assert plan.keep_targeted == kept / 464
    assert plan.kept_model_parameters == 1000 - 464 + kept
    assert plan.keep_model == (1000 - 464 + kept) / 1000
    assert (plan.bytes, plan.dense_bytes) == (2 * (536 + kept), 2000)
    assert plan.dense_modules == ["a.first"]


def test_json_is_stable_and_one_line_a_module(plan):
    text = plan.to_json()
    assert text == plan.to_json() == RankPlan.from_json(text).to_json()
    assert text.endswith(
        '  "modules": {\n'
        '    "z.last": {"shape": [10, 20], "rank": 3},\n'
        '    "a.first": {"shape": [20, 10], "rank": "dense"},\n'
        '    "m.some": {"shape": [8, 8], "rank": 2, "indices": [0, 5]}\n'
        "  }\n}\n"
    )
    assert "größer" in text


def test_json_schema(plan):
    data = json.loads(plan.to_json())
    assert list(data) == [
        *("schema", "method", "keep", "parameters", "bytes", "counts"),
        *("constraints", "notes", "origin", "fingerprint", "sha256", "modules"),
    ]
    assert data["schema"] == 2
    assert data["keep"] == {"asked": 0.6, "targeted": plan.keep_targeted, "model": plan.keep_model}
    assert data["parameters"] == {"targeted": {"dense": 464, "kept": 322}, "model": {"dense": 1000, "kept": 858}}
    assert data["bytes"] == {"dense": 2000, "kept": 1716, "per_parameter": 2}
    assert data["counts"] == {"modules": 3, "dense": 1, "any_k": 1, "pivoted": 0}


def test_an_edited_plan_is_read_with_a_warning(plan, tmp_path, caplog):
    path = plan.save(tmp_path / "plan.json")
    assert RankPlan.load(path) == plan
    assert not caplog.text
    path.write_text(path.read_text().replace('"rank": 3', '"rank": 2'))
    assert RankPlan.load(path).modules["z.last"].rank == 2
    assert f"{path} was edited or damaged" in caplog.text


def test_the_order_comes_last_one_line_a_module(plan):
    order = ComponentOrder({"z.last": torch.tensor([math.inf, 2.5]), "m.some": torch.tensor([-math.inf])})
    ordered = replace(plan, order=order, multiple_of=2, floors={"a*": 1.0})
    text = ordered.to_json()
    assert text.endswith('  },\n  "order": {\n    "z.last": "AACAfwAAIEA=",\n    "m.some": "AACA/w=="\n  }\n}\n')
    assert text.startswith(plan.to_json().split('  "constraints"')[0])
    read = RankPlan.from_json(text)
    assert read == ordered != plan
    assert read.order.scores["z.last"].tolist() == [math.inf, 2.5]
    assert json.loads(text)["constraints"] == {"multiple_of": 2, "floors": {"a*": 1.0}, "storage": "factored"}


def test_plans_without_constraints_and_order_are_read(plan):
    read = RankPlan.from_json(edited(plan, lambda d: d.pop("constraints")))
    assert (read.order, read.multiple_of, read.floors) == (None, 1, {})


def test_any_k_modules_are_those_that_keep_no_prefix(plan):
    assert plan.any_k_modules == ["m.some"]
    assert ModulePlan((8, 8), 2, (0, 1)).is_prefix
    assert ModulePlan((8, 8)).is_prefix


def test_the_highest_components():
    scores = torch.tensor([1.0, 5.0, 5.0, -math.inf])
    assert ModulePlan.of_highest((6, 9), None, scores) == ModulePlan((6, 9))
    assert ModulePlan.of_highest((6, 9), 1, scores).indices == (1,)
    assert ModulePlan.of_highest((6, 9), 2, scores).indices == (1, 2)
    assert ModulePlan.of_highest((6, 9), 3, scores).indices is None
    assert ModulePlan.of_highest((6, 9), 5, scores[[1, 1, 0]]) == ModulePlan((6, 9), 5)
    assert ModulePlan.of_highest((6, 9), 1, torch.tensor([])) == ModulePlan((6, 9), 1)


def test_round_trip_through_a_file(plan, tmp_path):
    path = plan.save(tmp_path / "plans" / "plan.json")
    assert RankPlan.load(path) == plan
    assert list(RankPlan.load(path).modules) == ["z.last", "a.first", "m.some"]
    assert RankPlan.load(str(path)).modules["m.some"].indices == (0, 5)


def test_plan_is_read_as_utf8_whatever_the_locale(plan, tmp_path, monkeypatch):
    path = plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "latin-1")
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1", raising=False)
    assert RankPlan.load(path).notes == plan.notes


def test_hand_edited_ranks_hold_and_counts_are_computed_again(plan):
    def change(data):
        data["modules"]["z.last"]["rank"] = 6
        data["modules"]["a.first"]["rank"] = 1
        data["modules"]["m.some"] = {"shape": [8, 8], "rank": "dense"}

    read = RankPlan.from_json(edited(plan, change))
    assert [module.rank for module in read.modules.values()] == [6, 1, None]
    assert read.kept_parameters == 6 * 30 + 30 + 64
    assert json.loads(read.to_json())["parameters"]["targeted"]["kept"] == 274


def test_origin_puts_notes_first(plan):
    told = plan.with_origin({"base": "there"}, {"model": "x"}, ["before"])
    assert told.notes == ("before", "größer", "second")
    assert (told.origin, told.fingerprint) == ({"base": "there"}, {"model": "x"})
    assert plan.origin["base"] == "here"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=99), r"schema 99: .* 1 to 4"),
        (lambda d: d.pop("schema"), r"schema None"),
        (lambda d: d.pop("method"), "method is missing"),
        (lambda d: d["parameters"].pop("model"), "parameters.model is missing"),
        (lambda d: d.update(keep=0.5), "keep: .* 0.5 was given"),
        (lambda d: d["keep"].update(asked=math.nan), "keep.asked: .* finite"),
        (lambda d: d["keep"].update(asked=-1), "keep.asked: .* greater than 0, but -1"),
        (lambda d: d["keep"].update(asked=2), "keep.asked: .* less than or equal to 1, but 2"),
        (lambda d: d["keep"].update(asked="0.5"), "keep.asked: .* valid number, but '0.5'"),
        (lambda d: d["parameters"]["targeted"].update(kept=-1), "parameters.targeted.kept: .*-1"),
        (lambda d: d["parameters"]["model"].update(dense=463), r"parameters.model.dense is 463: .* at least 464"),
        (lambda d: d["parameters"].update(left_out=600), r"parameters.model.dense is 1000: .* at least 1064"),
        (lambda d: d["parameters"].update(left_out=None), "parameters.left_out: .*None"),
        (lambda d: d["bytes"].update(per_parameter=0), "bytes.per_parameter: .* 0 was given"),
        (lambda d: d.update(origin=[]), r"origin: .*\[\] was given"),
        (lambda d: d["origin"].update(base=None), "origin.base: .*None"),
        (lambda d: d["origin"].update(dtype="float8"), "origin.dtype.*'float8'"),
        (lambda d: d["origin"]["calibration"].pop("windows"), "origin.calibration.windows is missing"),
        (lambda d: d["origin"].update(decomposition={"damping": "x"}), "origin.decomposition.damping: .*'x'"),
        (lambda d: d.update(fingerprint=None), "fingerprint: .*None"),
        (lambda d: d["fingerprint"].update(refit={"keep": 7}), "fingerprint.refit.keep: .*7"),
        (lambda d: d.update(konstraints={}), "konstraints is not a field"),
        (lambda d: d.update(order={"z.last": "AACA/wAAIEAAAAAA" * 4}), "'z.last'.* 12 scores .* allocate again"),
        (lambda d: d.update(modules=["a"]), "modules: .* object, but"),
        (lambda d: d.update(modules={}), "modules: .* at least 1 item"),
        (lambda d: d["modules"]["z.last"].pop("rank"), r'modules\["z.last"\].rank is missing'),
        (lambda d: d["constraints"].pop("floors"), "constraints.floors is missing"),
        (
            lambda d: d["constraints"].update(multiple_of="8"),
            r"constraints.multiple_of: .* valid integer, but '8'",
        ),
        (lambda d: d["constraints"].update(multiple_of=0), "multiple_of: .* 0 was given"),
        (
            lambda d: d["constraints"].update(floors={"*": "1"}),
            r'floors\["\*"\]: .* valid number',
        ),
        (
            lambda d: d["constraints"].update(floors={"*": 1.5}),
            r'floors\["\*"\]: .* less than or equal to 1, but 1.5',
        ),
        (lambda d: d["constraints"].update(floors=["*"]), "constraints.floors: .* object, but"),
        (
            lambda d: d.update(order={"z.last": "AAA"}),
            r"z.last is damaged \(.*\): allocate again",
        ),
        (
            lambda d: d.update(order={"z.last": "AAAA"}),
            r"z.last is damaged \(.*\): allocate again",
        ),
        (lambda d: d.update(order={"z.last": "AADAfw=="}), r"scores of z.last .* NaN"),
        (lambda d: d.update(order=3), "order: .*3 was given"),
        (lambda d: d["modules"]["z.last"].pop("shape"), r'modules\["z.last"\].shape is missing'),
        (
            lambda d: d["modules"]["z.last"].update(rank=2.5),
            r"z.last.* 2.5: expected a whole number of at least 1, \"dense\"",
        ),
        (
            lambda d: d["modules"]["z.last"].update(rank="Dense"),
            r"'Dense': expected a whole number of at least 1, \"dense\"",
        ),
        (lambda d: d["modules"]["z.last"].update(rank=True), r"True: expected a whole number"),
        (lambda d: d["modules"]["z.last"].update(rank=None), r"None: expected a whole number"),
        (
            lambda d: d["modules"]["z.last"].update(rank=0),
            r"z.last.* rank is 0: expected a whole number of at least 1",
        ),
        (lambda d: d["modules"]["z.last"].update(rank=11), r"rank of 11 .* expected 1..10"),
        (lambda d: d["modules"]["z.last"].update(shape=[10, 20, 30]), r'z.last"\].shape: .* at most 2 items'),
        (lambda d: d["modules"]["z.last"].update(shape=[10, 20.5]), r"shape\[1\]: .* integer, but 20.5"),
        (lambda d: d["modules"]["z.last"].update(shape=[10, -20]), r"shape\[1\]: .* greater than 0, but -20"),
        (lambda d: d["modules"]["m.some"].update(rank=3), r"m.some.* rank 3 and shape \(8, 8\)"),
        (lambda d: d["modules"]["m.some"].update(indices=[5, 0]), r"expected 2 ascending numbers below 8"),
        (lambda d: d["modules"]["m.some"].update(indices=[5, 5]), r"expected 2 ascending numbers below 8"),
        (lambda d: d["modules"]["m.some"].update(indices=[0, 8]), r"expected 2 ascending numbers below 8"),
        (lambda d: d["modules"]["m.some"].update(indices=[-1, 3]), r"expected 2 ascending numbers below 8"),
        (lambda d: d["modules"]["m.some"].update(indices=[0.5, 3]), r"indices\[0\]: .* integer, but 0.5"),
        (lambda d: d["modules"]["m.some"].update(indices=[]), r"expected 2 ascending numbers below 8"),
        (lambda d: d["modules"]["m.some"].update(rank="dense"), r"indices \(0, 5\).* rank None"),
    ],
)
def test_impossible_plans_are_refused(plan, change, message):
    with pytest.raises(ValueError, match=message):
        RankPlan.from_json(edited(plan, change))


def test_no_json_and_no_file(plan, tmp_path):
    with pytest.raises(ValueError, match="Invalid JSON: "):
        RankPlan.from_json("{")
    with pytest.raises(ValueError, match="schema 'list'"):
        RankPlan.from_json("[]")
    with pytest.raises(ValueError, match=r"absent.json: expected a JSON file"):
        RankPlan.load(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="no plan at"):
        RankPlan.load(tmp_path)
    (tmp_path / "bad.json").write_text(edited(plan, lambda d: d.update(schema=5)))
    with pytest.raises(ValueError, match=r"bad.json: .*schema 5.*`lowrank allocate`"):
        RankPlan.load(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary.json: "):
        RankPlan.load(tmp_path / "binary.json")


WRONG = [None, True, -1, -0.5, 0, 2.5, math.nan, math.inf, 10**30, "nonsense", [], ["x"], {"x": 1}, [[[]]]]


def spoil(data, steps, value, *, add):
    """Set one value of a plan's JSON, at the place that ``steps`` lead to, or add a key there; return the first key."""
    first, here = None, data
    for step in steps:
        inside = [*(here if isinstance(here, dict) else range(len(here)))]
        key = inside[step % len(inside)]
        first = first or key
        outer, here = here, here[key]
        if not isinstance(here, dict | list) or not here:
            break
    if add and isinstance(here, dict):
        here["added"] = value
    else:
        outer[key] = value
    return first


@pytest.mark.fuzz
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(0, 11), min_size=1, max_size=4), value=st.sampled_from(WRONG), add=st.booleans())
def test_a_spoiled_plan_is_read_as_it_was_or_refused_by_file_and_field(plan, tmp_path, steps, value, add):
    plan = replace(plan, order=ComponentOrder({"z.last": torch.ones(3)}), floors={"a*": 0.5})
    data, path = json.loads(plan.to_json()), tmp_path / "spoiled.json"
    field = spoil(data, steps, value, add=add)
    path.write_text(json.dumps(data))
    try:
        read = RankPlan.load(path)
    except ValueError as error:
        said = str(error)
    else:
        said = f"{path}: {field}"
        # Only these may be anything.
        free = ("method", "notes", "origin", "fingerprint", "floors")
        assert replace(read, **{name: getattr(plan, name) for name in free}) == plan
        assert (read.named_base, largest_keep(read)) == (read.origin.get("base", ""), 1.0)
    assert said.startswith(f"{path}: ")
    assert field in said
