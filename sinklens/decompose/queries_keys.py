"""Queries and keys of every head as affine functions of the residual stream, read off the host and proven.

With the scale of the layer norm and of the QK norm frozen, a head's query is ``q = N (W x + b)``: the part that comes
from the stream (content) and the part that is parameters (``b_eff``: b_Q, and the norm's bias through W). What is
rebuilt in that way is compared with what the host computed, up to the attention pattern itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import (
    attention_hook,
    block_input,
    block_output,
    by_head,
    learned_sink_logits,
    original,
    score_projection,
    score_scale,
    score_softcap,
)
from sinklens.bridge.capabilities import Capabilities, capabilities, has_hook
from sinklens.core.errors import UnsupportedModelError
from sinklens.decompose.margin import LayerScores, Scoring, Side
from sinklens.residual.linear_maps import FrozenNorm, Rotation, frozen_norm, identity_norm, rotations

POINTS = ("hook_in", "hook_q", "hook_k", "hook_v", "hook_q_normed", "hook_k_normed", "hook_cos", "hook_sin")
SEEN_SCORES = ("hook_attn_scores", "hook_pattern")
TOLERANCE = 2e-3


@dataclass(frozen=True, eq=False)
class Projected:
    """Queries or keys before rotation, and the way back to the residual stream.

    Attributes:
        content, bias: [head, pos, d_head], after QK norm; keys repeated over the query heads that share them.
        norm, head_norm: frozen.
        weight: [head, d_model, d_head].
    """

    content: Float[Tensor, "head pos d_head"]
    bias: Float[Tensor, "head pos d_head"]
    norm: FrozenNorm
    head_norm: FrozenNorm
    weight: Float[Tensor, "head d_model d_head"]

    def of(self, parts: Float[Tensor, "component pos d_model"]) -> Float[Tensor, "head component pos d_head"]:
        """What parts of the stream become here; the parts of the whole stream sum to ``content``."""
        projected = torch.einsum("ctm,hmd->chtd", self.norm.linear(parts), self.weight)
        return self.head_norm.linear(projected).transpose(0, 1)

    def back(self, weights: Float[Tensor, "head pos d_head"]) -> Float[Tensor, "head pos d_model"]:
        """The gradient with respect to the stream of ``sum <weights, this>``."""
        return self.norm.adjoint(self.head_norm.adjoint(weights) @ self.weight.mT)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """One layer of one sequence: its scores' parts, and how queries and keys come out of the residual stream."""

    scores: LayerScores
    query: Projected
    key: Projected


def read_layers(
    model: TransformerBridge, ids: Int[Tensor, "1 pos"], rest: Bool[Tensor, " pos"], layers: Sequence[int]
) -> dict[int, LayerInputs]:
    """Run one unpadded sequence and take some layers apart; see :func:`read_layer`. All of them are held at once."""
    found: dict[int, LayerInputs] = {}
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor.detach()

        return hook

    def read(layer: int) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            x = seen["block in"][0].to(torch.promote_types(tensor.dtype, torch.float32))
            found[layer] = read_layer(model, layer, seen | {"resid_pre": x}, rest)
            seen.clear()

        return hook

    hooks: list[Any] = []
    points = points_of(model)
    for layer in layers:
        hooks += [(block_input(layer), keep("block in"))] + [(attention_hook(layer, p), keep(p)) for p in points]
        hooks.append((block_output(layer), read(layer)))
    run_blocks(model, ids, hooks)
    return found


def points_of(model: TransformerBridge) -> list[str]:
    """The attention hooks that :func:`read_layer` wants to see and that this host has."""
    return [p for p in (*POINTS, *SEEN_SCORES) if has_hook(model, attention_hook(0, p))]


