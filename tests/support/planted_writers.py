"""Models whose writers and erasers of sinks are planted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl

X, Y, ORDINARY = 3, 4, range(5, 12)
SIZE, LAYERS, LENGTH = 16, 10, 100
WRITES_Y, WRITES_X, ERASES_X = 0, 3, 7
HELPS_X, FADES_X, LATE = WRITES_X - 1, WRITES_X + 2, 82


def planted_writers(erase: bool = True, change: Callable[[Any], None] | None = None) -> TransformerBridge:
    """Token Y gets a direction from one neuron of MLP 0, token X the same one from MLP 3 (and loses it in MLP 7).

    Every head's key reads that direction, every query asks for it (b_Q); nothing else moves the stream. ``change`` has
    the last word on the host's weights.
    """
    config = tf.GPT2Config(
        vocab_size=12, n_positions=256, n_embd=SIZE, n_layer=LAYERS, n_head=2, n_inner=8, bos_token_id=1,
        eos_token_id=2, activation_function="relu",
    )  # fmt: skip
    model: Any = tf.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln" not in name:
                weight.zero_()
        noise = torch.randn(SIZE, SIZE, generator=generator)
        noise[:, 0] = 1.0
        basis = torch.linalg.qr(noise)[0][:, 1:].T * math.sqrt(SIZE)  # rows of mean 0, orthogonal, of unit variance
        embedding = model.transformer.wte.weight
        embedding[3:] = basis[:9]
        direction = basis[10] / math.sqrt(SIZE)

        def neuron(layer: int, number: int, token: int, amount: float) -> None:
            mlp = model.transformer.h[layer].mlp
            mlp.c_fc.weight[:, number] = embedding[token] / SIZE
            mlp.c_proj.weight[number] = amount * direction

        neuron(WRITES_Y, 2, Y, 40.0)
        neuron(WRITES_X, 5, X, 40.0)
        for layer, block in enumerate(model.transformer.h):
            attention = block.attn.c_attn
            if layer > 0:
                for head in range(2):
                    at = head * 8
                    attention.bias[at] = 2.0 * math.sqrt(8)
                    attention.weight[:, SIZE + at] = direction
        if erase:  # X's own part of the stream is small beside what was written: a large weight reads it
            mlp = model.transformer.h[ERASES_X].mlp
            scale = math.sqrt((SIZE + 40.0**2) / SIZE)  # LN divides by this at X
            mlp.c_fc.weight[:, 1] = embedding[X] / SIZE * scale
            mlp.c_proj.weight[1] = -40.0 * direction
        if change is not None:
            change(model)
    return sl.load_model(model)


def texts(rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (rows, LENGTH), generator=generator)
    ids[:, 0] = Y
    ids[:, 20] = X
    return ids


def restless(host: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    blocks = host.transformer.h
    for block in blocks:
        for weight in (block.attn.c_attn.weight, block.attn.c_proj.weight):
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    blocks[HELPS_X].mlp.c_fc.weight[:, 5] = blocks[WRITES_X].mlp.c_fc.weight[:, 5]
    blocks[HELPS_X].mlp.c_proj.weight[5] = 0.15 * blocks[WRITES_X].mlp.c_proj.weight[5]
    blocks[FADES_X].mlp.c_fc.weight[:, 1] = blocks[ERASES_X].mlp.c_fc.weight[:, 1]
    blocks[FADES_X].mlp.c_proj.weight[1] = 0.1 * blocks[ERASES_X].mlp.c_proj.weight[1]
    late = host.transformer.wpe.weight[LATE:]
    late += 2 * torch.randn(late.shape, generator=draw)
