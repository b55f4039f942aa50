"""Figures of scores: importance by layer and head, by position, by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch

from sinklens.core.errors import BadInputError
from sinklens.show.theme import ACCENT, SCALE, escape_hover, layer_by_head, themed

if TYPE_CHECKING:
    from sinklens.find.scores import SinkScores


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
    return layer_by_head(numbers, title, "mean alpha", hover)


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