def read_layer(
    model: TransformerBridge, layer: int, seen: Mapping[str, Tensor], rest: Bool[Tensor, " pos"]
) -> LayerInputs:
    """Take one layer apart.

    Args:
        model: the bridge.
        layer: which.
        seen: the host's tensors of one unpadded sequence: at ``POINTS`` and ``SEEN_SCORES`` (by those names, batch axis
            kept), and ``resid_pre`` [pos, d_model].
        rest: the tokens that are no sink.

    Raises:
        UnsupportedModelError: what is rebuilt is not what the host computed.
    """
    facts = capabilities(model)
    wide = torch.promote_types(seen["hook_v"].dtype, torch.float32)
    x, x_hat = seen["resid_pre"].to(wide), seen["hook_in"][0].to(wide)
    norm = _input_norm(model, layer, x, x_hat)
    sides = {which: _project(model, facts, layer, which, seen, x, norm) for which in ("q", "k")}
    v = by_head(seen["hook_v"], facts.heads_first, facts.n_heads).to(wide)
    learned = learned_sink_logits(model, layer)
    scoring = Scoring(
        scale=model.cfg.d_head**-0.5,
        causal=facts.causal,
        window=facts.windows[layer],
        softcap=score_softcap(model),
        learned=None if learned is None else learned.detach().to(wide),
    )
    scores = _proven(model, facts, layer, seen, sides, v, rest, scoring)
    return LayerInputs(scores, sides["q"], sides["k"])


def _input_norm(model: TransformerBridge, layer: int, x: Tensor, x_hat: Tensor) -> FrozenNorm:
    if torch.allclose(x, x_hat, rtol=1e-5, atol=1e-6):
        return identity_norm(x)
    block: Any = model.blocks[layer]
    if not hasattr(block, "ln1"):
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: layer {layer} reads something else than the residual stream or its norm ln1"
        )
    return frozen_norm(original(block.ln1), x, x_hat)


def _project(
    model: TransformerBridge,
    facts: Capabilities,
    layer: int,
    which: str,
    seen: Mapping[str, Tensor],
    x: Tensor,
    norm: FrozenNorm,
) -> Projected:
    weight, bias = (t.to(x) for t in score_projection(model, layer, which))
    content = norm.linear(x) @ weight
    constant = norm.bias.expand(x.shape[-1]) @ weight + bias
    flat = constant[:, None].expand_as(content)
    shown = by_head(seen[f"hook_{which}"], facts.heads_first, weight.shape[0]).to(x)
    _compare(model, layer, content + flat, shown, f"hook_{which}")
    normed = seen.get(f"hook_{which}_normed")
    if normed is None:
        head_norm = identity_norm(content)
    else:
        head_norm = _head_norm(model, layer, which, content + flat, normed[0].to(x))
        content, flat = head_norm.linear(content), head_norm.linear(flat) + head_norm.bias
    shared = facts.n_heads // weight.shape[0]
    if shared > 1:
        content, flat, weight = (t.repeat_interleave(shared, 0) for t in (content, flat, weight))
        head_norm = _repeated(head_norm, shared)
    return Projected(content, flat, norm, head_norm, weight)


def _head_norm(model: TransformerBridge, layer: int, which: str, plain: Tensor, normed: Tensor) -> FrozenNorm:
    """The QK norm, per head or (OLMo 2) over all heads together, as a norm on [head, pos, d_head]."""
    attention: Any = model.blocks[layer].attn
    module = original(getattr(attention, f"{which}_norm"))
    heads, length, size = plain.shape
    if normed.ndim == 3:
        return frozen_norm(module, plain, normed if normed.shape[0] == heads else normed.transpose(0, 1))
    found = frozen_norm(module, plain.transpose(0, 1).flatten(1), normed)
    if found.centred:
        raise UnsupportedModelError(f"{model.cfg.model_name}: a centred norm over all heads' {which} together")
    return FrozenNorm(
        found.gain.view(heads, 1, size), found.bias.view(heads, 1, size), found.scale[None].expand(heads, length), False
    )


