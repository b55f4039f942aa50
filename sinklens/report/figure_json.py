"""Figures as small JSON: numbers with the digits that a reader sees, no title (the page has it), one shared template.

Plotly's own encoding keeps every bit of every number (eleven characters each); a figure on a page needs four digits.
"""

from __future__ import annotations

import html
import json
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

DIGITS = 4


def thinned(value: Any) -> Any:
    """The same structure with rounded numbers; NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: thinned(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return thinned(value.tolist())
    if isinstance(value, (list, tuple)):
        return [thinned(part) for part in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return _rounded(float(value))
    return value


def _rounded(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def split_title(figure: go.Figure) -> tuple[str, str]:
    """The title and the small line below it, as plain text."""
    whole = str(figure.layout.title.text or "")
    title, _, small = whole.partition("<br>")
    return html.unescape(title), html.unescape(small.replace("<sup>", "").replace("</sup>", ""))


def for_page(figure: go.Figure) -> dict[str, Any]:
    """Data and layout for the page: no title, no template, no width (it fills its column)."""
    content = thinned(figure.to_plotly_json())
    layout = content["layout"]
    for name in ("title", "template", "width"):
        layout.pop(name, None)
    top = 46 if layout.get("annotations") or "legend" in layout else 16
    layout["margin"] = {**layout.get("margin", {}), "t": top}
    layout["autosize"] = True
    return {"data": content["data"], "layout": layout}


def safe_json(value: Any) -> str:
    """JSON that may stand in a script: nothing in it can end the script or begin a tag."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
