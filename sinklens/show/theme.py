"""Figures: one theme, words and units on every axis, the numbers on hover, readable for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch

SCALE = "Cividis"  # one colour scale for attention everywhere: perceptually uniform, safe for colour-blind readers
INK = "#1f2933"
ACCENT = "#c2410c"
MUTED = "#9aa5b1"
COLOURS = (ACCENT, "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def themed(figure: go.Figure, title: str, *, height: int, width: int | None = None) -> go.Figure:
    """Give a figure the common look."""
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0, "xref": "paper", "font": {"size": 17, "color": INK}},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        margin={"l": 70, "r": 30, "t": 80, "b": 60},
        height=height,
        width=width,
    )


def layer_by_head(numbers: torch.Tensor, title: str, bar: str, hover: str) -> go.Figure:
    """A heat map of ``numbers[layer, head, 0]``, a share; the hover text may name all of them as customdata."""
    layers, heads = numbers.shape[:2]
    figure = go.Figure(
        go.Heatmap(
            z=numbers[..., 0].tolist(),
            customdata=numbers.tolist(),
            colorscale=SCALE,
            zmin=0,
            zmax=1,
            colorbar={"title": bar, "outlinewidth": 0},
            xgap=1,
            ygap=1,
            hovertemplate=f"layer %{{y}}, head %{{x}}<br>{hover}<extra></extra>",
        )
    )
    figure.update_xaxes(title="head", dtick=1 if heads <= 16 else None, showgrid=False)
    figure.update_yaxes(title="layer", showgrid=False, dtick=5 if layers > 12 else 1)
    return themed(figure, title, height=max(320, 130 + 17 * layers), width=max(420, 200 + 34 * heads))


def band(x: Sequence[Any], low: Sequence[float], high: Sequence[float], colour: str) -> go.Scatter:
    """The area between two curves, without legend or hover."""
    return go.Scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", line={"width": 0}, fillcolor=colour,
        opacity=0.18, showlegend=False, hoverinfo="skip", mode="none",
    )  # fmt: skip


def curve(
    figure: go.Figure,
    column: int,
    colour: int,
    label: str,
    rows: Sequence[dict[Any, Any]],
    names: tuple[str, str, str] = ("mean", "low", "high"),
) -> None:
    """A line over layers in one panel, with a band where there is one; ``names``: its value, low and high in rows."""
    tint, shown = COLOURS[colour % len(COLOURS)], escape_hover(label)
    x = [row["layer"] for row in rows]
    y, low, high = ([row[name] for row in rows] for name in names)
    if not any(math.isnan(value) for value in low):
        figure.add_trace(band(x, low, high, tint), row=1, col=column)
    figure.add_scatter(
        x=x, y=y, mode="lines+markers", name=shown, line={"color": tint}, marker={"size": 4}, legendgroup=label,
        showlegend=column == 1 and bool(label), row=1, col=column,
        hovertemplate="layer %{x}: %{y:.3g}<extra>" + shown + "</extra>",
    )  # fmt: skip


def escape_hover(text: str) -> str:
    """Text as plotly may show it: its labels read a subset of HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
