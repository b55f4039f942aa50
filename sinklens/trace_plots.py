"""Figures of a trace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinklens.circuit import layout
from sinklens.components import component_name
from sinklens.errors import BadInputError
from sinklens.plots import ACCENT, INK, MUTED, escape_hover, themed
from sinklens.secondary_claims import dose_table

if TYPE_CHECKING:
    import networkx as nx

    from sinklens.neurons import Neurons
    from sinklens.trace_result import SinkTrace

BLUE = "#0072b2"


def contribution_bars(trace: SinkTrace, sink: int | None = None) -> go.Figure:
    """Writer and eraser bars over depth with the running sum, for each phase of a life; above them the sink's mass."""
    phases = trace.phases(sink)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.25, 0.75], vertical_spacing=0.05)
    masses = trace.sinks[phases[0].sink].masses
    attention = [c for c in phases[0].components if c[0] == "attn"]
    figure.add_scatter(
        x=[component_name(c) for c in attention], y=[masses[layer] for _, layer in attention], mode="lines+markers",
        name="mass", line={"color": INK}, marker={"size": 5}, hovertemplate="%{x}: mass %{y:.3f}<extra></extra>",
        row=1, col=1,
    )  # fmt: skip
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
            row=2,
            col=1,
        )
        running = (one.contributions.cumsum(0) / one.projection).tolist()
        figure.add_scatter(
            x=names,
            y=running,
            mode="lines",
            name=f"running sum, {words}",
            line={"color": colour, "dash": "dot"},
            hovertemplate="after %{x}: %{y:.3f}<extra></extra>",
            row=2,
            col=1,
        )
    figure.add_hline(0, line={"color": INK, "width": 1}, row=2, col=1)  # type: ignore[arg-type]
    order = [component_name(c) for c in phases[0].components]
    figure.update_xaxes(categoryorder="array", categoryarray=order, tickangle=-90, tickfont={"size": 9}, dtick=1)
    figure.update_xaxes(title="component, in the order of writing", row=2, col=1)
    figure.update_yaxes(title="mass", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="share of <x_ref, u>", row=2, col=1)
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.24, "x": 0})
    one = phases[0]
    title = (
        f"Who writes and erases {escape_hover(repr(one.token))} at position {one.position} ({one.kind})<br><sup>u: the "
        f"primary's direction in other sequences; each phase at its reference layer; above: mass by layer</sup>"
    )
    return themed(figure, title, height=620)


def share_bars(trace: SinkTrace, smallest: float = 0.02) -> go.Figure:
    """Mean share of every component before the reference layer, by kind of sink, with intervals over documents.

    Components whose share is below ``smallest`` in size for every kind are left out.

    Raises:
        BadInputError: an empty trace.
    """
    if not trace.traced:
        raise BadInputError("this trace is empty: the map held no sink")
    kinds = list(dict.fromkeys(one.kind for one in trace.traced))
    tables = {kind: {r["component"]: r for r in trace.shares(kind).to_dict("records")} for kind in kinds}
    order = list(dict.fromkeys(component_name(c) for one in trace.traced for c in one.components))
    named = [n for n in order if any(abs(t[n]["share"]) >= smallest for t in tables.values() if n in t)]
    figure = go.Figure()
    for kind, colour in zip(kinds, (ACCENT, BLUE, "#009e73"), strict=False):
        nothing = {"share": math.nan, "low": math.nan, "high": math.nan}
        known = [tables[kind].get(name, nothing) for name in named]
        spans = [row["low"] == row["low"] for row in known]
        figure.add_bar(
            x=named,
            y=[row["share"] for row in known],
            name=f"{kind} sinks",
            marker_color=colour,
            error_y={
                "visible": any(spans),
                "type": "data",
                "symmetric": False,
                "array": [r["high"] - r["share"] if k else 0 for r, k in zip(known, spans, strict=True)],
                "arrayminus": [r["share"] - r["low"] if k else 0 for r, k in zip(known, spans, strict=True)],
                "thickness": 1.2,
                "color": INK,
            },
            hovertemplate="%{x}: %{y:.3f} of the stream along u<extra></extra>",
        )
    figure.add_hline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(title="component, in the order of writing", type="category", tickangle=-90, dtick=1)
    figure.update_yaxes(title="share of the stream along u")
    figure.update_layout(
        barmode="group", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"}
    )
    documents = len({one.document for one in trace.traced})
    title = (
        f"Who writes the sinks<br><sup>mean over the sinks of {documents} document(s); components below "
        f"{smallest:g} are left out; u: the primary's direction in other documents</sup>"
    )
    return themed(figure, title, height=440)


