"""What mixing is compared under, by label, beside the model as it is; and the set S of sinks that is counted apart.

``mixing_conditions`` makes the usual ones: each kind of sink gone, doses of the primary, other damage of that cost.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.ablate import ablate_sinks
from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.experiment.matched_damage import matched_damage
from sinklens.find.lifetimes import KINDS
from sinklens.find.sinkmap import SinkMap
from sinklens.find.sinks import find_sinks
from sinklens.forward.metrics import token_loss
from sinklens.inputs.tokens import Tokens

BASE = "base"
Conditions = Mapping[str, Sequence[Any]]
Places = tuple[tuple[int, ...], ...]
Sinks = SinkMap | Sequence[int] | Sequence[Sequence[int]] | None


@dataclass(frozen=True, eq=False)
class MixingConditions:
    """Hook lists by label for :func:`sinklens.compare_mixing`, and what each costs.

    Attributes:
        edits: the hook lists.
        losses: mean loss in nats of the model as it is ("base") and under each; empty where it predicts no tokens.
    """

    edits: dict[str, Sequence[Any]]
    losses: dict[str, float]


@public
def mixing_conditions(
    model: TransformerBridge,
    sinks: SinkMap,
    *,
    doses: Sequence[float] = (),
    control: bool = True,
    seed: int = 0,
) -> MixingConditions:
    """The conditions under which mixing is compared on the tokens of a sink map.

    Args:
        model: from :func:`sinklens.load_model`.
        sinks: the map, on the very tokens that are measured (cut it with :meth:`sinklens.SinkMap.cut`).
        doses: also the primary's attention scaled by these factors.
        control: for each "without" that costs loss, noise of the same loss
            (:func:`sinklens.experiment.matched_damage`).
        seed: of the noise.

    Raises:
        UnsupportedModelError: a model without a bridge.
        BadInputError: doses, and no primary sink to scale.
    """
    capabilities(model)
    edits: dict[str, Sequence[Any]] = {}
    for kind in KINDS:
        chosen = sinks.where(kind=kind)
        if len(chosen):
            edits[f"without {kind} sinks"] = ablate_sinks(model, chosen)
    if len(sinks.primary):
        edits |= {f"primary x {g:g}": ablate_sinks(model, sinks.primary, "scale", g=g) for g in doses}
    elif doses:
        raise BadInputError("doses scale the primary sink, and this text has none")
    losses: dict[str, float] = {}
    try:
        for label, hooks in {BASE: [], **edits}.items():
            losses[label] = float(token_loss(model, sinks.tokens, hooks=hooks).double().nanmean())
    except UnsupportedModelError:
        return MixingConditions(edits, {})
    for label in list(edits) if control else ():
        if label.startswith("without"):
            try:
                matched = matched_damage(model, sinks.tokens, edits[label], seed=seed, progress=False)
            except BadInputError:
                continue  # it costs nothing, or nothing reaches it
            edits[f"noise, same loss as {label}"] = matched.hooks
            losses[f"noise, same loss as {label}"] = matched.loss
    return MixingConditions(edits, losses)


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
