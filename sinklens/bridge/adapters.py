"""What a head may see, and under which names the host shows it. The only file that knows adapters.

A query i may see key k iff both are unpadded, ``k <= i`` in a causal layer, and ``i - k < window`` in a sliding
one. Everything here is stated in unshifted indices of the batch; positions are counted elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.offload import real_weights
from sinklens.core.errors import UnsupportedModelError


def attention_hook(layer: int, point: str) -> str:
    """The name of an attention hook point, such as ``blocks.3.attn.hook_pattern``."""
    return f"blocks.{layer}.attn.{point}"


def block_input(layer: int) -> str:
    """The name of the hook on the residual stream before block ``layer`` (``resid_pre``)."""
    return f"blocks.{layer}.hook_in"


def block_output(layer: int) -> str:
    """The name of the hook on the residual stream after block ``layer`` (``resid_post``)."""
    return f"blocks.{layer}.hook_out"


def text_config(model: TransformerBridge) -> Any:
    """The configuration of the (text) model that the bridge wraps: Hugging Face's, or the host's for native models."""
    config: Any = getattr(model.original_model, "config", model.cfg)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def context_window(model: TransformerBridge) -> int | None:
    """The longest sequence that the model has positions for; None where it has no limit (ALiBi)."""
    config = text_config(model)
    if not any(getattr(config, field, None) for field in ("max_position_embeddings", "n_positions", "n_ctx")):
        return None
    return int(model.cfg.n_ctx)


def declared_windows(model: TransformerBridge) -> tuple[int | None, ...]:
    """The sliding window of each layer as the configuration declares it; None is full attention.

    Raises:
        UnsupportedModelError: a layer attends in a way that is neither full nor a sliding window.
    """
    config = text_config(model)
    window: int | None = getattr(config, "sliding_window", None) or None
    if getattr(config, "attention_layers", None):
        return tuple(config.window_size if kind == "local" else None for kind in config.attention_layers)  # GPT-Neo
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * model.cfg.n_layers
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise UnsupportedModelError(
            f"{model.cfg.model_name} has layers of kind {', '.join(strange)}; sinklens measures full and "
            f"sliding-window softmax attention only"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def learned_sink_logits(model: TransformerBridge, layer: int) -> Tensor | None:
    """The trained logit per head that stands in the softmax denominator (gpt-oss), or None."""
    component: Any = model.blocks[layer].attn.original_component
    if not isinstance(getattr(component, "sinks", None), Tensor):
        return None
    with real_weights(component, deep=False):
        return component.sinks


def either_backend(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook that need not fire under the flash backend, because what it does is done there in another way."""
    hook.either_backend = True  # type: ignore[attr-defined]
    return hook


