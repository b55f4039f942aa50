"""``sinklens mix``: how far tokens mix, with and without the sinks of a text."""

from __future__ import annotations

import sys
import warnings
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
def mix(
    model: ModelOption = DEFAULT_MODEL,
    text: TextOption = None,
    corpus: CorpusOption = None,
    seq_len: LengthOption = None,
    n_seqs: CountOption = None,
    first: Annotated[int, typer.Option(help="Measure so many tokens; sinks are found in the whole text.")] = 48,
    probes: Annotated[int, typer.Option(help="Random vectors per token.")] = 4,
    doses: Annotated[str | None, typer.Option(help="Also scale the primary's attention, such as 0.5,2.")] = None,
    layer: Annotated[int, typer.Option(help="The block whose input is varied; 0: the embedding.")] = 0,
    frozen_attention: Annotated[bool, typer.Option("--frozen-attention", help="Keep every pattern.")] = False,
    frozen_norms: Annotated[bool, typer.Option("--frozen-norms", help="Keep the scale of every norm.")] = False,
    control: Annotated[bool, typer.Option(help="Also other damage of the same loss, for costly edits.")] = True,
    twin: Annotated[bool, typer.Option("--twin", help="Also an untrained twin: what is not learned.")] = False,
    swaps: Annotated[int, typer.Option(help="So many random exchanges of one token; 0: none.")] = 0,
    collapse: Annotated[bool, typer.Option("--collapse", help="Also how alike tokens become.")] = False,
    bound: Annotated[bool, typer.Option("--bound", help="Also the path-sum bound (slow; take few tokens).")] = False,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Measure how far tokens mix, with and without sinks, by Jacobians."""
    factors = numbers_of(doses, "--doses", "0.5,2")
    check_out(out)
    if first < 3:
        raise BadInputError(f"--first must be at least 3, got {first}")
    loaded = sl.load_model(model)
    tokens = sl.load_tokens(loaded, source_of(text, corpus, Context.natural), n_seqs=n_seqs, seq_len=seq_len, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        whole = sl.find_sinks(loaded, tokens)
    sinks = whole.cut(range(len(tokens)), first) if sl.models.capabilities(loaded).causal else whole
    conditions = sl.mixing.mixing_conditions(loaded, sinks, doses=factors, control=control, seed=seed)
    edits, losses = conditions.edits, conditions.losses
    shared: dict[str, Any] = {"sinks": sinks, "seed": seed}
    found = sl.compare_mixing(
        loaded, sinks.tokens, edits, probes=probes, layer=layer, frozen_attention=frozen_attention,
        frozen_norms=frozen_norms, twin=twin, **shared,
    )  # fmt: skip
    show(found, losses)
    perturbed = sl.mixing.perturbation_spread(loaded, sinks.tokens, edits, n_swaps=swaps, **shared) if swaps else None
    if perturbed is not None:
        stdout.print(plain(repr(perturbed)), highlight=False)
    alike = sl.mixing.measure_collapse(loaded, sinks.tokens, edits, sinks=sinks) if collapse else None
    if alike is not None:
        stdout.print(plain(repr(alike)), highlight=False)
    bounds = sl.mixing.path_sums(loaded, sinks.tokens, **shared) if bound else None
    if bounds is not None:
        worst = bounds.looseness()
        stdout.print(f"path-sum bound: {worst.broken.sum()} of {worst.n.sum()} blocks above it", highlight=False)
    if out is not None:
        command = ["sinklens", *sys.argv[1:]]
        say_written(
            sl.mixing.write_mixing(
                found, out, losses=losses, swaps=perturbed, collapse=alike, bound=bounds, command=command
            )
        )


def show(found: Any, losses: dict[str, float]) -> None:
    """The three indices of every condition at the last layer."""
    from sinklens.mixing.indices import INDICES, at_last_layer  # torch is slow to load

    table = Table("condition", "loss", *INDICES, box=None, pad_edge=False)
    for label, one in found.conditions.items():
        loss = f"{losses[label]:.3f}" if label in losses else ""
        table.add_row(plain(label), loss, *(f"{value:.4g}" for value in at_last_layer(one).values()))
    stdout.print(table)
    first = next(iter(found.conditions.values()))
    stdout.print(f"at the last layer; {first.info['definition']}; S: {first.info['S']}", highlight=False)
