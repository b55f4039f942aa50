"""Attention written out: whole patterns in float64, as the formulas say, with room for one plain edit.

The reference of the self-test. It shares no kernel and no edit with the rest of the package: queries, keys and values
are taken where the host's own attention code hands them over, and ``z = A v`` is computed from the whole pattern.
Where that code never asks transformers' AttentionInterface (Bloom, Falcon, GPT-Neo) scores and values are read from
the host's hooks and ``hook_z`` is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Flash, switched
from sinklens.attention.flash_proof import unsupported
from sinklens.attention.kernels import View
from sinklens.bridge.adapters import (
    attention_hook,
    block_output,
    grouped_by_head,
    learned_sink_logits,
    score_scale,
    scored_points,
    value_bias,
)
from sinklens.bridge.capabilities import capabilities
from sinklens.check.reference_kinds import kind_of
from sinklens.core.visibility import allowed_keys


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of some unpadded sequences, float64, by query head.

    Attributes:
        q, k: as they are scored; None where the host shows them only before its rotary embedding.
        v: values.
        scores: with -inf where the query does not see the key.
        learned: a logit per head in the softmax; None without.
        bias: the value bias; None without.
        scale, softcap: ``s = cap(scale q.k)``.
        other: the pattern of a kind of attention that is no softmax of these scores (lab models); None elsewhere.
    """

    q: Float[Tensor, "batch head query d"] | None
    k: Float[Tensor, "batch head key d"] | None
    v: Float[Tensor, "batch head key d_v"]
    scores: Float[Tensor, "batch head query key"]
    learned: Float[Tensor, " head"] | None
    bias: Float[Tensor, "head d_v"] | None
    scale: float
    softcap: float | None
    other: Float[Tensor, "batch head query key"] | None = None

    @property
    def log_sum(self) -> Float[Tensor, "batch head query"]:
        """The log of the softmax's denominator, the learned logit included."""
        return with_learned(self, self.scores.logsumexp(-1))

    @property
    def weights(self) -> Float[Tensor, "batch head query key"]:
        """The pattern."""
        if self.other is not None:
            return self.other
        return (self.scores - self.log_sum[..., None]).exp()


Edit = Callable[[int, Layer], Tensor]


@dataclass(frozen=True, eq=False)
class Written:
    """A run: every layer's attention (before any edit of it), every block's output, and the logits if asked for."""

    layers: tuple[Layer, ...]
    states: Float[Tensor, "layer batch pos d_model"]
    logits: Float[Tensor, "batch pos vocabulary"] | None


def plain(_: int, layer: Layer) -> Tensor:
    """No edit."""
    return layer.weights @ layer.v


def with_learned(layer: Layer, lse: Float[Tensor, "batch head query"]) -> Float[Tensor, "batch head query"]:
    """A log-sum-exp with the learned logit in it."""
    return lse if layer.learned is None else torch.logaddexp(lse, layer.learned[:, None].expand_as(lse))


def write_out(
    model: TransformerBridge,
    ids: Int[Tensor, "batch pos"],
    edit: Edit = plain,
    *,
    hooks: Sequence[Any] = (),
    logits: bool = False,
) -> Written:
    """Run unpadded sequences with attention written out, and an edit of it. Memory: every layer's patterns in float64.

    ``hooks``: plain hooks on the stream, run as the host runs them.
    """
    layers: list[Layer] = []
    states: list[Tensor] = []
    facts = capabilities(model)

    def keep(tensor: Tensor, hook: Any) -> None:
        states.append(tensor.detach().double().cpu())

    def attend(n: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, str]:
        groups = q.shape[1] // k.shape[1]
        q64, k64, v64 = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
        scores = capped(view.scale * q64 @ k64.mT, view.softcap)
        learned = None if view.learned is None else view.learned.double()
        layers.append(_layer(model, n, q64, k64, v64, scores, learned, view.scale, view.softcap))
        return edit(n, layers[-1]).to(q.dtype), "written out"

    ends = [(block_output(n), keep) for n in range(facts.n_layers)]
    with torch.no_grad():
        if unsupported(model):
            found = model.run_with_hooks(ids, fwd_hooks=[*hooks, *_read_and_replace(model, edit, layers), *ends])
        else:
            with switched(model, Flash(model)) as state:
                assert state is not None
                state.collect = attend
                found = model.run_with_hooks(ids, fwd_hooks=[*hooks, *ends])
    return Written(tuple(layers), torch.stack(states), found.detach() if logits else None)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """``c tanh(s / c)``."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _layer(
    model: TransformerBridge,
    n: int,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    scores: Tensor,
    learned: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Layer:
    facts = capabilities(model)
    seen = visible(scores.shape[-1], facts.causal, facts.windows[n]).to(scores.device)
    bias = value_bias(model, n, facts.n_heads)
    return Layer(
        q,
        k,
        v,
        scores.masked_fill(~seen, -torch.inf),
        learned,
        None if bias is None else bias.detach().double(),
        scale,
        softcap,
    )


def visible(length: int, causal: bool, window: int | None) -> Bool[Tensor, "query key"]:
    """Which keys a query of an unpadded sequence sees."""
    return allowed_keys(torch.ones(1, length, dtype=torch.bool), slice(0, length), causal=causal, window=window)[0]


def _read_and_replace(model: TransformerBridge, edit: Edit, layers: list[Layer]) -> list[Any]:
    """Hooks that read scores and values of the host and replace z."""
    facts = capabilities(model)
    seen: dict[str, Tensor] = {}

    def keep(point: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[point] = tensor.detach().double()

        return hook

    def take_over(n: int) -> Any:
        def hook(z: Tensor, hook: Any) -> Tensor:
            def heads(point: str) -> Tensor:
                x = seen[point]
                held = facts.n_heads if x.ndim != 4 else x.shape[1 if facts.heads_first else 2]
                x = grouped_by_head(x, held, facts.heads_first).transpose(1, 2)
                return x.repeat_interleave(facts.n_heads // x.shape[1], 1)

            learned = learned_sink_logits(model, n)
            scored = scored_points(facts.fires, facts.rope)
            q, k = (None, None) if scored is None else (heads(scored[0]), heads(scored[1]))
            if facts.scores_are_logits:
                scores = seen["hook_attn_scores"]
            else:  # the host reads patterns off behind z: GPT-Neo, whose scores have no scale
                assert q is not None
                assert k is not None
                scores = q @ k.mT
            layers.append(
                _layer(
                    model,
                    n,
                    q,
                    k,
                    heads("hook_v"),
                    scores,
                    None if learned is None else learned.detach().double(),
                    score_scale(model, n) or (model.cfg.d_head**-0.5 if facts.scores_are_logits else 1.0),
                    None,
                )
            )
            kind = kind_of(model, n, seen)
            if kind is not None:
                layers[-1] = replace(layers[-1], other=kind.pattern(layers[-1].scores))
            made = edit(n, layers[-1])
            if kind is not None:
                made = kind.output(made, layers[-1].scores)
            return made.transpose(1, 2).reshape(z.shape).to(z.dtype)

        return hook

    hooks: list[Any] = []
    for n in range(facts.n_layers):
        points = ["hook_in", "hook_q", "hook_k", "hook_v", "hook_attn_scores"]
        points += [point for point in ("hook_rot_q", "hook_rot_k") if point in facts.fires]
        hooks += [(attention_hook(n, point), keep(point)) for point in points]
        hooks.append((attention_hook(n, "hook_z"), take_over(n)))
    return hooks