def _repeated(norm: FrozenNorm, times: int) -> FrozenNorm:
    gain, bias = norm.gain, norm.bias
    if gain.ndim == 3:
        gain, bias = gain.repeat_interleave(times, 0), bias.repeat_interleave(times, 0)
    return replace(norm, gain=gain, bias=bias, scale=norm.scale.repeat_interleave(times, 0))


def _compare(model: TransformerBridge, layer: int, ours: Tensor, theirs: Tensor, what: str) -> None:
    gap = (ours - theirs).abs().max() / (1 + theirs.abs().max())
    if not gap <= TOLERANCE:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: {what} of layer {layer}, rebuilt from the residual stream, misses the host's by "
            f"{float(gap):.2g} of its size; this architecture computes it in a way that sinklens does not know. "
            f"Please report it"
        )


def _proven(
    model: TransformerBridge,
    facts: Capabilities,
    layer: int,
    seen: Mapping[str, Tensor],
    sides: Mapping[str, Projected],
    v: Tensor,
    rest: Bool[Tensor, " pos"],
    scoring: Scoring,
) -> LayerScores:
    """The layer's scores with the rotation (and ALiBi's slopes) under which they are the host's."""
    candidates = [Rotation()]
    if "hook_cos" in seen and "hook_sin" in seen:
        cos, sin = (seen[name].to(v) for name in ("hook_cos", "hook_sin"))
        d_head = sides["k"].content.shape[-1]
        candidates = rotations(cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]), d_head)
    best, smallest = None, float("inf")
    known = score_scale(model, layer)
    scales = [scoring.scale, 1.0] if known is None else [known]  # GPT-Neo has no scale and no field that says so
    for rotation, scale in itertools.product(candidates, scales):
        q, k = (Side(rotation(s.content), rotation(s.bias)) for s in (sides["q"], sides["k"]))
        scores = LayerScores(q, k, v, rotation, rest, replace(scoring, scale=scale))
        gap = _misses(scores, seen, facts)
        if gap > TOLERANCE and not facts.rope and facts.scores_are_logits:
            slopes = _slopes(scores, seen)
            with_slopes = replace(scores, scoring=replace(scores.scoring, slopes=slopes))
            slope_gap = _misses(with_slopes, seen, facts)
            if slope_gap < gap:
                scores, gap = with_slopes, slope_gap
        if gap < smallest:
            best, smallest = scores, gap
        if smallest <= TOLERANCE:
            break
    if best is None or not smallest <= TOLERANCE:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: the scores of layer {layer}, rebuilt from queries and keys, miss the host's by "
            f"{smallest:.2g}; its position embedding is none that sinklens knows. Please report this architecture"
        )
    return best


def _misses(scores: LayerScores, seen: Mapping[str, Tensor], facts: Capabilities) -> float:
    """The largest difference from the host's scores (over their size), or from its pattern where it hides them."""
    gap, size = 0.0, 1.0
    for start in range(0, scores.length, 128):
        rows = slice(start, min(start + 128, scores.length))
        ours = scores.scores(scores.q.whole[:, rows], rows)
        if facts.scores_are_logits:
            theirs = seen["hook_attn_scores"][0, :, rows, : scores.length].to(ours)
            known = ours.isfinite()
            size = max(size, float(theirs[known].abs().max()))
            gap = max(gap, float((ours - theirs)[known].abs().max()))
        else:
            gap = max(gap, float((ours.softmax(-1) - seen["hook_pattern"][0, :, rows].to(ours)).abs().max()))
    return gap / size


def _slopes(scores: LayerScores, seen: Mapping[str, Tensor]) -> Float[Tensor, " head"]:
    """ALiBi's slope per head, from the last query's scores."""
    last = slice(scores.length - 1, scores.length)
    difference = seen["hook_attn_scores"][0, :, last] - scores.scores(scores.q.whole[:, last], last)
    return (difference[:, 0, -1] - difference[:, 0, 0]) / max(scores.length - 1, 1)