def by_head(tensor: Float[Tensor, "1 a b d_head"], heads_first: bool, n_heads: int) -> Float[Tensor, "head pos d_head"]:
    """A query, key or value hook's tensor of one sequence, repeated over the query heads that share a KV head."""
    x = tensor[0] if heads_first else tensor[0].transpose(0, 1)
    return x.repeat_interleave(n_heads // x.shape[0], dim=0)


def scored_points(fires: Sequence[str], rope: bool) -> tuple[str, str] | None:
    """The hooks that hold queries and keys as they are scored: after RoPE, after QK norm.

    None where the host shows them only before RoPE (NeoX, Phi-3, Falcon).
    """
    if "hook_rot_q" in fires and "hook_rot_k" in fires:
        late = "hook_q" in fires and fires.index("hook_q") > fires.index("hook_rot_q")  # MLA concatenates afterwards
        return ("hook_q", "hook_k") if late else ("hook_rot_q", "hook_rot_k")
    return None if rope else ("hook_q", "hook_k")


def output_weights(model: TransformerBridge, layer: int) -> Float[Tensor, "head d_head d_model"] | None:
    """W_O of one layer by head, or None where the host does not split it (it raises NotImplementedError)."""
    attention: Any = model.blocks[layer].attn
    try:
        with real_weights(getattr(attention, "o", attention)):
            return attention.W_O
    except NotImplementedError:
        return None


def value_bias(model: TransformerBridge, layer: int, n_heads: int) -> Float[Tensor, "head d_head"] | None:
    """b_V of one layer by query head, or None where the model has none."""
    attention: Any = model.blocks[layer].attn
    try:
        with real_weights(getattr(attention, "v", attention)):
            bias = attention.b_V
    except NotImplementedError:  # MLA, whose values come out of a projection without a bias
        projection: Any = getattr(attention.original_component, "kv_b_proj", None)
        if getattr(projection, "bias", None) is not None:
            raise
        return None
    if bias is None:
        return None
    bias = bias.view(-1, model.cfg.d_head) if bias.ndim == 1 else bias
    return bias.repeat_interleave(n_heads // bias.shape[0], dim=0)


def grouped_by_head(
    tensor: Float[Tensor, "batch *rest"], n_heads: int, heads_first: bool
) -> Float[Tensor, "batch pos head d_head"]:
    """A query, key or value hook's tensor as [batch, pos, head, d_head], whichever way the adapter lays it out.

    ``n_heads`` counts the heads that the tensor holds: KV heads for keys and values.
    """
    if tensor.ndim == 3:  # OLMo 2 normalises before it splits the heads
        return tensor.unflatten(-1, (n_heads, -1))
    return tensor.transpose(1, 2) if heads_first else tensor


def unrotated_keys(fires: Sequence[str], rope: bool) -> tuple[str, bool] | None:
    """The hook that holds keys before RoPE and after QK norm, and whether its heads come first; None if none does.

    Without RoPE the keys themselves; with RoPE only where the rotated ones are shown too (not NeoX, Phi-3, MLA).
    """
    scored = scored_points(fires, rope)
    if scored is None or (rope and scored[1] != "hook_rot_k"):
        return None
    return ("hook_k_normed", True) if "hook_k_normed" in fires else ("hook_k", False)


def score_scale(model: TransformerBridge, layer: int) -> float | None:
    """The factor of ``q.k`` in the scores; None where the host's module does not say."""
    component: Any = model.blocks[layer].attn.original_component
    for name in ("scaling", "inv_norm_factor"):
        value = getattr(component, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return None


def score_softcap(model: TransformerBridge) -> float | None:
    """The cap c of ``c tanh(s / c)``, where the model has one (Gemma 2)."""
    return getattr(text_config(model), "attn_logit_softcapping", None)


def score_projection(
    model: TransformerBridge, layer: int, which: str
) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
    """W and b of the "q" or "k" projection of one layer by head (KV heads for "k"); a missing bias is 0.

    Raises:
        UnsupportedModelError: the projection is no single matrix per head (MLA).
    """
    attention: Any = model.blocks[layer].attn
    try:
        with real_weights(getattr(attention, which, attention)):
            weight, bias = getattr(attention, f"W_{which.upper()}"), getattr(attention, f"b_{which.upper()}")
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: queries and keys come out of a latent (MLA), not of a matrix per head, so their "
            f"scores cannot be split into components; ablate_sinks and sink_anatomy work on it"
        ) from None
    if bias is None:
        bias = weight.new_zeros(weight.shape[0], weight.shape[2])
    return weight.detach(), bias.detach().view(weight.shape[0], weight.shape[2])


def mlp_of(model: TransformerBridge, layer: int) -> Any:
    """The bridge component of a layer's MLP.

    Raises:
        UnsupportedModelError: the model is made of attention only.
    """
    block: Any = model.blocks[layer]
    if not hasattr(block, "mlp"):
        raise UnsupportedModelError(
            f"{model.cfg.model_name} has no MLPs, and this is about what they write; find_sinks, ablate_sinks, "
            f"decompose_sinks, trace_sinks(causal=False) and measure_mixing work on it"
        )
    return block.mlp


def original(component: Any) -> torch.nn.Module:
    """The host's own module inside a bridge component; calling it fires no hook."""
    return getattr(component, "original_component", component)


def residual_multiplier(model: TransformerBridge) -> float:
    """What the host multiplies a layer's output with before it joins the stream (Granite); 1 elsewhere."""
    return float(getattr(text_config(model), "residual_multiplier", None) or 1.0)


def logit_factor(model: TransformerBridge) -> float:
    """What the host multiplies the unembedding's output with (Granite divides, Cohere multiplies); 1 elsewhere."""
    config = text_config(model)
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
