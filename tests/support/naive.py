"""Naive references: loops over queries and keys that follow the published formulas, nothing shared with sinklens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def eager_patterns(model: Any, ids: Tensor) -> list[Tensor]:
    """Attention of one unpadded sequence, a [head, query, key] tensor per layer, straight from Hugging Face."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids[None], output_attentions=True)
    return [layer[0].double() for layer in out.attentions]


def sees(query: int, key: int, causal: bool, window: int | None) -> bool:
    if causal and key > query:
        return False
    return window is None or abs(query - key) < window


def naive_scores(pattern: Tensor, causal: bool, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha [head, key], beta [head, key], uniform [key], learned-sink mass [head], by loops."""
    heads, length, _ = pattern.shape
    alpha = torch.zeros(heads, length, dtype=torch.float64)
    beta = torch.full((heads, length), math.nan, dtype=torch.float64)
    uniform = torch.full((length,), math.nan, dtype=torch.float64)
    visible = [[k for k in range(length) if sees(i, k, causal, window)] for i in range(length)]
    for k in range(length):
        queries = [i for i in range(length) if k in visible[i]]
        far = [i for i in queries if abs(i - k) >= 16]
        for h in range(heads):
            alpha[h, k] = sum(float(pattern[h, i, k]) for i in queries) / len(queries)
            if len(far) >= 32:
                beta[h, k] = sum(float(pattern[h, i, k]) for i in far) / len(far)
        if len(far) >= 32:
            uniform[k] = sum(1 / len(visible[i]) for i in far) / len(far)
    mass = torch.tensor([sum(1 - float(pattern[h, i].sum()) for i in range(length)) / length for h in range(heads)])
    return alpha, beta, uniform, mass
