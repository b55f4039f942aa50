"""``reading_heads``: which heads read the sinks, against a permutation null."""

from __future__ import annotations

import math
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.find.lifetimes import Kind
from sinklens.find.scores import SinkScores
from sinklens.find.sinkmap import SinkMap


@public
def reading_heads(
    scores: SinkScores,
    sinks: SinkMap,
    *,
    kind: Kind = "secondary",
    null: Literal["any", "same_id"] = "any",
    permutations: int = 999,
    level: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Far importance of the sinks in every head, against that of tokens drawn in their place.

    Args:
        scores: of the same tokens, from :func:`sinklens.sink_scores`.
        sinks: the map.
        kind: which of its sinks.
        null: what is drawn in the place of each sink: any token of its sequence that is no sink, or a token of its id
            that is no sink, in any sequence (the harder comparison: the same word where it is not a sink). Sinks whose
            id is always one are left out of the latter.
        permutations: draws of one such token, read in the same layers, for every sink.
        level: of the false discovery rate (Benjamini and Hochberg) over all heads.
        seed: of the draws.

    Returns:
        One row per (layer, head): ``beta``: mean far importance over the sinks alive in the layer, ``null``: its mean
        over the draws, ``sinks``: how many are alive, ``p`` (one-sided, ``(1 + #{null >= beta}) / (1 + n)``), ``q``
        (p corrected over all heads: Benjamini and Hochberg), ``reads`` (q at most the level). Layers in which no sink
        is alive, or none has a far importance, have no rows. The smallest p is ``1 / (1 + permutations)``, so more
        heads need more permutations. ``reads.mean()`` is the share of reading heads.

    Cost: no forward.

    Raises:
        BadInputError: scores of other tokens or of chosen positions only, no such sink, or none with such a token.
    """
    if scores.tokens.digest != sinks.tokens.digest:
        raise BadInputError("scores and sinks must be of the same tokens")
    if permutations < 1 or not 0 < level < 1:
        raise BadInputError(f"permutations must be at least 1 and level between 0 and 1, got {permutations}, {level}")
    chosen = [s for s in sinks if s.kind == kind]
    if not chosen:
        raise BadInputError(f"there is no {kind} sink")
    draw = torch.Generator().manual_seed(seed)
    taken = set(sinks.places or ())
    defined = ~scores.beta[:, :, 0].isnan()
    short = ~defined.any(0).any(1)  # windows without far queries
    known = (defined | short[:, None]).all(1) & defined.any(1)
    by_id = _places_of_ids(sinks, known, {s.token_id for s in chosen}, taken) if null == "same_id" else {}
    totals: dict[int, Float[Tensor, "draw head"]] = {}
    counts: dict[int, int] = {}
    for sink in chosen:
        b = sink.sequence
        if null == "same_id":
            free = by_id[sink.token_id]
        else:
            free = [(b, p) for p in known[b].nonzero().flatten().tolist() if (b, p) not in taken]
            if not free:
                raise BadInputError(
                    f"sequence {b} has no token beside its sinks with a far importance: give longer sequences, and "
                    f"scores of all positions"
                )
        if not free:
            continue
        picked = torch.tensor(free)[torch.randint(len(free), (permutations,), generator=draw)]
        rows, columns = torch.cat([torch.tensor([[b, sink.position]]), picked]).unbind(1)
        for layer in (n for first, last, _ in sink.episodes for n in range(first, last + 1)):
            if not bool(defined[b, layer, sink.position]):
                continue
            totals[layer] = totals.get(layer, 0) + scores.beta[rows, layer, :, columns].double()
            counts[layer] = counts.get(layer, 0) + 1
    if not totals:
        raise BadInputError(
            f"there is none to draw: no {kind} sink has a far importance and a token that can stand in its place (with "
            f"null='same_id', one of its id that is no sink)"
        )
    found = []
    for layer in sorted(totals):
        means = totals[layer] / counts[layer]
        for head in range(means.shape[1]):
            own, drawn = float(means[0, head]), means[1:, head]
            p = (1 + int((drawn >= own).sum())) / (1 + permutations)
            found.append(
                {"layer": layer, "head": head, "beta": own, "null": float(drawn.mean()), "sinks": counts[layer], "p": p}
            )
    table = pd.DataFrame(found)
    adjusted = false_discovery_control(table.p.tolist())
    table["q"] = [float(q) for q in adjusted]
    table["reads"] = [bool(q <= level + math.ulp(1.0)) for q in adjusted]
    return table


def _places_of_ids(
    sinks: SinkMap, known: Bool[Tensor, "batch pos"], ids: set[int], taken: set[tuple[int, int]]
) -> dict[int, list[tuple[int, int]]]:
    """Where tokens of these ids are no sink and have a far importance."""
    found: dict[int, list[tuple[int, int]]] = {token_id: [] for token_id in ids}
    for b, (row, seen) in enumerate(zip(sinks.tokens.ids.tolist(), known.tolist(), strict=True)):
        for p, (token_id, usable) in enumerate(zip(row, seen, strict=True)):
            if usable and token_id in found and (b, p) not in taken:
                found[token_id].append((b, p))
    return found
