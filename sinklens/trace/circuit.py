"""``SinkTrace.circuit()``: tokens, components, neurons and heads of a sink as a small directed graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx

from sinklens.core.errors import BadInputError
from sinklens.residual.components import Component, component_name

if TYPE_CHECKING:
    from sinklens.find.scores import SinkScores
    from sinklens.trace.neurons import Neurons
    from sinklens.trace.phases import Traced
    from sinklens.trace.result import SinkTrace


def circuit(
    trace: SinkTrace,
    sink: int | None,
    neurons: Neurons | None,
    scores: SinkScores | None,
    *,
    most_neurons: int = 3,
    most_feeders: int = 3,
    most_readers: int = 8,
) -> nx.DiGraph:
    """See :meth:`sinklens.trace.SinkTrace.circuit`."""
    phases = trace.phases(sink)
    one = phases[0]
    graph = nx.DiGraph(model=trace.info.get("model", ""), sequence=one.sequence, position=one.position, kind=one.kind)
    token = f"{one.position} {one.token!r}"
    graph.add_node(token, kind="token", layer=phases[0].phase.onset)
    for phase in phases:
        for component in phase.writers():
            _component(graph, component)
            graph.add_edge(component_name(component), token, role="writes", weight=phase.share(component))
            if neurons is not None:
                _neurons(graph, phase, component, neurons, most_neurons, most_feeders)
        for component in phase.erasers():
            _component(graph, component)
            graph.add_edge(component_name(component), token, role="erases", weight=phase.share(component))
    for layer, head, weight in _readers(trace, phases, scores)[:most_readers]:
        name = f"head {layer}.{head}"
        graph.add_node(name, kind="head", layer=layer)
        graph.add_edge(token, name, role="is read by", **({} if weight is None else {"weight": weight}))
    return graph


def _component(graph: nx.DiGraph, component: Component) -> None:
    graph.add_node(component_name(component), kind="component", layer=component[1])


def _neurons(
    graph: nx.DiGraph, phase: Traced, component: Component, neurons: Neurons, most: int, most_feeders: int
) -> None:
    """The largest neurons of a writer, and what tells them that this token is a sink."""
    wanted = (phase.sequence, phase.position, phase.number, component_name(component))
    names = ("sequence", "position", "phase", "writer")
    listed = [r for r in neurons.neurons.to_dict("records") if tuple(r[n] for n in names) == wanted][:most]
    for row in listed:
        name = f"{component_name(component)} neuron {row['neuron']}"
        graph.add_node(name, kind="neuron", layer=component[1])
        graph.add_edge(name, component_name(component), role="is part of", weight=row["share"])
        feeds = [
            r for r in neurons.feeds.to_dict("records")
            if tuple(r[n] for n in names) == wanted and r["neuron"] == row["neuron"] and r["component"] != "bias"
        ]  # fmt: skip
        for feed in sorted(feeds, key=lambda r: -abs(r["difference"]))[:most_feeders]:
            kind, _, layer = feed["component"].partition(" ")
            graph.add_node(feed["component"], kind="component", layer=int(layer) if layer else -1)
            known = graph.get_edge_data(feed["component"], name, {"weight": 0.0})
            if abs(feed["difference"]) > abs(known["weight"]):
                graph.add_edge(
                    feed["component"], name, role="feeds", weight=feed["difference"], matrix=feed["matrix"], source=kind
                )


def _readers(trace: SinkTrace, phases: list[Traced], scores: SinkScores | None) -> list[tuple[int, int, float | None]]:
    """(layer, head, far importance where it is known) of the heads that use the sink, largest first."""
    one = phases[0]
    if scores is None:
        return [(layer, head, None) for layer, head in trace.sinks[one.sink].heads]
    if scores.tokens.digest != trace.tokens.digest:
        raise BadInputError("scores must be of the traced tokens")
    found: list[tuple[int, int, float]] = []
    for phase in phases:
        for layer in range(phase.phase.onset, phase.phase.end + 1):
            betas = scores.beta[one.sequence, layer, :, one.position].tolist()
            found += [(layer, head, beta) for head, beta in enumerate(betas) if beta == beta]
    found.sort(key=lambda reader: -reader[2])
    return [*found]


def layout(graph: nx.DiGraph) -> dict[Any, tuple[float, float]]:
    """Left to right: components that feed, neurons, writers and erasers, the token, its readers; spread by depth."""
    column = {"component": 0, "neuron": 1, "writer": 2, "token": 3, "head": 4}

    def place(node: Any) -> int:
        kind = graph.nodes[node]["kind"]
        direct = kind == "component" and any(
            d["role"] in ("writes", "erases") for _, _, d in graph.out_edges(node, True)
        )
        return column["writer" if direct else kind]

    columns: dict[int, list[Any]] = {}
    for node in graph.nodes:
        columns.setdefault(place(node), []).append(node)
    found = {}
    for x, nodes in columns.items():
        nodes.sort(key=lambda n: (graph.nodes[n]["layer"], str(n)))
        for i, node in enumerate(nodes):
            found[node] = (float(x), (len(nodes) - 1) / 2 - i)
    return found
