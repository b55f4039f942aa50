"""Attention as a rolling cache leaves it, for all queries at once, as pure tensor maths: a band and a few columns.

Query i sees the ``recent`` latest keys, itself included, and the kept keys that have left that window. Evicting tokens
moves what stands before them closer: a kept key that is the j-th of the n kept ones outside the window of query i
stands ``n - 1 - j + recent`` positions before it. With

    k'_j = R(j - s_j) k_j        q'_i = R(n_i - 1 + recent - i) q_i        (s_j: where key j stood in the text)

the score of the pair is ``q'_i . k'_j``; recent keys keep their distance and need nothing. The band gives ``(o_R,
lse_R)``, the columns ``(o_S, lse_S)``, and ``o = (1 - sigma) o_R + sigma o_S`` with ``sigma = sigmoid(lse_S - lse_R)``.

Cost: time O(T (recent + kept)), memory O(T (d + kept)): no score of the band is kept.
Source: Xiao et al. 2024 (StreamingLLM), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.attention.kernels import View, blocked, fused, fused_takes, grouped

ROWS = 64  # query rows that share a view of their keys
ABSENT = 2**40  # the column of a kept token that a row does not have: later than every query

Turning = Callable[[Tensor, Tensor], Tensor]


def banded(
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head query d"],
    v: Float[Tensor, "batch kv_head query d_v"],
    view: View,
    *,
    recent: int,
    kept: Int[Tensor, "batch kept"],
    turn: Turning,
) -> tuple[Float[Tensor, "batch head query d_v"], str]:
    """One layer's attention under a rolling cache, and which kernel ran.

    Args:
        q, k, v: as scored, each at its position in the text.
        view: the layer's own; its window is counted in the cache, too.
        recent: how many of the latest keys every query sees.
        kept: columns of kept tokens, in order; ``ABSENT`` fills up.
        turn: ``turn(x, by)`` is ``R(by) x``.
    """
    length = q.shape[2]
    near = min(recent, view.window or recent)
    band = replace(view, window=near, learned=None)
    path = "banded"
    if fused_takes(q, k, v, replace(band, window=None)) and q.device.type == "cpu":
        out, lse = fused_band(q, k, v, band, near)
    else:
        out, lse = blocked(q, k, v, band, want_lse=True)
        assert lse is not None
        path = "banded blocks"
    evicting = slice(recent, length)
    if kept.shape[1] and recent < length and (view.window is None or recent < view.window):
        far, far_lse = _columns(q, k, v, view, recent, kept, turn)
        share = far_lse - lse[..., evicting]
        share = share.sigmoid().nan_to_num_(0)[..., None].to(out)
        other = (lse[..., evicting] - far_lse).sigmoid().nan_to_num_(0)[..., None].to(out)
        out[..., evicting, :] = out[..., evicting, :] * other + far.to(out) * share
        lse[..., evicting] = torch.logaddexp(lse[..., evicting], far_lse.to(lse))
    if view.learned is not None:
        out = out * (lse - view.learned[:, None].to(lse)).sigmoid()[..., None].to(out)
    return out, path


def fused_band(
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head query d"],
    v: Float[Tensor, "batch kv_head query d"],
    view: View,
    width: int,
) -> tuple[Float[Tensor, "batch head query d"], Float[Tensor, "batch head query"]]:
    """The band by PyTorch's fused kernel: output and lse of the ``width`` latest keys of every query (CPU).

    The first ``width`` rows are plain causal attention. All other rows go in blocks; a block sees ``width - 1`` keys
    before its first row, and one mask, the same for all blocks, hides what lies outside each row's band.
    """
    plain = replace(view, window=None, learned=None)
    length = q.shape[2]
    if length <= width:
        return fused(q, k, v, plain)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    head = slice(0, width)
    out[:, :, head], lse[:, :, head] = fused(q[:, :, head], k[:, :, head], v[:, :, head], plain)
    whole = width + (length - width) // ROWS * ROWS
    for rows, size in (((width, whole), ROWS), ((whole, length), length - whole)):
        if rows[0] < rows[1]:
            _blocks_of_rows(q, k, v, plain.scale, width, rows, size, out, lse)
    return out, lse


def _blocks_of_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    width: int,
    rows: tuple[int, int],
    size: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Rows in blocks of one size, as one call per sequence; results are written into ``out`` and ``lse``."""
    low, high = rows
    spread = width - 1 + size  # keys that a block sees
    column, row = torch.arange(spread, device=q.device), torch.arange(size, device=q.device)[:, None]
    mask = torch.zeros(size, spread, dtype=q.dtype, device=q.device)
    mask.masked_fill_((column < row) | (column >= row + width), -math.inf)
    keys = slice(low - width + 1, high)
    for b in range(q.shape[0]):
        queries = q[b, :, low:high].unflatten(1, (-1, size)).transpose(0, 1)
        ks, vs = (t[b, :, keys].unfold(1, spread, size).permute(1, 0, 3, 2) for t in (k, v))
        found, found_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, ks, vs, 0.0, False, attn_mask=mask[None, None].expand(len(queries), 1, -1, -1), scale=scale
        )
        out[b, :, low:high] = found.transpose(0, 1).flatten(1, 2)
        lse[b, :, low:high] = found_lse.transpose(0, 1).flatten(1, 2)


def _columns(
    q: Tensor, k: Tensor, v: Tensor, view: View, recent: int, kept: Int[Tensor, "batch kept"], turn: Turning
) -> tuple[Float[Tensor, "batch head row d_v"], Float[Tensor, "batch head row"]]:
    """Output and lse over the kept keys outside the window, for the rows from ``recent`` on; 0 and -inf without any."""
    batch, heads, length, _ = q.shape
    index = torch.arange(recent, length, device=q.device)
    gone = kept[:, None, :] <= index[:, None] - recent
    if view.mask is not None:
        gone = gone & view.mask[:, recent:, None]
    count = gone.sum(-1)
    rank = torch.arange(kept.shape[1], device=q.device)
    if view.window is not None:
        gone = gone & (count[..., None] - 1 - rank + recent < view.window)
    where = kept.clamp(max=length - 1)
    few_k, few_v = (t.gather(2, where[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[-1])) for t in (k, v))
    few_k = turn(few_k, (rank - where)[:, None])
    queries = turn(q[:, :, recent:], (count - 1 + recent - index)[:, None])
    wide = torch.promote_types(q.dtype, torch.float32)
    n_kv = k.shape[1]
    scores = grouped(queries, n_kv).to(wide).flatten(1, 2) @ few_k.flatten(0, 1).to(wide).mT
    scores = scores.mul_(view.scale).view(batch, heads, length - recent, -1)
    if view.softcap is not None:
        scores.div_(view.softcap).tanh_().mul_(view.softcap)
    scores.masked_fill_(~gone[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, -1).nan_to_num_(0)
    found = weights.view(batch * n_kv, -1, kept.shape[1]) @ few_v.flatten(0, 1).to(wide)
    return found.view(batch, heads, length - recent, -1), lse
