"""Another softmax, or another mask, put in the place of a model's own: no training, so these show dependence only.

``swap_attention``: ``off-by-one`` adds a key with score 0 and value 0, ``softmax_1(s)_k = exp(s_k) / (1 + sum exp(s))``
(Miller 2023; StreamingLLM's zero sink); ``learned-logit`` the same with a score of your choice per head (gpt-oss's
mechanism); ``clipped`` is ``clip((zeta - gamma) softmax(s) + gamma, 0, 1)`` (Bondarenko et al. 2023, eq. 4).
``restrict_attention``: StreamingLLM's attention pattern (Xiao et al. 2024, figure 1d) as a mask; positions stay where
they are in the text (the cache with positions counted inside it is another experiment).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.ablate.attention_edit import PatternEdit, Seen
from sinklens.ablate.edit_hooks import edit_hooks, refuse_unless_editable
from sinklens.ablate.hooks import Hooks
from sinklens.ablate.partition import Partition, edited_pattern, pair
from sinklens.ablate.selection import Heads, Layers, Selection, select
from sinklens.bridge.adapters import learned_sink_logits
from sinklens.bridge.capabilities import Capabilities, capabilities
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.find.locations import Places, Sinks, find_places
from sinklens.forward.follow import Forward

Kind = Literal["off-by-one", "learned-logit", "clipped"]


@public
def swap_attention(
    model: TransformerBridge,
    kind: Kind,
    *,
    layers: Layers = None,
    heads: Heads = None,
    logit: float | Tensor | None = None,
    gamma: float = -0.03,
    zeta: float = 1.0,
) -> Hooks:
    """Hooks that give every query another normalisation of its scores.

    Args:
        model: from :func:`sinklens.load_model`.
        kind: ``"off-by-one"``, ``"learned-logit"`` or ``"clipped"``.
        layers, heads: where; default everywhere.
        logit: for ``learned-logit``: one number, or a tensor [layer, head]. On a model that has such a logit, this is
            one more.
        gamma, zeta: for ``clipped``: probabilities below ``-gamma / (zeta - gamma)`` become exactly 0.

    Raises:
        BadInputError: unknown kind, a logit of the wrong shape, gamma above 0 or zeta below 1.
        UnsupportedModelError: the host's attention cannot be edited by hooks.

    Cost: one pattern-sized temporary per layer.
    """
    facts = capabilities(model)
    if (logit is None) == (kind == "learned-logit"):
        raise BadInputError(f"logit= belongs to kind 'learned-logit' and must be given there; got {kind!r}, {logit}")
    if gamma > 0 or zeta < 1:
        raise BadInputError(f"clipped softmax needs gamma <= 0 <= 1 <= zeta, got gamma={gamma}, zeta={zeta}")
    table = _logits(facts, logit)
    refuse_unless_editable(model, values=False)
    chosen = select(facts, None, layers, heads)

    def normalise(layer: int, seen: Seen) -> Tensor:
        kept = chosen.mask(layer, facts.n_heads, seen.pattern.device)[:, None, None]
        if kind == "clipped":
            new = ((zeta - gamma) * seen.pattern + gamma).clamp(0, 1) * seen.allowed
        else:
            lse = seen.scores.masked_fill(~seen.allowed, -torch.inf).logsumexp(-1)
            learned = learned_sink_logits(model, layer)
            if learned is not None:
                lse = torch.logaddexp(lse, learned[:, None].to(lse))
            extra = table[layer].to(lse)[:, None]
            new = seen.pattern * (lse - extra).sigmoid()[..., None].to(seen.pattern)
        return torch.where(kept & seen.allowed.any(-1, keepdim=True), new, seen.pattern)

    name = kind if logit is None or isinstance(logit, Tensor) else f"{kind}({logit:g})"
    options: dict[str, Any] = {"layers": layers, "heads": heads, "logit": logit, "gamma": gamma, "zeta": zeta}
    return _hooks(model, normalise, chosen, name, lambda other: swap_attention(other, kind, **options))


@public
def restrict_attention(
    model: TransformerBridge, *, sinks: int | Sinks = 4, recent: int = 256, layers: Layers = None, heads: Heads = None
) -> Hooks:
    """Hooks that let every query see only some sinks and the most recent keys, itself included.

    Query i keeps key k iff ``k`` is a sink or ``i - k < recent``; what is left is normalised again.

    Args:
        model: from :func:`sinklens.load_model`.
        sinks: how many first tokens stay visible (0: the window alone), or a SinkMap, a list of positions or a
            predicate: those stay visible in the layers in which they live.
        recent: the window, at least 1.
        layers, heads: where; default everywhere.

    Raises:
        BadInputError: a window below 1, a negative number of sinks.
        UnsupportedModelError: the host's attention cannot be edited by hooks.

    Cost: one pattern-sized temporary per layer; this saves no computation.
    """
    facts = capabilities(model)
    if recent < 1 or (isinstance(sinks, int) and sinks < 0):
        raise BadInputError(f"restrict_attention needs sinks >= 0 and recent >= 1, got sinks={sinks}, recent={recent}")
    refuse_unless_editable(model, values=False)
    first_ones = sinks if isinstance(sinks, int) else None
    places = Places() if first_ones is not None else find_places(sinks)
    forward = Forward(model, places.tokens)
    chosen = select(facts, None, layers, heads)

    def restrict(layer: int, seen: Seen) -> Tensor:
        index = torch.arange(forward.columns, device=seen.pattern.device)
        queries = index[seen.rows, None]
        stays = (queries - index < recent)[None]
        if not facts.causal:
            stays = stays & (index - queries < recent)[None]
        if first_ones is not None:
            stays = stays | (index < forward.starts[:, None] + first_ones)[:, None]
        elif places.acts_in(layer):
            stays = stays | places.columns(forward, layer)[:, None]
        hidden = ~stays[:, None, :, seen.keys] & seen.allowed
        learned = learned_sink_logits(model, layer)
        part = Partition(seen.scores, seen.pattern, hidden, seen.allowed & ~hidden, learned)
        rows = part.editable & chosen.mask(layer, facts.n_heads, hidden.device)[:, None]
        return edited_pattern(part, pair("renormalize", part), rows)

    named = str(first_ones) if first_ones is not None else "sinks"
    return _hooks(
        model,
        restrict,
        chosen,
        f"{named}+{recent} recent",
        lambda other: restrict_attention(other, sinks=sinks, recent=recent, layers=layers, heads=heads),
        forward,
    )


def _hooks(
    model: TransformerBridge,
    edit: Callable[[int, Seen], Tensor],
    chosen: Selection,
    name: str,
    again: Callable[[TransformerBridge], Hooks],
    forward: Forward | None = None,
) -> Hooks:
    items = edit_hooks(model, forward or Forward(model), PatternEdit(edit), chosen.layers)
    return Hooks(items, name=name, build=lambda other, _: again(other or model), layers=chosen.layers)


def _logits(facts: Capabilities, logit: float | Tensor | None) -> Tensor:
    shape = (facts.n_layers, facts.n_heads)
    if isinstance(logit, Tensor):
        if logit.shape != shape or not logit.isfinite().all():
            raise BadInputError(f"logit must be finite and of shape {shape} [layer, head], got {tuple(logit.shape)}")
        return logit.detach()
    return torch.full(shape, logit or 0.0)
