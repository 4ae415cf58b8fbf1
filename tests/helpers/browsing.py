"""Pages opened in a real browser, headless Chromium: what goes wrong on them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

WIDE, NARROW = 1280, 390
"""Pixels of a laptop and of a phone."""

LINKS = "() => [...document.querySelectorAll('a[href]')].map(link => link.href)"

# A fold works if its summary can be hit, and if a click shows and another one hides its content.
BROKEN_FOLDS = """() => {
  const broken = [];
  for (const fold of document.querySelectorAll("details")) {
    for (let outer = fold.parentElement; outer; outer = outer.parentElement) outer.open = true;
    const summary = fold.querySelector("summary"), content = summary.nextElementSibling, open = fold.open;
    const name = summary.textContent.trim().slice(0, 60);
    summary.scrollIntoView({ block: "center", behavior: "instant" });
    const box = summary.getBoundingClientRect();
    const hit = document.elementFromPoint(box.left + Math.min(box.width / 2, 40), box.top + box.height / 2);
    if (!summary.contains(hit)) broken.push(`${name}: covered by ${hit && hit.outerHTML.slice(0, 80)}`);
    for (const expected of [!open, open]) {
      summary.click();
      const shown = content.checkVisibility() && content.getBoundingClientRect().height > 0;
      if (fold.open !== expected || shown !== expected) broken.push(`${name}: does not ${expected ? "open" : "close"}`);
    }
  }
  return broken;
}"""

OPEN_FOLDS = "() => document.querySelectorAll('details').forEach(fold => { fold.open = true; })"

# What lies in a box that scrolls or clips is not beyond the edge: the box is what is seen.
OVERFLOWS = """() => {
  const found = [], root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) found.push(`the page is ${root.scrollWidth} wide in ${window.innerWidth}`);
  const contained = element => {
    for (let outer = element.parentElement; outer && outer !== document.body; outer = outer.parentElement)
      if (getComputedStyle(outer).overflowX !== "visible") return true;
    return false;
  };
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.height === 0) continue;
    // Text may run out of an element that itself ends in time.
    const text = getComputedStyle(element).overflowX === "visible" ? box.left + element.scrollWidth : 0;
    const end = Math.round(Math.max(box.right, text));
    if (end <= root.clientWidth + 1) continue;
    if (!element.checkVisibility({ visibilityProperty: true, opacityProperty: true }) || contained(element)) continue;
    found.push(`${element.outerHTML.slice(0, 120)} ends at ${end} of ${root.clientWidth}`);
  }
  return found.slice(0, 5);
}"""


@dataclass
class Visit:
    """What went wrong on a page."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    folds: list[str] = field(default_factory=list)
    overflows: dict[int, list[str]] = field(default_factory=dict)


def open_page(browser, path, visit):
    """Open the file at ``path``; what its console and its requests say goes into ``visit``."""
    page = browser.new_page(viewport={"width": WIDE, "height": 900})
    page.on("console", lambda message: message.type in ("error", "warning") and visit.console.append(message.text))
    page.on("pageerror", lambda error: visit.console.append(str(error)))
    page.on("requestfailed", lambda request: visit.requests.append(f"{request.url}: {request.failure}"))
    page.on("request", lambda request: is_local(request.url) or visit.requests.append(request.url))
    page.goto(Path(path).as_uri())
    return page


def is_local(url):
    return urlsplit(url).scheme in ("file", "data", "blob")


def visit(browser, path):
    """Open the file at ``path`` at both widths, and try its links and its folds."""
    found = Visit()
    page = open_page(browser, path, found)
    found.links = [link for link in page.evaluate(LINKS) if not leads_somewhere(link)]
    found.folds = page.evaluate(BROKEN_FOLDS)
    page.evaluate(OPEN_FOLDS)
    for width in (WIDE, NARROW):
        page.set_viewport_size({"width": width, "height": 900})
        found.overflows[width] = page.evaluate(OVERFLOWS)
    page.close()
    return found


def leads_somewhere(link):
    """Tell whether a link to a file leads to one that is there, and to an anchor in it; others are not followed."""
    parts = urlsplit(link)
    if parts.scheme != "file":
        return parts.scheme in ("https", "mailto")
    path = Path(unquote(parts.path))
    if not path.is_file():
        return False
    return not parts.fragment or unquote(parts.fragment) in anchors(path)


@cache
def anchors(path):
    """The anchors of an HTML file."""
    return set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8")))


class PageClaims:
    """Tests of every page of one kind: the fixture ``visited`` of its module is the visit of each page in turn."""

    def test_console_is_silent(self, visited):
        assert visited.console == []

    def test_nothing_else_is_requested(self, visited):
        assert visited.requests == []

    def test_links_lead_somewhere(self, visited):
        assert visited.links == []

    def test_folds_open_and_close(self, visited):
        assert visited.folds == []

    @pytest.mark.parametrize("width", [WIDE, NARROW])
    def test_nothing_overflows(self, visited, width):
        assert visited.overflows[width] == []
