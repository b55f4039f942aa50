"""How much attention a position gets: the column means of one layer's attention, as pure tensor maths.

Source: Gu et al. 2025 (alpha, with the denominator of their released code: the queries that can see the key);
far importance beta and the uniform share are defined in docs/definitions.md, section 1. Nothing here imports the
host. Temporaries hold one block of query rows, never more than the pattern that came in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.attention.kernels import Block
from sinklens.core.visibility import allowed_keys, row_blocks

FAR = 16  # queries closer than this are local attention, not a sink's
MIN_FAR_QUERIES = 32  # fewer say nothing: NaN, never 0


@dataclass(frozen=True)
class Columns:
    """Column means of one layer's pattern, indexed like the batch (not yet by position)."""

    alpha: Float[Tensor, "batch head key"]
    beta: Float[Tensor, "batch head key"]
    row_rest: Float[Tensor, "batch head"]
    outside: float


@dataclass(frozen=True)
class Visibility:
    """How many queries see each key, far ones apart, and the uniform share: the same for all heads."""

    queries: Float[Tensor, "batch key"]
    far_queries: Float[Tensor, "batch key"]
    uniform: Float[Tensor, "batch key"]


def _far(mask: Bool[Tensor, "batch key"], rows: slice) -> Bool[Tensor, "query key"]:
    position = torch.arange(mask.shape[1], device=mask.device)
    return (position[rows, None] - position).abs() >= FAR


def visibility(mask: Bool[Tensor, "batch key"], *, causal: bool, window: int | None) -> Visibility:
    """Denominators of alpha and beta, and beta under uniform attention over the allowed keys.

    Cost: O(T); the keys that a query may see are a range, so counts are differences of running sums.
    """
    length = mask.shape[1]
    real = mask.double()
    index = torch.arange(length, device=mask.device)
    reach = length if window is None else window
    before, after = (index - reach + 1).clamp(min=0), (index + reach).clamp(max=length)
    keys = _between(real, before, index + 1 if causal else after)  # how many each query sees
    share = real / keys.clamp(min=1)
    near = index if causal else before
    queries = _between(real, near, after)
    later, earlier = (index + FAR).clamp(max=length), (index - FAR + 1).clamp(min=0)
    far_queries, uniform = _between(real, later, after), _between(share, later, after)
    if not causal:
        far_queries = far_queries + _between(real, before, earlier)
        uniform = uniform + _between(share, before, earlier)
    queries, far_queries = queries * real, far_queries * real
    return Visibility(queries, far_queries, _defined(uniform / far_queries, far_queries).float())


def _between(
    values: Float[Tensor, "batch key"], low: Int[Tensor, " key"], high: Int[Tensor, " key"]
) -> Float[Tensor, "batch key"]:
    """Sums of ``values[low:high]``; 0 where the range is empty."""
    total = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    return total[:, torch.maximum(low, high)] - total[:, low]


