"""Write what decompose_sinks found: a page, tables, the result, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.decompose.margin import PARAMETERS
from sinklens.decompose.result import SinkDecomposition
from sinklens.show.page import html_table, manifest, render

CAPTIONS = {
    "gap": "Bars sum to the gap (diamond): the sink's score above the mean score of the tokens that are no sink.",
    "components": "Red: this component's output stands in the sink's own key and raises its score; blue: it lowers it.",
    "parts": "Left of the dotted line: the model is better for having it, right: worse. A whisker across the line says "
    "that no effect can be told.",
    "plane": "Left: the model is better for the mass that the sink takes; below: for what it writes.",
}


@public
def write_decomposition(
    found: SinkDecomposition, out: str | os.PathLike[str], *, command: Sequence[str] = ()
) -> dict[str, Path]:
    """Write ``decomposition.html`` (self-contained), ``heads.csv``, ``sinks.csv``, ``components.csv``, ``effects.csv``
    and ``claims.csv`` (where measured), ``decomposition.safetensors`` and ``manifest.json``, each whole or not at all.
    Returns the paths by name.
    """
    folder = Path(out)
    heads = pd.concat([found.heads(kind).assign(kind=kind) for kind in found.kinds])
    parts = [
        found.component_table(side, kind).assign(side=side, kind=kind)
        for kind in found.kinds
        for side in ("key", "rest", "query")
    ]
    tables = {"heads": heads, "sinks": found.to_dataframe(), "components": pd.concat(parts)}
    if found.effects:
        tables["effects"] = pd.concat([square.to_dataframe().assign(scope=s) for s, square in found.effects.items()])
    if found.claims is not None:
        tables["claims"] = found.claims.to_dataframe()
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    found.save(folder / "decomposition.safetensors")
    result = {"sinks": len(found.subjects), "kinds": list(found.kinds), "effects": list(found.effects)}
    facts = manifest(found.info, found.tokens, result, command)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    figures = []
    for kind in found.kinds:
        if len(found.heads(kind)) and len(found.component_table("key", kind)):
            figures.append((found.plot("gap", kind=kind), CAPTIONS["gap"]))
            if bool((found.number("bq_content").nan_to_num() != 0).any()):
                figures.append((found.plot("gap", split="parameters", kind=kind), CAPTIONS["gap"]))
            figures.append((found.plot("components", kind=kind), CAPTIONS["components"]))
    if found.effects:
        metrics = next(iter(found.effects.values())).values
        figures += [(found.plot("plane", metric=metric), CAPTIONS["plane"]) for metric in metrics]
    means = {kind: html_table(found.means(kind)) for kind in found.kinds}
    page = render(
        "decomposition.html",
        figures,
        found=found,
        model=found.info["model"],
        summary=found.summary(),
        means=means,
        claims=html_table(tables["claims"]) if "claims" in tables else "",
        effects=html_table(found.effects["all"].to_dataframe()) if "all" in found.effects else "",
        parameters=", ".join(PARAMETERS),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "decomposition.html", page)
    names = ["decomposition.html", *(f"{n}.csv" for n in tables), "decomposition.safetensors", "manifest.json"]
    return {name: folder / name for name in names}
