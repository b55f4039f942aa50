"""Write what trace_sinks found: a page, tables, the result, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sinklens.pages import html_table, manifest, render
from sinklens.results import atomic_path, write_text
from sinklens.trace_result import SinkTrace

MOST_FIGURES = 6
CAPTION = (
    "Bars: what each component adds along the primary's direction, of the sink's own stream at the reference layer; "
    "dotted: their running sum."
)


def write_trace(
    trace: SinkTrace,
    out: str | os.PathLike[str],
    *,
    planted: pd.DataFrame | None = None,
    command: Sequence[str] = (),
) -> dict[str, Path]:
    """Write ``trace.html`` (self-contained), ``writers.csv``, ``erasers.csv``, ``contributions.csv``, ``effects.csv``,
    ``planted.csv`` (where given), ``trace.safetensors`` and ``manifest.json``, each whole or not at all. Returns the
    paths by name.
    """
    folder = Path(out)
    tables = {
        "writers": trace.writers(),
        "erasers": trace.erasers(),
        "contributions": trace.to_dataframe(),
        "effects": trace.effects(),
    }
    if planted is not None:
        tables["planted"] = planted
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    trace.save(folder / "trace.safetensors")
    result = {"sinks": len({one.sink for one in trace.traced}), "phases": len(trace.traced)}
    facts = manifest(trace.info, trace.tokens, result, command)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    numbers = list(dict.fromkeys(one.sink for one in trace.traced))[:MOST_FIGURES]
    page = render(
        "trace.html",
        [(trace.plot(number), CAPTION) for number in numbers],
        trace=trace,
        model=trace.info["model"],
        shown=len(numbers),
        sinks=result["sinks"],
        writers=html_table(tables["writers"]),
        erasers=html_table(tables["erasers"]),
        planted="" if planted is None else html_table(planted),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "trace.html", page)
    names = ["trace.html", *(f"{n}.csv" for n in tables), "trace.safetensors", "manifest.json"]
    return {name: folder / name for name in names}