class ColumnSums:
    """Sums of attention over query rows, all and far ones, added up block by block.

    Attributes:
        near_and_far, far: [kv, group, key], kv counting (sequence, KV head).
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.near_and_far = torch.zeros(shape, dtype=dtype, device=device)
        self.far = self.near_and_far.clone()

    def add(self, chunk: slice, block: Block, pattern: Float[Tensor, "kv group row key"]) -> None:
        """Add a block of query rows."""
        count, group, rows, keys = pattern.shape
        ones = pattern.new_ones(1, 1, rows).expand(count * group, -1, -1)
        sums = torch.bmm(ones, pattern.reshape(-1, rows, keys)).view(count, group, keys)  # faster than sum(2)
        self.near_and_far[chunk, :, block.keys] += sums
        certain = min(max(block.queries.start - FAR + 1 - block.low, 0), keys)
        far = self.far[chunk, :, block.keys]
        far[..., :certain] += sums[..., :certain]
        if certain < keys:
            queries = torch.arange(block.queries.start, block.queries.stop, device=pattern.device)
            columns = torch.arange(block.low + certain, block.high, device=pattern.device)
            distant = ((queries[:, None] - columns).abs() >= FAR).to(pattern)
            far[..., certain:] += (pattern[..., certain:] * distant).sum(2)

    def means(self, seen_by: Visibility) -> tuple[Float[Tensor, "batch head key"], Float[Tensor, "batch head key"]]:
        """Alpha and beta."""
        batch, length = seen_by.queries.shape
        total, far = (t.view(batch, -1, length) for t in (self.near_and_far, self.far))
        alpha = total / seen_by.queries[:, None].clamp(min=1).to(total)
        beta = far / seen_by.far_queries[:, None].to(far)
        return alpha.float(), _defined(beta, seen_by.far_queries[:, None]).float()


def column_means(
    pattern: Float[Tensor, "batch head query key"],
    mask: Bool[Tensor, "batch key"],
    seen_by: Visibility,
    *,
    causal: bool,
    window: int | None,
) -> Columns:
    """Alpha and beta of every key in one layer.

    ``alpha[k] = mean of A[i,k] over unpadded queries i that may see k``; ``beta[k]`` the same over those with
    ``|i - k| >= 16``, NaN with fewer than 32 of them. ``row_rest`` is the mean over queries of 1 minus the row's sum
    (a learned sink's mass); ``outside`` the largest attention that a query puts outside its allowed keys.
    """
    batch, heads, length, _ = pattern.shape
    wide = torch.promote_types(pattern.dtype, torch.float32)
    near_and_far = torch.zeros(batch, heads, length, dtype=wide, device=pattern.device)
    far_sum, rest = near_and_far.clone(), torch.zeros(batch, heads, dtype=wide, device=pattern.device)
    outside = torch.zeros((), dtype=wide, device=pattern.device)
    for rows in row_blocks(length):
        block = pattern[:, :, rows].to(wide)
        allowed = allowed_keys(mask, rows, causal=causal, window=window)[:, None].to(wide)
        real = mask[:, None, rows].to(wide)
        row_sum = block.sum(-1)
        rest += ((1 - row_sum) * real).sum(-1)
        block = block * allowed
        outside = torch.maximum(outside, ((row_sum - block.sum(-1)) * real).max())  # keeps NaN, unlike max()
        near_and_far += block.sum(2)
        far_sum += (block * _far(mask, rows)).sum(2)
    alpha = near_and_far / seen_by.queries[:, None].clamp(min=1).to(wide)
    beta = far_sum / seen_by.far_queries[:, None].to(wide)
    return Columns(
        alpha=alpha.float(),
        beta=_defined(beta, seen_by.far_queries[:, None]).float(),
        row_rest=(rest / mask.sum(1).clamp(min=1)[:, None]).float(),
        outside=float(outside),
    )


def never_far(pattern: Float[Tensor, "batch head query key"], mask: Bool[Tensor, "batch key"]) -> bool:
    """Whether every head of a sequence of 64 tokens or more gives its last quarter's queries exactly nothing from the
    first quarter's keys: a window that nobody declared, since a softmax underflows nowhere near so evenly.
    """
    for row, length, start in zip(pattern, mask.sum(1).tolist(), mask.int().argmax(1).tolist(), strict=True):
        quarter = length // 4
        if length >= 64 and not row[:, start + length - quarter : start + length, start : start + quarter].any():
            return True
    return False


def _defined(values: Tensor, far_queries: Tensor) -> Tensor:
    return torch.where(far_queries >= MIN_FAR_QUERIES, values, torch.nan)


def by_position(
    values: Float[Tensor, "batch *rest key"], mask: Bool[Tensor, "batch key"]
) -> Float[Tensor, "batch *rest pos"]:
    """Shift each sequence so that its first unpadded token is position 0; NaN beyond its end."""
    lengths, starts = mask.sum(1), mask.int().argmax(1)
    pos = torch.arange(int(lengths.max()), device=mask.device)
    index = (starts[:, None] + pos).clamp(max=mask.shape[1] - 1)
    shape = (index.shape[0], *([1] * (values.ndim - 2)), index.shape[1])
    moved = values.gather(-1, index.view(shape).expand(*values.shape[:-1], -1))
    return torch.where((pos < lengths[:, None]).view(shape), moved, torch.nan)
