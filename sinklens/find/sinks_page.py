"""Write what find_sinks and sink_anatomy found: a page, tables, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.find.anatomy import Anatomy
from sinklens.find.sinkmap import SinkMap
from sinklens.show.page import manifest, render

MOST_ROWS = 100


@public
def write_sinks(
    sinks: SinkMap, anatomy: Anatomy, out: str | os.PathLike[str], *, command: Sequence[str] = ()
) -> dict[str, Path]:
    """Write ``sinks.html`` (self-contained), ``sinks.csv``, the anatomy's Parquet tables and ``manifest.json``.

    Each file is written whole or not at all. Returns the paths by name.
    """
    folder = Path(out)
    result = {
        "method": sinks.method,
        "primary": len(sinks.primary),
        "secondary": len(sinks.secondary),
        "undetermined": len(sinks.where(kind="undetermined")),
        "notes": list(sinks.notes) + list(anatomy.notes),
    }
    facts = manifest(sinks.info, sinks.tokens, result, command)
    with atomic_path(folder / "sinks.csv") as partial:
        sinks.to_dataframe().to_csv(partial, index=False)
    anatomy.save(folder)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    figures = []
    if len(sinks):
        figures.append(
            (
                sinks.plot(),
                "A row is a sink, a column a layer; colour is the attention that it takes from afar, mean over "
                "heads. A primary sink lives as long as the strongest lasting one; a secondary one begins or "
                "ends elsewhere.",
            )
        )
        figures.append(
            (
                anatomy.plot(),
                "Each line is a sink: its residual norm against the other tokens, the attention that it takes, "
                "its margin over all tokens that are no sink, and the size of what it writes (median over heads).",
            )
        )
    if sinks.method == "attention":
        figures.append(
            (
                sinks.plot_sweep(),
                "How the counts depend on the activity threshold: read each count with this curve and with "
                "the masses in the table.",
            )
        )
    page = render(
        "sinks.html",
        figures,
        sinks=sinks,
        model=sinks.info["capabilities"]["model"],
        rows=sinks.to_dataframe().head(MOST_ROWS).to_dict("records"),
        most_rows=MOST_ROWS,
        levels=sinks.levels().to_dict("records"),
        classes=anatomy.head_classes()["class"].value_counts().to_dict() if len(anatomy.use) else {},
        notes=result["notes"],
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "sinks.html", page)
    names = ("sinks.html", "sinks.csv", "layers.parquet", "heads.parquet", "use.parquet", "manifest.json")
    return {name: folder / name for name in names}
