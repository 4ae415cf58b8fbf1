"""A browser for the tests of this folder, which are skipped where there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="package")
def browser():
    """A headless Chromium: the system's, or else the one that playwright installed."""
    api = pytest.importorskip(
        "playwright.sync_api", reason='playwright is not installed: pip install -e ".[dev]"', exc_type=ImportError
    )
    with api.sync_playwright() as playwright:
        system = next(filter(None, map(shutil.which, INSTALLED)), None)
        if system is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed: apt-get install chromium, or python -m playwright install chromium")
        # Chromium refuses to sandbox itself as root, as in a container; it opens our own pages only.
        browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield browser
        browser.close()
