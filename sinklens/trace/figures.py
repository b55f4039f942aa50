"""Figures of a trace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinklens.core.errors import BadInputError
from sinklens.find.lifetimes import Kind
from sinklens.residual.components import component_name
from sinklens.show.theme import ACCENT, INK, MUTED, escape_hover, themed
from sinklens.trace.circuit import layout
from sinklens.trace.doses import dose_table

if TYPE_CHECKING:
    import networkx as nx

    from sinklens.trace.neurons import Neurons
    from sinklens.trace.result import SinkTrace

BLUE = "#0072b2"
BESIDE: dict[str, dict[str, Any]] = {  # where a label stands by its node, clear of the marker
    "above": {"xanchor": "center", "yanchor": "bottom", "yshift": 9},
    "right": {"xanchor": "left", "xshift": 8},
    "left": {"xanchor": "right", "xshift": -8},
}
NODES = {
    "component": (BLUE, "above"),
    "neuron": ("#009e73", "above"),
    "token": (ACCENT, "above"),
    "head": ("#cc79a7", "right"),
}
HEADS = ("feeds", "neurons", "writers, erasers", "token", "read by heads")


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
    kinds: list[Any] = list(dict.fromkeys(one.kind for one in trace.traced))
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


def dose_curves(trace: SinkTrace, kind: Kind | None = None) -> go.Figure:
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
    figure.update_xaxes(title="factor on what the writer adds at the sink", row=1, col=2)
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
    """What feeds, neurons, writers, the token and its readers from left to right; the line's width is the weight, and
    the number stands on the edge (of a reader: behind its name).
    """
    places = layout(graph)
    columns = sorted({x for x, _ in places.values()})
    counts = {x: sum(place[0] == x for place in places.values()) for x in columns}
    wider = {x: 0.8 * (max(counts.values()) - 1) / (n - 1) if n > 1 else 1.0 for x, n in counts.items()}
    spot = {  # no room for empty columns; each uses most of the height
        node: (float(columns.index(x)), y * max(1.0, wider[x])) for node, (x, y) in places.items()
    }
    largest: dict[str, float] = {}
    for _, _, data in graph.edges(data=True):
        largest[data["role"]] = max(largest.get(data["role"], 0.0), abs(data.get("weight", 0.0)))
    figure = go.Figure()
    read: dict[Any, str] = {}
    for a, b, data in graph.edges(data=True):
        (x0, y0), (x1, y1) = spot[a], spot[b]
        weight = data.get("weight", 0.0)
        share = abs(weight) / largest[data["role"]] if largest[data["role"]] else 0.0
        words = f"{a} {data['role']} {b}" + (f": {weight:.3g}" if "weight" in data else "")
        figure.add_scatter(
            x=[x0, x1], y=[y0, y1], mode="lines", showlegend=False, hoverinfo="skip",
            line={"width": 1 + 5 * share, "color": "#c1121f" if weight < 0 else "#c5ced8"},
        )  # fmt: skip
        figure.add_scatter(
            x=[(x0 + x1) / 2], y=[(y0 + y1) / 2], mode="markers", marker={"size": 12, "opacity": 0}, showlegend=False,
            hovertext=escape_hover(words), hoverinfo="text",
        )  # fmt: skip
        if "weight" in data and data["role"] == "is read by":
            read[b] = f"  {weight:.2f}"
        elif "weight" in data:
            along = 0.3 + 0.12 * (sum(spot[other][1] > y0 for other in graph.predecessors(b)) % 3)
            figure.add_annotation(
                x=x0 + along * (x1 - x0), y=y0 + along * (y1 - y0), text=f"{weight:.2f}", showarrow=False,
                font={"size": 10, "color": "#c1121f" if weight < 0 else INK}, bgcolor="rgba(255,255,255,0.85)",
            )  # fmt: skip
    for kind, (colour, where) in NODES.items():
        nodes = [n for n in graph.nodes if graph.nodes[n]["kind"] == kind]
        for n in nodes:
            beside = BESIDE["left" if kind == "component" and places[n][0] == columns[0] else where]
            text = f"{escape_hover(_short(str(n).replace(' neuron ', ' n ')))}{read.get(n, '')}"
            figure.add_annotation(
                x=spot[n][0], y=spot[n][1], text=text, showarrow=False, bgcolor="rgba(255,255,255,0.8)", **beside
            )
        figure.add_scatter(
            x=[spot[n][0] for n in nodes], y=[spot[n][1] for n in nodes], mode="markers", name=kind,
            hovertext=[escape_hover(str(n)) for n in nodes], hoverinfo="text",
            marker={"size": 20 if kind == "token" else 14, "color": colour, "line": {"color": "white", "width": 2}},
        )  # fmt: skip
    top = max(y for _, y in spot.values())
    for number, column in enumerate(columns):
        figure.add_annotation(
            x=number, y=top + 1.1, text=HEADS[int(column)], showarrow=False, font={"size": 12, "color": "#52667a"}
        )
    figure.update_xaxes(visible=False, range=[-0.6, len(columns) - 0.3])
    figure.update_yaxes(visible=False, range=[min(y for _, y in spot.values()) - 0.7, top + 1.6])
    figure.update_layout(showlegend=False, plot_bgcolor="white")
    title = (
        f"Circuit of the {graph.graph['kind']} sink at position {graph.graph['position']}<br><sup>numbers: share of "
        f"the stream, of the writer, difference of the pre-activation, far importance; red: taken away</sup>"
    )
    return themed(figure, title, height=max(420, 180 + 56 * max(counts.values())))


def _short(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"
