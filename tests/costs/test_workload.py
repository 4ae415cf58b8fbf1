"""What learners hold and multiply by, and workloads that can't be."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.costs.workload import Learner, Preparation, Scoring, Step, Workload
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.base import Mask
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.recipes import RECIPES
from lowrank_pl.plans.storage import Storage
from lowrank_pl.text.sequences import Calibration

SHAPE = (64, 96)
METHODS = {type(one.learning.mask): one.learning.mask for one in RECIPES.values() if one.learning is not None}


def test_tokens_skip_the_inactive_components_of_some_methods_only():
    some, every = (Learner("learning", mask, Step(8), 1, storage="factored") for mask in (ARA(), Fermi()))
    assert some.active(SHAPE, 4, 0.5) == int(Storage("factored").rank_at(SHAPE, 0.5)) < some.stored(SHAPE, 4)
    assert every.active(SHAPE, 4, 0.5) == every.stored(SHAPE, 4)


@pytest.mark.parametrize("method", METHODS.values(), ids=[kind.__name__ for kind in METHODS])
def test_methods_say_whether_their_masks_name_active_components(method):
    mask = method.create((8, 8), torch.linspace(1, 0.1, 8, dtype=torch.float64), 0.5, storage=Storage("factored"))
    assert method.skips_inactive == (type(mask).active is not Mask.active)


def test_a_step_counts_the_tokens_of_all_its_batches():
    assert Step(8, batch_size=2, batches=3).tokens == 48


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Workload(keeps=()), "no fraction to keep"),
        (lambda: Workload(keeps=(1.5,)), "1.5"),
        (lambda: Preparation(Calibration(sequences=0)), "sequences is 0: .*at least 1"),
        (lambda: Preparation(Calibration(length=1)), "length is 1: .*at least 2"),
        (lambda: Scoring(length=1), "length is 1: .*at least 2"),
    ],
)
def test_impossible_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
