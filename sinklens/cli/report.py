"""``sinklens report``: everything about a model's sinks, as one folder that others can read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import sinklens as sl
from sinklens.cli.options import (
    Context,
    CorpusOption,
    CountOption,
    LengthOption,
    ModelOption,
    SeedOption,
    TextOption,
    friendly,
    plain,
    source_of,
    stdout,
)
from sinklens.models.catalogue import DEFAULT_MODEL


@friendly
def report(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="Shorter texts, fewer controls: a first look.")] = False,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="The report's folder; a second run goes on in it.")] = Path(
        "report"
    ),
) -> None:
    """Scan, find, ablate, decompose, trace, mix; write a report that opens offline."""
    from sinklens.report.budget import text_of  # torch is slow to load
    from sinklens.report.write import check_folder  # torch is slow to load

    check_folder(out)
    source = source_of(text, corpus, Context.natural)
    loaded = sl.load_model(model)
    tokens = text_of(loaded, source, n_seqs=n_seqs, seq_len=seq_len, quick=quick, seed=seed)
    command = ["sinklens", *sys.argv[1:]]
    page = sl.write_report(loaded, tokens, out, name=model, quick=quick, seed=seed, command=command, progress=True)
    stdout.print(f"wrote {plain(str(page))}", highlight=False, soft_wrap=True)
