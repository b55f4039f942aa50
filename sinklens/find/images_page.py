"""Write what was measured on pictures: a page with maps, a table of tokens, a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sinklens.core.errors import BadInputError
from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.find.image_figures import image_map
from sinklens.find.registers import Registers
from sinklens.find.scores import SinkScores
from sinklens.find.sinks import from_scores
from sinklens.inputs.images import Images
from sinklens.show.page import html_table, manifest, render

MOST_PICTURES = 8  # with a map on the page


@public
def write_images(
    scores: SinkScores, registers: Registers, out: str | os.PathLike[str], *, command: Sequence[str] = ()
) -> dict[str, Path]:
    """Write ``images.html`` (self-contained, opens offline), ``tokens.csv`` and ``manifest.json`` into a folder.

    Each file is written whole or not at all. Returns the three paths by name.

    Raises:
        BadInputError: scores of texts, or scores and registers of different pictures.
    """
    tokens = scores.tokens
    if not isinstance(tokens, Images):
        raise BadInputError("these scores are of texts; write_scan is for texts")
    folder = Path(out)
    table = registers.to_dataframe(scores)
    sinks = from_scores(scores)
    found = int(registers.high[:, registers.layer].sum())
    model = scores.info["capabilities"]["model"]
    result = {"rule": registers.rule, "registers": found, "sinks": len(sinks), "notes": list(sinks.notes)}
    facts = manifest(scores.info, tokens, result, command)
    figures = [
        (
            image_map(scores, image),
            "Each panel is a layer: bright patches are those that the picture's tokens look at, blue ones are looked "
            "at less than an even spread would give. The numbers above are the tokens that have no place on the "
            "picture, and the strongest patch.",
        )
        for image in range(min(len(tokens), MOST_PICTURES))
    ]
    figures.append(
        (
            registers.plot(),
            "Norms of the residual stream over the median of the picture's patches. Patches used as registers would "
            "rise above the dashed line in the middle of the model (Darcet et al. 2024).",
        )
    )
    paths = {name: folder / name for name in ("images.html", "tokens.csv", "manifest.json")}
    with atomic_path(paths["tokens.csv"]) as partial:
        table.to_csv(partial, index=False)
    write_text(paths["manifest.json"], json.dumps(facts, indent=1))
    page = render(
        "images.html",
        figures,
        model=model,
        pictures=len(tokens),
        found=found,
        words=repr(registers),
        sigmas=f"{registers.sigmas:g}",
        sinks=list(sinks),
        notes=list(sinks.notes),
        tokens=html_table(table),
        manifest=json.dumps(facts, indent=1),
    )
    write_text(paths["images.html"], page)
    return paths
