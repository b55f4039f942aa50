"""Figures of a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinklens.components import component_name
from sinklens.errors import BadInputError
from sinklens.plots import ACCENT, INK, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.trace_result import SinkTrace

BLUE = "#0072b2"


def contribution_bars(trace: SinkTrace, sink: int | None = None) -> go.Figure:
    """Writer and eraser bars over depth with the running sum; one row of bars per phase of the sink's life."""
    if not trace.traced:
        raise BadInputError("this trace is empty: the map held no sink")
    number = trace.traced[0].sink if sink is None else sink
    phases = [one for one in trace.traced if one.sink == number]
    if not phases:
        raise BadInputError(f"no sink {number} in this trace; there are {sorted({t.sink for t in trace.traced})}")
    figure = go.Figure()
    for one, colour in zip(phases, (ACCENT, BLUE, "#009e73", "#cc79a7"), strict=False):
        names = [component_name(c) for c in one.components]
        shares = (one.contributions / one.projection).tolist()
        words = f"layers {one.phase.onset} to {one.phase.end}"
        figure.add_bar(
            x=names,
            y=shares,
            name=f"share, {words}",
            marker_color=colour,
            customdata=one.contributions.tolist(),
            hovertemplate="%{x}: %{y:.3f} of the stream's part along u (%{customdata:.1f})<extra></extra>",
        )
        running = (one.contributions.cumsum(0) / one.projection).tolist()
        figure.add_scatter(
            x=names,
            y=running,
            mode="lines",
            name=f"running sum, {words}",
            line={"color": colour, "dash": "dot"},
            hovertemplate="after %{x}: %{y:.3f}<extra></extra>",
        )
    figure.add_hline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(title="component, in the order of writing", tickangle=-90, tickfont={"size": 9}, dtick=1)
    figure.update_yaxes(title="share of <x_ref, u>")
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.32, "x": 0})
    one = phases[0]
    title = (
        f"Who writes and erases {escape_hover(repr(one.token))} at position {one.position} ({one.kind})<br><sup>u: the "
        f"primary's direction in other sequences; each phase at its own reference layer</sup>"
    )
    return themed(figure, title, height=500)
