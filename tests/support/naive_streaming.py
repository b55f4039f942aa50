"""A rolling cache written out: one list of cached tokens per query, positions counted in it, loops, no shared code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "naive_streaming"
_now: dict[str, Any] = {}


def cached(i: int, kept: Sequence[int], recent: int) -> list[int]:
    """Which tokens the cache holds when token i has come, in order."""
    return [k for k in range(i + 1) if k in kept or i - k < recent]


def turned(x: Tensor, by: list[int], inv_freq: Tensor) -> Tensor:
    """Rotary embedding moves each vector by so many positions: as complex numbers (halves), the rest untouched."""
    size = 2 * len(inv_freq)
    pairs = torch.complex(x[..., : size // 2].double(), x[..., size // 2 : size].double())
    pairs = pairs * torch.exp(1j * torch.tensor(by)[:, None] * inv_freq.double())
    return torch.cat([pairs.real.to(x), pairs.imag.to(x), x[..., size:]], -1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: every query against its own cache."""
    layer = module.layer_idx
    inv_freq, recent, rows = _now["inv_freq"][layer], _now["recent"], _now["kept"]
    window, cap, learned = rest.get("sliding_window"), rest.get("softcap"), rest.get("s_aux")
    batch, heads, length, d = query.shape
    out = torch.zeros(batch, heads, length, value.shape[-1])
    for b in range(batch):
        for i in range(length):
            held = cached(i, rows[b], recent)
            here = len(held) - 1
            q = turned(query[b, :, i, None], [here - i], inv_freq)
            k = turned(key[b][:, held], [place - k for place, k in enumerate(held)], inv_freq)
            k = k.repeat_interleave(heads // key.shape[1], 0)
            scores = (q @ k.transpose(1, 2))[:, 0] * (scaling or d**-0.5)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            if window is not None:
                scores[:, [place for place in range(here + 1) if here - place >= window]] = -torch.inf
            if learned is not None:
                scores = torch.cat([scores, learned[:, None]], 1)
            weights = scores.softmax(1)[:, None, : here + 1]
            out[b, :, i] = (weights @ value[b][:, held].repeat_interleave(heads // key.shape[1], 0))[:, 0]
    return out.transpose(1, 2), None


@contextlib.contextmanager
def naive(model: Any, kept: Sequence[Sequence[int]], recent: int, inv_freq: Sequence[Tensor]) -> Iterator[None]:
    """Let a Hugging Face model attend like that."""
    _now.update(kept=[set(row) for row in kept], recent=recent, inv_freq=inv_freq)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
