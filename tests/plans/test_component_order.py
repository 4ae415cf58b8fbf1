"""Component orders: float32 numbers by module, kept through JSON, damaged ones refused."""

from __future__ import annotations

import base64
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_pl.plans.component_order import ComponentOrder, requested_rank_scores

numbers = st.lists(st.floats(width=32, allow_nan=False), max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=9), numbers, max_size=4))
def test_every_number_survives_json(drawn):
    order = ComponentOrder({name: torch.tensor(values, dtype=torch.float32) for name, values in drawn.items()})
    again = ComponentOrder.from_json(json.loads(json.dumps(order.to_json())))
    assert again == order
    assert {name: values.tolist() for name, values in again.scores.items()} == drawn


def test_scores_are_kept_as_float32_on_the_cpu_apart_from_any_graph():
    given_scores = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scores = ComponentOrder({"a": given_scores}).scores["a"]
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)
    assert ComponentOrder({"a": torch.tensor([2, 1])[::1]}).scores["a"].tolist() == [2.0, 1.0]
    strided = ComponentOrder({"a": torch.arange(6.0)[::2]})
    assert ComponentOrder.from_json(strided.to_json()).scores["a"].tolist() == [0.0, 2.0, 4.0]


def test_equality_is_by_names_and_values():
    order = ComponentOrder({"a": torch.tensor([1.0])})
    assert order == ComponentOrder({"a": torch.tensor([1.0])})
    assert order != ComponentOrder({"b": torch.tensor([1.0])})
    assert order != ComponentOrder({"a": torch.tensor([1.0, 0.0])})
    assert order != {"a": torch.tensor([1.0])}


@pytest.mark.parametrize("bad", [torch.tensor([1.0, math.nan]), torch.ones(2, 2), torch.tensor(1.0)])
def test_what_is_no_list_of_numbers_is_refused(bad):
    with pytest.raises(ValueError, match=r"scores of h.0 .*: expected one number a component"):
        ComponentOrder({"h.0": bad})


@pytest.mark.parametrize("text", ["!", "AAA", base64.b64encode(b"12345").decode(), "ä"])
def test_damaged_text_is_named(text):
    with pytest.raises(ValueError, match=r"h.0 is damaged \(.*\): allocate again"):
        ComponentOrder.from_json({"h.0": text})


def test_requested_ranks_shrink_by_one_factor():
    a, b = requested_rank_scores((30, 40), 20.0), requested_rank_scores((30, 40), 10.0)
    assert [int((scores >= 2.0).sum()) for scores in (a, b)] == [10, 5]
    assert requested_rank_scores((3, 2), math.inf).tolist() == [math.inf, math.inf]
    assert requested_rank_scores((3, 2), 0.0).tolist() == [0.0, 0.0]
