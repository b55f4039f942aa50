"""Figures of lab runs: how sinks emerge, and which variants have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinklens.show.theme import ACCENT, COLOURS, INK, MUTED, band, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.lab.comparison import LabComparison

DASHES = ("solid", "dash", "dot")


def emergence(found: LabComparison) -> go.Figure:
    """Loss above the floor and sink rate against training steps: lines are means over seeds, bands their range."""
    table = found.emergence()
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    for index, (variant, group) in enumerate(table.groupby("variant", sort=False)):
        tint, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
        shown = escape_hover(str(variant))
        for column, name in ((1, "above floor"), (2, "sink")):
            spread = group.groupby("step")[name].agg(["mean", "min", "max"])
            steps = list(spread.index)
            if len(set(group["seed"])) > 1:
                figure.add_trace(band(steps, list(spread["min"]), list(spread["max"]), tint), row=1, col=column)
            figure.add_scatter(
                x=steps, y=list(spread["mean"]), mode="lines", name=shown, line={"color": tint, "dash": dash},
                legendgroup=str(variant), showlegend=column == 1, row=1, col=column,
                hovertemplate="step %{x}: %{y:.3f}<extra>" + shown + "</extra>",
            )  # fmt: skip
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text="loss above the floor, nats", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="first token is a sink, share", range=[-0.02, 1.02], row=1, col=2)
    themed(figure, "Sinks emerge with training", height=460)
    return figure.update_layout(legend={"orientation": "h", "y": -0.2}, margin={"b": 110})


def sinks_of_variants(found: LabComparison) -> go.Figure:
    """Every seed of every variant at the end of training: the first token's sink rate, and the slot's."""
    table = found.to_dataframe()
    variants = list(dict.fromkeys(table["variant"]))
    figure = go.Figure()
    for name, label, colour, symbol in (
        ("sink", "first token", ACCENT, "circle"),
        ("slot_sink", "slot", COLOURS[1], "diamond"),
        ("anywhere", "any token", MUTED, "line-ns-open"),
    ):
        kept = table if name != "slot_sink" else table[table["slot_mass"] > 0]
        figure.add_scatter(
            x=list(kept[name]), y=[escape_hover(str(v)) for v in kept["variant"]], mode="markers", name=label,
            marker={"color": colour, "symbol": symbol, "size": 11, "line": {"color": INK, "width": 1}},
            customdata=list(kept["seed"]),
            hovertemplate="%{y}, seed %{customdata}: %{x:.3f}<extra>" + label + "</extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title_text="share of sequences with a sink (alpha above 0.3); one mark per seed", range=[-0.03, 1.03]
    )
    figure.update_yaxes(categoryorder="array", categoryarray=[escape_hover(str(v)) for v in reversed(variants)])
    themed(figure, "Where the sink is, by kind of attention", height=140 + 42 * len(variants))
    return figure.update_layout(legend={"orientation": "h", "y": -0.25}, margin={"l": 190, "b": 100})
