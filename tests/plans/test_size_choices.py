"""The exact choice of sizes, compared with every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowrank_pl.plans.size_choices import Sizes, choose_sizes


def parts_of(seed, count=4, sizes=5):
    random = np.random.default_rng(seed)
    return {
        f"part {place}": Sizes(random.integers(1, 50, sizes), random.random(sizes) ** 3 * 10) for place in range(count)
    }


def total(parts, chosen):
    pairs = [(int(parts[name].bytes[index]), float(parts[name].losses[index])) for name, index in chosen.items()]
    return sum(size for size, _ in pairs), sum(loss for _, loss in pairs)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_within_one_step_of_the_best(seed):
    parts = parts_of(seed)
    least = sum(one.bytes.min() for one in parts.values())
    for limit in range(least, 150, 10):
        size, loss = total(parts, choose_sizes(parts, limit))
        assert size <= limit
        every = itertools.product(*(range(len(one.bytes)) for one in parts.values()))
        found = [total(parts, dict(zip(parts, choice, strict=True))) for choice in every]
        best = min(cost for taken, cost in found if taken <= limit)
        # At most one step of one part does not fit.
        assert best <= loss <= best + max(one.losses.max() for one in parts.values())


def test_everything_is_taken_if_it_fits():
    parts = parts_of(0)
    chosen = choose_sizes(parts, 10**6)
    assert all(parts[name].losses[index] == parts[name].losses.min() for name, index in chosen.items())


def test_too_small_a_limit_says_what_is_needed():
    with pytest.raises(ValueError, match=r"smallest sizes take 6 bytes, and 5 are allowed"):
        choose_sizes({"a": Sizes(np.array([6, 9]), np.array([1.0, 0.0]))}, 5)
