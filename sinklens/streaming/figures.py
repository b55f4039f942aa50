"""Figures of rolling caches."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from sinklens.show.theme import COLOURS, INK, MUTED, band, escape_hover, themed


def study_bars(table: pd.DataFrame) -> go.Figure:
    """Perplexity by what stays in the cache, on a logarithmic axis; intervals as bars, full attention as a line."""
    figure = go.Figure()
    rows = table.to_dict("records")
    base = next(row for row in rows if row["recent"] != row["recent"])
    for n, size in enumerate(dict.fromkeys(row["recent"] for row in rows if row["recent"] == row["recent"])):
        mine = [row for row in rows if row["recent"] == size]
        known = all(row["loss_low"] == row["loss_low"] for row in mine)
        error = {
            "array": [math.exp(row["loss_high"]) - row["perplexity"] for row in mine],
            "arrayminus": [row["perplexity"] - math.exp(row["loss_low"]) for row in mine],
        }
        figure.add_bar(
            x=[escape_hover(str(row["keeps"])) for row in mine], y=[row["perplexity"] for row in mine],
            name=f"{size:g} recent tokens", marker_color=COLOURS[n % len(COLOURS)], error_y=error if known else None,
            customdata=[[row["loss"], row["kept"]] for row in mine],
            hovertemplate="%{x}<br>perplexity %{y:.2f}, loss %{customdata[0]:.3f} nats<br>%{customdata[1]:.3g} tokens "
            "kept<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=base["perplexity"], line={"color": INK, "dash": "dash"}, annotation_text=f"full: {base['perplexity']:.2f}"
    )
    figure.update_xaxes(title="what stays in the cache beside the recent tokens")
    figure.update_yaxes(title="perplexity", type="log")
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.35, "x": 0})
    return themed(figure, "Which tokens must stay in a rolling cache", height=480)


def loss_by_position(tables: Mapping[str, pd.DataFrame], recent: int | None) -> go.Figure:
    """Mean loss of the predictions made in each range of positions; one line per condition."""
    figure = go.Figure()
    for n, (label, table) in enumerate(tables.items()):
        rows = table.to_dict("records")
        x = [math.sqrt(max(1, row["first"]) * (row["last"] + 1)) for row in rows]
        tint, shown = COLOURS[n % len(COLOURS)], escape_hover(label)
        if all(row["loss_low"] == row["loss_low"] for row in rows):
            figure.add_trace(band(x, [row["loss_low"] for row in rows], [row["loss_high"] for row in rows], tint))
        figure.add_scatter(
            x=x, y=[row["loss"] for row in rows], mode="lines+markers", name=shown,
            line={"color": tint, "dash": "solid" if n < len(COLOURS) else "dot"},
            text=[f"positions {row['first']} to {row['last']}" for row in rows],
            hovertemplate="%{text}: %{y:.3f} nats<extra>" + shown + "</extra>",
        )  # fmt: skip
    if recent is not None:
        figure.add_vline(x=recent, line={"color": MUTED, "dash": "dash"}, annotation_text="eviction begins")
    figure.update_xaxes(title="position of the prediction (bins that double)", type="log")
    figure.update_yaxes(title="loss (nats)")
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})
    words = "Loss along the text" if recent is None else f"Loss along the text, {recent} recent tokens in the cache"
    return themed(figure, words, height=480)
