"""Figures of a decomposition: what makes the gap in each head, which components, mass part against value part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from sinklens.core.errors import BadInputError
from sinklens.decompose.margin import BEYOND, SPLITS
from sinklens.show.theme import ACCENT, INK, themed

if TYPE_CHECKING:
    from sinklens.decompose.result import SinkDecomposition

WORDS = {
    "content_content": "content x content",
    "content_bk": "content x b_K",
    "bq_content": "b_Q x content",
    "bq_bk": "b_Q x b_K",
    "distance": "mean query x mean key (distance)",
    "key_side": "mean query x the sink's key",
    "query_distance": "own query x mean key",
    "query_specific": "own query x the sink's key",
    "norm": "key norm",
    "angle": "angle",
    "covariance": "covariance over the rest",
    "softcap": "softcap",
    "position": "position term",
}
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#999999")  # Okabe and Ito: safe for colour-blind
PART_WORDS = {
    "mass_part": "mass part: the attention that they take",
    "value_part": "value part: what they write",
    "interaction": "interaction: beyond both alone",
    "total": "total: having them",
}
MOST_BARS = 48
GREY = "#7b8794"
NOTHING = "no {kind} sink is alive in the layers that were taken apart and seen by a query 16 or more tokens away"


def gap_bars(found: SinkDecomposition, split: str, kind: str | None) -> go.Figure:
    """Stacked contributions to the gap; the heads with the largest gap, at most 48, in the order of the layers."""
    kind = kind or found.kinds[0]
    table = found.heads(kind)
    if not len(table):
        raise BadInputError(NOTHING.format(kind=kind))
    heads: list[dict[str, Any]] = [row for row in table.to_dict("records") if row["gap"] == row["gap"]]
    largest = sorted(heads, key=lambda row: -row["gap"])[:MOST_BARS]
    shown = sorted(largest, key=lambda row: (row["layer"], row["head"]))
    names = [f"{row['layer']}.{row['head']}" for row in shown]
    terms = [t for t in (*SPLITS[split], *BEYOND) if any(abs(row[t]) > 1e-6 for row in shown)]
    figure = go.Figure()
    colours = dict(zip((*SPLITS[split], *BEYOND), COLOURS, strict=False))  # the same term, the same colour everywhere
    for term in terms:
        figure.add_bar(
            x=names,
            y=[row[term] for row in shown],
            name=WORDS[term],
            marker_color=colours[term],
            hovertemplate=f"head %{{x}}<br>{WORDS[term]}: %{{y:.2f}} nats<extra></extra>",
        )
    marks = (("gap", "gap", "diamond", INK), ("margin", "margin", "circle-open", ACCENT))
    for name, words, symbol, colour in marks:
        figure.add_scatter(
            x=names,
            y=[row[name] for row in shown],
            mode="markers",
            name=words,
            marker={"symbol": symbol, "color": colour, "size": 8, "line": {"width": 2, "color": colour}},
            hovertemplate=f"head %{{x}}<br>{words}: %{{y:.2f}} nats<extra></extra>",
        )
    figure.update_layout(barmode="relative", legend={"orientation": "h", "y": -0.22, "x": 0})
    figure.update_xaxes(title="layer.head", type="category", tickangle=-90, tickfont={"size": 10}, dtick=1)
    figure.update_yaxes(title="nats, mean over queries and sinks")
    what = (
        f"{len(shown)} heads with the largest gap of {len(heads)}" if len(heads) > len(shown) else f"{len(heads)} heads"
    )
    title = (
        f"Why the margin is high: {kind} sinks, by {split}<br><sup>{what}; bars sum to the gap (diamond); margin = gap "
        f"- log of the rest - peakedness</sup>"
    )
    return themed(figure, title, height=520)


def component_map(found: SinkDecomposition, kind: str | None) -> go.Figure:
    """Layer x component: who put the sink's key there."""
    kind = kind or found.kinds[0]
    table = found.component_table("key", kind)
    if not len(table):
        raise BadInputError(NOTHING.format(kind=kind))
    order = list(dict.fromkeys(table.component))
    order = [*(name for name in order if name != "bias"), "bias"]
    grid = table.pivot(index="layer", columns="component", values="nats").reindex(columns=pd.Index(order))
    strongest = float(grid.abs().to_numpy()[~grid.isna().to_numpy()].max())
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(),
            x=order,
            y=list(grid.index),
            colorscale="RdBu_r",
            zmid=0,
            zmin=-strongest,
            zmax=strongest,
            colorbar={"title": "nats", "outlinewidth": 0},
            hovertemplate="layer %{y}, %{x}: %{z:.2f} nats of the score<extra></extra>",
        )
    )
    figure.update_xaxes(title="component whose output stands in the sink's key", showgrid=False, tickangle=-90)
    figure.update_xaxes(tickfont={"size": 9}, dtick=1)
    figure.update_yaxes(title="layer whose heads read it", showgrid=False, dtick=5 if len(grid.index) > 12 else 1)
    title = (
        f"Who writes what the heads read: {kind} sinks<br><sup>parts of the score that stand in the sink's own key, "
        f"mean over heads; blank: comes later</sup>"
    )
    return themed(figure, title, height=max(360, 170 + 15 * len(grid.index)))


