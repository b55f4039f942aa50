"""``decompose_sinks``: one pass for the means, one pass that takes every layer apart, then the 2x2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.reference import sinks_of
from sinklens.ablate.selection import Layers, select
from sinklens.bridge.capabilities import capabilities, same_model
from sinklens.bridge.requirements import refuse_half_precision, refuse_unless_softmax
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.decompose.key_or_value import EXACT_HEADS, Scope, by_head, by_layer, check_metrics, whole
from sinklens.decompose.layer_pass import Reading
from sinklens.decompose.margin import PARAMETERS
from sinklens.decompose.mean_queries_keys import gather_means
from sinklens.decompose.result import NUMBERS, SinkDecomposition, Subject
from sinklens.decompose.two_by_two import Claims, TwoByTwo
from sinklens.experiment.controls import slots
from sinklens.find.locations import Places, Sinks, find_places
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.inputs.load import DEFAULT_SEQUENCES, as_tokens, load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.progress import progress_bar


@public
def decompose_sinks(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    sinks: Sinks | None = None,
    *,
    layers: Layers = None,
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    effects: Sequence[Scope] | Scope = ("all",),
    metrics: Sequence[str] | str | None = None,
    exact_heads: int | None = EXACT_HEADS,
    most_scored: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SinkDecomposition:
    """Why a sink's margin is high, what it writes, and whether it acts through its key or through its value.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences; intervals need 16 documents.
        sinks: a SinkMap of these tokens, positions, or a predicate on the ids; default :func:`sinklens.find_sinks`.
        layers: which to take apart; default, for each sink, those of its life.
        reference: sequences for the mean query and key; default the other documents of ``tokens``, or 16 of python-docs
            where there is only one.
        effects: the 2x2 for "all" heads at once (with the tests of the four claims), for every "layer" by itself, for
            every "head" (on the first 128 tokens of each sequence); () for none.
        metrics: of the 2x2: "loss", "kl" (default where the model predicts a next token) or "embedding" (encoders:
            1 - cos of the mean-pooled embedding to the unedited one).
        exact_heads: with effects="head": so many heads, those with the largest first-order effect, are measured, the
            others stay estimates; None measures all.
        most_scored: score at most so many predictions per sequence.
        seed: of that draw.
        progress: show bars.

    Queries are those at least 16 tokens from the sink (on both sides in encoders) that see it and some token that is no
    sink; a sink that none sees is NaN. Keys and queries are rebuilt from the residual stream with the scales of layer
    norm and QK norm frozen, and compared with the host's scores in every layer.

    Cost: one forward per reference sequence, and one per sequence in which every layer costs about as much again per
    sink; memory: the stream's contributions, (2 L + 1) x T x d_model floats. effects="all": 6 forwards per sequence;
    "layer": 3 sweeps of half of L forwards; "head": 3 forwards and backwards and 3 x exact_heads forwards of 128
    tokens.

    Raises:
        BadInputError: no sink, sinks of other tokens, unknown effects or metrics, a loss on an encoder.
        UnsupportedModelError: queries and keys that cannot be rebuilt (MLA; the message says where they differ).
    """
    facts = capabilities(model)
    refuse_unless_softmax(model, "decompose_sinks")
    refuse_half_precision(model, "scores are rebuilt")
    if (exact_heads is not None and exact_heads < 1) or (most_scored is not None and most_scored < 1):
        raise BadInputError("exact_heads and most_scored must be at least 1, or None for all")
    scopes = [effects] if isinstance(effects, str) else list(effects or ())
    chosen_metrics = check_metrics(model, metrics)
    batch = as_tokens(model, tokens).to("cpu")
    found: Sinks = find_sinks(model, batch, progress=progress) if sinks is None else sinks
    if isinstance(found, SinkMap) and not same_model(found.info, facts):
        raise BadInputError("the sinks were found in another model; find them again")
    places = find_places(found)
    if places.learned:
        raise BadInputError(
            "a learned sink is one constant per head: there is nothing to decompose; give its positions"
        )
    if isinstance(found, SinkMap) and found.tokens.digest != batch.digest:
        raise BadInputError("the sinks were found in other tokens; pass those, or find them again")
    chosen = select(facts, None, layers).layers
    subjects = _subjects(places, batch, facts.n_layers)
    if not subjects:
        raise BadInputError("none of these sequences holds such a sink")
    own = reference is None and len(set(batch.documents)) > 1
    if own and places.tokens is None:  # known sequences, so that means leave out the document itself
        everywhere = tuple(e for b in range(len(batch)) for e in slots(places, batch, b))
        places = Places(tokens=batch, entries=everywhere, others=tuple((e.sequence, e.position) for e in everywhere))
    where, apart = _ordinary(model, batch, places, own=own, reference=reference)
    means = gather_means(model, where, apart, progress=progress)
    notes = [] if own else [f"mean queries and keys come from {where.info.get('source', 'reference=')}"]
    reading = Reading(model, batch, subjects, chosen, means, everywhere=layers is not None)
    with progress_bar("decomposition", len(batch), progress) as advance:
        for b in range(len(batch)):
            reading.run(b, _apart(places, batch, b))
            advance()
    squares: dict[str, TwoByTwo] = {}
    claims: Claims | None = None
    values = reading.finish()
    if scopes:
        known = found if isinstance(found, SinkMap) and found.method == "attention" else None
        square, changes, more = whole(
            model, batch, places, known, chosen_metrics, reference, most_scored, seed, progress
        )
        squares["all"] = square
        claims = _claims(chosen_metrics[0], changes, values, subjects, chosen, batch, more)
    if "layer" in scopes:
        squares["layer"] = by_layer(model, batch, places, chosen_metrics, most_scored, seed, progress)
    if "head" in scopes:
        squares["head"] = by_head(model, batch, places, chosen_metrics, exact_heads, most_scored, seed, progress)
    return SinkDecomposition(
        subjects=tuple(subjects),
        layers=chosen,
        values=values,
        key_side=reading.key_side,
        rest_side=reading.rest_side,
        query_side=reading.query_side,
        components=tuple(reading.components),
        effects=squares,
        claims=claims,
        tokens=batch,
        notes=tuple([*notes, *reading.notes, *(claims.notes if claims else ())]),
        info={
            "model": facts.model,
            "sinklens": version("sinklens"),
            "seed": seed,
            "reference": where.info.get("source", "given"),
            "capabilities": asdict(facts),
        },
    )


def _ordinary(
    model: TransformerBridge, batch: Tokens, places: Places, *, own: bool, reference: Any
) -> tuple[Tokens, list[list[int]]]:
    """The sequences over which queries and keys are averaged, and the sinks to leave out of each."""
    if own:
        return batch, [_apart(places, batch, b) for b in range(len(batch))]
    if reference is None:
        context = capabilities(model).context
        length = 512 if context is None else min(512, context)
        reference = load_tokens(model, "python-docs", n_seqs=DEFAULT_SEQUENCES, seq_len=length)
    where = as_tokens(model, reference).to("cpu")
    if places.tokens is None:
        return where, [_apart(places, where, b) for b in range(len(where))]
    found = sinks_of(model, where)
    return where, [[p for s, p in found.places or () if s == b] for b in range(len(where))]


def _apart(places: Places, tokens: Tokens, sequence: int) -> list[int]:
    """Every position of a sequence that is a sink, or is treated as one: what "the rest" leaves out."""
    if places.tokens is not None and places.tokens.digest == tokens.digest:
        known = {p for b, p in places.others if b == sequence}
    else:
        known = set()
    length = int(tokens.lengths[sequence])
    if places.predicate is None and places.tokens is None:
        return sorted({p for p in places.positions if p < length})
    return sorted(known | {e.position for e in slots(places, tokens, sequence)})


def _subjects(places: Places, tokens: Tokens, n_layers: int) -> list[Subject]:
    found = []
    for b in range(len(tokens)):
        for entry in slots(places, tokens, b):
            alive = tuple(range(n_layers)) if entry.layers is None else tuple(sorted(entry.layers))
            kind = entry.group if places.tokens is not None else "chosen" if places.predicate else entry.group
            label = tokens.labels[b][entry.position]
            found.append(Subject(b, entry.position, label, kind, tokens.documents[b], alive))
    return found


def _claims(
    metric: str,
    changes: dict[str, Tensor],
    values: Float[Tensor, "sink layer head number"],
    subjects: Sequence[Subject],
    layers: Sequence[int],
    tokens: Tokens,
    notes: Sequence[str],
) -> Claims:
    """The tests of the four claims: three edits, and the bilinear terms at the layers of each sink's life."""
    with_parameters = [NUMBERS.index(name) for name in PARAMETERS[1:]]
    parameters, gaps = [], []
    for s, subject in enumerate(subjects):
        alive = [n for n, layer in enumerate(layers) if layer in subject.layers]
        parameters.append(values[s, alive][..., with_parameters].double().sum(-1).nanmean())
        gaps.append(values[s, alive][..., NUMBERS.index("gap")].double().nanmean())
    return Claims(
        metric,
        {label: change.double() for label, change in changes.items()},
        torch.stack(parameters),
        torch.stack(gaps),
        tokens.documents,
        tuple(s.document for s in subjects),
        tuple(notes),
    )
