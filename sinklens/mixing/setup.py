"""What the measures of mixing share: conditions by label, and the set S of sinks that is counted apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensWarning
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.inputs.tokens import Tokens

BASE = "base"
Conditions = Mapping[str, Sequence[Any]]
Places = tuple[tuple[int, ...], ...]
Sinks = SinkMap | Sequence[int] | Sequence[Sequence[int]] | None


def conditions_of(conditions: Conditions) -> dict[str, Sequence[Any]]:
    """The conditions with the model as it is, "base", in front.

    Raises:
        BadInputError: the label "base" is given.
    """
    if BASE in conditions:
        raise BadInputError(f"the label {BASE!r} is taken: the model without hooks is always measured")
    return {BASE: [], **conditions}


def sinks_of(model: TransformerBridge, batch: Tokens, sinks: Sinks) -> tuple[Places, str]:
    """S of every sequence, and in words where it comes from.

    A map's positions; or the positions given, in every sequence, or a list for each; or, with None, those that
    :func:`find_sinks` finds in the model without hooks, and in sequences too short for far importance the first token
    (in encoders the special tokens).

    Raises:
        BadInputError: sinks of other tokens, out of range, or fewer than two tokens that are no sink.
    """
    lengths = [int(n) for n in batch.lengths.tolist()]
    if isinstance(sinks, SinkMap):
        if sinks.tokens.digest != batch.digest:
            raise BadInputError("sinks must be those of these very tokens")
        found = [tuple(sorted(set(sinks.positions(b)))) for b in range(len(batch))]
        words = "a sink map"
    elif sinks is not None:
        apart = [s for s in sinks if not isinstance(s, int)]
        if apart and len(apart) != len(lengths):
            raise BadInputError(f"give positions for all sequences alike, or one list for each of the {len(lengths)}")
        plain = [s for s in sinks if isinstance(s, int)]
        found = [tuple(sorted(set(apart[b] if apart else plain))) for b in range(len(lengths))]
        words = f"positions {list(sinks)}"
    else:
        found = _found(model, batch)
        words = "find_sinks on the model without hooks, else the first token (encoders: the special tokens)"
    for b, (own, length) in enumerate(zip(found, lengths, strict=True)):
        if any(not 0 <= p < length for p in own):
            raise BadInputError(f"sinks {own} are out of range: sequence {b} has {length} tokens")
        if length - len(own) < 2:
            raise BadInputError(f"sequence {b} has fewer than two tokens that are no sink: nothing can mix")
    return tuple(found), words


def _found(model: TransformerBridge, batch: Tokens) -> list[tuple[int, ...]]:
    facts = capabilities(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinklensWarning)
        known = find_sinks(model, batch, progress=False)
    special = batch.special & batch.mask
    found = []
    for b in range(len(batch)):
        if not bool(known.mass[b].isnan().all()):
            own = known.positions(b)
        elif facts.causal:
            own = [0]
        else:
            own = special[b, int(batch.starts[b]) :].nonzero().flatten().tolist()
        found.append(tuple(sorted(set(own))))
    return found
