"""Who sees whom: which keys a query may see under causality and a window, and blocks of query rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool
from torch import Tensor


def allowed_keys(
    mask: Bool[Tensor, "batch pos"], rows: slice, *, causal: bool, window: int | None
) -> Bool[Tensor, "batch query pos"]:
    """Which keys the queries ``rows`` may see; padded queries see none.

    Cost: ``batch x rows x pos`` booleans; ask for blocks of rows at long context.
    """
    keys = torch.arange(mask.shape[1], device=mask.device)
    queries = keys[rows, None]
    visible = torch.ones(queries.shape[0], keys.shape[0], dtype=torch.bool, device=mask.device)
    if causal:
        visible &= keys <= queries
    if window is not None:
        visible &= queries - keys < window
        if not causal:
            visible &= keys - queries < window
    return visible & mask[:, None, :] & mask[:, rows, None]


def row_blocks(length: int, size: int = 128) -> Iterator[slice]:
    """Slices that cover ``length`` query rows, so that no temporary holds more than ``size`` of them."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
