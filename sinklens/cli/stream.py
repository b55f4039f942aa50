"""``sinklens stream``: which tokens of a text must stay in a rolling cache."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.options import (
    Context,
    CorpusOption,
    CountOption,
    LengthOption,
    ModelOption,
    OutOption,
    SeedOption,
    TextOption,
    check_out,
    friendly,
    numbers_of,
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL


@friendly
def stream(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    recent: Annotated[str, typer.Option(help="Recent tokens in the cache, such as 64,256.")] = "64,256",
    sinks: Annotated[str, typer.Option(help="First tokens that stay, such as 1,2,4.")] = "1,2,4",
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Read a text through StreamingLLM's rolling cache: window alone, first tokens, sinks, random tokens."""
    sizes, first = _whole(recent, "--recent", "64,256"), _whole(sinks, "--sinks", "1,2,4")
    check_out(out)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source_of(text, corpus, Context.natural), n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    found = sl.streaming.eviction_study(loaded, tokens, sizes, first=first, seed=seed)
    show(found)
    if out is not None:
        say_written(sl.streaming.write_streaming(found, out, command=["sinklens", *sys.argv[1:]]))


def _whole(words: str, option: str, example: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    found = numbers_of(words, option, example)
    if not found or any(value != int(value) for value in found):
        raise BadInputError(f"{option} takes whole numbers between commas, such as {example}; got {words!r}")
    return tuple(int(value) for value in found)


def show(found: Any) -> None:
    """Every cache with its loss, against full attention and against the window alone."""
    table = Table("recent", "stays", "kept", "loss", "perplexity", "cost", "gain", box=None, pad_edge=False)
    for row in found.to_dataframe().to_dict("records"):
        full = row["recent"] != row["recent"]
        size, kept = ("all", "-") if full else (f"{row['recent']:.0f}", f"{row['kept']:.3g}")
        shown = [_between(row, "cost"), _between(row, "gain")]
        table.add_row(size, plain(row["keeps"]), kept, f"{row['loss']:.3f}", f"{row['perplexity']:.2f}", *shown)
    stdout.print(table)
    stdout.print(
        f"{len(found.tokens)} sequence(s) of up to {int(found.tokens.lengths.max())} tokens; cost: loss above full "
        f"attention; gain: loss below the window alone; positions are counted in the cache",
        highlight=False,
    )


def _between(row: dict[str, Any], name: str) -> str:
    mean, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if mean != mean:
        return "-"
    return f"{mean:+.3f}" + (plain(f" [{low:+.3f}, {high:+.3f}]") if low == low else "")
