"""How sinklens shows itself in notebooks: results as short tables, progress as a bar. Plain HTML, so that nothing has
to be installed in the notebook's server, a saved notebook holds no dead widget, and VS Code and JupyterLab agree.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import pandas as pd

SHOWN_ROWS = 10
REDRAW = 0.2  # seconds between two drawings of a bar
_NO_FORMULAS = "tex2jax_ignore mathjax_ignore"  # notebooks would typeset what stands between two dollar tokens


class ShownInJupyter:
    """A result that shows itself as one line and the first rows of a table; ``table`` names the method that gives it.

    ``class Verdict(ShownInJupyter)`` shows ``to_dataframe()``, ``class SinkTrace(ShownInJupyter, table="writers")``
    shows ``writers()``. The line is the first one of ``repr``; a record of fields shows its name.
    """

    _table = "to_dataframe"

    def __init_subclass__(cls, table: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls._table = table or cls._table

    def _repr_html_(self) -> str:
        headline = type(self).__name__ if self._table == "_fields" else repr(self).split("\n")[0]
        return html_view(headline, getattr(self, self._table)(), self._table, getattr(self, "notes", ()))

    def _last_layer(self) -> pd.DataFrame:
        """The rows of the last layer of a table that has all."""
        shown: Any = self
        rows = shown.to_dataframe()
        return rows[rows["layer"] == rows["layer"].max()]

    def _fields(self) -> pd.DataFrame:
        """The fields of a record, one a row."""
        shown: Any = self
        rows = [(field.name, str(getattr(self, field.name))) for field in dataclasses.fields(shown)]
        return pd.DataFrame(rows, columns=pd.Index(["field", "value"]))


def html_view(headline: str, table: pd.DataFrame, method: str = "", notes: Sequence[str] = ()) -> str:
    """One line, the first rows of a table without its empty columns, notes; everything escaped."""
    shown = table.dropna(axis=1, how="all")
    with pd.option_context("display.max_colwidth", 80):
        rows = shown.head(SHOWN_ROWS).to_html(
            index=False, border=0, na_rep="", classes=_NO_FORMULAS, float_format=lambda value: f"{value:.4g}"
        )
    parts = [f"<div><strong>{escape(headline)}</strong></div>", rows if len(shown) else ""]
    if len(shown) > SHOWN_ROWS:
        where = f": <code>.{escape(method)}()</code> has them all" if method and not method.startswith("_") else ""
        parts.append(f"<div>and {len(shown) - SHOWN_ROWS} more rows{where}</div>")
    parts += [f"<div>note: {escape(note)}</div>" for note in notes]
    return f'<div class="{_NO_FORMULAS}" style="overflow-x: auto; max-width: 100%">{"".join(parts)}</div>'


@contextmanager
def notebook_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar in the cell's output that fills with each step and leaves nothing behind, also after an error."""
    from IPython.display import display  # only where a notebook runs

    begun = time.monotonic()
    done, drawn = 0, begun
    handle: Any = display(_drawn(description, 0, total, 0.0), display_id=True)

    def advance() -> None:
        nonlocal done, drawn
        done, now = done + 1, time.monotonic()
        if now - drawn >= REDRAW:
            drawn = now
            handle.update(_drawn(description, done, total, now - begun))

    try:
        yield advance
    finally:
        handle.update(_drawn("", 0, 0, 0.0))


class _Bar:
    """HTML for notebooks, words for whatever reads only text."""

    def __init__(self, html: str, text: str) -> None:
        self._html, self._text = html, text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text


def _drawn(description: str, done: int, total: int, seconds: float) -> _Bar:
    """The bar as it stands; an empty one where there is no step."""
    if not total:
        return _Bar("", "")
    left = f", {seconds / done * (total - done):.0f} s left" if done else ""
    words = f"{description}: {done} of {total}{left}"
    html = f'<div>{escape(words)}<br><progress value="{done}" max="{total}" style="width: 24em"></progress></div>'
    return _Bar(html, words)
