"""``sinklens ablate``: sinks ablated and judged beside controls."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import sinklens as sl
from sinklens.cli.effects import show_effects
from sinklens.cli.options import (
    KINDS,
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
    numbers,
    say_written,
    source_of,
)
from sinklens.core.errors import BadInputError
from sinklens.models.catalogue import DEFAULT_MODEL


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
    to_whom: Any = to
    name: Any  # what a user types is checked by the functions themselves
    for name in mode or ["renormalize", "zero"]:
        hooks = sl.ablate_sinks(
            loaded, sinks if places is None else places, name, layers=chosen_layers, heads=chosen_heads, to=to_whom,
            g=g if name == "scale" else None,
        )  # fmt: skip
        interventions[hooks.name] = hooks
    controls: Any = [] if control == ["none"] else control or ["random", "recent"]
    experiment = sl.run_experiment(
        loaded, tokens, interventions, controls=controls, sinks=found, twin=twin, seed=seed, resume=resume
    )
    show_effects(experiment)
    if out is not None:
        say_written(
            sl.experiment.write_experiment(experiment, out, title="sinks ablated", command=["sinklens", *sys.argv[1:]])
        )
