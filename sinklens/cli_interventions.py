"""``sinklens ablate`` and ``sinklens bos``: experiments from the command line."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sinklens.cli_common import (
    Context,
    ContextOption,
    CorpusOption,
    CountOption,
    LengthOption,
    ModelOption,
    OutOption,
    SeedOption,
    TextOption,
    check_out,
    friendly,
    plain,
    say_written,
    source_of,
    stdout,
)
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL

KINDS = ("all", "primary", "secondary")


def numbers(text: str | None, what: str) -> list[int] | None:
    """``0,3-5`` as [0, 3, 4, 5]."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise BadInputError(f"--{what} takes numbers such as 0,3-5; got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


@friendly
def ablate(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    context: ContextOption = Context.natural,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    mode: Annotated[list[str] | None, typer.Option(help="renormalize, zero, ...; may be repeated.")] = None,
    kind: Annotated[str, typer.Option(help="Which found sinks: all, primary or secondary.")] = "all",
    positions: Annotated[str | None, typer.Option(help="Positions instead of found sinks, such as 0,4-6.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers, such as 3-10; default all.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads, such as 0,2; default all.")] = None,
    to: Annotated[str, typer.Option(help="Where freed mass may go: all, or ordinary tokens only.")] = "all",
    g: Annotated[float | None, typer.Option(help="The factor of mode scale.")] = None,
    control: Annotated[list[str] | None, typer.Option(help="random, recent, same_id, matched or none.")] = None,
    twin: Annotated[bool, typer.Option("--twin", help="Also on an untrained twin.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Folder in which an interrupted run goes on.")] = None,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Ablate sinks and measure what changes, beside controls."""
    import sinklens as sl

    if kind not in KINDS:
        raise BadInputError(f"--kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_out(out)
    chosen_layers, chosen_heads = numbers(layers, "layers"), numbers(heads, "heads")
    places = numbers(positions, "positions")
    source = source_of(text, corpus, context)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        found = sl.find_sinks(loaded, tokens)
    sinks = found if kind == "all" else found.where(kind=kind)
    interventions: dict[str, Any] = {}
    for name in mode or ["renormalize", "zero"]:
        hooks = sl.ablate_sinks(
            loaded, sinks if places is None else places, name, layers=chosen_layers, heads=chosen_heads, to=to,
            g=g if name == "scale" else None,
        )  # fmt: skip
        interventions[hooks.name] = hooks
    controls = [] if control == ["none"] else control or ["random", "recent"]
    experiment = sl.run_experiment(
        loaded, tokens, interventions, controls=controls, sinks=found, twin=twin, seed=seed, resume=resume
    )
    show(experiment)
    if out is not None:
        say_written(sl.write_experiment(experiment, out, title="sinks ablated", command=["sinklens", *sys.argv[1:]]))


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
    import sinklens as sl
    from sinklens.core.storage import atomic_path

    check_out(out)
    chosen = numbers(layers, "layers")
    where = source_of(text, corpus, Context.natural)
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, where, n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    variants = sl.bos_variants(loaded, tokens, replacement=replacement)
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
        hooks = sl.patch_bos(loaded, tokens, source, layers=chosen, site=site)
        experiment = sl.run_experiment(loaded, tokens, {hooks.name: hooks}, controls=["random"], seed=seed)
        show(experiment)
        if out is not None:
            command = ["sinklens", *sys.argv[1:]]
            say_written(sl.write_experiment(experiment, out, title="the first token patched", command=command))


def show(experiment: Any) -> None:
    """Effects and side effects on the terminal."""
    table = Table("intervention", "control", "sequences", "d loss", "KL", "same top", box=None, pad_edge=False)
    rows = experiment.to_dataframe().to_dict("records")
    for row in rows[1:]:
        name = "" if row["control"] else plain(row["label"])
        effect = f"{row['d_loss']:+.4f}" + bounds(row, "d_loss")
        table.add_row(
            name,
            row["control"],
            str(row["sequences"]),
            effect,
            f"{row['kl']:.4f}" + bounds(row, "kl"),
            f"{row['top1']:.3f}",
        )
    stdout.print(
        f"base loss {rows[0]['loss']:.4f} nats per token on {rows[0]['sequences']} sequence(s)", highlight=False
    )
    stdout.print(table)
    for row in experiment.side_effects().to_dict("records"):
        if row["label"] != "base" and not row["control"]:
            went = ", ".join(
                f"{row[key]:.3f} to {words}"
                for key, words in (
                    ("to_other_sinks", "other sinks"),
                    ("to_ordinary", "ordinary tokens"),
                    ("to_nothing", "nothing"),
                )
            )
            stdout.print(
                f"{plain(row['label'])}: of {row['freed']:.3f} attention freed per query, {went}; "
                f"{row['new_sinks']:.1f} new sinks per sequence",
                highlight=False,
            )
    for note in experiment.notes:
        stdout.print(f"note: {plain(note)}", highlight=False)


def bounds(row: dict[str, Any], key: str) -> str:
    """An interval, where there is one."""
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return plain(f" [{low:+.4f}, {high:+.4f}]") if low == low else ""
