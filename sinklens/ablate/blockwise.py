"""Edits of attention inside the registered function.

Ablations that need no pattern take :mod:`sinklens.ablate.compressed`; any other edit runs on blocks of query rows
(``pattern_attention``): the same code as on the hooks backend, in O(T) memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.attention_edit import Attached, Seen
from sinklens.ablate.compressed import lean_attention
from sinklens.ablate.sink_edit import SinkEdit
from sinklens.attention.backend import Flash, told
from sinklens.attention.kernels import ROWS, View, blocks, dense_output, dense_scores, scored, visible
from sinklens.bridge.capabilities import capabilities


class BlockSeen(Seen):
    """What a block of queries computes; keys and values are those of the whole layer."""

    def __init__(self, k: Tensor, v: Tensor, view: View, columns: int) -> None:
        super().__init__(k.shape[1])
        self.scale, self.softcap = view.scale, view.softcap
        self._tensors = {"key": k, "value": v}
        self._first = columns - k.shape[2]

    def at(self, what: str, columns: Sequence[int], past: int) -> Float[Tensor, "batch column kv_head d_head"]:
        """Keys or values at absolute columns; those of earlier calls are in the cache."""
        del past
        return self._tensors[what][:, :, [c - self._first for c in columns]].transpose(1, 2)


def edited_attention(
    state: Flash, layer: int, edits: list[Attached], q: Tensor, k: Tensor, v: Tensor, view: View
) -> tuple[Tensor, str]:
    """One layer's attention with its edits, and which path ran."""
    for attached in edits:
        attached.forward.visit(attached.name)
    if state.watch is None and len(edits) == 1 and isinstance(edits[0].edit, SinkEdit):
        edits[0].edit.begin(layer)
        found = lean_attention(edits[0], layer, q, k, v, view)
        if found is not None:
            edits[0].edit.finish(layer)
            return found
    return pattern_attention(edits, layer, q, k, v, view, watch=state.watch)[0], "pattern"


def dense_attention(
    model: TransformerBridge, edits: list[Attached], layer: int, q: Tensor, k: Tensor, v: Tensor, view: View
) -> tuple[Tensor, Tensor]:
    """One call of a delegating host's attention with its edits: the output and the whole pattern."""
    facts = capabilities(model)
    view = replace(view, causal=facts.causal, window=facts.windows[layer])
    if layer == 0:
        told([attached.forward for attached in edits], q, k, view)
    for attached in edits:
        attached.forward.visit(attached.name)
    return pattern_attention(edits, layer, q, k, v, view, rows=q.shape[2])


def pattern_attention(
    edits: Sequence[Attached],
    layer: int,
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d"],
    v: Float[Tensor, "batch kv_head key d_v"],
    view: View,
    *,
    watch: Any = None,
    rows: int | None = None,
) -> tuple[Float[Tensor, "batch head query d_v"], Tensor]:
    """Edited attention by blocks of query rows; the output and the last block's pattern."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    seens = [BlockSeen(k, v, view, attached.forward.columns) for attached in edits]
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    pattern = q.new_empty(0)
    for attached in edits:
        attached.edit.begin(layer)
    for block in blocks(view, n_queries, n_keys, rows or ROWS.get(q.device.type, ROWS["cpu"])):
        values = v[:, :, block.keys]
        allowed = visible(view, block, q.shape[0], q.device)
        scores = _scores(q[:, :, block.rows], k[:, :, block.keys], view).masked_fill_(~allowed, -math.inf)
        before = pattern = _softmax(scores, view).to(q.dtype)
        added: Tensor | None = None
        for attached, seen in zip(edits, seens, strict=True):
            shift = attached.forward.columns - n_keys
            seen.scores, seen.pattern, seen.allowed, seen.queries = scores, pattern, allowed, q[:, :, block.rows]
            seen.rows, seen.keys = _shifted(block.queries, shift), _shifted(block.keys, shift)
            seen.extra = seen.bias = None
            pattern = attached.edit(layer, seen)
            for more in (seen.extra, _written(seen.bias, attached.bias)):
                if more is not None:
                    added = more if added is None else added + more
        if watch is not None:
            watch.look(layer, block, before, pattern)
        z = dense_output(pattern, values) if view_is_grouped(q, k) else pattern @ values
        out[:, :, block.rows] = z if added is None else z + added.to(z)
    for attached, seen in zip(edits, seens, strict=True):
        seen.close()
        attached.edit.finish(layer)
    return out, pattern


def view_is_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether several query heads share a KV head."""
    return q.shape[1] != k.shape[1]


def _scores(q: Tensor, k: Tensor, view: View) -> Tensor:
    """As the host computes them where heads are not grouped, so that an edit that changes nothing is exactly that."""
    if view_is_grouped(q, k):
        return dense_scores(q, k, view)
    return scored((q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * view.scale, view)


def _softmax(scores: Float[Tensor, "batch head row key"], view: View) -> Tensor:
    """0 where a row sees nothing; a learned logit takes its share."""
    if view.learned is not None:
        learned = view.learned[:, None, None].to(scores).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, learned], -1)
    pattern = scores.softmax(-1).nan_to_num(0)
    return pattern if view.learned is None else pattern[..., :-1]


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _written(bias: Tensor | None, b_v: Tensor | None) -> Tensor | None:
    return None if bias is None or b_v is None else bias[..., None] * b_v[:, None].to(bias)
