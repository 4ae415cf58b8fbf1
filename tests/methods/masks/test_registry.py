"""Every method says what paper it is from, and the page of the methods says the same."""

from __future__ import annotations

import re

import pytest
import torch

from lowrank_pl.methods.allocate import ALLOCATORS
from lowrank_pl.methods.masks import ACIP, MASK_METHODS, Mask, paper_of
from lowrank_pl.plans.storage import Storage
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
KINDS = [*ALLOCATORS.values(), *MASK_METHODS.values()]
NOT_ON_ARXIV = {"ars": "Gao et al., NAACL 2024", "energy": "baseline", "fisher": "ours", "rescaled": "ours"}


def paper_cell(kind):
    """The last cell of the method's row on the page, where allocators go by name and masks by class."""
    shown = kind.name if kind.name in ALLOCATORS else kind.__name__
    # The first row: recipes, which have names of methods too, come further down.
    return re.findall(rf"^\| `{shown}` \|.*\| (.*) \|$", PAGE, re.MULTILINE)[0]


def test_mask_methods_are_named_like_their_papers():
    assert list(MASK_METHODS) == ["ara", "llrc", "ars", "dobi_svd", "fermi", "rescaled"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_method_sets_its_paper_itself(kind):
    assert "paper" in vars(kind)
    assert kind.paper is None or re.fullmatch(r"\d{4}\.\d{5}", kind.paper)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.paper], ids=lambda kind: kind.name)
def test_the_page_links_the_paper_of_every_method(kind):
    assert f"[{kind.paper}](https://arxiv.org/abs/{kind.paper})" in paper_cell(kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.paper], ids=lambda kind: kind.name)
def test_the_page_says_where_methods_without_a_number_come_from(kind):
    assert NOT_ON_ARXIV[kind.name] in paper_cell(kind)


def test_the_page_links_the_paper_of_recorded_orders():
    assert f"[{ACIP.paper}](https://arxiv.org/abs/{ACIP.paper})" in PAGE


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_paper_is_in_the_docstring(kind):
    assert (kind.paper or NOT_ON_ARXIV[kind.name]) in kind.__doc__


@pytest.mark.parametrize(
    ("method", "paper"),
    [
        ("ara", "2510.19389"), ("zs_svd", "2602.02848"), ("tanh", "2502.02723"), ("zero_sum", "2602.02848"),
        ("rescaled", None), ("of another package", None),
    ],
)  # fmt: skip
def test_papers_are_found_by_present_and_former_names(method, paper):
    assert paper_of(method) == paper


def test_no_two_methods_share_a_name():
    names = [name for kind in KINDS for name in (kind.name, *kind.former_names)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", MASK_METHODS.values(), ids=lambda kind: kind.name)
def test_methods_whose_masks_name_active_components_say_so(kind):
    mask = kind().create((8, 8), torch.linspace(1, 0.1, 8).double(), 0.5, storage=Storage("factored"))
    assert kind.skips_inactive == (type(mask).active is not Mask.active)
