"""Figures of mixing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinklens.plots import ACCENT, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.mixing import Mixing

COLOURS = (ACCENT, "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
NAMES = {
    "mix": "mix: from other tokens that are no sink",
    "via_sink": "via_sink: from the sinks",
    "spread": "spread: against the token's own norm",
}


def index_curves(found: Mixing) -> go.Figure:
    """One panel per index, one line per condition, a band where there are intervals."""
    table = found.to_dataframe().to_dict("records")
    figure = make_subplots(rows=1, cols=3, subplot_titles=tuple(NAMES.values()), horizontal_spacing=0.07)
    for column, name in enumerate(NAMES, start=1):
        for c, label in enumerate(found.labels):
            rows = [row for row in table if (row["index"], row["condition"]) == (name, label)]
            colour = COLOURS[c % len(COLOURS)]
            x = [row["layer"] for row in rows]
            if rows and rows[0]["low"] == rows[0]["low"]:
                figure.add_scatter(
                    x=[*x, *x[::-1]], y=[*(r["high"] for r in rows), *(r["low"] for r in rows[::-1])], fill="toself",
                    line={"width": 0}, fillcolor=colour, opacity=0.18, showlegend=False, hoverinfo="skip", row=1,
                    col=column,
                )  # fmt: skip
            figure.add_scatter(
                x=x, y=[row["mean"] for row in rows], mode="lines+markers", name=escape_hover(label),
                line={"color": colour}, marker={"size": 4}, showlegend=column == 1, legendgroup=label,
                hovertemplate="layer %{x}: %{y:.3g}<extra>" + escape_hover(label) + "</extra>", row=1, col=column,
            )  # fmt: skip
    figure.update_xaxes(title="layer")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})
    title = (
        f"Mixing with and without sinks, {len(found.tokens)} sequence(s)<br><sup>"
        f"{escape_hover(found.info['definition'])}; means over tokens that are no sink</sup>"
    )
    return themed(figure, title, height=440)
