"""Figures: one theme, words and units on every axis, the numbers on hover, readable for colour-blind readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch

from sinklens.errors import BadInputError

if TYPE_CHECKING:
    from sinklens.head_statistics import AttentionStatistics
    from sinklens.scores import SinkScores

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


def head_map(scores: SinkScores, position: int = 0, epsilon: float = 0.3) -> go.Figure:
    """Layer x head heat map of mean alpha at a position; hover shows alpha, beta and the sink rate."""
    table = scores.head_table(position, epsilon)
    shape = (scores.n_layers, scores.n_heads)
    numbers = torch.stack(
        [torch.tensor(table[name].to_numpy()).view(shape) for name in ("alpha", "beta", "sink_rate")], -1
    )
    rate = scores.sink_rate(position, epsilon)
    title = f"Attention on position {position}, per head<br><sup>sink rate {rate:.3f} at epsilon {epsilon:g}</sup>"
    hover = (
        "importance alpha %{customdata[0]:.3f}<br>far importance beta %{customdata[1]:.3f}<br>"
        f"sink rate (alpha > {epsilon:g}) %{{customdata[2]:.3f}}"
    )
    return _layer_by_head(numbers, title, "mean alpha", hover)


def _layer_by_head(numbers: torch.Tensor, title: str, bar: str, hover: str) -> go.Figure:
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


def position_map(scores: SinkScores, sequence: int = 0, columns: int | None = None) -> go.Figure:
    """Layer x position heat map of one sequence: mean importance over heads, far importance where it is defined.

    ``columns``: only the first so many tokens.
    """
    if not 0 <= sequence < len(scores.tokens):
        raise BadInputError(f"sequence {sequence} is out of range: there are {len(scores.tokens)}")
    whole = int(scores.tokens.lengths[sequence])
    length = whole if columns is None else min(columns, whole)
    alpha = scores.alpha[sequence, ..., :length].double().mean(1)
    beta = scores.beta[sequence, ..., :length].double().mean(1)
    far = not bool(beta.isnan().all())
    labels = scores.tokens.labels[sequence]
    hover = [
        [
            f"{escape_hover(repr(labels[p]))}<br>alpha {float(alpha[layer, p]):.3f}, beta {float(beta[layer, p]):.3f}"
            for p in range(length)
        ]
        for layer in range(scores.n_layers)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=(beta if far else alpha).tolist(),
            text=hover,
            hovertemplate="layer %{y}, position %{x}: %{text}<extra></extra>",
            colorscale=SCALE,
            zmin=0,
            zmax=0.5,
            colorbar={"title": "mean beta" if far else "mean alpha", "outlinewidth": 0},
        )
    )
    figure.update_xaxes(title="position (tokens from the first unpadded one)", showgrid=False)
    figure.update_yaxes(title="layer", showgrid=False, zeroline=False, dtick=5 if scores.n_layers > 12 else 1)
    what = (
        "far importance beta, colours saturate at 0.5; blank where fewer than 32 far queries see the token"
        if far
        else "importance alpha (too short for far importance; the last tokens' self-attention shows as false sinks)"
    )
    title = (
        f"Where the sinks are: {escape_hover(scores.tokens.sources[sequence])}<br><sup>{what}; mean over heads</sup>"
    )
    return themed(figure, title, height=max(320, 130 + 13 * scores.n_layers))


def layer_profile(scores: SinkScores, position: int = 0, epsilon: float = 0.3) -> go.Figure:
    """Per layer: sink rate and mean alpha at a position."""
    table = scores.layer_table(position, epsilon)
    figure = go.Figure()
    figure.add_bar(
        x=table.layer,
        y=table.sink_rate,
        name=f"sink rate (alpha > {epsilon:g})",
        marker_color="#9fb3c8",
        hovertemplate="layer %{x}: sink rate %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=table.layer,
        y=table.alpha,
        name="mean importance alpha",
        line={"color": ACCENT, "width": 2.5},
        hovertemplate="layer %{x}: alpha %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title="layer", dtick=5 if scores.n_layers > 12 else 1)
    figure.update_yaxes(title="share of heads / mean attention", range=[0, 1])
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})
    return themed(figure, f"Position {position}, layer by layer", height=360)


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


def statistics_map(statistics: AttentionStatistics) -> go.Figure:
    """Layer x head heat map of the mean mass of S over queries and sequences."""
    table = statistics.to_dataframe()
    shape = statistics.mass.shape[:3]
    columns = [torch.tensor(table[name].tolist()).view(shape).nanmean(0) for name in ("mass", "margin", "free_margin")]
    title = (
        "Attention mass of the sinks, per head<br><sup>mean over the queries that see a sink and something else</sup>"
    )
    hover = (
        "mass of the sinks %{customdata[0]:.3f}<br>margin %{customdata[1]:.2f} nats<br>"
        "competitor-free margin %{customdata[2]:.2f} nats"
    )
    return _layer_by_head(torch.stack(columns, -1), title, "mean mass", hover)
