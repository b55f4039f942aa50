"""``write_comparison``: a comparison as a page, tables and a manifest."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from sinklens.core.storage import atomic_path, write_text
from sinklens.lab.comparison import LabComparison
from sinklens.show.page import html_table, render

CAPTIONS = {
    "emergence": "Lines are means over seeds, bands run from the least to the largest seed. Left: loss above the exact "
    "floor of the task. Right: in how many sequences (and heads) the first token is a sink.",
    "sinks": "Every seed at the end of training. On relative weights where rows sum to anything; elsewhere on the "
    "weights as they are, so that what a slot takes counts against the token.",
}
PACKAGES = ("sinklens", "transformer-lens", "torch", "numpy")


def write_comparison(
    found: LabComparison, out: str | os.PathLike[str], *, command: Sequence[str] = ()
) -> dict[str, Path]:
    """Write ``lab.html`` (self-contained), ``runs.csv``, ``operations.csv``, ``bos.csv``, ``mechanisms.csv``,
    ``emergence.csv`` and ``manifest.json``, each whole or not at all. Returns the paths by name.
    """
    folder = Path(out)
    tables = {
        "runs": found.to_dataframe(),
        "operations": found.operations_table(),
        "bos": found.bos_table(),
        "mechanisms": found.mechanisms_table(),
        "emergence": found.emergence(),
    }
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            table.to_csv(partial, index=False)
    facts = {
        "command": list(command),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "runs": [{"seed": run.seed, "folder": str(run.folder), **run.config.to_dict()} for run in found.runs],
    }
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    page = render(
        "lab.html",
        [(found.plot(), CAPTIONS["emergence"]), (found.plot("sinks"), CAPTIONS["sinks"])],
        variants=len({run.config.name for run in found.runs}),
        runs=len(found.runs),
        operations=html_table(tables["operations"]),
        bos=html_table(tables["bos"]),
        mechanisms=html_table(tables["mechanisms"]),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "lab.html", page)
    names = ["lab.html", *(f"{name}.csv" for name in tables), "manifest.json"]
    return {name: folder / name for name in names}
