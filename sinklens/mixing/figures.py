"""Figures of mixing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinklens.mixing.indices import INDICES
from sinklens.show.theme import MUTED, SCALE, curve, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.mixing.result import Mixing


def index_curves(conditions: dict[str, Mixing]) -> go.Figure:
    """One panel per index, one line per condition, a band where there are intervals."""
    first = next(iter(conditions.values()))
    tables = {label: found.to_dataframe().to_dict("records") for label, found in conditions.items()}
    figure = make_subplots(rows=1, cols=3, subplot_titles=tuple(INDICES.values()), horizontal_spacing=0.07)
    for column, name in enumerate(INDICES, start=1):
        for c, (label, table) in enumerate(tables.items()):
            rows = [row for row in table if row["index"] == name]
            curve(figure, column, c, label, rows)
    figure.update_xaxes(title="layer")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})
    title = (
        f"Mixing over depth, {len(first.tokens)} sequence(s)<br><sup>"
        f"{escape_hover(first.info['definition'])}; means over tokens that are no sink</sup>"
    )
    return themed(figure, title, height=440).update_layout(margin={"t": 100})


def sensitivity_map(found: Mixing, sequence: int, layer: int) -> go.Figure:
    """log10 of ``|J_ij|_F``, rows i down, columns j across; sinks marked on the axis."""
    values = found.maps[sequence][layer].double().clamp(min=0).sqrt()
    values[values == 0] = float("nan")
    sinks = found.sinks[sequence]
    labels = [
        f"{p} {escape_hover(found.tokens.labels[sequence][p])}{' (sink)' if p in sinks else ''}"
        for p in found.positions[sequence]
    ]
    figure = go.Figure(
        go.Heatmap(
            z=values.log10().tolist(), x=labels, y=labels, colorscale=SCALE,
            colorbar={"title": "log10 |J|"}, hovertemplate="row %{y}<br>column %{x}<br>%{z:.2f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="varied token j (input)", type="category")
    figure.update_yaxes(title="token i that responds", type="category", autorange="reversed")
    title = (
        f"Sensitivity at layer {layer + found.info['layer']}, sequence {sequence}<br><sup>"
        f"{escape_hover(found.info['definition'])}</sup>"
    )
    return themed(figure, title, height=620, width=760)


def bound_scatter(table: pd.DataFrame) -> go.Figure:
    """Measured spectral norms against their bounds, on log scales, with the line that none may cross."""
    figure = go.Figure()
    for sink, symbol, words in ((False, "circle", "other column"), (True, "diamond", "column of a sink")):
        mine = pd.DataFrame(table[table.sink == sink])
        figure.add_scatter(
            x=mine.bound.tolist(), y=mine.spectral.tolist(), mode="markers", name=words,
            marker={
                "color": mine.layer.tolist(), "symbol": symbol, "size": 4, "coloraxis": "coloraxis", "opacity": 0.6
            },
            text=[f"layer {r['layer']}, row {r['row']}, column {r['column']}" for r in mine.to_dict("records")],
            hovertemplate="%{text}<br>bound %{x:.3g}, measured %{y:.3g}<extra></extra>",
        )  # fmt: skip
    ends = [float(table.spectral.min()), float(table.bound.max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", name="measured = bound", line={"color": MUTED, "dash": "dash"}, hoverinfo="skip"
    )
    figure.update_xaxes(title="local path-sum bound on |J_ij|", type="log")
    figure.update_yaxes(title="measured |J_ij| (spectral)", type="log")
    figure.update_layout(
        coloraxis={"colorscale": "Cividis", "colorbar": {"title": "layer"}},
        legend={"orientation": "h", "y": -0.2, "x": 0},
    )
    return themed(figure, "The path-sum bound and what was measured, attention frozen", height=520, width=720)
