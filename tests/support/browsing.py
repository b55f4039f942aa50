"""Pages in a real browser: Chromium, driven by Playwright. What a page asks for and complains about is kept.

``conftest`` makes the fixture ``visit`` known to every test; a test that uses it carries the mark ``browser``::

    @pytest.mark.browser
    def test_a_page_opens_offline(visit):
        seen = visit("report/index.html", width=390)
        assert seen.requests == [] and seen.complaints == []
        assert seen.page.locator(".js-plotly-plot").count() == 3
        assert seen.overflow() <= 0
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOCAL = ("file:", "data:", "blob:", "about:")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


def chromium() -> str:
    """The path of a Chromium or Chrome; without one the test fails and says how to get it."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.fail(
            f"no browser: none of {', '.join(NAMES)} is installed (Debian and Ubuntu: apt-get install chromium)"
        )
    return found


@dataclass(eq=False)
class Visit:
    """An opened page.

    Attributes:
        page: Playwright's page, to click and to ask.
        requests: every address outside this machine's files that the page, or a page that it holds, asked for.
        complaints: errors and warnings on the console, exceptions, files that were asked for and are not there.
        dialogs: the words of every alert, question or prompt; each is sent away.
    """

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window: above 0, readers must scroll sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def picture(self, path: str | os.PathLike[str]) -> Path:
        """A screenshot of the whole page."""
        self.page.screenshot(path=os.fspath(path), full_page=True)
        return Path(path)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests of a process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """``visit(address, width=1400, height=900)``: a file's path, or an address, in a window of its own.

    Files load with the network off; an ``http://127.0.0.1`` address (a server of the test's own) with it on, and is no
    entry of ``requests``.
    """
    contexts: list[Any] = []

    def open_page(address: str | os.PathLike[str], *, width: int = 1400, height: int = 900) -> Visit:
        target = os.fspath(address)
        served = target.startswith("http://127.0.0.1")
        context = browser.new_context(viewport={"width": width, "height": height}, offline=not served)
        contexts.append(context)
        seen = Visit(context.new_page())
        own = (*LOCAL, "http://127.0.0.1", "ws://127.0.0.1") if served else LOCAL

        def asked(request: Any) -> None:
            if not request.url.startswith(own):
                seen.requests.append(request.url)

        def said(message: Any) -> None:
            if message.type in ("error", "warning"):
                seen.complaints.append(f"{message.type}: {message.text}")

        def opened(dialog: Any) -> None:
            seen.dialogs.append(dialog.message)
            dialog.dismiss()

        context.on("request", asked)
        seen.page.on("dialog", opened)
        seen.page.on("console", said)
        seen.page.on("pageerror", lambda error: seen.complaints.append(f"exception: {error}"))
        seen.page.on("requestfailed", lambda request: seen.complaints.append(f"not loaded: {request.url}"))
        seen.page.goto(target if "://" in target else Path(target).resolve().as_uri(), wait_until="load")
        return seen

    yield open_page
    for context in contexts:
        context.close()
