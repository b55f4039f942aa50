"""Figures of sinks: their timeline, the threshold sweep, their anatomy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from sinklens.core.errors import BadInputError
from sinklens.show.theme import ACCENT, SCALE, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.find.sinkmap import SinkMap

MOST_ROWS = 60
LONGEST_LABEL = 22
MARKS = {"primary": "\u25a0", "secondary": "\u25c6", "undetermined": "\u25cb"}


def timeline(sinks: SinkMap) -> go.Figure:
    """A row per sink, a column per layer; colour is mass, only where the sink lives (all its lives)."""
    if not len(sinks):
        raise BadInputError("there are no sinks to draw; " + (" ".join(sinks.notes) or "none was found"))
    shown = sorted(sinks, key=lambda s: (s.sequence, s.position))[:MOST_ROWS]
    grid, labels, hover = [], [], []
    for sink in shown:
        alive = [any(a <= layer <= b for a, b, _ in sink.episodes) for layer in range(sinks.n_layers)]
        grid.append([sink.masses[layer] if alive[layer] else None for layer in range(sinks.n_layers)])
        name = (
            f"{sink.sequence}:{sink.position} {sink.token!r}"
            if len(sinks.tokens) > 1
            else f"{sink.position} {sink.token!r}"
        )
        short = name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}\u2026"
        labels.append(f"{MARKS[sink.kind]} {escape_hover(short)}")
        reason = f" ({sink.reason})" if sink.reason else ""
        story = (
            f"{escape_hover(name)}: {sink.kind}{reason}<br>layers {sink.onset} to {sink.end}, mean mass {sink.mass:.3f}"
        )
        hover.append([story if here else "" for here in alive])
    rows = list(range(len(shown)))
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            y=rows,
            text=hover,
            hovertemplate="%{text}<br>layer %{x}: mass %{z:.3f}<extra></extra>",
            hoverongaps=False,
            colorscale=SCALE,
            zmin=0,
            zmax=max((v for line in grid for v in line if v is not None and v == v), default=1.0),
            xgap=1,
            ygap=3,
            colorbar={"title": "mass", "outlinewidth": 0},
        )
    )
    figure.update_xaxes(title="layer", dtick=5 if sinks.n_layers > 12 else 1, range=[-0.5, sinks.n_layers - 0.5])
    figure.update_yaxes(tickvals=rows, ticktext=labels, autorange="reversed", showgrid=False, automargin=True)
    cut = f"; the first {MOST_ROWS} of {len(sinks)}" if len(sinks) > MOST_ROWS else ""
    title = (
        f"When each sink lives<br><sup>\u25a0 primary, \u25c6 secondary, \u25cb undetermined; position and token; "
        f"colour: mean far importance over heads{cut}</sup>"
    )
    return themed(figure, title, height=170 + 26 * len(shown))


def sweep_curves(table: pd.DataFrame, name: str, chosen: float) -> go.Figure:
    """Counts against a threshold, the one in force marked."""
    figure = go.Figure()
    for column, colour in (("sinks", "#1f2933"), ("primary", "#0072b2"), ("secondary", ACCENT)):
        figure.add_scatter(x=table[name], y=table[column], name=column, mode="lines+markers", line={"color": colour})
    figure.add_vline(x=chosen, line={"dash": "dot", "color": "#8795a5"}, annotation_text=f"in force: {chosen:g}")
    figure.update_xaxes(title=f"threshold: {name.replace('_', ' ')}")
    highest = max(1, table[["sinks", "primary", "secondary"]].max().max())
    figure.update_yaxes(title="sinks", range=[0, 1.15 * highest])  # room for the words beside the line
    return themed(figure, "How the count depends on the threshold", height=380)
