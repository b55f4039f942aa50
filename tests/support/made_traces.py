"""Traces of secondary sinks written down by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import sinklens as sl
from sinklens.find.sinkmap import Sink
from sinklens.residual.components import Component
from sinklens.trace.phases import Phase, Traced

LAYERS, DOCUMENTS = 12, 20
COMPONENTS: tuple[Component, ...] = (("embed", -1), *((k, n) for n in range(LAYERS) for k in ("attn", "mlp")))


def tokens(documents: Sequence[int] = tuple(range(DOCUMENTS))) -> sl.Tokens:
    n = len(documents)
    ids = torch.full((n, 4), 7)
    words = tuple(("a", "b", "c", "d") for _ in documents)
    names = tuple(f"text {d}" for d in documents)
    whole = torch.ones(n, 4, dtype=torch.bool)
    return sl.Tokens(ids, whole, words, names, tuple(documents), ~whole)


def sink(sequence: int, onset: int, lifetime: int, kind: str = "secondary", **changes: Any) -> Sink:
    end = onset + lifetime - 1
    life = ((onset, end, 0.2),)
    one = Sink(sequence, 1, "b", 7, kind, "", onset, end, lifetime, 0.2, 0, life, (0.2,) * LAYERS, (), True)
    return replace(one, **changes)


def traced(
    sequence: int,
    shares: dict[Component, float],
    *,
    document: int | None = None,
    projection: float = 10.0,
    **changes: Any,
) -> Traced:
    """A phase from layer 6 to 8, read at 7."""
    amounts = torch.tensor([projection * shares.get(c, 0.0) for c in COMPONENTS], dtype=torch.float64)
    flat = torch.zeros(len(COMPONENTS))
    one = Traced(
        sink=sequence, sequence=sequence, position=1, token="b", token_id=7, kind="secondary",
        document=sequence if document is None else document, number=0, phase=Phase(6, 8, 7), components=COMPONENTS,
        contributions=amounts, before=torch.tensor([layer < 7 for _, layer in COMPONENTS]), cosines=flat.clone(),
        norms=flat.clone(), same_cosines=flat.clone(), same_norms=flat.clone(), same=1, projection=projection, rho=1.0,
        norm=1.0, direction=torch.ones(3),
    )  # fmt: skip
    return replace(one, **changes)


def trace_of(chosen: Sequence[Traced], causes: Sequence[dict[str, Any]] = (), **fields: Any) -> sl.trace.SinkTrace:
    sinks = tuple(sink(n, 6, 3) for n in range(max((t.sink for t in chosen), default=-1) + 1))
    return sl.trace.SinkTrace(
        tuple(chosen), tuple(causes), fields.pop("sinks", sinks), fields.pop("tokens", tokens()), **fields
    )


def weakened(dip: float, back: float, margin: float, noise: float = 0.001) -> list[dict[str, Any]]:
    """A primary of layers 1 to 9; secondary sinks live in 0, in 6 and 7, and in 11, so partly beside its life."""
    draw = torch.Generator().manual_seed(0)
    alive = [1] + [0] * 5 + [1, 2] + [0] * 3 + [1]
    entries = []
    for n in range(DOCUMENTS):
        a, b, c = (noise * torch.randn(3, generator=draw)).tolist()
        # far layers (1, 2) and those beside the life (0, 10, 11) stand out: they must not count
        curve = [9.0, 7.0, 8.0, 0.5, 0.6, 0.7, 0.7 - dip + a, 0.6 - dip + a, 0.7, 0.8, 9.0, 9.0]
        without = [5.0] * 6 + [curve[6] + back + b, curve[7] + back + b] + [5.0] * 4
        levels = [3.0 + layer for layer in range(LAYERS)]
        gone = [x + margin + c if count else x - 50 for x, count in zip(levels, alive, strict=True)]
        levels[9] = math.nan
        entries.append(
            {"sequence": n, "document": n, "position": 0, "secondary": 2, "alive": alive}
            | {"active": [False, *[True] * 9, False, False], "alpha": curve, "alpha_without": without}
            | {"margin": levels, "margin_without": gone, "secondary_alpha": [float(x) for x in range(LAYERS)]}
            | {"secondary_alpha_without": [0.1 * x for x in range(LAYERS)]}
        )
    return entries
