"""``sinklens lab``: train small models with any kind of attention, and compare them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import check_out, friendly, numbers_of, plain, say_written, stdout
from sinklens.core.errors import BadInputError

if TYPE_CHECKING:
    from sinklens.lab.comparison import LabComparison

lab = typer.Typer(help="Train small models with any kind of attention, and compare them.", no_args_is_help=True)


@lab.command()
@friendly
def run(
    config: Annotated[str, typer.Argument(help="A YAML file, or a study that comes with sinklens (lab studies).")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs; what is finished there is kept.")] = Path(
        "lab"
    ),
    seeds: Annotated[str | None, typer.Option(help="Other seeds than the study's, such as 0,1.")] = None,
    analysis: Annotated[bool, typer.Option(help="Also the 2x2, head classes and mixing of each model.")] = True,
) -> None:
    """Train every variant of a study on every seed; a second call goes on where the first stopped."""
    from sinklens.lab.page import write_comparison  # torch is slow to load

    check_out(out)
    study = sl.lab.read_study(config)
    chosen = tuple(int(seed) for seed in numbers_of(seeds, "--seeds", "0,1")) or None
    found = sl.lab.compare(sl.lab.run_study(study, out, seeds=chosen, analysis=analysis))
    _show(found)
    say_written(write_comparison(found, out / study.name, command=["sinklens", *sys.argv[1:]]))


@lab.command()
@friendly
def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders with finished runs.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the page, tables and manifest.")] = None,
) -> None:
    """Compare finished runs: the operations table, the BOS table, the figure of emergence."""
    from sinklens.lab.page import write_comparison  # torch is slow to load

    check_out(out)
    for folder in runs:
        if not Path(folder).is_dir():
            raise BadInputError(f"no folder at {folder!r}; give what 'sinklens lab run' wrote")
    found = sl.lab.compare(runs)
    _show(found)
    if out is not None:
        say_written(write_comparison(found, out, command=["sinklens", *sys.argv[1:]]))


@lab.command("studies")
@friendly
def list_studies() -> None:
    """List the studies that come with sinklens."""
    table = Table("study", "variants", "seeds", box=None, pad_edge=False)
    for name in sl.lab.studies():
        study = sl.lab.read_study(name)
        table.add_row(name, plain(", ".join(variant.name for variant in study.variants)), f"{len(study.seeds)}")
    stdout.print(table)


def _show(found: LabComparison) -> None:
    """The tables, all seeds."""
    for title, frame in (("operations", found.operations_table()), ("without the first token", found.bos_table())):
        table = Table(*(str(column) for column in frame.columns), title=title, title_justify="left", box=None)
        for row in frame.to_dict("records"):
            table.add_row(*(plain(str(value)) for value in row.values()))
        stdout.print(table)
