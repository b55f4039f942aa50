"""Controls: the same edit at as many tokens that are no sink (docs/definitions.md, section 7).

``random``: ordinary tokens drawn at random. ``recent``: for every query, the latest tokens before it. ``same_id``:
tokens with the sink's own token id. ``matched``: the tokens whose far importance, over the sink's layers, is nearest to
the sink's. A control never picks a sink, a special token, or a place that any intervention edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.find.locations import Place, Places, apply_predicate
from sinklens.find.sinkmap import SinkMap
from sinklens.inputs.tokens import Tokens

Control = Literal["random", "recent", "same_id", "matched"]
CONTROLS = get_args(Control)


@dataclass(frozen=True)
class Candidates:
    """What controls of one sequence choose from.

    Attributes:
        ids: the sequence.
        free: positions that are no sink, no special token, and edited by no intervention.
        mass: mean far importance over heads: [layer, pos]; NaN where undefined.
    """

    ids: tuple[int, ...]
    free: tuple[int, ...]
    mass: Float[Tensor, "layer pos"]


def slots(places: Places, tokens: Tokens, sequence: int) -> list[Place]:
    """The tokens that an edit acts on in one sequence of a batch, whichever way it names them."""
    if places.tokens is not None:
        if places.tokens.digest == tokens.digest:
            return [e for e in places.entries if e.sequence == sequence]
        own = [tuple(places.tokens.row(i).tolist()) for i in range(len(places.tokens))]
        row = tuple(tokens.row(sequence).tolist())
        if row not in own:
            raise BadInputError(
                f"sequence {sequence} ({tokens.sources[sequence]}) is none of those that these hooks were built for"
            )
        known = sequence if sequence < len(own) and own[sequence] == row else own.index(row)
        return [replace(e, sequence=sequence) for e in places.entries if e.sequence == known]
    if places.predicate is not None:
        marked = apply_predicate(places.predicate, tokens.row(sequence)[None])
        chosen = marked[0].nonzero().flatten().tolist()
        return [Place(sequence, p, None, "chosen") for p in chosen]
    length = int(tokens.lengths[sequence])
    wrong = [p for p in places.positions if p >= length]
    if wrong:
        raise BadInputError(
            f"positions {wrong} are out of range in sequence {sequence} ({tokens.sources[sequence]}, {length} tokens)"
        )
    return [Place(sequence, p, None, f"position {p}") for p in places.positions]


def candidates(found: SinkMap, tokens: Tokens, sequence: int, taken: Sequence[int]) -> Candidates:
    """What controls of a sequence may choose from: no found sink, no special token, nothing that is edited."""
    ids = tuple(tokens.row(sequence).tolist())
    special = tokens.special[sequence][tokens.mask[sequence]].tolist()
    sinks = {p for b, p in found.places or () if b == sequence} | set(taken)
    free = tuple(p for p in range(len(ids)) if p not in sinks and not special[p])
    return Candidates(ids, free, found.mass[sequence][:, : len(ids)])


def stand_ins(kind: str, wanted: Sequence[Place], among: Candidates, seed: int) -> dict[int, int]:
    """For each sink's position the position that stands in for it, each used once; those without one are left out.

    The same sink has the same stand-in in every experiment with the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    order = [among.free[i] for i in torch.randperm(len(among.free), generator=generator).tolist()]
    chosen: dict[int, int] = {}
    for place in sorted(wanted, key=lambda e: e.position):
        if place.position in chosen:
            continue
        left = [p for p in order if p not in chosen.values()]
        if kind == "same_id":
            left = [p for p in left if among.ids[p] == among.ids[place.position]]
        if kind == "matched":
            left = _by_mass(place, left, among)
        if left:
            chosen[place.position] = left[0]
    return chosen


def _by_mass(place: Place, left: Sequence[int], among: Candidates) -> list[int]:
    layers = sorted(place.layers) if place.layers is not None else list(range(among.mass.shape[0]))
    mean = among.mass[layers].nanmean(0)
    known = [p for p in left if not mean[p].isnan()]
    own = mean[place.position]
    if own.isnan():
        return []
    return sorted(known, key=lambda p: float((mean[p] - own).abs()))


def control_places(
    kind: str, wanted: Sequence[Sequence[Place]], among: Sequence[Candidates], tokens: Tokens, found: SinkMap, seed: int
) -> tuple[Places, list[bool]]:
    """Where a control acts in every sequence of a batch, and in which sequences it has as many places as the sinks.

    Args:
        kind: one of ``CONTROLS``.
        wanted: the sinks' places per sequence.
        among: what may be chosen, per sequence.
        tokens: the batch.
        found: its sinks.
        seed: of the draws; each sequence has its own.
    """
    others = {(b, e.position) for b, row in enumerate(wanted) for e in row} | set(found.places or ())
    entries: list[Place] = []
    complete: list[bool] = []
    for b, row in enumerate(wanted):
        if kind == "recent":
            entries += row
            complete.append(bool(row))
            continue
        every = [Place(b, p, None, "") for p in sorted({p for s, p in others if s == b})]
        layers = {e.position: e.layers for e in row}
        every = [replace(e, layers=layers.get(e.position)) for e in every]
        chosen = stand_ins(kind, every if kind == "random" else row, among[b], seed + b)
        entries += [replace(e, position=chosen[e.position]) for e in row if e.position in chosen]
        complete.append(bool(row) and all(e.position in chosen for e in row))
    return Places(
        tokens=tokens, entries=tuple(entries), others=tuple(sorted(others)), recent=kind == "recent"
    ), complete
