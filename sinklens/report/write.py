"""``write_report``: scan, find, ablate, decompose, trace, mix, and one folder that says what was found."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import record
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.storage import write_text
from sinklens.core.validation import public
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens, reads_images
from sinklens.models.load import load_model
from sinklens.report.attention_pages import write_attention
from sinklens.report.budget import FULL, QUICK, text_of
from sinklens.report.export import export
from sinklens.report.fingerprint import identity, key_of, weights_digest
from sinklens.report.manifest import write_manifest
from sinklens.report.methods import BIBLIOGRAPHY, script
from sinklens.report.page import Told, html_page, markdown_page
from sinklens.report.run_stages import run_stages, teller
from sinklens.report.sections import sections
from sinklens.report.stage_store import Shelf
from sinklens.report.stages import Material
from sinklens.report.story import finding
from sinklens.report.tables import write_tables


@public
def write_report(
    model: TransformerBridge | PlainModel | str | os.PathLike[str],
    tokens: str | Sequence[str] | Tensor | Tokens | None,
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    name: str | None = None,
    command: Sequence[str] = (),
    progress: bool | None = None,
) -> Path:
    """Analyse a model's sinks on a text and write a report: one folder that opens offline.

    Args:
        model: from :func:`sinklens.load_model`, or what that takes (a name, a folder, a hub id).
        tokens: the sequences, as everywhere; None: 16 documents of python-docs. Intervals need 16 documents.
        path: the folder. If it holds this report already, wholly or in part, what is done is not done again.
        quick: fewer tokens and controls; see :mod:`sinklens.report.budget`.
        seed: of every draw.
        name: what ``load_model`` takes to load this model again, for ``reproduce.py``; default: what was passed, or the
            model's own name.
        command: what the manifest names as the command.
        progress: True: say each stage on standard error; None: in terminals and notebooks; False: never.

    Written are ``index.html`` (self-contained), ``report.md``, ``reproduce.py``, ``tables/`` (CSV and Parquet),
    ``figures/`` (SVG and PNG, where kaleido and a browser are installed), ``attention/`` (circuitsvis), ``stages/``
    (the results, to be loaded again), ``references.bib`` and ``manifest.json``. Each file is written whole or not at
    all; a stage that this model cannot do is left out, and the report says why.

    Cost: the sum of the functions it calls, about 100 forwards of the text, and Jacobians of a few tokens.

    Returns:
        The path of ``index.html``.

    Raises:
        BadInputError: no such model or text, a path that is a file or a folder of something else, another report
            being written there.
        UnsupportedModelError: a model of images, or one that cannot be scanned.
    """
    folder = Path(path)
    check_folder(folder)
    began = time.perf_counter()
    known = name or (os.fspath(model) if isinstance(model, (str, os.PathLike)) else None)
    loaded = load_model(model)
    if reads_images(loaded):
        raise UnsupportedModelError(
            f"{record(loaded).model} reads images; sinklens images (write_images) writes their page"
        )
    sizes = QUICK if quick else FULL
    given = text_of(loaded, "python-docs", quick=quick, seed=seed) if tokens is None else tokens
    batch = as_tokens(loaded, given).to("cpu")
    m = Material(loaded, batch, sizes, seed, None if progress is None or progress else False)
    say = teller(progress)
    say("reading the weights, to know which results belong to them")
    facts = identity(loaded, batch, sizes, seed, weights_digest(loaded))
    shelf = Shelf(folder / "stages", key_of(facts))
    with shelf.locked():
        batch.save(shelf.folder / "tokens.safetensors")
        entries = run_stages(m, shelf, say)
        say("writing the page, tables and figures")
        parts = sections(m)
        plots = [plot for part in parts for plot in part.plots]
        pages, note = write_attention(m, shelf, folder / "attention")
        tables = write_tables(parts, folder / "tables")
        files, why = export(plots, folder / "figures", shelf.folder / "figures.json")
        called = known or record(loaded).model
        told = Told(m, finding(m), parts, called, pages, note, files, why, list(command))
        calls = [f'"{plot.name}": {plot.code}' for plot in plots]
        write_text(folder / "reproduce.py", script(m, called, calls))
        write_text(folder / "references.bib", BIBLIOGRAPHY)
        write_text(folder / "report.md", markdown_page(told))
        write_manifest(told, facts, entries, tables, time.perf_counter() - began, folder)
        write_text(folder / "index.html", html_page(told, folder))
    return folder / "index.html"


def check_folder(folder: Path) -> None:
    """Refuse what cannot be a report's folder before any work is done.

    Raises:
        BadInputError: the path is a file, or stands below one.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise BadInputError(f"{str(path)!r} is a file; give a folder for the report")
