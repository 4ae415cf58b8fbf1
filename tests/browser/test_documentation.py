"""The built documentation: no warning at the build, and pages that work in a real browser, opened from the folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.helpers import ROOT
from tests.helpers.browsing import PageClaims, visit

SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def in_navigation(entries):
    """The files that a part of the navigation names."""
    for entry in entries:
        for target in entry.values():
            yield from in_navigation(target) if isinstance(target, list) else [target]


PAGES = [name.replace(".md", ".html") for name in in_navigation(SETTINGS["nav"])]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason='mkdocs is not installed: pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_every_page_of_the_navigation(site):
    assert [name for name in PAGES if not (site / name).is_file()] == []


def test_site_asks_no_other_server(site):
    fetched = {}
    for page in site.glob("*.html"):
        fetches = r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"'
        fetched[page.name] = re.findall(fetches, page.read_text(encoding="utf-8"))
    assert {name: found for name, found in fetched.items() if found} == {}


def test_every_formula_is_mathml(site):
    assert [page.name for page in site.glob("*.html") if "arithmatex" in page.read_text(encoding="utf-8")] == []


@pytest.fixture(scope="module", params=PAGES)
def visited(browser, site, request):
    return visit(browser, site / request.param)


class TestPagesOfTheDocumentation(PageClaims):
    """Every page of the navigation."""
