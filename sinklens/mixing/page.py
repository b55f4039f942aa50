"""Write what the measures of mixing found: a page, tables, the results, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.mixing.result import MixingComparison
from sinklens.show.page import html_table, manifest, render

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from sinklens.mixing.collapse import Collapse
    from sinklens.mixing.path_sum import PathSums
    from sinklens.mixing.perturbation_result import Perturbation

CAPTIONS = {
    "indices": "One line per condition, the same probes and the same S in all. Left: how much of what a token's "
    "representation depends on stands elsewhere; middle: how much of it is the sinks'; right: the same dependence "
    "against the token's own length. How the sink's column is counted decides the sign: read all three.",
    "map": "The model without edits: how strongly each token (down) responds to each input (across).",
    "swaps": "The same exchanges of one token in every condition. Right: how many times as far they spread.",
    "swap": "One exchange: how much every token's representation changes, layer by layer.",
    "collapse": "How alike tokens that are no sink become: low residual, high cosine, low entropy.",
    "bound": "Every measured block lies below the dashed line if the bound holds; how far below is how loose it is.",
}


@public
def write_mixing(
    found: MixingComparison,
    out: str | os.PathLike[str],
    *,
    losses: dict[str, float] | None = None,
    swaps: Perturbation | None = None,
    collapse: Collapse | None = None,
    bound: PathSums | None = None,
    command: Sequence[str] = (),
) -> dict[str, Path]:
    """Write ``mixing.html`` (self-contained), ``indices.csv``, ``distances.csv``, ``influence.csv``, ``swaps.csv``,
    ``collapse.csv`` and ``bound.csv`` (where given), ``mixing.safetensors`` and ``manifest.json``, each whole or not at
    all. Returns the paths by name.
    """
    folder = Path(out)
    base = next(iter(found.conditions.values()))
    tables: dict[str, pd.DataFrame] = {
        "indices": found.to_dataframe(),
        "distances": found.distances(),
        "influence": found.influence(),
    }
    figures: list[tuple[Figure, str]] = [(found.plot(), CAPTIONS["indices"]), (base.plot_map(), CAPTIONS["map"])]
    if swaps is not None:
        tables["swaps"] = swaps.to_dataframe()
        figures += [(swaps.plot(), CAPTIONS["swaps"]), (swaps.plot_swap(), CAPTIONS["swap"])]
    if collapse is not None:
        tables["collapse"] = collapse.to_dataframe()
        figures.append((collapse.plot(), CAPTIONS["collapse"]))
    if bound is not None:
        tables["bound"] = bound.looseness()
        figures.append((bound.plot(), CAPTIONS["bound"]))
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    found.save(folder / "mixing.safetensors")
    facts = manifest(base.info, base.tokens, {"conditions": list(found.conditions), "losses": losses or {}}, command)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    last = base.info["layer"] + base.mix.shape[1] - 1
    ends = tables["indices"]
    page = render(
        "mixing.html",
        figures,
        model=base.info["model"],
        count=len(base.tokens),
        definition=base.info["definition"],
        source=base.info["S"],
        sinks=[sorted(s) for s in base.sinks][:8],
        losses=losses or {},
        last=last,
        indices=html_table(pd.DataFrame(ends[ends.layer == last]).drop(columns="layer")),
        bound=html_table(tables["bound"]) if bound is not None else "",
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "mixing.html", page)
    names = ["mixing.html", *(f"{n}.csv" for n in tables), "mixing.safetensors", "manifest.json"]
    return {name: folder / name for name in names}
