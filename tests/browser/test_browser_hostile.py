"""Pages of hostile tokens in a real browser: what is in a token is never run, however the page is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from browsing import Visit
from public_calls import WICKED, WRITERS, World

import sinklens as sl

pytestmark = pytest.mark.browser

# A hand on everything but plotly's figures, which take no made-up events: what waits for the mouse is set off.
TOUCH = """() => {
  for (const element of document.querySelectorAll("*"))
    if (!element.closest(".js-plotly-plot"))
      for (const kind of ["mouseover", "mouseenter", "mousemove", "focus"])
        element.dispatchEvent(new MouseEvent(kind, {bubbles: true}));
}"""
PLOT_POINTS = 5  # where the real mouse stops on a figure, from left to right
FOREIGN = "[...document.querySelectorAll('wicked, img[src=x], [onerror], [onmouseover]')].map(e => e.outerHTML)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def harmless(visit: Callable[..., Visit]) -> Callable[[Path], Visit]:
    """Open a page, touch all of it, and see that nothing of a token ran, was rendered or was asked for."""

    def look(page: Path) -> Visit:
        seen = visit(page)
        seen.page.evaluate(TOUCH)
        for figure in seen.page.locator(".js-plotly-plot").all():
            figure.scroll_into_view_if_needed()
            box = figure.bounding_box()
            if box is None:
                continue
            for step in range(1, PLOT_POINTS + 1):
                x, y = box["x"] + box["width"] * step / (PLOT_POINTS + 1), box["y"] + box["height"] / 2
                seen.page.mouse.move(x, y)
        seen.page.wait_for_timeout(200)
        assert seen.dialogs == [], page
        assert seen.page.evaluate(FOREIGN) == [], page
        assert seen.requests == [], page
        assert [words for words in seen.complaints if not words.startswith("warning")] == [], page
        return seen

    return look


@pytest.mark.parametrize("name", WRITERS)
def test_no_token_runs_on_a_page_that_is_written(world: World, harmless: Callable[[Path], Visit], name: str) -> None:
    found = world.result(name)
    folder = (found if isinstance(found, Path) else Path(next(iter(found.values())))).parent
    pages = sorted(folder.rglob("*.html"))
    assert pages
    for page in pages:
        harmless(page)


def test_no_token_runs_in_a_view_or_a_figure(world: World, harmless: Callable[[Path], Visit], tmp_path: Path) -> None:
    seen = harmless(world.sinks.token_view().save(tmp_path / "tokens.html"))
    assert "<\u2060wicked>" in seen.page.locator("[id^=circuits-vis]").inner_text(), "shown as what it is"
    harmless(sl.heads.attention_view(world.model, world.tokens, layer=1).save(tmp_path / "heads.html"))
    figures = (
        world.scores.plot(), world.scores.plot_positions(), world.sinks.plot(), world.made.plot(),
        sl.attention_map(world.model, world.tokens, layer=0, head=0),
        sl.heads.attention_grid(world.model, world.tokens),
    )  # fmt: skip
    for number, figure in enumerate(figures):
        figure.write_html(tmp_path / f"{number}.html", include_plotlyjs=True)
        harmless(tmp_path / f"{number}.html")


def test_a_token_without_spaces_is_no_tag_either(
    world: World, harmless: Callable[[Path], Visit], tmp_path: Path
) -> None:
    token = '<img/src="x"/onerror=alert(1)>'  # circuitsvis takes tokens for HTML and turns their spaces into others
    labels = [[*row] for row in world.sinks.tokens.labels]
    labels[0][3], labels[0][4] = token, "&lt;"
    tokens = replace(world.sinks.tokens, labels=tuple(map(tuple, labels)))
    seen = harmless(replace(world.sinks, tokens=tokens).token_view().save(tmp_path / "view.html"))
    shown = seen.page.locator("[id^=circuits-vis]").inner_text().replace("\u2060", "")
    assert token in shown
    assert "&lt;" in shown


@pytest.mark.parametrize("token", [WICKED[0], WICKED[1], f'<b title="{WICKED[7]}">x</b>', f"<b {WICKED[7][3:]}>x</b>"])
def test_a_page_that_runs_a_token_is_noticed(harmless: Callable[[Path], Visit], tmp_path: Path, token: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><script>var label = '{token}';</script><body>{token}</body>")
    with pytest.raises(AssertionError):
        harmless(page)
