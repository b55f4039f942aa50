"""The browser fixture sees what it is there to see: requests, complaints, width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from browsing import Visit

pytestmark = pytest.mark.browser


def test_a_quiet_page_that_fits_is_found_quiet_and_fitting(visit: Callable[..., Visit], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<!doctype html><p>Quiet.</p><script>document.title = 'ran'</script>")
    seen = visit(tmp_path / "page.html", width=390)
    assert (seen.requests, seen.complaints, seen.overflow()) == ([], [], 0)
    assert seen.page.title() == "ran"
    assert seen.picture(tmp_path / "page.png").stat().st_size > 0


def test_requests_errors_and_overflow_are_seen(visit: Callable[..., Visit], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<!doctype html><div style='width:600px'>wide</div><img src='http://example.com/x.png'>"
        "<script>console.warn('hm'); absent()</script>"
    )
    seen = visit(tmp_path / "page.html", width=390)
    assert seen.requests == ["http://example.com/x.png"]
    assert "warning: hm" in seen.complaints
    assert any("absent is not defined" in complaint for complaint in seen.complaints)
    assert "not loaded: http://example.com/x.png" in seen.complaints
    assert seen.overflow() > 200
