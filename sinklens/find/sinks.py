"""``find_sinks``: from scores to sinks with lives and kinds, by attention or by direction (docs/definitions.md, 2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, get_args

import pandas as pd
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Backend
from sinklens.attention.importance import FAR, MIN_FAR_QUERIES
from sinklens.bridge.capabilities import Capabilities, record, same_model
from sinklens.bridge.unbridged import PlainModel
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.core.validation import public
from sinklens.find.lifetimes import Thresholds, activity as active_where
from sinklens.find.residual_detectors import direction_activity, wong_sequences
from sinklens.find.scores import SinkScores, sink_scores
from sinklens.find.sinkmap import Sink, SinkMap, assemble
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens

Method = Literal["attention", "direction", "wong"]
METHODS = get_args(Method)
SUSPICIOUS_SHARE = 0.05


@public
def find_sinks(
    model: TransformerBridge | PlainModel,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    method: Method = "attention",
    scores: SinkScores | None = None,
    backend: Backend = "auto",
    activity: float = 0.05,
    uniform_factor: float = 3.0,
    gap: int = 2,
    min_life: float = 0.1,
    primary_mass: float = 0.1,
    late: float = 0.25,
    onset_tolerance: float = 0.05,
    end_tolerance: float = 0.1,
    head_use: float = 0.3,
    norm_ratio: float = 3.0,
    cosine: float = 0.9,
    progress: bool | None = None,
) -> SinkMap:
    """The sinks of every sequence: primary, secondary with the reason, their lives, masses and heads.

    A position is active at layer l if ``mean_h beta >= max(activity, uniform_factor * u)``; a life is a run of active
    layers with gaps of at most ``gap`` bridged and at least ``ceil(min_life * L)`` layers. P is the position with the
    largest mass summed over its life, if its mean there is at least ``primary_mass`` and it is active in the last
    quarter of the layers. A sink whose onset and end lie within ``max(1, round(onset_tolerance * L))`` and
    ``max(1, round(end_tolerance * L))`` of P's is primary, any other secondary.

    Args:
        model, tokens: as everywhere.
        method: ``"attention"``; ``"direction"`` (residual norm and centred cosine with P); ``"wong"`` (the published
            detector verbatim, for replication).
        scores: :func:`sinklens.sink_scores` of the same tokens, if at hand.
        backend: of the scores: "auto", "hooks" or "flash".
        activity, uniform_factor, gap, min_life, primary_mass, late, onset_tolerance, end_tolerance, head_use: the
            thresholds, see :class:`sinklens.find.Thresholds`.
        norm_ratio, cosine: the direction method's criteria.
        progress: show a bar; default in terminals and notebooks.

    Cost: one forward for the scores; the residual methods one more per sequence.

    Raises:
        BadInputError: unknown method, or scores of other tokens.

    Warns:
        SinklensWarning: a sequence is too short for far importance anywhere (a token needs 32 queries at least 16
            tokens away), so that its sinks cannot be told; or ``"wong"`` flags more than 5 % of all tokens.
    """
    thresholds = Thresholds(
        activity, uniform_factor, gap, min_life, primary_mass, late, onset_tolerance, end_tolerance, head_use,
        norm_ratio, cosine,
    )  # fmt: skip
    batch = as_tokens(model, tokens)
    facts = record(model)
    if isinstance(facts, Capabilities) and not facts.shares:
        raise UnsupportedModelError(
            f"{facts.model}: its attention rows sum to more than 1, so importance is no share and no threshold on it "
            f"means anything; sinklens.lab measures sinks on relative weights, |A| / sum |A|"
        )
    if scores is None:
        scores = sink_scores(model, batch, backend=backend, progress=progress)
    elif scores.alpha[:, 0, 0].isnan().sum() > scores.alpha[:, 0, 0].numel() - int(scores.tokens.lengths.sum()):
        raise BadInputError("scores= hold only some positions (positions=); sinks need all of them")
    elif scores.tokens.digest != batch.digest:
        raise BadInputError("scores= belong to other tokens; leave it out or score these")
    elif not same_model(scores.info, record(model)):
        raise BadInputError("scores= belong to another model; leave it out or score with this one")
    by_attention = from_scores(scores, thresholds)
    if method == "direction":
        return _by_direction(model, batch, by_attention, progress)
    if method == "wong":
        return _by_wong(model, batch, by_attention, progress)
    return by_attention


def from_scores(scores: SinkScores, thresholds: Thresholds = Thresholds()) -> SinkMap:  # noqa: B008
    """The attention method on scores that are at hand; no model needed."""
    mass = scores.beta.double().mean(2).float()
    active = active_where(mass, scores.uniform, thresholds)
    in_use = scores.beta > thresholds.head_use
    sinks, strongest = assemble(active, mass, in_use, scores.tokens, thresholds, attended=None)
    notes = _too_short(mass, scores.tokens)
    for note in notes:
        warnings.warn(note, SinklensWarning, stacklevel=3)
    return SinkMap(
        sinks, strongest, (), mass, scores.uniform, scores.tokens, thresholds, "attention", notes, scores.info
    )


@public
def compare_methods(
    model: TransformerBridge | PlainModel,
    tokens: str | Sequence[str] | Tensor | Tokens,
    *,
    methods: Sequence[Method] = METHODS,
    progress: bool | None = None,
) -> pd.DataFrame:
    """How far the methods agree on one model: counts per method, and for each pair the sinks found by both.

    Columns: ``method, sinks, primary, secondary, share_of_tokens`` and, per other method, ``also_by_<method>`` (how
    many of this method's (sequence, position) the other finds too).
    """
    batch = as_tokens(model, tokens)
    scores = sink_scores(model, batch, progress=progress)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinklensWarning)  # the table shows the shares
        maps = {m: find_sinks(model, batch, method=m, scores=scores, progress=progress) for m in methods}
    places = {m: {(s.sequence, s.position) for s in found} for m, found in maps.items()}
    total = int(batch.lengths.sum())
    rows = {
        m: {
            "method": m,
            "sinks": len(found),
            "primary": len(found.primary),
            "secondary": len(found.secondary),
            "massive_unattended": len(found.unattended),
            "share_of_tokens": len(found) / total,
        }
        for m, found in maps.items()
    }
    for a, b in combinations(methods, 2):
        rows[a][f"also_by_{b}"] = rows[b][f"also_by_{a}"] = len(places[a] & places[b])
    return pd.DataFrame(rows.values())


def _too_short(mass: Tensor, tokens: Tokens) -> tuple[str, ...]:
    short = mass.isnan().all(1).all(1).nonzero().flatten().tolist()
    if not short:
        return ()
    named = ", ".join(f"{i} ({int(tokens.lengths[i])} tokens)" for i in short[:5])
    more = f" and {len(short) - 5} more" if len(short) > 5 else ""
    return (
        f"too few queries in sequence {named}{more}: no token is seen by {MIN_FAR_QUERIES} queries at least {FAR} "
        f"tokens away, so far importance is undefined (NaN) and no sink can be told; give longer texts",
    )


def _by_direction(
    model: TransformerBridge | PlainModel, batch: Tokens, reference: SinkMap, progress: bool | None
) -> SinkMap:
    thresholds = reference.thresholds
    active, used = direction_activity(model, batch, reference.strongest, thresholds, progress)
    attended = active_where(reference.mass, reference.uniform, thresholds)
    fixed = tuple(u if p is not None else None for u, p in zip(used, reference.strongest, strict=True))
    found, strongest = assemble(
        active, reference.mass, None, reference.tokens, thresholds, attended=attended, given_strongest=fixed
    )
    sinks = tuple(sink for sink in found if sink.attended is not False)
    unattended = tuple(sink for sink in found if sink.attended is False)
    return replace(reference, sinks=sinks, strongest=strongest, unattended=unattended, method="direction", places=None)


def _by_wong(
    model: TransformerBridge | PlainModel, batch: Tokens, reference: SinkMap, progress: bool | None
) -> SinkMap:
    attended = active_where(reference.mass, reference.uniform, reference.thresholds)
    sinks: list[Sink] = []
    for b, found in enumerate(wong_sequences(model, batch, progress)):
        for token in found:
            if token.label == "noise" or not token.layers:
                continue
            masses = reference.mass[b, :, token.position]
            read_by = [min(layer + 1, len(masses) - 1) for layer in token.layers]  # block outputs, read one layer later
            mass = float(masses[read_by].nanmean())
            sinks.append(
                Sink(
                    sequence=b,
                    position=token.position,
                    token=reference.tokens.labels[b][token.position],
                    token_id=int(reference.tokens.row(b)[token.position]),
                    kind="primary" if token.label == "bos_sink" else "secondary",
                    reason=token.label,
                    onset=read_by[0],
                    end=read_by[-1],
                    lifetime=len(token.layers),
                    mass=mass,
                    bridged=token.layers[-1] - token.layers[0] + 1 - len(token.layers),
                    episodes=((read_by[0], read_by[-1], mass),),
                    masses=tuple(masses.tolist()),
                    heads=(),
                    attended=None if masses.isnan().all() else bool(attended[b, :, token.position].any()),
                    special=bool(batch.special[b][batch.mask[b]][token.position]),
                )
            )
    notes = reference.notes
    share = len(sinks) / int(batch.lengths.sum())
    if share > SUSPICIOUS_SHARE:
        name = record(model).model
        note = (
            f"method='wong' flags {len(sinks)} of {int(batch.lengths.sum())} tokens ({share:.0%}) of {name}: raw "
            f"cosines are high between ordinary tokens here, so these are not sinks; use 'attention' or 'direction'"
        )
        warnings.warn(note, SinklensWarning, stacklevel=3)
        notes = (*notes, note)
    return replace(reference, sinks=tuple(sinks), method="wong", notes=notes, places=None)
