"""The indices of mixing (docs/definitions.md, section 6), as means over the rows that are no sink.

Three, always together, since how the sink's column is counted decides the sign of the conclusion::

    mix[l,i]      = sum_{j<i, j not in S} |J_ij|_F^2 / sum_{j<=i, j not in S} |J_ij|_F^2
    via_sink[l,i] = sum_{j in S} |J_ij|_F^2 / sum_j |J_ij|_F^2
    spread[l,i]   = sqrt(sum_{j<i, j not in S} |J_ij|_F^2 |e_j|^2) / |x_i^l|

for i >= 1 (encoders: j != i in the place of j < i). Where not every token was measured, sums over other tokens are
scaled to all of them. A further index is an entry of ``INDICES``, a line in :func:`indices` and a field of ``Mixing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

INDICES = {  # and what a figure calls them
    "mix": "mix: other tokens",
    "via_sink": "via_sink: sinks",
    "spread": "spread: over own norm",
}


def indices(
    squares: Float[Tensor, "layer row column"],
    positions: Sequence[int],
    sinks: Sequence[int],
    start: Float[Tensor, "pos d_model"],
    outputs: Float[Tensor, "layer pos d_model"],
    *,
    causal: bool,
) -> dict[str, Float[Tensor, " layer"]]:
    """The indices of one sequence.

    Args:
        squares: ``|J_ij|_F^2`` of the measured tokens.
        positions: which tokens those are.
        sinks: S.
        start: e, what J is taken with respect to.
        outputs: x^l.
        causal: whether a token depends on earlier ones only.
    """
    at = torch.tensor(positions)
    is_sink = torch.tensor([p in sinks for p in positions])
    norms = start[at.to(start.device)].double().square().sum(-1).cpu()
    size = outputs[:, at.to(start.device)].double().norm(dim=-1).cpu()
    everyone = [p for p in range(start.shape[0]) if p not in sinks]
    rows: dict[str, list[Tensor]] = {name: [] for name in INDICES}
    for r, i in enumerate(positions):
        if i < 1 or bool(is_sink[r]):
            continue
        others = ~is_sink & (at != i) & ((at < i) if causal else torch.ones_like(is_sink))
        whole = sum(p != i and (p < i or not causal) for p in everyone)
        if whole and not bool(others.any()):
            continue
        scale = whole / max(int(others.sum()), 1)
        line = squares[:, r].double()
        mixed = line[:, others].sum(-1) * scale
        through = line[:, is_sink].sum(-1)
        rows["mix"].append(mixed / (mixed + line[:, r]))
        rows["via_sink"].append(through / (through + mixed + line[:, r]))
        rows["spread"].append(((line[:, others] * norms[others]).sum(-1) * scale).sqrt() / size[:, r])
    return {name: torch.stack(values).mean(0) for name, values in rows.items()}


def at_last_layer(found: Any) -> dict[str, float]:
    """The indices of a ``Mixing`` at its last layer, as means over sequences."""
    return {name: float(getattr(found, name)[:, -1].nanmean()) for name in INDICES}
