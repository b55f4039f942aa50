"""``sinklens reproduce``: published results, measured again, with verdicts by rule."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import CorpusOption, OutOption, SeedOption, check_out, friendly, plain, say_written, stdout


@friendly
def reproduce(
    entry: Annotated[list[str] | None, typer.Option("--entry", help="An entry by name; may be repeated.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the entries and end.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="Run on this model; default: originals at hand, else embedded ones.")
    ] = None,
    corpus: CorpusOption = None,
    n_seqs: Annotated[int | None, typer.Option("--n-seqs", help="Sequences; default each entry's own number.")] = None,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Measure published results again: published against measured, with interval and verdict."""
    from sinklens.core.storage import write_text  # torch is slow to load

    check_out(out)
    if listed:
        table = Table("entry", "result", "source", "published on", box=None, pad_edge=False)
        for one in sl.reproductions.CATALOGUE.values():
            table.add_row(one.name, plain(one.title), plain(one.source), ", ".join(one.originals))
        stdout.print(table)
        return
    found = sl.reproduce(entry or None, model=model, source=corpus or "python-docs", n_seqs=n_seqs, seed=seed)
    show(found)
    if out is not None:
        found.info["command"] = " ".join(["sinklens", *sys.argv[1:]])
        paths = {"page": out / "reproductions.md", "data": out / "reproductions.json"}
        write_text(paths["page"], found.to_markdown())
        found.save(paths["data"])
        say_written(paths)


def show(found: Any) -> None:
    """Every claim: published, measured, verdict."""
    from sinklens.reproductions.result import brief  # torch is slow to load

    colours = {"reproduced": "green", "differs": "bold red", "not comparable": "yellow"}
    table = Table("entry", "model", "claim", "published", "measured", "verdict", box=None, pad_edge=False)
    for row in brief(found.rows):
        span = "" if row["low"] != row["low"] else f" [{row['low']:.3g}, {row['high']:.3g}]"
        value = "-" if row["measured"] != row["measured"] else f"{row['measured']:.3g}{span} ({row['rule']})"
        word = f"[{colours[row['verdict']]}]{row['verdict']}[/]"
        because = f" because {row['reason']}" if row["reason"] else ""
        cells = [row["entry"], row["model"], row["claim"], row["published"], value]
        table.add_row(*map(plain, cells), word + plain(because))
    stdout.print(table)
    for note in found.notes:
        stdout.print(f"note: {plain(note)}", highlight=False)
    stdout.print(", ".join(f"{n} {word}" for word, n in found.counts().items()), highlight=False)
