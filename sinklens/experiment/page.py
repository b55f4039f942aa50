"""Write what run_experiment found: a page, tables, the result, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.experiment.result import Experiment
from sinklens.show.page import html_table, manifest, render


@public
def write_experiment(
    experiment: Experiment, out: str | os.PathLike[str], *, title: str = "interventions", command: Sequence[str] = ()
) -> dict[str, Path]:
    """Write ``experiment.html`` (self-contained), ``effects.csv``, ``side_effects.csv``, ``experiment.safetensors`` and
    ``manifest.json``, each whole or not at all. Returns the paths by name.
    """
    folder = Path(out)
    effects, side = experiment.to_dataframe(), experiment.side_effects()
    with atomic_path(folder / "effects.csv") as partial:
        effects.to_csv(partial, index=False)
    with atomic_path(folder / "side_effects.csv") as partial:
        side.to_csv(partial, index=False)
    experiment.save(folder / "experiment.safetensors")
    result = {"runs": [f"{r.label} / {r.control}" if r.control else r.label for r in experiment.runs]}
    facts = manifest(experiment.info, experiment.tokens, result, command)
    write_text(folder / "manifest.json", json.dumps(facts, indent=1))
    figures = []
    for metric in experiment.metrics:
        caption = (
            "Each row is an intervention (filled) or, below it, the same edit at tokens that are no sink (hollow)."
        )
        figures.append((experiment.plot(metric), caption))
    page = render(
        "experiment.html",
        figures,
        experiment=experiment,
        title=title,
        model=experiment.info["capabilities"]["model"],
        effects=html_table(effects),
        side=html_table(side),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(folder / "experiment.html", page)
    names = ("experiment.html", "effects.csv", "side_effects.csv", "experiment.safetensors", "manifest.json")
    return {name: folder / name for name in names}
