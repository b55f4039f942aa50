"""A tiny DINOv2 whose weights plant a register: one white patch on black gets a known norm and a known attention.

Black patches and [CLS] hold the same vector ``e0`` throughout; the white patch ``e0 + e1``, and from block ``writer``
on ``e0 + e1 + g e2``, so that its norm is ``sqrt(2 + g^2)`` times theirs. In the planted layers a query bias of
strength t against a key that only the white patch has gives it ``e^t / (e^t + n - 1)`` of every query's attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers as tf

import sinklens as sl

LAYERS, WIDTH, HEADS, PATCH, SIDE = 6, 16, 2, 4, 8
COUNT = SIDE * SIDE + 1
WHITE = (2, 5)  # row, column
POSITION = 1 + WHITE[0] * SIDE + WHITE[1]


def planted(
    ratio: float = 10.0, share: float = 0.5, *, writer: int = 2, layers: Sequence[int] = range(LAYERS)
) -> sl.models.PlainModel:
    """``ratio``: the white patch's norm over the others' from block ``writer`` on; ``share``: its attention."""
    config = tf.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=PATCH * SIDE,
        patch_size=PATCH, mlp_ratio=2, layerscale_value=1.0, use_mask_token=False,
    )  # fmt: skip
    model: Any = tf.Dinov2Model(config).eval()
    gain = math.sqrt(ratio**2 - 2)
    logit = math.log(share * (COUNT - 1) / (1 - share))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "lambda" not in name:
                weight.zero_()
        units = torch.eye(WIDTH)
        model.embeddings.cls_token[0, 0] = units[0]
        model.embeddings.patch_embeddings.projection.bias[:] = units[0]
        model.embeddings.patch_embeddings.projection.weight[1] = 1 / (3 * PATCH**2)  # the mean colour
        for layer, block in enumerate(model.encoder.layer):
            before = units[0] + units[1] + (gain * units[2] if layer > writer else 0)
            seen = torch.nn.functional.layer_norm(torch.stack([units[0], before]), (WIDTH,), eps=1e-6)
            reads = torch.linalg.pinv(seen)[:, 1]  # 1 on the white patch, 0 on the others
            if layer == writer:
                block.mlp.fc1.weight[0] = 100 * reads
                block.mlp.fc2.weight[:, 0] = gain / 100 * units[2]  # gelu(100) is 100, gelu(0) is 0
            if layer in layers:
                for head in range(HEADS):
                    at = head * (WIDTH // HEADS)
                    block.attention.q_proj.bias[at] = logit * math.sqrt(WIDTH // HEADS)
                    block.attention.k_proj.weight[at] = reads
    loaded = sl.load_model(model)
    assert isinstance(loaded, sl.models.PlainModel)
    return loaded


def pictures(model: sl.models.PlainModel, count: int = 1) -> sl.inputs.Images:
    """Black pictures with one white patch."""
    canvas = np.zeros((SIDE * PATCH, SIDE * PATCH, 3), dtype=np.uint8)
    canvas[WHITE[0] * PATCH : (WHITE[0] + 1) * PATCH, WHITE[1] * PATCH : (WHITE[1] + 1) * PATCH] = 255
    return sl.load_images(model, [canvas] * count, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
