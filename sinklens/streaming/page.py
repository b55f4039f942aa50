"""Write what an eviction study found: a page, tables, the result, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.show.page import html_table, manifest, render
from sinklens.streaming.eviction import EvictionStudy

CAPTIONS = {
    "bars": "Perplexity by what is never evicted, beside the recent tokens; dashed: the model that evicts nothing.",
    "positions": "Where the loss arises: all conditions are one model until the first token is evicted.",
}


@public
def write_streaming(
    found: EvictionStudy, out: str | os.PathLike[str], *, command: Sequence[str] = ()
) -> dict[str, Path]:
    """Write ``streaming.html`` (self-contained), ``caches.csv``, ``positions.csv``, ``streaming.safetensors`` and
    ``manifest.json``, each whole or not at all. Returns the paths by name.
    """
    folder = Path(out)
    tables = {"caches": found.to_dataframe(), "positions": found.positions()}
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    found.save(folder / "streaming.safetensors")
    kept = {f"{c.keeps}, {c.recent}": [list(row) for row in c.kept] for c in found.caches if c.recent is not None}
    facts = manifest(found.info, found.tokens, {"kept": kept}, command)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    sizes = dict.fromkeys(c.recent for c in found.caches if c.recent is not None)
    figures = [(found.plot(), CAPTIONS["bars"]), *((found.plot_positions(n), CAPTIONS["positions"]) for n in sizes)]
    page = render(
        "streaming.html",
        figures,
        model=found.info["capabilities"]["model"],
        count=len(found.tokens),
        longest=int(found.tokens.lengths.max()),
        table=html_table(tables["caches"]),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "streaming.html", page)
    names = ["streaming.html", "caches.csv", "positions.csv", "streaming.safetensors", "manifest.json"]
    return {name: folder / name for name in names}
