"""Naive edits of attention: one query and one head at a time, o_R and o_S from their own softmax, all in float64.

Also an attention function for Hugging Face that uses them, so that whole models can be run with a naive edit and no
TransformerLens hook at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask


def softmax_mean(scores: list[float], values: list[Tensor], size: int) -> tuple[float, Tensor]:
    """Log-sum-exp and softmax-weighted mean of some keys, by a loop."""
    if not scores:
        return -math.inf, torch.zeros(size, dtype=torch.float64)
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = sum(weights)
    mean = sum((w / total * v for w, v in zip(weights, values, strict=True)), torch.zeros(size, dtype=torch.float64))
    return top + math.log(total), mean


def naive_row(
    scores: Tensor,
    values: Tensor,
    visible: list[int],
    sinks: set[int],
    mode: str,
    *,
    others: frozenset[int] = frozenset(),
    learned: float | None = None,
    learned_is_sink: bool = False,
    b_v: Tensor | None = None,
    g: float | None = None,
    margin: float | None = None,
    target: int | None = None,
    mean_values: dict[int, Tensor] | None = None,
    new_scores: dict[int, float] | None = None,
    value: str = "kept",
    neutral: str = "bias",
) -> Tensor:
    """z of one query and head after an edit, by the definitions."""
    size = values.shape[-1]
    nothing = torch.zeros(size, dtype=torch.float64)
    b_v = nothing if b_v is None else b_v.double()
    b_v = b_v if neutral == "bias" else nothing
    s = {k: float(scores[k]) for k in visible}
    v = {k: values[k].double() for k in visible}
    keys_s = [k for k in visible if k in sinks]
    keys_f = [k for k in visible if k in others and k not in sinks]
    keys_r = [k for k in visible if k not in sinks and k not in keys_f]
    everything = [s[k] for k in visible] + ([] if learned is None else [learned])
    total = sum(math.exp(x - max(everything)) for x in everything)
    weight = {k: math.exp(s[k] - max(everything)) / total for k in visible}
    unedited = sum((weight[k] * v[k] for k in visible), nothing)
    z_fixed = sum((weight[k] * v[k] for k in keys_f), nothing)
    learned_fixed = learned is not None and bool(others) and not learned_is_sink
    p_fixed = sum(weight[k] for k in keys_f)
    if learned is not None and learned_fixed:
        p_fixed += math.exp(learned - max(everything)) / total
    extra_s = [learned] if learned is not None and learned_is_sink else []
    extra_r = [learned] if learned is not None and not learned_is_sink and not learned_fixed else []
    s_now = {k: (new_scores or {}).get(k, s[k]) for k in keys_s}
    lse_s, o_s = softmax_mean(
        [s_now[k] for k in keys_s] + extra_s, [v[k] for k in keys_s] + [nothing] * len(extra_s), size
    )
    lse_r, o_r = softmax_mean([s[k] for k in keys_r] + extra_r, [v[k] for k in keys_r] + [nothing] * len(extra_r), size)
    if lse_s == -math.inf or lse_r == -math.inf:
        return unedited
    if (mode == "move" and target not in visible) or (mode == "uniform" and not keys_r):
        return unedited
    m = lse_s - lse_r

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    if mean_values is not None and (mode == "mean_value" or value == "mean"):
        vs = [mean_values.get(k, v[k]).double() for k in keys_s]
        o_s = softmax_mean([s_now[k] for k in keys_s], vs, size)[1]
    if mode == "fixed_logit":
        assert margin is not None
        m = margin
    if mode == "scale":
        assert g is not None
        m = m + math.log(g) if g else -math.inf
    if mode == "null":
        m = -lse_r
    sigma, rest = sigmoid(m), sigmoid(-m)
    if value == "neutral":
        o_s = b_v
    z = {
        "renormalize": lambda: o_r,
        "zero": lambda: rest * o_r + sigma * b_v,
        "value_only": lambda: o_r + sigma * (o_s - b_v),
        "scale": lambda: rest * o_r + sigma * o_s,
        "mean_value": lambda: rest * o_r + sigma * o_s,
        "fixed_key": lambda: rest * o_r + sigma * o_s,
        "fixed_logit": lambda: rest * o_r + sigma * o_s,
        "null": lambda: rest * o_r,
        "move": lambda: rest * o_r + sigma * v[target or 0],
        "uniform": lambda: rest * o_r + sigma * sum((v[k] for k in keys_r), nothing) / max(len(keys_r), 1),
    }[mode]()
    return z_fixed + (1 - p_fixed) * z


Row = Callable[[int, int, int, int, Tensor, Tensor, list[int]], Tensor]
_current: list[Row] = []
SEEN: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}  # per layer: q, k, v by query head as scored, and the scale


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kw: Any) -> Any:
    """Eager attention by loops; the output of every row is what the current row function says."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    SEEN[module.layer_idx] = (q, k, v, scaling)
    scores = (q.double() @ k.double().mT) * scaling
    if kw.get("softcap"):
        scores = kw["softcap"] * (scores / kw["softcap"]).tanh()
    seen = torch.ones_like(scores, dtype=torch.bool) if mask is None else (mask[:, :, :, : k.shape[2]] > -1e30)
    seen = seen.expand_as(scores)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                visible = seen[b, h, i].nonzero().flatten().tolist()
                out[b, h, i] = _current[-1](module.layer_idx, b, h, i, scores[b, h, i], v[b, h], visible)
    return out.to(q.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("naive-edit", _attention)
AttentionMaskInterface.register("naive-edit", eager_mask)


def naive_logits(model: Any, ids: Tensor, row: Row, mask: Tensor | None = None) -> Tensor:
    """The logits of a plain Hugging Face model with every attention row computed by ``row``."""
    SEEN.clear()
    model.set_attn_implementation("naive-edit")
    _current.append(row)
    try:
        with torch.no_grad():
            return model(ids, attention_mask=None if mask is None else mask.long()).logits
    finally:
        _current.pop()
        model.set_attn_implementation("eager")


def plain_row(scores: Tensor, values: Tensor, visible: list[int]) -> Tensor:
    """Unedited attention of one row."""
    return softmax_mean([float(scores[k]) for k in visible], [values[k].double() for k in visible], values.shape[-1])[1]
