"""Figures of experiments: effects beside their controls, sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinklens.core.errors import BadInputError
from sinklens.show.theme import ACCENT, INK, SCALE, escape_hover, themed

if TYPE_CHECKING:
    from sinklens.experiment.ablation_sweep_result import Sweep
    from sinklens.experiment.result import Experiment

WORDS = {
    "loss": "change of loss (nats per token)",
    "kl": "KL(base || edited) (nats per token)",
    "top1": "agreement of the likeliest token with base",
}
TITLES = {
    "loss": "What breaks, beside controls",
    "kl": "How far the predictions move, beside controls",
    "top1": "How often the likeliest token stays, beside controls",
}
GREY = "#7b8794"


def forest(experiment: Experiment, metric: str | None = None) -> go.Figure:
    """Effects with their 95 % intervals; each intervention's controls stand below it, hollow."""
    metric = metric or next(iter(experiment.metrics))
    if metric not in experiment.metrics:
        raise BadInputError(f"no metric {metric!r}; there are {', '.join(experiment.metrics)}")
    table = [row for row in experiment.to_dataframe().to_dict("records") if row["label"] != "base"]
    value = metric if metric in ("kl", "top1") else f"d_{metric}"
    figure = go.Figure()
    rows = list(range(len(table)))
    names = [
        f"<span style='color:{GREY}'>{escape_hover(r['control'])}</span>" if r["control"] else escape_hover(r["label"])
        for r in table
    ]
    for control in (False, True):
        chosen = [i for i in rows if bool(table[i]["control"]) == control]
        x, low, high = ([float(table[i][key]) for i in chosen] for key in (value, f"{value}_low", f"{value}_high"))
        figure.add_scatter(
            x=x,
            y=chosen,
            mode="markers",
            name="control" if control else "intervention",
            marker={
                "symbol": "circle-open" if control else "circle",
                "color": GREY if control else ACCENT,
                "size": 8 if control else 11,
            },
            error_x={
                "visible": any(b == b for b in low),
                "type": "data",
                "symmetric": False,
                "array": [b - a if b == b else 0 for a, b in zip(x, high, strict=True)],
                "arrayminus": [a - b if b == b else 0 for a, b in zip(x, low, strict=True)],
                "color": GREY if control else ACCENT,
                "thickness": 1.5,
            },
            customdata=[
                [escape_hover(table[i]["label"]), table[i]["control"], low[j], high[j], table[i]["sequences"]]
                for j, i in enumerate(chosen)
            ],
            hovertemplate=(
                "%{customdata[0]} %{customdata[1]}<br>%{x:.4f} [%{customdata[2]:.4f}, %{customdata[3]:.4f}]"
                "<br>%{customdata[4]} sequences<extra></extra>"
            ),
        )
    figure.add_vline(x=1 if metric == "top1" else 0, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(title=WORDS.get(metric, f"change of {escape_hover(metric)}"), zeroline=False)
    figure.update_yaxes(
        tickvals=rows, ticktext=names, range=[len(rows) - 0.5, -0.5], showgrid=False, zeroline=False, automargin=True
    )
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"})
    documents = len(set(experiment.tokens.documents))
    bars = "bars: 95 % intervals over documents" if documents >= 16 else "too few documents for intervals"
    what = TITLES.get(metric, f"Change of {escape_hover(metric)}, beside controls")
    title = f"{what}<br><sup>{documents} document(s); {bars}; hollow: the same edit elsewhere</sup>"
    return themed(figure, title, height=max(320, 170 + 24 * len(rows)))


def sweep_figure(sweep: Sweep, metric: str = "loss") -> go.Figure:
    """Bars over layers or heads, a map over both, a curve over doses."""
    if metric not in sweep.metrics:
        raise BadInputError(f"no metric {metric!r}; there are {', '.join(sweep.metrics)}")
    table = sweep.to_dataframe()
    value = "d_loss" if metric == "loss" else metric
    words = WORDS[metric]
    if sweep.over == "layer-head":
        grid = table.pivot(index="layer", columns="head", values=value)
        figure = go.Figure(
            go.Heatmap(
                z=grid.to_numpy(),
                x=list(grid.columns),
                y=list(grid.index),
                colorscale="RdBu_r" if metric == "loss" else SCALE,
                zmid=0 if metric == "loss" else None,
                colorbar={"title": words, "outlinewidth": 0},
                hovertemplate="layer %{y}, head %{x}: %{z:.4f}<extra></extra>",
            )
        )
        figure.update_xaxes(title="head", dtick=1 if len(grid.columns) <= 16 else None, showgrid=False)
        figure.update_yaxes(title="layer", showgrid=False)
        title = f"{sweep.mode}, one head at a time"
        return themed(figure, title, height=max(320, 130 + 17 * len(grid.index)))
    x = table[sweep.over].tolist()
    y = table[value].tolist()
    low, high = table[f"{value}_low"].tolist(), table[f"{value}_high"].tolist()
    bars: dict[str, object] = {
        "visible": any(b == b for b in low),
        "type": "data",
        "symmetric": False,
        "array": [b - a if b == b else 0 for a, b in zip(y, high, strict=True)],
        "arrayminus": [a - b if b == b else 0 for a, b in zip(y, low, strict=True)],
        "thickness": 1.5,
    }
    figure = go.Figure()
    if sweep.over == "dose":
        figure.add_scatter(x=x, y=y, mode="lines+markers", line={"color": ACCENT}, error_y=bars)
        figure.update_xaxes(title="factor g on the sinks' exp-scores (0: gone, 1: unchanged)")
    else:
        figure.add_bar(x=x, y=y, marker_color=ACCENT, error_y={**bars, "color": INK})
        figure.update_xaxes(title=sweep.over, dtick=5 if len(x) > 12 else 1)
    figure.update_yaxes(title=words)
    name = "scale(g)" if sweep.over == "dose" else f"{sweep.mode}, one {sweep.over} at a time"
    return themed(figure, name, height=380)