def plane(found: SinkDecomposition, metric: str) -> go.Figure:
    """Mass part against value part: a dot per head, else per layer; hollow where estimated to first order."""
    square = next((found.effects[s] for s in ("head", "layer", "all") if s in found.effects), None)
    if square is None:
        raise BadInputError("this decomposition has no 2x2: decompose_sinks(..., effects=('all', 'layer', 'head'))")
    table = square.to_dataframe()
    known = list(square.values)
    if metric not in known:
        if metric != "loss":
            raise BadInputError(f"no metric {metric!r}; there are {', '.join(known)}")
        metric = known[0]  # the default, on an encoder
    rows: list[dict[str, Any]] = [
        r for r in table.to_dict("records") if r["metric"] == metric and r["mass_part"] == r["mass_part"]
    ]
    figure = go.Figure()
    for exact, words in ((True, "measured"), (False, "first-order estimate")):
        chosen = [r for r in rows if r["exact"] == exact]
        if not chosen:
            continue
        names = [
            f"head {int(r['layer'])}.{int(r['head'])}"
            if square.scope == "head"
            else f"layer {int(r['layer'])}"
            if square.scope == "layer"
            else "all heads"
            for r in chosen
        ]
        figure.add_scatter(
            x=[r["mass_part"] for r in chosen],
            y=[r["value_part"] for r in chosen],
            text=names,
            customdata=[[r["interaction"], r["total"]] for r in chosen],
            mode="markers",
            name=words,
            marker={"color": ACCENT if exact else GREY, "symbol": "circle" if exact else "circle-open", "size": 8},
            error_x=_bars(chosen, "mass_part") if exact else None,
            error_y=_bars(chosen, "value_part") if exact else None,
            hovertemplate=(
                "%{text}<br>mass part %{x:.4f}, value part %{y:.4f}<br>interaction %{customdata[0]:.4f}, together "
                "%{customdata[1]:.4f}<extra></extra>"
            ),
        )
    for line in ("add_vline", "add_hline"):
        getattr(figure, line)(0, line={"color": INK, "width": 1, "dash": "dot"})
    unit = "nats per token" if metric in ("loss", "kl") else "1 - cos"
    figure.update_xaxes(title=f"mass part ({metric}, {unit}; negative: lowers it)", zeroline=False)
    figure.update_yaxes(title="value part", zeroline=False)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})
    documents = len(set(square.documents))
    title = (
        f"Through its key or through its value?<br><sup>2x2 per {square.scope}, {documents} document(s), "
        f"{square.length} tokens; parts are not additive</sup>"
    )
    return themed(figure, title, height=520, width=720)


def parts(found: SinkDecomposition) -> go.Figure:
    """The 2x2 of all heads at once: mass part, value part, interaction and total with their intervals.

    Raises:
        BadInputError: a decomposition without the 2x2 of all heads.
    """
    square = found.effects.get("all")
    if square is None:
        raise BadInputError("this decomposition has no 2x2 of all heads: decompose_sinks(..., effects=('all',))")
    figure = go.Figure()
    words = [PART_WORDS[name] for name in PART_WORDS]
    for row, colour in zip(square.to_dataframe().to_dict("records"), (ACCENT, COLOURS[0], COLOURS[2]), strict=False):
        values = [row[name] for name in PART_WORDS]
        spans = [_span(row, name) for name in PART_WORDS]
        figure.add_scatter(
            x=values,
            y=words,
            mode="markers",
            name=row["metric"],
            marker={"color": colour, "size": 11},
            error_x={
                "visible": any(low == low for low, _ in spans),
                "type": "data",
                "symmetric": False,
                "array": [high - v if high == high else 0 for v, (_, high) in zip(values, spans, strict=True)],
                "arrayminus": [v - low if low == low else 0 for v, (low, _) in zip(values, spans, strict=True)],
                "thickness": 1.5,
            },
            customdata=[list(span) for span in spans],
            hovertemplate="%{y}<br>%{x:.4f} [%{customdata[0]:.4f}, %{customdata[1]:.4f}]<extra></extra>",
        )
    metrics = list(square.values)
    unit = "nats per token" if set(metrics) <= {"loss", "kl"} else "1 - cosine of the embedding"
    figure.add_vline(0, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title=f"part of the {' and '.join(metrics)} ({unit}); negative: lowers it", zeroline=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(
        showlegend=len(metrics) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    documents = len(set(square.documents))
    bars = "whiskers: 95 % intervals" if documents >= 16 else "too few documents for intervals"
    title = (
        f"Through their key or through their value?<br><sup>all heads at once, {documents} document(s); {bars}</sup>"
    )
    return themed(figure, title, height=330)


def _span(row: dict[str, Any], name: str) -> tuple[float, float]:
    return row[f"{name}_low"], row[f"{name}_high"]


def _bars(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    known = [r[f"{name}_low"] == r[f"{name}_low"] for r in rows]
    return {
        "visible": any(known),
        "type": "data",
        "symmetric": False,
        "array": [r[f"{name}_high"] - r[name] if k else 0 for r, k in zip(rows, known, strict=True)],
        "arrayminus": [r[name] - r[f"{name}_low"] if k else 0 for r, k in zip(rows, known, strict=True)],
        "thickness": 1,
        "width": 0,
    }
