"""Editing a layer's attention through hooks: the pattern, and z where values change.

Works where the host reimplements attention: there ``hook_pattern`` is what the values are multiplied with. Where it
delegates (OPT, BERT), the pattern is only read off afterwards, and an edit would be lost: those models are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention import attention_hook, grouped_by_head, scored_points, value_bias
from sinklens.errors import UnsupportedModelError
from sinklens.forward import Forward
from sinklens.proof import capabilities

Edit = Callable[[int, "Seen"], Tensor]


class Seen:
    """What one layer's attention computes in this call, and what the edit leaves for z.

    Attributes:
        scores: before the softmax, in float32 at least; masked entries hold the dtype's minimum.
        pattern: the kernel's softmax.
        allowed: which keys each query may see: [batch, 1, query, key].
        queries: as they are scored: [batch, head, query, d_head]; only where asked for.
        extra: to be added to z: [batch, head, query, d_head].
        bias: the coefficient of b_V to be added to z: [batch, head, query].
    """

    def __init__(self, n_kv_heads: int) -> None:
        self.n_kv_heads = n_kv_heads
        self.raw_scores: Tensor | None = None
        self.scores: Float[Tensor, "batch head query key"]
        self.pattern: Float[Tensor, "batch head query key"]
        self.allowed: Bool[Tensor, "batch 1 query key"]
        self.queries: Float[Tensor, "batch head query d_head"]
        self.extra: Float[Tensor, "batch head query d_head"] | None = None
        self.bias: Float[Tensor, "batch head query"] | None = None
        self._current: dict[str, Float[Tensor, "batch pos kv_head d_head"]] = {}
        self._kept: dict[str, dict[int, Tensor]] = {}

    def keep(self, what: str, tensor: Float[Tensor, "batch pos kv_head d_head"], fresh: bool) -> None:
        """Hold this call's keys or values; a fresh forward forgets what was kept of an earlier one."""
        self._current[what] = tensor.detach()
        if fresh:
            self._kept[what] = {}

    def at(self, what: str, columns: Sequence[int], past: int) -> Float[Tensor, "batch column kv_head d_head"]:
        """Keys or values at absolute columns, also of earlier calls where they were asked for then."""
        kept = self._kept.setdefault(what, {})
        for column in columns:
            if column >= past:
                kept[column] = self._current[what][:, column - past].clone()
        return torch.stack([kept[column] for column in columns], 1)

    def open(self, pattern: Tensor) -> None:
        """Take the pattern: the scores are complete now."""
        if self.raw_scores is None:
            raise UnsupportedModelError("hook_pattern fired without hook_attn_scores; this host cannot be edited")
        raw = self.raw_scores
        self.allowed = raw[:, :1] > torch.finfo(raw.dtype).min / 2
        self.scores = raw.to(torch.promote_types(raw.dtype, torch.float32))
        self.pattern, self.raw_scores, self.extra, self.bias = pattern, None, None, None

    def close(self) -> None:
        """Let the layer's tensors go."""
        self._current.clear()
        self.extra = self.bias = None
        for name in ("scores", "pattern", "allowed", "queries"):
            self.__dict__.pop(name, None)


def refuse_unless_editable(model: TransformerBridge, *, values: bool) -> None:
    """Raise UnsupportedModelError where an edit of the pattern, or of z, would change nothing."""
    facts = capabilities(model)
    if not facts.pattern_edit or not facts.scores_are_logits:
        raise UnsupportedModelError(
            f"{facts.model} ({facts.architecture}): this host delegates attention and only reads the pattern off "
            f"afterwards, so an edit of it would silently change nothing. Edits of the residual stream work on it "
            f"(ablate_residual; patch_bos at resid_pre, resid_post, mlp_out, attn_out)"
        )
    if values and not (facts.z_edit and facts.z_is_pattern_v):
        raise UnsupportedModelError(
            f"{facts.model} ({facts.architecture}): hook_z is not pattern @ v here (a gate?), so values cannot be "
            f"exchanged after the fact; modes that only move weights work (renormalize, scale, null, move, uniform)"
        )


def edit_hooks(
    model: TransformerBridge,
    forward: Forward,
    edit: Edit,
    layers: Sequence[int],
    *,
    values: bool = False,
    keys: bool = False,
    bias: bool = False,
) -> list[tuple[str, Any]]:
    """The hooks that run an edit in the given layers.

    Args:
        model: the model.
        forward: what the edit asks about ids, padding and positions.
        edit: from a layer and what was seen to the new pattern; may leave ``extra`` and ``bias`` for z.
        layers: where.
        values, keys: whether the edit asks for the sinks' values; for queries and keys as they are scored.
        bias: whether it leaves a coefficient of b_V.
    """
    hooks: list[tuple[str, Any]] = list(forward.hooks())
    for layer in layers:
        hooks += _layer_hooks(model, forward, edit, layer, values=values, keys=keys, bias=bias)
    return hooks


def _layer_hooks(
    model: TransformerBridge,
    forward: Forward,
    edit: Edit,
    layer: int,
    *,
    values: bool,
    keys: bool,
    bias: bool,
) -> list[tuple[str, Any]]:
    facts = capabilities(model)
    seen = Seen(facts.n_kv_heads)
    points = scored_points(facts.fires, facts.rope) or ("hook_q", "hook_k")
    heads_first = facts.heads_first and points == ("hook_q", "hook_k")
    b_v = value_bias(model, layer, facts.n_heads) if bias else None

    def keep_values(tensor: Tensor, hook: Any) -> None:
        by_head = grouped_by_head(tensor, facts.n_kv_heads, facts.heads_first)
        seen.keep("value", by_head, not forward.past)

    def keep_queries(tensor: Tensor, hook: Any) -> None:
        seen.queries = grouped_by_head(tensor, facts.n_heads, heads_first).transpose(1, 2).detach()

    def keep_keys(tensor: Tensor, hook: Any) -> None:
        seen.keep("key", grouped_by_head(tensor, facts.n_kv_heads, heads_first), not forward.past)

    def keep_scores(tensor: Tensor, hook: Any) -> None:
        seen.raw_scores = tensor.detach() if not tensor.requires_grad else tensor

    def edit_pattern(tensor: Tensor, hook: Any) -> Tensor:
        forward.visit(hook.name)
        seen.open(tensor)
        new = edit(layer, seen)
        if seen.extra is None and seen.bias is None:
            seen.close()
        return new

    def edit_z(tensor: Tensor, hook: Any) -> Tensor:
        added = seen.extra
        if seen.bias is not None and b_v is not None:
            written = seen.bias[..., None] * b_v[:, None].to(seen.bias)
            added = written if added is None else added + written
        seen.close()
        return tensor if added is None else tensor + added.transpose(1, 2).to(tensor)

    hooks: list[tuple[str, Any]] = []
    if values:
        hooks.append((attention_hook(layer, "hook_v"), keep_values))
    if keys:
        hooks += [(attention_hook(layer, points[0]), keep_queries), (attention_hook(layer, points[1]), keep_keys)]
    hooks += [
        (attention_hook(layer, "hook_attn_scores"), keep_scores),
        (attention_hook(layer, "hook_pattern"), edit_pattern),
    ]
    if values or b_v is not None:
        hooks.append((attention_hook(layer, "hook_z"), edit_z))
    return hooks
