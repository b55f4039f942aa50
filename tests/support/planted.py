"""A tiny GPT-2 whose weights plant sinks: a known token draws a known attention in known layers and heads.

All ordinary tokens share one embedding, positions have none, attention and MLP write nothing, so the residual is the
same in every layer. A query bias of strength s against a key that only the sink token has gives that token the logit
``t``; a query that sees n keys puts ``e^t / (e^t + n - 1)`` on it, in any layer and head that is planted, and
``1 / n`` elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers as tf
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl

ORDINARY, X, Y = 3, 4, 5
D_MODEL, HEADS, D_HEAD = 16, 2, 8


def planted_model(
    n_layers: int,
    strength: Mapping[int, float],
    where: Mapping[int, Sequence[int]],
    heads: Sequence[int] = (0, 1),
    writes: float = 0.0,
) -> TransformerBridge:
    """``strength[token]`` is the token's logit, ``where[token]`` the layers in which it has it.

    ``writes`` lets attention write a little, so that an edit of it has an effect.
    """
    config = tf.GPT2Config(
        vocab_size=8, n_positions=512, n_embd=D_MODEL, n_layer=n_layers, n_head=HEADS, bos_token_id=1, eos_token_id=2
    )
    model: Any = tf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln" not in name:
                weight.zero_()
        embedding = model.transformer.wte.weight
        embedding[:, 0] = 1.0
        embedding[X] = torch.eye(D_MODEL)[1]
        embedding[Y] = torch.eye(D_MODEL)[2]
        seen = torch.nn.functional.layer_norm(embedding[[ORDINARY, X, Y]], (D_MODEL,))
        reads = torch.linalg.pinv(seen)  # column i reads 1 on token i and 0 on the other two
        for layer, block in enumerate(model.transformer.h):
            attention = block.attn.c_attn
            generator = torch.Generator().manual_seed(layer)
            for weight in (attention.weight[:, 2 * D_MODEL :], block.attn.c_proj.weight):
                weight += writes * torch.randn(weight.shape, generator=generator)
            for slot, token in enumerate((X, Y)):
                if layer not in where.get(token, ()):
                    continue
                for head in heads:
                    at = head * D_HEAD + slot
                    attention.bias[at] = strength[token] * math.sqrt(D_HEAD)
                    attention.weight[:, D_MODEL + at] = reads[:, slot + 1]
    return sl.load_model(model)


def row(length: int, tokens: Mapping[int, int]) -> torch.Tensor:
    """Ordinary ids with ``tokens[position] = id``."""
    ids = torch.full((length,), ORDINARY)
    for position, token in tokens.items():
        ids[position] = token
    return ids


def expected_beta(logit: float, length: int, position: int) -> float:
    """Far importance of a lone planted token, by its formula."""
    queries = range(position + 16, length)
    return sum(math.exp(logit) / (math.exp(logit) + i) for i in queries) / len(queries)


def logit_for(beta: float, length: int, position: int) -> float:
    """The logit that gives a lone planted token this far importance."""
    low, high = -5.0, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_beta(middle, length, position) < beta else (low, middle)
    return low
