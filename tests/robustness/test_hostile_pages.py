"""No page runs or renders what is in a token: every page that is written, of tokens that try."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from public_calls import WICKED, WRITERS, World

import sinklens as sl


class Elements(HTMLParser):
    """Every element with its attributes, and what stands in scripts and between tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text.append(data)


def assert_harmless(page: str) -> None:
    found = Elements()
    found.feed(page)
    assert not [script for script in found.scripts if script.strip().startswith("alert")]
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("src") != "x"
        assert not (attributes.get("href") or "").lower().startswith("javascript:")
    text = " ".join(found.text)
    assert "{{" not in text or "{{ 7*7 }}" in text
    assert "wicked" not in [tag for tag, _ in found.tags]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_page_shows_a_wicked_token_as_text(world: World, name: str) -> None:
    found = world.result(name)
    written = [found] if isinstance(found, Path) else found.values()
    pages = [Path(p) for p in written if str(p).endswith(".html")]
    assert pages
    for page in pages:
        assert_harmless(page.read_text(encoding="utf-8"))


def test_the_token_view_and_the_figures_show_wicked_tokens_as_text(world: World, tmp_path: Path) -> None:
    assert_harmless(world.sinks.token_view().save(tmp_path / "view.html").read_text(encoding="utf-8"))
    for figure in (
        sl.attention_map(world.model, world.tokens, layer=0, head=0),
        world.scores.plot(),
        world.sinks.plot(),
    ):
        assert_harmless(figure.to_html(include_plotlyjs=False))


def test_the_check_sees_what_it_is_for() -> None:
    for token in WICKED[:2]:
        with pytest.raises(AssertionError):
            assert_harmless(f"<html><body><p>{token}</p></body></html>")
    with pytest.raises(AssertionError):
        assert_harmless(f"<script>var label = '{WICKED[0]}';</script>")
