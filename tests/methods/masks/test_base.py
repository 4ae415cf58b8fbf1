"""What masks and mask methods do by default, for methods that define nothing but a gate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank_pl.methods.masks.base import Mask, MaskMethod, ModelMasks, gated_rank
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.storage import Storage

FACTORED = Storage("factored")
SHAPE = (12, 24)  # 8 components cost as much as the dense weight
SIGMA = 0.9 ** torch.arange(12, dtype=torch.float64)


class Gates(Mask):
    """A mask whose parameters are its gates."""

    def __init__(self, rank, storage):
        super().__init__(SHAPE, rank, storage)
        self.gates = nn.Parameter(torch.zeros(rank))

    def forward(self):
        return self.gates


class Plain(MaskMethod):
    """A method that defines nothing but its masks."""

    name = "plain"

    def create(self, shape, sigma, keep, *, storage, kept=None):
        return Gates(self.stored_rank(shape, storage), storage)


@pytest.fixture
def mask():
    made = Plain().create(SHAPE, SIGMA, 0.5, storage=FACTORED)
    with torch.no_grad():
        made.gates.copy_(torch.tensor([1.0, 0.9, 0.6, 0.4, 0.1, 0.0, 0.0, 0.0, 0.0]))
    return made


def test_a_mask_gates_what_the_default_top_pays_for(mask):
    assert mask.rank == gated_rank(SHAPE, 1.2, FACTORED) == 9


def test_the_ratio_is_what_the_sum_of_the_gates_costs(mask):
    ratio = mask.ratio()
    assert ratio.item() == pytest.approx(3.0 / 8)
    ratio.backward()
    assert mask.gates.grad.tolist() == pytest.approx([1 / 8] * 9)


def test_components_that_are_more_than_half_on_are_kept(mask):
    assert mask.kept().nonzero().flatten().tolist() == [0, 1, 2]
    assert not mask.kept().requires_grad


def test_all_components_are_active(mask):
    assert mask.active() is None


def test_the_penalty_is_the_squared_distance_from_the_budget(mask):
    masks = ModelMasks({"a": mask})
    terms = Plain().penalties(masks, torch.stack([mask.ratio()]), 0.5, 0)
    assert list(terms) == ["budget"]
    assert terms["budget"].item() == pytest.approx(100 * (3 / 8 - 0.5) ** 2)


def test_the_penalty_has_a_gradient_beyond_dense(mask):
    with torch.no_grad():
        mask.gates.fill_(1.0)
    masks = ModelMasks({"a": mask})
    Plain().penalties(masks, torch.stack([mask.ratio()]), 0.5, 0)["budget"].backward()
    assert (mask.gates.grad > 0).all()


def test_the_plan_has_the_sum_of_the_gates_as_rank(mask):
    other = Plain().create(SHAPE, SIGMA, 0.5, storage=FACTORED)
    with torch.no_grad():
        other.gates[:5] = 1.0
    budget = Budget(keep=0.5, shapes={"a": SHAPE, "b": SHAPE}, model_parameters=576, storage="factored")
    plan = Plain().finalise(ModelMasks({"a": mask, "b": other}), budget)
    assert plan.method == "plain"
    assert [module.rank for module in plan.modules.values()] == [3, 5]


def test_the_plan_has_modules_dense_whose_ratio_is_one(mask):
    dense = Plain().create(SHAPE, SIGMA, 0.5, storage=FACTORED)
    with torch.no_grad():
        dense.gates[:8] = 1.0
    budget = Budget(keep=0.75, shapes={"a": SHAPE, "b": SHAPE}, model_parameters=576, storage="factored")
    plan = Plain().finalise(ModelMasks({"a": mask, "b": dense}), budget)
    assert [module.rank for module in plan.modules.values()] == [4, None]


def test_masks_of_a_model_have_nothing_in_common_by_default(mask):
    assert Plain().shared_module({"a": mask}) is None
    assert ModelMasks({"a": mask}).shared is None


def test_masks_of_a_model_are_a_mapping_by_name(mask):
    shared = nn.Linear(1, 1)
    masks = ModelMasks({"a": mask}, shared)
    assert list(masks) == ["a"]
    assert masks["a"] is mask
    assert masks.shared is shared
