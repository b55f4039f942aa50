"""Attention with statistics in O(T) memory, as pure tensor maths: one blocked pass, and the fused kernels.

``blocked`` goes over query rows in blocks: scores of a block against the keys that it may see, softmax in place,
output; whoever wants statistics, or another pattern, looks at the block while it is there. ``fused`` calls PyTorch's
flash kernel, which gives the output and the log-sum-exp of every row and shows nothing else. Both take KV heads as
they are (GQA without copies); inputs may be float16 or bfloat16, all that is added up is float32 at least.

Nothing here imports the host. Cost of ``blocked``: one buffer of a block of scores for as many heads as fit into
``BUDGET`` bytes, and the time of a fused kernel times 1.0 to 1.3 (benchmarks/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

ROWS = {"cpu": 64, "cuda": 256}
BUDGET = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True, eq=False)
class View:
    """What a head's queries may see, and how they score it.

    Attributes:
        scale: factor of ``q.k``.
        causal, window: as everywhere: ``k <= i``, ``i - k < window``.
        softcap: c of ``c tanh(s / c)``.
        learned: a logit per query head in the denominator (gpt-oss).
        mask: real keys; None: all.
    """

    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    learned: Float[Tensor, " head"] | None = None
    mask: Bool[Tensor, "batch key"] | None = None

    def reaches(self, n_keys: int) -> bool:
        """Whether the window is so long that it hides nothing."""
        return self.window is None or n_keys <= self.window


@dataclass(frozen=True)
class Block:
    """Query rows ``start`` to ``stop`` (keys count as columns, queries are the last of them) and their keys."""

    start: int
    stop: int
    low: int
    high: int
    past: int

    @property
    def rows(self) -> slice:
        """The queries among this call's queries."""
        return slice(self.start, self.stop)

    @property
    def queries(self) -> slice:
        """The queries as columns."""
        return slice(self.start + self.past, self.stop + self.past)

    @property
    def keys(self) -> slice:
        """The columns that any of the queries may see."""
        return slice(self.low, self.high)


Visit = Callable[[slice, Block, Tensor], None]


def blocks(view: View, n_queries: int, n_keys: int, size: int) -> Iterator[Block]:
    """Blocks of query rows, with the range of keys that each may see."""
    past = n_keys - n_queries
    for start in range(0, n_queries, size):
        stop = min(start + size, n_queries)
        high = stop + past if view.causal else n_keys
        low = 0
        if view.window is not None:
            low = max(0, start + past - view.window + 1)
            high = min(high, stop + past - 1 + view.window)
        yield Block(start, stop, low, high, past)


def hide_unseen(scores: Float[Tensor, "*rest row key"], view: View, block: Block) -> None:
    """Put -inf, in place, where a query of the block may not see a key by causality or by the window."""
    queries, width = block.queries, scores.shape[-1]
    device = scores.device
    if view.causal:
        first = max(0, queries.start + 1 - block.low)
        later = _outside(block, slice(first, width), device, lambda q, k: k > q)
        scores[..., first:].masked_fill_(later, -math.inf)
    if view.window is not None:
        window = view.window
        last = min(width, max(0, queries.stop - window - block.low))
        scores[..., :last].masked_fill_(
            _outside(block, slice(0, last), device, lambda q, k: q - k >= window), -math.inf
        )
        if not view.causal:
            scores.masked_fill_(_outside(block, slice(0, width), device, lambda q, k: k - q >= window), -math.inf)


def _outside(
    block: Block, columns: slice, device: torch.device, rule: Callable[[Tensor, Tensor], Tensor]
) -> Bool[Tensor, "row key"]:
    queries = torch.arange(block.queries.start, block.queries.stop, device=device)
    keys = torch.arange(block.low + columns.start, block.low + columns.stop, device=device)
    return rule(queries[:, None], keys)


def visible(view: View, block: Block, batch: int, device: torch.device) -> Bool[Tensor, "batch 1 row key"]:
    """Which keys each query of a block may see."""
    seen = torch.zeros(block.stop - block.start, block.high - block.low, device=device)
    hide_unseen(seen, view, block)
    shown = (seen == 0).expand(batch, 1, -1, -1)
    if view.mask is None:
        return shown
    return shown & view.mask[:, None, None, block.keys] & view.mask[:, None, block.queries, None]


def scored(scores: Tensor, view: View) -> Tensor:
    """Softcap, in place."""
    if view.softcap is not None:
        scores.div_(view.softcap).tanh_().mul_(view.softcap)
    return scores


