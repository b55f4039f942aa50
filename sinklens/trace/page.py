"""Write what trace_sinks found: a page, tables, the result, a manifest."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import pandas as pd

from sinklens.core.errors import BadInputError
from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.show.page import html_table, manifest, render
from sinklens.trace.claims import norm_and_mass, primary_weakening, sink_levels, writer_alignment
from sinklens.trace.result import SinkTrace
from sinklens.trace.verdicts import Verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from sinklens.find.scores import SinkScores
    from sinklens.trace.neurons import Neurons

MOST_FIGURES = 6
CAPTION = (
    "Bars: what each component adds along the primary's direction, of the sink's own stream at the reference layer; "
    "dotted: their running sum."
)
CIRCUIT = (
    "From left to right: what tells the writer's neurons that this token is a sink, the neurons, the writers and "
    "erasers, the token, the heads that look at it. Edges are as wide as their weight among edges of the same kind."
)
NEURONS = "What single neurons of the first writer add along the primary's direction; dotted: their running sum."
DOSES = (
    "The main writer's output at the sink, rescaled: each thin line is one phase of one sink, the thick one the mean."
)


@public
def write_trace(
    trace: SinkTrace,
    out: str | os.PathLike[str],
    *,
    planted: pd.DataFrame | None = None,
    neurons: Neurons | None = None,
    scores: SinkScores | None = None,
    command: Sequence[str] = (),
) -> dict[str, Path]:
    """Write ``trace.html`` (self-contained), ``writers.csv``, ``erasers.csv``, ``contributions.csv``, ``effects.csv``,
    ``claims.csv``, ``planted.csv`` and ``neurons.csv`` (where given), ``circuit.json`` (node-link form),
    ``trace.safetensors`` and ``manifest.json``, each whole or not at all. ``scores`` of the same tokens weigh the
    circuit's reading heads. Returns the paths by name.
    """
    folder = Path(out)
    tables = {
        "writers": trace.writers(),
        "erasers": trace.erasers(),
        "contributions": trace.to_dataframe(),
        "effects": trace.effects(),
    }
    verdicts = tested(trace)
    tables["claims"] = pd.concat(
        [v.numbers.assign(claim=v.claim, holds=[v.holds] * len(v.numbers)) for v in verdicts] or [pd.DataFrame()]
    )
    if planted is not None:
        tables["planted"] = planted
    if neurons is not None:
        tables["neurons"] = neurons.to_dataframe()
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    trace.save(folder / "trace.safetensors")
    result = {"sinks": len({one.sink for one in trace.traced}), "phases": len(trace.traced)}
    facts = manifest(trace.info, trace.tokens, result, command)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    shown: list[tuple[Figure, str]] = []
    graph: Any = {}
    if trace.traced:
        first = next((one.sink for one in trace.traced if one.kind == "secondary"), trace.traced[0].sink)
        graph = nx.node_link_data(trace.circuit(first, neurons=neurons, scores=scores), edges="edges")
        shown.append((trace.plot_circuit(first, neurons=neurons, scores=scores), CIRCUIT))
    if neurons is not None:
        shown.append((neurons.plot(), NEURONS))
    if any(row["replacement"].startswith("x ") for row in trace.causes):
        shown.append((trace.plot_doses(), DOSES))
    write_text(folder / "circuit.json", json.dumps(graph, indent=1))
    numbers = list(dict.fromkeys(one.sink for one in trace.traced))[:MOST_FIGURES]
    page = render(
        "trace.html",
        [*((trace.plot(number), CAPTION) for number in numbers), *shown],
        trace=trace,
        model=trace.info["model"],
        shown=len(numbers),
        sinks=result["sinks"],
        writers=html_table(tables["writers"]),
        erasers=html_table(tables["erasers"]),
        verdicts=[str(verdict) for verdict in verdicts],
        planted="" if planted is None else html_table(planted),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "trace.html", page)
    names = ["trace.html", *(f"{n}.csv" for n in tables), "circuit.json", "trace.safetensors", "manifest.json"]
    return {name: folder / name for name in names}


def tested(trace: SinkTrace) -> list[Verdict]:
    """The claims about secondary sinks that this trace can answer."""
    found = []
    for claim in (writer_alignment, norm_and_mass, primary_weakening, sink_levels):
        with contextlib.suppress(BadInputError):
            found.append(claim(trace))
    return [verdict for verdict in found if verdict.numbers["n"].max() > 0]
