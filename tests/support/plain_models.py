"""Tiny random transformers models that have no TransformerLens bridge here, and images for those that read them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as tf

import sinklens as sl

VOCABULARY = 97
WINDOW = 17  # ModernBERT sees |i - k| <= 16 in local layers
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
_DISTIL: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}

TEXT: dict[str, Callable[[], Any]] = {
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(
            **{**_TEXT, "num_hidden_layers": 3},
            local_attention=2 * (WINDOW - 1),
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "clip-text": lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**{**_TEXT, "max_position_embeddings": 77})),
    "distilbert": lambda: tf.DistilBertModel(tf.DistilBertConfig(**_DISTIL, max_position_embeddings=128)),
}
IMAGES: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**_IMAGE)),
    "dinov2-registers": lambda: tf.Dinov2WithRegistersModel(
        tf.Dinov2WithRegistersConfig(**_IMAGE, num_register_tokens=3)
    ),
    "clip-vision": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_IMAGE)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE)),
    "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**_IMAGE)),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "deberta": (lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_TEXT)), "never calls transformers' AttentionInterface"),
    "albert": (lambda: tf.AlbertModel(tf.AlbertConfig(**_TEXT)), "runs one attention module several times"),
    "t5-encoder": (
        lambda: tf.T5EncoderModel(
            tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
        "differs by .* own eager attention",
    ),
    "bart": (
        lambda: tf.BartModel(
            tf.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=8)
        ),
        "encoder-decoder",
    ),
    "clip": (
        lambda: tf.CLIPModel(
            tf.CLIPConfig(text_config={**_TEXT, "projection_dim": 8}, vision_config={**_IMAGE, "projection_dim": 8})
        ),
        "text and images at once; pass one of its towers",
    ),
    "swin": (
        lambda: tf.SwinModel(
            tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
        ),
        "runs neither images of|differ between layers|never calls",
    ),
}


def build(name: str, seed: int = 0) -> Any:
    """A model with large random weights, so that attention is peaked and layers differ."""
    torch.manual_seed(seed)
    builder = {**TEXT, **IMAGES}.get(name) or REFUSED[name][0]
    model = builder().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim >= 2 or "bias" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    return model


def build_pair(name: str, seed: int = 0) -> tuple[Any, sl.models.PlainModel]:
    """The transformers model, and a copy of it as sinklens loads it."""
    model = build(name, seed)
    plain = sl.load_model(copy.deepcopy(model))
    assert isinstance(plain, sl.models.PlainModel)
    return model, plain


def stack_of(model: Any) -> Any:
    """The model without its head, which has hidden states and patterns whatever the head returns."""
    return model.base_model


def picture(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Random 8-bit colours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