def dose_curves(trace: SinkTrace, kind: str | None = None) -> go.Figure:
    """One thin line per sink and their mean, against the factor on the main writer's output."""
    rows = dose_table(trace, kind)
    if not rows:
        raise BadInputError("this trace holds no doses; give trace_sinks doses=(0, 0.5, 2)")
    doses = sorted({row["dose"] for row in rows})
    shown = {"alpha": "attention on the sink", "life": "active layers", "margin": "margin without competitors (nats)"}
    figure = make_subplots(rows=1, cols=3, subplot_titles=tuple(shown.values()), horizontal_spacing=0.09)
    sinks = len({(row["sequence"], row["position"], row["phase"]) for row in rows})
    for column, name in enumerate(shown, start=1):
        lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
        for row in rows:
            key = (row["sequence"], row["position"], row["phase"])
            lines.setdefault(key, []).append((row["dose"], row[name]))
        for points in lines.values():
            figure.add_scatter(
                x=[d for d, _ in points], y=[v for _, v in points], mode="lines", showlegend=False, hoverinfo="skip",
                line={"color": MUTED, "width": 1}, row=1, col=column,
            )  # fmt: skip
        means = [[row[name] for row in rows if row["dose"] == dose and row[name] == row[name]] for dose in doses]
        figure.add_scatter(
            x=doses, y=[sum(m) / len(m) if m else None for m in means], mode="lines+markers", name="mean",
            line={"color": ACCENT, "width": 3}, showlegend=column == 1,
            hovertemplate="x %{x}: %{y:.3f}<extra></extra>", row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title="factor on what the writer adds at the sink")
    which = f"{kind} sinks" if kind else "sinks"
    title = f"What the writer adds, rescaled: {sinks} phase(s) of {which}<br><sup>thin: each; thick: mean</sup>"
    return themed(figure, title, height=420)


def neuron_bars(found: Neurons, number: int = 0) -> go.Figure:
    """The largest neurons of one writer: share of its contribution; activation at the sink and elsewhere on hover."""
    if not 0 <= number < len(found.writers):
        raise BadInputError(f"there are {len(found.writers)} writers, numbered from 0; got {number}")
    names = ["sequence", "position", "phase", "writer"]
    writer = found.writers.to_dict("records")[number]
    rows = [r for r in found.neurons.to_dict("records") if all(r[n] == writer[n] for n in names)]
    labels = [str(row["neuron"]) for row in rows]
    figure = go.Figure()
    figure.add_bar(
        x=labels, y=[row["share"] for row in rows], name="share", marker_color=ACCENT,
        customdata=[(row["activation"], row["ordinary"], row["same_id"]) for row in rows],
        hovertemplate="neuron %{x}: %{y:.3f}<br>activation %{customdata[0]:.2f}; ordinary tokens %{customdata[1]:.2f}, "
        "same id %{customdata[2]:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=labels, y=[row["cumulative"] for row in rows], mode="lines+markers", name="running sum",
        line={"color": BLUE, "dash": "dot"}, hovertemplate="%{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_hline(0.9, line={"color": MUTED, "width": 1, "dash": "dash"})
    figure.update_xaxes(title=f"neuron of {writer['writer']} (of {writer['neurons']}), largest first", type="category")
    figure.update_yaxes(title="share of the writer's contribution along u")
    figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})
    title = (
        f"{writer['neurons_for_90']} neuron(s) carry 90 % of what {writer['writer']} writes at position "
        f"{writer['position']} {escape_hover(repr(writer['token']))}<br><sup>dashed: 90 %</sup>"
    )
    return themed(figure, title, height=420)


def circuit_figure(graph: nx.DiGraph) -> go.Figure:
    """What feeds, neurons, writers, the token and its readers from left to right; the line's width is the weight."""
    places = layout(graph)
    colours = {"token": ACCENT, "component": BLUE, "neuron": "#009e73", "head": "#cc79a7"}
    largest: dict[str, float] = {}
    for _, _, data in graph.edges(data=True):
        largest[data["role"]] = max(largest.get(data["role"], 0.0), abs(data.get("weight", 0.0)))
    figure = go.Figure()
    for a, b, data in graph.edges(data=True):
        (x0, y0), (x1, y1) = places[a], places[b]
        weight = data.get("weight", 0.0)
        share = abs(weight) / largest[data["role"]] if largest[data["role"]] else 0.0
        words = f"{a} {data['role']} {b}" + (f": {weight:.3g}" if "weight" in data else "")
        figure.add_scatter(
            x=[x0, x1], y=[y0, y1], mode="lines", showlegend=False, hoverinfo="skip",
            line={"width": 1 + 5 * share, "color": "#c1121f" if weight < 0 else MUTED},
        )  # fmt: skip
        figure.add_scatter(
            x=[(x0 + x1) / 2], y=[(y0 + y1) / 2], mode="markers", marker={"size": 12, "opacity": 0}, showlegend=False,
            hovertext=escape_hover(words), hoverinfo="text",
        )  # fmt: skip
    for kind, colour in colours.items():
        nodes = [n for n in graph.nodes if graph.nodes[n]["kind"] == kind]
        figure.add_scatter(
            x=[places[n][0] for n in nodes], y=[places[n][1] for n in nodes], mode="markers+text", name=kind,
            text=[escape_hover(str(n).replace(" neuron ", " n ")) for n in nodes], textposition="top center",
            marker={"size": 14, "color": colour}, hoverinfo="text",
        )  # fmt: skip
    figure.update_xaxes(visible=False, range=[-0.6, 4.6])
    figure.update_yaxes(
        visible=False, range=[min(y for _, y in places.values()) - 0.7, max(y for _, y in places.values()) + 0.9]
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.05, "x": 0}, plot_bgcolor="white")
    title = (
        f"Circuit of the {graph.graph['kind']} sink at position {graph.graph['position']}<br><sup>left to right: what "
        f"feeds the neurons, neurons, writers and erasers, the token, the heads that read it; red: taken away</sup>"
    )
    return themed(figure, title, height=max(420, 48 * max(len(graph.nodes) // 2, 6)))
