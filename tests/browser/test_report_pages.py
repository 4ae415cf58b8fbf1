"""Pages of ``lowrank report`` in a real browser: no errors, links and folds that work, and nothing that overflows."""

from __future__ import annotations

import pytest

from lowrank_pl.cli.report import report
from tests.helpers.browsing import PageClaims, Visit, open_page, visit
from tests.helpers.run_folder import plan_of, write_run, write_wide_comparison, write_wide_run

PAGES = ("wide run", "deep run", "tiny run", "plan", "comparison")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind: of a run with every section, of a very deep and of a tiny one, of a plan, a comparison."""
    root = tmp_path_factory.mktemp("pages")
    (root / "plan").mkdir()
    plan_of().save(root / "plan" / "plan.json")
    folders = {
        "wide run": write_wide_run(root / "wide", blocks=30),
        "deep run": write_wide_run(root / "deep", blocks=50),
        "tiny run": write_run(root / "tiny"),
        "plan": root / "plan",
        "comparison": write_wide_comparison(root / "compare"),
    }
    return {name: report(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module", params=PAGES)
def visited(browser, pages, request):
    return visit(browser, pages[request.param])


class TestReportPages(PageClaims):
    """A page of each kind."""


@pytest.fixture
def page(browser, pages):
    found = Visit()
    page = open_page(browser, pages["wide run"], found)
    yield page
    page.close()
    assert found == Visit()


def test_a_cell_shows_its_rank_and_leads_to_its_spectrum(page):
    cell = page.locator(".map td.cell").nth(8)
    cell.hover()
    shown = page.locator("#described")
    assert cell.get_attribute("title") in shown.inner_text()
    fold = page.locator(f"#s{cell.get_attribute('data-n')}").locator("xpath=ancestor::details")
    fold.evaluate("fold => { fold.open = false; }")
    shown.get_by_role("link").click()
    assert page.locator(f"#s{cell.get_attribute('data-n')} svg").is_visible()


def test_arrow_keys_move_through_the_map(page):
    page.locator(".map").locator("xpath=..").focus()
    for key, block in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowDown", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert f"block {block}: " in page.locator("#described").inner_text()
    assert page.locator(".map td.on").count() == 1
