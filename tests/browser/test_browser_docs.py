"""The documentation site in a real browser: from disk, with the network off, on a phone and on a desk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from doc_code import DOCS

PAGES = ("index", "quickstart", "concepts", "howto/find", "api/find", "findings", "definitions", "citation")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", str(DOCS), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_open_from_disk_and_fit_the_screen(site: Path, visit: Any, width: int) -> None:
    for name in PAGES:
        seen = visit(site / f"{name}.html", width=width)
        assert seen.requests == [], name
        assert seen.complaints == [], name
        assert seen.overflow() <= 0, name
        assert seen.page.locator("h1").first.is_visible(), name
        broken = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src)"
        assert seen.page.evaluate(broken) == [], name


def test_links_between_pages_lead_somewhere(site: Path, visit: Any) -> None:
    seen = visit(site / "index.html")
    seen.page.locator(".sidebar-tree a", has_text="Find sinks").first.click()
    seen.page.wait_for_load_state()
    assert "Find sinks" in seen.page.title()
    assert seen.page.locator("pre", has_text="sl.find_sinks(model, tokens, scores=scores)").count() >= 1
    seen.page.locator(".sidebar-tree a", has_text="API reference").first.click()
    seen.page.wait_for_load_state()
    assert "API reference" in seen.page.title()
    assert seen.complaints == []


def test_search_works_from_disk(site: Path, visit: Any) -> None:
    seen = visit(site / "index.html")
    box = seen.page.locator("input[name=q]").first
    box.fill("secondary")
    box.press("Enter")
    seen.page.wait_for_selector("#search-results li", timeout=20_000)
    assert seen.page.locator("#search-results li").count() >= 3
    assert seen.requests == []
    assert seen.complaints == []
