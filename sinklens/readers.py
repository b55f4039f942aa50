"""``reading_heads``: which heads read the sinks, against a permutation null."""

from __future__ import annotations

import math

import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import false_discovery_control
from torch import Tensor

from sinklens.errors import BadInputError
from sinklens.scores import SinkScores
from sinklens.sinkmap import SinkMap


def reading_heads(
    scores: SinkScores,
    sinks: SinkMap,
    *,
    kind: str = "secondary",
    permutations: int = 999,
    level: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Far importance of the sinks in every head, against that of tokens drawn in their place.

    Args:
        scores: of the same tokens, from :func:`sinklens.sink_scores`.
        sinks: the map.
        kind: which of its sinks.
        permutations: draws of one token that is no sink, in the same sequence and layers, for every sink.
        level: of the false discovery rate (Benjamini and Hochberg) over all heads.
        seed: of the draws.

    Returns:
        One row per (layer, head): ``beta``: mean far importance over the sinks alive in the layer, ``null``: its mean
        over the draws, ``sinks``: how many are alive, ``p`` (one-sided, ``(1 + #{null >= beta}) / (1 + n)``), ``reads``
        (significant at the level). Layers in which no sink is alive have no rows. The smallest p is
        ``1 / (1 + permutations)``, so more heads need more permutations. ``reads.mean()`` is the share of reading
        heads.

    Cost: no forward.

    Raises:
        BadInputError: scores of other tokens or of chosen positions only, or no such sink.
    """
    if scores.tokens.digest != sinks.tokens.digest:
        raise BadInputError("scores and sinks must be of the same tokens")
    if permutations < 1 or not 0 < level < 1:
        raise BadInputError(f"permutations must be at least 1 and level between 0 and 1, got {permutations}, {level}")
    chosen = [s for s in sinks if s.kind == kind]
    if not chosen:
        raise BadInputError(f"there is no {kind} sink")
    draw = torch.Generator().manual_seed(seed)
    taken: dict[int, set[int]] = {}
    for b, p in sinks.places or ():
        taken.setdefault(b, set()).add(p)
    totals: dict[int, Float[Tensor, "draw head"]] = {}
    counts: dict[int, int] = {}
    for sink in chosen:
        b = sink.sequence
        beta = scores.beta[b].double()
        free = [p for p in (~beta[0, 0].isnan()).nonzero().flatten().tolist() if p not in taken[b]]
        if not free:
            raise BadInputError(
                f"sequence {b} has no token beside its sinks with a far importance: give longer sequences, and scores "
                f"of all positions"
            )
        index = torch.tensor(free)[torch.randint(len(free), (permutations,), generator=draw)]
        index = torch.cat([torch.tensor([sink.position]), index])
        for layer in (n for first, last, _ in sink.episodes for n in range(first, last + 1)):
            totals[layer] = totals.get(layer, 0) + beta[layer][:, index].T
            counts[layer] = counts.get(layer, 0) + 1
    rows = []
    for layer in sorted(totals):
        means = totals[layer] / counts[layer]
        for head in range(means.shape[1]):
            own, null = float(means[0, head]), means[1:, head]
            p = (1 + int((null >= own).sum())) / (1 + permutations)
            rows.append(
                {"layer": layer, "head": head, "beta": own, "null": float(null.mean()), "sinks": counts[layer], "p": p}
            )
    table = pd.DataFrame(rows)
    known = [p if p == p else 1.0 for p in table.p.tolist()]
    adjusted = false_discovery_control(known) if known else []
    table["reads"] = [bool(q <= level + math.ulp(1.0)) for q in adjusted]
    return table
