"""``LabModel``: a small pre-norm transformer on TransformerLens' native model, with any kind of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources.native.model import NativeModel

from sinklens.bridge.torch_globals import own_generator
from sinklens.core.errors import BadInputError
from sinklens.lab.attention import LabAttention, show_scores
from sinklens.lab.kinds import AttentionKind, kind_named

MLPS = {"swiglu": ("silu", True), "geglu": ("gelu", True), "gelu": ("gelu", False), "relu": ("relu", False)}
NORMS = {"rms": "RMS", "layer": "LN", "none": None}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a lab model; the defaults are those of settings P and B.

    Attributes:
        attention: one of :data:`sinklens.lab.KINDS`.
        n_layers, n_heads, d_model, d_head, d_mlp: sizes; ``d_head`` and ``d_mlp`` default to ``d_model / n_heads``
            and ``2 d_model``.
        n_kv_heads: fewer KV heads than heads, for grouped-query attention.
        norm: "rms", "layer" or "none", before each sublayer and before the unembedding.
        mlp: "swiglu", "geglu", "gelu", "relu" or "none".
        position: "learned", "rope" or "none".
        n_ctx, n_vocab: the longest sequence, and ids; a task sets them.
        bias_scale: what the slot learns is this times a parameter (see :mod:`sinklens.lab.kinds`).
    """

    attention: str = "softmax"
    n_layers: int = 1
    n_heads: int = 1
    d_model: int = 64
    d_head: int | None = None
    d_mlp: int | None = None
    n_kv_heads: int | None = None
    norm: str = "rms"
    mlp: str = "swiglu"
    position: str = "learned"
    n_ctx: int = 64
    n_vocab: int = 64
    bias_scale: float = 20.0

    def __post_init__(self) -> None:
        kind_named(self.attention)
        for name, choices in (("norm", NORMS), ("mlp", [*MLPS, "none"]), ("position", ("learned", "rope", "none"))):
            if getattr(self, name) not in choices:
                raise BadInputError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("n_layers", "n_heads", "d_model", "n_ctx", "n_vocab"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_head is None and self.d_model % self.n_heads:
            raise BadInputError(f"d_model {self.d_model} is no multiple of n_heads {self.n_heads}; set d_head")
        if self.position == "rope" and (self.d_head or self.d_model // self.n_heads) % 2:
            raise BadInputError("rope turns pairs of dimensions; d_head must be even")
        if self.n_kv_heads is not None and (self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads):
            raise BadInputError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads, got {self.n_kv_heads}")

    @property
    def kind(self) -> AttentionKind:
        """The kind of attention."""
        return kind_named(self.attention)

    @property
    def max_position_embeddings(self) -> int:
        """``n_ctx``, under the name that transformers gives it."""
        return self.n_ctx

    def host(self) -> TransformerBridgeConfig:
        """TransformerLens' configuration of the same shape."""
        act, gated = MLPS.get(self.mlp, ("gelu", False))
        return TransformerBridgeConfig.from_dict(
            {
                "d_model": self.d_model,
                "n_layers": self.n_layers,
                "n_heads": self.n_heads,
                "n_key_value_heads": self.n_kv_heads or self.n_heads,
                "d_head": self.d_head or self.d_model // self.n_heads,
                "d_mlp": self.d_mlp or 2 * self.d_model,
                "n_ctx": self.n_ctx,
                "d_vocab": self.n_vocab,
                "act_fn": act,
                "gated_mlp": gated,
                "attn_only": self.mlp == "none",
                "normalization_type": NORMS[self.norm],
                "final_rms": self.norm == "rms",
                "positional_embedding_type": "rotary" if self.position == "rope" else "standard",
                "init_weights": False,
            }
        )


class LabModel(NativeModel):
    """TransformerLens' native model with :class:`LabAttention` in every layer.

    Args:
        config: the shape.
        seed: of the initial weights: embeddings N(0, 0.02), matrices N(0, 0.8 / sqrt(fan in)), biases and gates 0.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        host = config.host()
        with own_generator(seed):  # torch's own initial weights, which are not kept
            super().__init__(host)
            for block in self.layers:
                block.attn = LabAttention(host, config.kind, config.bias_scale, self.rotary)
        self.config = config
        self.name = f"lab-{config.attention}"
        if config.position == "none" and self.pos is not None:
            self.pos.weight.requires_grad_(False)
        self._initialise(seed)

    def prepare_adapter(self, adapter: ArchitectureAdapter) -> None:
        """What :func:`sinklens.load_model` does to the host's native adapter for this model."""
        show_scores(adapter)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(weight: torch.Tensor, deviation: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

        normal(self.tok_embed.weight, 0.02)
        if self.pos is not None:
            (normal(self.pos.weight, 0.02) if self.config.position == "learned" else self.pos.weight.zero_())
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                normal(
                    module.weight, 0.0 if name.endswith("gate") and self._is_attention(name) else self._scale(module)
                )
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, LabAttention):
                for slot in ("key_bias", "value_bias", "sink_logit"):
                    if hasattr(module, slot):
                        normal(getattr(module, slot), 0.02)

    @staticmethod
    def _is_attention(name: str) -> bool:
        return name.split(".")[-2] == "attn"

    @staticmethod
    def _scale(module: nn.Linear) -> float:
        return 0.8 / math.sqrt(module.in_features)
