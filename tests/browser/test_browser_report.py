"""The report in a real browser: offline, silent, every figure drawn, hover, narrow and wide windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import Visit
from reporting import NASTY, SMALL, nasty, planted, texts

import sinklens as sl
from sinklens.report import export as exporting, write as writing

pytestmark = pytest.mark.browser

# What each figure shows: traces, drawn marks (paths, images, points), its size.
DRAWN = """() => [...document.querySelectorAll(".plot")].map(place => {
  const box = place.getBoundingClientRect();
  return {
    name: place.dataset.name, traces: (place.data || []).length, width: box.width, height: box.height,
    marks: place.querySelectorAll(".trace path, .hm image, .point path, .bars path, .heatmaplayer image").length,
  };
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose tokens try to be markup."""
    model = planted()
    out = tmp_path_factory.mktemp("browser") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "can_draw", lambda: False)
        patch.setattr(writing, "QUICK", SMALL)
        sl.write_report(model, nasty(texts(model)), out, quick=True)
    return out


@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_opens_offline_and_fits_narrow_and_wide_windows(
    visit: Callable[..., Visit], folder: Path, width: int
) -> None:
    seen = visit(folder / "index.html", width=width)
    drawn = seen.page.evaluate(DRAWN)
    assert len(drawn) >= 10
    for figure in drawn:
        assert figure["traces"] > 0, figure
        assert figure["marks"] > 0, figure
        assert figure["height"] > 100, figure
        assert figure["width"] >= min(width - 60, 300), figure
    told = "s => !s.checkVisibility() || s.classList.contains('wide') == s.scrollWidth > s.clientWidth + 8"
    assert seen.page.evaluate(f"[...document.querySelectorAll('.scroller')].every({told})"), "who may scroll is told so"
    assert (seen.page.locator(".scroller.wide > .plot").count() > 0) == (width == 390)
    assert seen.overflow() <= 0
    assert seen.requests == []
    assert seen.complaints == []


def test_what_tokens_hold_is_shown_as_text_and_never_run(visit: Callable[..., Visit], folder: Path) -> None:
    seen = visit(folder / "index.html")
    assert seen.page.title().startswith("Attention sinks of")
    assert seen.page.locator(".strip").inner_text().count(NASTY[0]) == 1
    assert seen.page.locator(".strip b, .strip img, td b, td img, li b").count() == 0
    assert seen.page.evaluate("[...document.querySelectorAll('svg b, svg img, svg script')].length") == 0


def test_hovering_over_a_figure_shows_the_token_as_text(visit: Callable[..., Visit], folder: Path) -> None:
    seen = visit(folder / "index.html")
    place = seen.page.locator('.plot[data-name="where-positions"]')
    place.scroll_into_view_if_needed()
    box: Any = place.locator(".plot-container .draglayer .nsewdrag").first.bounding_box()
    columns = 56  # the text's length; the first token is the first column
    seen.page.mouse.move(box["x"] + box["width"] * 0.5 / columns, box["y"] + box["height"] / 2)
    shown = place.locator(".hoverlayer .hovertext").first
    shown.wait_for(timeout=5000)
    words = shown.text_content() or ""
    assert "position 0" in words
    assert "document.title" in words
    assert "alpha 0." in words
    assert seen.page.title().startswith("Attention sinks of")


def test_tables_open_and_links_lead_to_files(visit: Callable[..., Visit], folder: Path) -> None:
    seen = visit(folder / "index.html", width=390)
    closed = seen.page.locator("details.sheet:not([open]) > summary")
    assert closed.count() > 5
    while closed.count():
        closed.first.click(position={"x": 8, "y": 8})
    assert seen.overflow() <= 0, "wide tables scroll by themselves"
    links = seen.page.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    local = [link for link in links if not link.startswith("#")]
    assert len(local) > 10
    for link in local:
        assert (folder / link).is_file(), link
    for link in links:
        if link.startswith("#"):
            assert seen.page.locator(link).count() == 1, link


def test_attention_pages_draw_without_a_network(visit: Callable[..., Visit], folder: Path) -> None:
    pages = sorted((folder / "attention").glob("*.html"))
    assert len(pages) >= 2
    for page in pages:
        seen = visit(page)
        drawn = seen.page.locator("[id^=circuits-vis]")
        drawn.locator("svg, canvas, span, div").first.wait_for(timeout=10000)
        assert len(drawn.inner_text()) > 20
        assert seen.requests == []
        assert not [words for words in seen.complaints if not words.startswith("warning")]
        assert "hit" not in seen.page.title()
