"""Editing a layer's attention as a list of hooks: the pattern, and z where values change.

Where the host reimplements attention, ``hook_pattern`` is what the values are multiplied with, and is edited there.
Where it delegates (OPT, BERT), the pattern is only read off afterwards: a hook at the attention's input arms the edit,
and the function registered in :mod:`sinklens.attention.backend` consumes it in the same call. Under flash all do that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.attention_edit import Attached, PatternEdit, Seen
from sinklens.ablate.blockwise import dense_attention, edited_attention
from sinklens.attention.backend import Armed, Backend, hook_points, once, running
from sinklens.attention.flash_proof import unsupported
from sinklens.attention.kernels import View
from sinklens.bridge.adapters import attention_hook, either_backend, grouped_by_head, scored_points, value_bias
from sinklens.bridge.capabilities import capabilities
from sinklens.bridge.requirements import refuse_unless_softmax
from sinklens.core.errors import SinklensError, UnsupportedModelError
from sinklens.forward.follow import Forward


def delegates(model: TransformerBridge) -> bool:
    """Whether the host's attention cannot be edited by hooks, so that edits go through the registered function."""
    facts = capabilities(model)
    return not facts.pattern_edit or not facts.scores_are_logits


def refuse_unless_editable(model: TransformerBridge, backend: Backend = "auto", *, values: bool) -> None:
    """Raise UnsupportedModelError where an edit of the pattern, or of z, would change nothing."""
    facts = capabilities(model)
    refuse_unless_softmax(model, "an edit of attention")
    reason = unsupported(model) if backend == "flash" or delegates(model) else ""
    if reason and backend == "flash":
        raise UnsupportedModelError(f"{facts.model}: the flash backend cannot run it: {reason}")
    if reason:
        raise UnsupportedModelError(
            f"{facts.model} ({facts.architecture}): this host delegates attention and only reads the pattern off "
            f"afterwards, so an edit of it would silently change nothing, and {reason}. Edits of the residual stream "
            f"work on it (ablate_residual; patch_bos at resid_pre, resid_post, mlp_out, attn_out)"
        )
    if delegates(model):
        return
    if values and not (facts.z_edit and facts.z_is_pattern_v):
        raise UnsupportedModelError(
            f"{facts.model} ({facts.architecture}): hook_z is not pattern @ v here (a gate?), so values cannot be "
            f"exchanged after the fact; modes that only move weights work (renormalize, scale, null, move, uniform)"
        )


def edit_hooks(
    model: TransformerBridge,
    forward: Forward,
    edit: PatternEdit,
    layers: Sequence[int],
    *,
    values: bool = False,
    keys: bool = False,
    bias: bool = False,
    backend: Backend = "auto",
) -> list[tuple[str, Any]]:
    """The hooks that run an edit in the given layers.

    Args:
        model: the model.
        forward: what the edit asks about ids, padding and positions.
        edit: from a layer and what was seen to the new pattern; may leave ``extra`` and ``bias`` for z.
        layers: where.
        values, keys: whether the edit asks for the sinks' values; for queries and keys as they are scored.
        bias: whether it leaves a coefficient of b_V.
        backend: "hooks" and "flash" refuse the other; "auto" follows the forward.
    """
    hooks: list[tuple[str, Any]] = list(forward.hooks())
    for layer in layers:
        name = attention_hook(layer, "hook_in")
        b_v = value_bias(model, layer, capabilities(model).n_heads) if bias else None
        hooks.append((name, _arming(model, layer, Attached(edit, forward, name, b_v), backend)))
        if delegates(model):
            continue
        hooks += _layer_hooks(model, forward, edit, layer, values=values, keys=keys, bias=bias)
    return hooks


def _arming(model: TransformerBridge, layer: int, attached: Attached, backend: Backend) -> Callable[..., None]:
    """The hook at a layer's attention input that hands the edit to the registered function, where that runs."""
    point = hook_points(model)[attached.name]

    def arm(_: Tensor, hook: Any) -> None:
        state = running(model)
        armed = Armed(attached, point, arm)
        if state is not None and backend == "hooks":
            raise SinklensError("these hooks were built with backend='hooks'; run them outside sinklens.flash(model)")
        if state is not None:
            state.edited = edited_attention
            state.arm(layer, armed)
        elif delegates(model):
            once(model.blocks[layer].attn.original_component, armed, dense, layer)
        elif backend == "flash":
            raise SinklensError(
                "these hooks were built with backend='flash'; run them inside 'with sinklens.flash(model):', or build "
                "them with backend='auto', which works in both"
            )

    def dense(edits: list[Any], layer: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor]:
        return dense_attention(model, edits, layer, q, k, v, view)

    return arm


def _layer_hooks(
    model: TransformerBridge,
    forward: Forward,
    edit: PatternEdit,
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
        if running(model) is None:
            by_head = grouped_by_head(tensor, facts.n_kv_heads, facts.heads_first)
            seen.keep("value", by_head, not forward.past)

    def keep_queries(tensor: Tensor, hook: Any) -> None:
        if running(model) is None:
            seen.queries = grouped_by_head(tensor, facts.n_heads, heads_first).transpose(1, 2)

    def keep_keys(tensor: Tensor, hook: Any) -> None:
        if running(model) is None:
            seen.keep("key", grouped_by_head(tensor, facts.n_kv_heads, heads_first), not forward.past)

    def keep_scores(tensor: Tensor, hook: Any) -> None:
        seen.raw_scores = tensor

    def edit_pattern(tensor: Tensor, hook: Any) -> Tensor:
        forward.visit(hook.name)
        seen.open(tensor, forward)
        edit.begin(layer)
        new = edit(layer, seen)
        edit.finish(layer)
        if seen.extra is None and seen.bias is None:
            seen.close()
        return new

    def edit_z(tensor: Tensor, hook: Any) -> Tensor | None:
        if running(model) is not None:
            return None
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
    return [(name, either_backend(hook)) for name, hook in hooks]