def grouped(q: Float[Tensor, "batch head query d"], n_kv_heads: int) -> Float[Tensor, "kv group query d"]:
    """Queries by (sequence, KV head): [batch * kv_head, heads per KV head, query, d]."""
    batch, heads, length, size = q.shape
    return q.reshape(batch * n_kv_heads, heads // n_kv_heads, length, size)


def blocked(
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d"],
    v: Float[Tensor, "batch kv_head key d_v"],
    view: View,
    *,
    hidden: Bool[Tensor, "#batch #head key"] | None = None,
    visit: Visit | None = None,
    want_lse: bool = False,
    rows: int | None = None,
) -> tuple[Float[Tensor, "batch head query d_v"], Float[Tensor, "batch head query"] | None]:
    """Attention by blocks of query rows; what ``hidden`` marks is left out of the softmax.

    Args:
        q, k, v, view: one layer's attention.
        hidden: keys that do not take part, per sequence and head.
        visit: called as ``visit(chunk, block, pattern)`` with the block's pattern [kv, group, row, key] (in a buffer
            that is used again), kv in ``chunk`` counting (sequence, KV head).
        want_lse: return the log-sum-exp over the keys (without a learned logit); implied by a learned logit.
        rows: rows per block.

    Returns:
        The output, 0 for padded queries and where nothing is visible; the lse (-inf there), or None.
    """
    device = "cuda" if q.device.type == "cuda" else "cpu"
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, n_queries, _ = q.shape
    n_kv, n_keys = k.shape[1], k.shape[2]
    group = heads // n_kv
    size = min(rows or ROWS[device], n_queries)
    qs = grouped(q, n_kv).to(wide) * view.scale
    ks, vs = k.reshape(batch * n_kv, n_keys, -1).to(wide), v.reshape(batch * n_kv, n_keys, -1).to(wide)
    each = group * size * n_keys * wide.itemsize
    step = max(1, min(batch * n_kv, BUDGET[device] // each))
    out = q.new_empty(batch * n_kv, group, n_queries, v.shape[-1])
    need_lse = want_lse or view.learned is not None
    lse = qs.new_empty(batch * n_kv, group, n_queries) if need_lse else None
    buffer = qs.new_empty(step * group * size * n_keys)
    learned = None if view.learned is None else view.learned.to(wide).view(1, n_kv, group).expand(batch, -1, -1)
    learned = None if learned is None else learned.reshape(batch * n_kv, group, 1)
    ragged = view.mask is not None or hidden is not None
    for first in range(0, batch * n_kv, step):
        chunk = slice(first, min(first + step, batch * n_kv))
        count = chunk.stop - chunk.start
        for block in blocks(view, n_queries, n_keys, size):
            width, height = block.high - block.low, block.stop - block.start
            flat = buffer[: count * group * height * width].view(count, group * height, width)
            torch.bmm(qs[chunk, :, block.rows].reshape(count, group * height, -1), ks[chunk, block.keys].mT, out=flat)
            scores = scored(flat.view(count, group, height, width), view)
            hide_unseen(scores, view, block)
            _hide(scores, view, hidden, chunk, block, n_kv, group)
            top = scores.amax(-1) if lse is not None else None
            torch.softmax(scores, -1, out=scores)
            if ragged:
                scores.nan_to_num_(0)
            if view.mask is not None:  # padded queries see nothing
                real = view.mask[torch.arange(chunk.start, chunk.stop, device=q.device) // n_kv, None, block.queries]
                scores.mul_(real[..., None])
                top = None if top is None else top.masked_fill(~real, -math.inf)
            if lse is not None and top is not None:
                here = top - scores.amax(-1).log()
                here.masked_fill_(top == -math.inf, -math.inf)
                lse[chunk, :, block.rows] = here
                if learned is not None:
                    scores.mul_((here - learned[chunk]).sigmoid()[..., None])
            if visit is not None:
                visit(chunk, block, scores)
            found = torch.bmm(scores.view(count, group * height, width), vs[chunk, block.keys])
            out[chunk, :, block.rows] = found.view(count, group, height, -1).to(out)
    return out.view(batch, heads, n_queries, -1), None if lse is None else lse.view(batch, heads, n_queries)


def _hide(scores: Tensor, view: View, hidden: Tensor | None, chunk: slice, block: Block, n_kv: int, group: int) -> None:
    """-inf at padding and at hidden keys."""
    sequence = torch.arange(chunk.start, chunk.stop, device=scores.device) // n_kv
    if view.mask is not None:
        scores.masked_fill_(~view.mask[sequence, None, None, block.keys], -math.inf)
    if hidden is None:
        return
    if hidden.shape[:2] == (1, 1):
        scores.index_fill_(-1, hidden[0, 0, block.keys].nonzero().flatten(), -math.inf)
        return
    if hidden.shape[0] > 1:
        hidden = hidden[sequence]
    if hidden.shape[1] > 1:
        kv = torch.arange(chunk.start, chunk.stop, device=scores.device) % n_kv
        own = hidden.unflatten(1, (n_kv, group)).expand(len(kv), -1, -1, -1)
        hidden = own[torch.arange(len(kv), device=scores.device), kv]
    scores.masked_fill_(hidden[..., None, block.keys], -math.inf)


def fused_takes(q: Tensor, k: Tensor, v: Tensor, view: View) -> bool:
    """Whether ``fused`` can do this layer: no softcap, no padding, no window that hides anything, equal sizes."""
    if view.softcap is not None or view.mask is not None or not view.reaches(k.shape[2]):
        return False
    if q.shape[-1] != v.shape[-1] or (view.causal and q.shape[2] not in (1, k.shape[2])):
        return False
    return q.device.type in ("cpu", "cuda") and not (q.device.type == "cuda" and q.dtype == torch.float64)


def fused(
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d"],
    v: Float[Tensor, "batch kv_head key d"],
    view: View,
) -> tuple[Float[Tensor, "batch head query d"], Float[Tensor, "batch head query"]]:
    """PyTorch's flash kernel: output and lse (over the keys, without a learned logit, which the output has in it)."""
    causal = view.causal and q.shape[2] > 1
    if q.device.type == "cuda":
        repeat = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeat, 1) if repeat > 1 else t for t in (k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal, scale=view.scale
        )
        lse = lse[..., : q.shape[2]]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=view.scale)
    if view.learned is not None:
        out = out * (lse - view.learned[:, None].to(lse)).sigmoid()[..., None].to(out)
    return out, lse


def without(
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d"],
    v: Float[Tensor, "batch kv_head key d_v"],
    view: View,
    gone: Bool[Tensor, "#batch #head key"],
) -> tuple[Float[Tensor, "batch head query d_v"], Float[Tensor, "batch head query"], str]:
    """``o_R`` and ``lse_R``: attention with some keys deleted, each query renormalised over what is left.

    Deleting the rows S from queries, keys and values leaves a plain causal problem, so one call of the fused kernel on
    the shorter sequence is exact; the queries at S themselves are done apart. Where S differs between heads or
    sequences, or ``fused`` does not take the layer, the blocked pass hides the keys instead.

    Returns:
        The output (a learned logit not in it), the lse over the keys, and which path ran.
    """
    plain = View(view.scale, view.causal, view.window, view.softcap, None, view.mask)
    shared = gone.shape[:2] == (1, 1) or bool((gone == gone[:1, :1]).all())
    if not (shared and fused_takes(q, k, v, plain) and q.shape[2] == k.shape[2]):
        out, lse = blocked(q, k, v, plain, hidden=gone, want_lse=True)
        assert lse is not None
        return out, lse, "blocked"
    columns = gone[0, 0].nonzero().flatten()
    kept = (~gone[0, 0]).nonzero().flatten()
    if not len(columns):
        out, lse = fused(q, k, v, plain)
        return out, lse, "fused"
    if not len(kept):
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32), "compressed"
    run = slice(int(kept[0]), int(kept[-1]) + 1)
    few = run.stop - run.start == len(kept)  # S stands at the ends: views, no copies
    queries, keys, values = (t[:, :, run] if few else t.index_select(2, kept) for t in (q, k, v))
    out_kept, lse_kept = fused(queries, keys, values, plain)
    out, lse = torch.empty_like(q), lse_kept.new_empty(q.shape[:3])
    where = run if few else kept
    out[:, :, where], lse[:, :, where] = out_kept, lse_kept
    few_queries = q.index_select(2, columns)
    own, own_lse = _few_rows(few_queries, keys, values, plain, columns, kept)
    out[:, :, columns], lse[:, :, columns] = own.to(out), own_lse.to(lse)
    return out, lse, "compressed"


def _few_rows(
    q: Float[Tensor, "batch head few d"],
    k: Float[Tensor, "batch kv_head kept d"],
    v: Float[Tensor, "batch kv_head kept d_v"],
    view: View,
    rows: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """Dense attention of a few queries over the kept keys; 0 and -inf where they see none."""
    scores = dense_scores(q, k, view)
    if view.causal:
        scores.masked_fill_(kept > rows[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    return dense_output((scores - lse[..., None]).exp().nan_to_num(0), v), lse


def dense_scores(
    q: Float[Tensor, "batch head query d"], k: Float[Tensor, "batch kv_head key d"], view: View
) -> Float[Tensor, "batch head query key"]:
    """All scores of (few) queries or keys, softcap applied, nothing masked."""
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, length, _ = q.shape
    by_group = grouped(q, k.shape[1]).to(wide).flatten(1, 2)
    few = k.reshape(batch * k.shape[1], k.shape[2], -1).to(wide) * view.scale
    scores = torch.bmm(by_group, few.mT)
    return scored(scores.view(batch, heads, length, -1), view)


def dense_output(
    weights: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch kv_head key d_v"]
) -> Float[Tensor, "batch head query d_v"]:
    """``weights @ v`` with KV heads as they are."""
    batch, heads, length, n_keys = weights.shape
    by_group = weights.reshape(batch * v.shape[1], (heads // v.shape[1]) * length, n_keys)
    return torch.bmm(by_group, v.reshape(batch * v.shape[1], n_keys, -1).to(weights)).view(batch, heads, length, -1)
