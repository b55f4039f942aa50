"""``LabAttention``: TransformerLens' native attention with another way from scores to weights.

Its bridge shows the scores before the softmax and, with rotary embeddings, the rotated queries and keys, so that every
function of this package sees a lab model as it sees any other (the host's own native bridge shows the pattern twice).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import AttentionBridge
from transformer_lens.model_bridge.sources.native.model import NativeAttention, NativeRotary

from sinklens.lab.kinds import AttentionKind, weights


class LabAttention(NativeAttention):
    """Causal self-attention of one of the :data:`sinklens.lab.KINDS`.

    Without hooks, attention with a softmax runs in PyTorch's fused kernels; the slot is then one more key.

    Attributes:
        key_bias, value_bias, sink_logit: what the slot learns, where the kind has one; see :attr:`sinks`.
        gate: ``W_g`` of gated attention.
    """

    def __init__(
        self, cfg: TransformerBridgeConfig, kind: AttentionKind, bias_scale: float, rotary: NativeRotary | None = None
    ) -> None:
        super().__init__(cfg, rotary)
        self.kind, self.bias_scale = kind, bias_scale
        if kind.slot in ("key", "key and value"):
            self.key_bias = nn.Parameter(torch.zeros(self.n_kv_heads, self.d_head))
        if kind.slot == "key and value":
            self.value_bias = nn.Parameter(torch.zeros(self.n_kv_heads, self.d_head))
        if kind.slot == "logit":
            self.sink_logit = nn.Parameter(torch.zeros(self.n_heads))
        if kind.gated:
            self.gate = nn.Linear(cfg.d_model, self.n_heads * self.d_head)

    @property
    def scaling(self) -> float:
        """The factor of ``q.k`` in the scores, under the name that transformers gives it."""
        return 1 / self.scale

    @property
    def sinks(self) -> Tensor | None:
        """The slot's score per head where it is one number, as gpt-oss calls it; None for other kinds."""
        if self.kind.slot == "logit":
            return self.bias_scale * self.sink_logit
        if self.kind.slot == "zero":
            return self.q.weight.new_zeros(self.n_heads)
        return None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        hooks: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the pattern where hooks (a bridge) ask for it."""
        batch, length, _width = hidden_states.shape
        q = self.q(hidden_states).view(batch, length, self.n_heads, -1).transpose(1, 2)
        k = self.k(hidden_states).view(batch, length, self.n_kv_heads, -1).transpose(1, 2)
        v = self.v(hidden_states).view(batch, length, self.n_kv_heads, -1).transpose(1, 2)
        slot = self._slot(q)
        if self.rotary is not None:
            q, k = self._rotated(q, k, position_ids, hooks)
        k, v = (x.repeat_interleave(self.kv_repeats, 1) if self.kv_repeats > 1 else x for x in (k, v))
        hidden = self.causal_mask[:length, :length][None, None]
        if attention_mask is not None:
            hidden = self._combine_attention_mask(hidden, attention_mask, batch=batch)
        pattern = None
        if hooks is None and self.kind.rows != "any" and self.kind.name != "sigmoid_normalised":
            z = self._fused(q, k, v, slot, hidden, causal=attention_mask is None)
        else:
            scores = (q @ k.transpose(-2, -1) / self.scale).masked_fill(hidden, -torch.inf)
            scores = scores if hooks is None else hooks.hook_attn_scores(scores)
            pattern, rest = weights(self.kind, scores, ~hidden, slot)
            pattern = pattern if hooks is None else hooks.hook_pattern(pattern)
            z = pattern @ v
            if rest is not None and self.kind.slot == "key and value":
                z = z + rest[..., None] * self._by_head(self.bias_scale * self.value_bias)[:, None]
        z = z.transpose(1, 2).reshape(batch, length, -1)
        if self.kind.gated:
            z = z * self.gate(hidden_states).sigmoid()
        return self.o(z), pattern

    def _rotated(self, q: Tensor, k: Tensor, position_ids: Tensor | None, hooks: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys turned by their positions; hooks see, and may change, the angles and the results."""
        rotary: Any = self.rotary
        at = torch.arange(q.shape[2], device=q.device)[None] if position_ids is None else position_ids
        cos, sin = rotary.cos_cached[at].to(q.dtype), rotary.sin_cached[at].to(q.dtype)
        if hooks is not None:
            cos, sin = hooks.hook_cos(cos), hooks.hook_sin(sin)
        q, k = (x * cos[:, None] + rotary._rotate_half(x) * sin[:, None] for x in (q, k))
        return (q, k) if hooks is None else (hooks.hook_rot_q(q), hooks.hook_rot_k(k))

    def _by_head(self, vectors: Float[Tensor, "kv_head d_head"]) -> Float[Tensor, "head d_head"]:
        return vectors.repeat_interleave(self.kv_repeats, 0)

    def _slot(self, q: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos"] | None:
        """The slot's score for each query, which is not rotated yet."""
        if self.kind.slot == "none":
            return None
        if self.sinks is not None:
            return self.sinks[:, None].expand(q.shape[:-1])
        key = self.bias_scale * self._by_head(self.key_bias)
        return torch.einsum("bhqd,hd->bhq", q, key) / self.scale

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, slot: Tensor | None, hidden: Tensor, *, causal: bool
    ) -> Float[Tensor, "batch head pos d_head"]:
        """The same in PyTorch's kernels: the slot is a key of zeros whose score is put into the mask."""
        if slot is None:
            if causal:
                return scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=self.scaling)
            return mixed.masked_fill(hidden.all(-1)[..., None], 0)  # a padded query sees nothing
        batch, heads, length, width = q.shape
        value = v.new_zeros(heads, width)
        if self.kind.slot == "key and value":
            value = self._by_head(self.bias_scale * self.value_bias)
        k = torch.cat([k.new_zeros(batch, heads, 1, width), k], 2)
        v = torch.cat([value[None, :, None].expand(batch, -1, -1, -1).to(v), v], 2)
        mask = q.new_zeros(batch, heads, length, length).masked_fill(hidden, -torch.inf)
        return scaled_dot_product_attention(
            q, k, v, attn_mask=torch.cat([slot[..., None].to(q), mask], -1), scale=self.scaling
        )


class LabAttentionBridge(AttentionBridge):
    """Runs :class:`LabAttention` with its own hooks inside, in the order of the computation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(self, "hook_rot_q"):
            self.hook_cos, self.hook_sin = HookPoint(), HookPoint()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """hook_in, the attention with this component's hook points, hook_out."""
        inner: Any = self.original_component
        if args:
            kwargs["hidden_states"], args = args[0], args[1:]
        kwargs["hidden_states"] = self.hook_in(kwargs["hidden_states"])
        output, pattern = inner(*args, hooks=self, **kwargs)
        return self.hook_out(output), pattern


def show_scores(adapter: ArchitectureAdapter) -> None:
    """Put the lab's attention bridge into the host's native adapter."""
    mapping: Any = adapter.component_mapping
    block = mapping["blocks"]
    old = block.submodules["attn"]
    block.submodules["attn"] = LabAttentionBridge(name="attn", config=adapter.cfg, submodules=dict(old.submodules))
