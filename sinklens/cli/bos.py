"""``sinklens bos``: the first token kept, removed, replaced, doubled, moved, patched."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

import sinklens as sl
from sinklens.cli.effects import show_effects
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
    numbers,
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.models.catalogue import DEFAULT_MODEL


@friendly
def bos(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    replacement: Annotated[int | None, typer.Option(help="Token id that replaces the first.")] = None,
    source: Annotated[str | None, typer.Option(help="Also patch the first token from: zero, mean, or a text.")] = None,
    site: Annotated[str, typer.Option(help="resid_pre, resid_post, k, v, mlp_out or attn_out.")] = "resid_pre",
    layers: Annotated[str | None, typer.Option(help="Layers of the patch; default all.")] = None,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Keep, remove, replace, double or move the BOS (or first) token; patch its activations."""
    from sinklens.core.storage import atomic_path  # torch is slow to load

    check_out(out)
    chosen = numbers(layers, "layers")
    where = source_of(text, corpus, Context.natural)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, where, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    variants = sl.experiment.bos_variants(loaded, tokens, replacement=replacement)
    table = variants.to_dataframe(loaded)
    shown = Table("first token", "loss", "difference", "interval", box=None, pad_edge=False)
    for row in table.to_dict("records"):
        low, high = row["low"], row["high"]
        between = f"[{low:+.3f}, {high:+.3f}]" if low == low else ""
        shown.add_row(row["variant"], f"{row['loss']:.3f}", f"{row['difference']:+.3f}", plain(between))
    first = plain(repr(tokens.labels[0][0]))
    stdout.print(f"first token {first}, replaced by {plain(repr(variants.replacement))}", highlight=False)
    stdout.print(shown)
    stdout.print(f"{table.targets[0]} tokens are scored, the same in every row; nats per token", highlight=False)
    if out is not None:
        with atomic_path(out / "bos_variants.csv") as partial:
            table.to_csv(partial, index=False)
        say_written({"bos_variants.csv": out / "bos_variants.csv"})
    if source is not None:
        where_in: Any = site
        hooks = sl.patch_bos(loaded, tokens, source, layers=chosen, site=where_in)
        experiment = sl.run_experiment(loaded, tokens, {hooks.name: hooks}, controls=["random"], seed=seed)
        show_effects(experiment)
        if out is not None:
            command = ["sinklens", *sys.argv[1:]]
            say_written(
                sl.experiment.write_experiment(experiment, out, title="the first token patched", command=command)
            )
