"""The pass of ``decompose_sinks`` over one sequence after the other: a layer is taken apart when its block is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.importance import FAR
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, original, output_weights, residual_multiplier, value_bias
from sinklens.bridge.capabilities import capabilities, has_hook
from sinklens.decompose.direct_logit_effects import LogitEffects
from sinklens.decompose.margin import far_queries, key_weights, query_weights, split_margin
from sinklens.decompose.mean_queries_keys import MeanInputs
from sinklens.decompose.ov_writes import direction, numbers, off_manifold, written
from sinklens.decompose.queries_keys import LayerInputs, points_of, read_layer
from sinklens.decompose.result import NUMBERS, Subject
from sinklens.find.anatomy import stable_rank
from sinklens.inputs.tokens import Tokens
from sinklens.residual.components import Component, Contributions
from sinklens.residual.contributions import flat, stream_hooks
from sinklens.residual.linear_maps import FrozenNorm, frozen_norm

POST_NORM = ("ln1_post.hook_in", "ln1_post.hook_out")


@dataclass(eq=False)
class Held:
    """What one sink's row of one layer needs again at the end: what it writes, and how lengths are taken there."""

    sink: int
    layer: int
    value: Float[Tensor, "head d_v"]


class Reading:
    """The pass that takes layers apart, sequence by sequence."""

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Tokens,
        subjects: Sequence[Subject],
        layers: Sequence[int],
        means: MeanInputs,
        *,
        everywhere: bool,
    ) -> None:
        self.everywhere = everywhere
        self.model, self.tokens, self.subjects, self.layers, self.means = model, tokens, subjects, tuple(layers), means
        self.facts = capabilities(model)
        shape = (len(subjects), len(layers), self.facts.n_heads)
        exact = torch.float64 if model.cfg.dtype == torch.float64 else torch.float32
        self.values = torch.full((*shape, len(NUMBERS)), math.nan, dtype=exact)
        self.wide = 2 * self.facts.n_layers + 4
        self._sides = [torch.full((*shape, self.wide), math.nan, dtype=exact) for _ in range(3)]
        self.components: list[Component] = []
        self.notes: list[str] = []
        self.held: list[Held] = []
        self.weights: dict[int, tuple[Tensor, Tensor] | None] = {}
        self.points = points_of(model)
        self.logits = LogitEffects(model, self.facts)

    @property
    def key_side(self) -> Tensor:
        """The raw gap by component: what stands in the sink's own key."""
        return self._trimmed(0)

    @property
    def rest_side(self) -> Tensor:
        """Minus what stands in the keys of the rest."""
        return self._trimmed(1)

    @property
    def query_side(self) -> Tensor:
        """The raw gap by component of the queries."""
        return self._trimmed(2)

    def _trimmed(self, side: int) -> Tensor:
        kept = self._sides[side]
        return torch.cat([kept[..., : len(self.components)], kept[..., -1:]], -1)

    def run(self, sequence: int, apart: Sequence[int]) -> None:
        """One forward; each layer is taken apart as soon as its block is complete."""
        mine = [i for i, s in enumerate(self.subjects) if s.sequence == sequence]
        if not mine:
            return
        one = self.tokens[sequence].trim().to(str(self.model.cfg.device))
        length = int(one.lengths[0])
        rest = torch.ones(length, dtype=torch.bool, device=one.ids.device)
        rest[list(apart)] = False
        contributions = Contributions(self.model)
        seen: dict[str, Tensor] = {}
        mean_q, mean_k = self.means.without(self.tokens, sequence)
        self.logits.begin(one)

        def keep(name: str) -> Any:
            def hook(tensor: Tensor, hook: Any) -> None:
                seen[name] = tensor.detach()

            return hook

        def before(layer: int, x: Tensor) -> None:
            wanted = [s for s in mine if self._wants(s, layer)]
            if wanted:
                self._layer(layer, wanted, apart, rest, seen | {"resid_pre": x}, contributions, mean_q, mean_k)
            seen.clear()

        hooks: list[Any] = []
        for layer in range(self.facts.n_layers):
            if any(self._wants(s, layer) for s in mine):
                hooks += [(attention_hook(layer, p), keep(p)) for p in self.points]
                hooks += [(f"blocks.{layer}.{p}", keep(p)) for p in POST_NORM if has_hook(self.model, "blocks.0." + p)]
        hooks += stream_hooks(self.model, length, contributions, before)
        hooks += self.logits.hooks()
        run_blocks(self.model, one.ids, hooks, until=self.logits.until)
        self.logits.end(self.values)
        if len(contributions.names) > len(self.components):
            self.components = list(contributions.names)

    def _wants(self, s: int, layer: int) -> bool:
        return layer in self.layers and (self.everywhere or layer in self.subjects[s].layers)

    def _layer(
        self,
        layer: int,
        mine: Sequence[int],
        apart: Sequence[int],
        rest: Bool[Tensor, " pos"],
        seen: dict[str, Tensor],
        contributions: Contributions,
        mean_q: Float[Tensor, "layer head d"],
        mean_k: Float[Tensor, "layer head d"],
    ) -> None:
        inputs = read_layer(self.model, layer, seen, rest)
        scores = inputs.scores
        bias = value_bias(self.model, layer, self.facts.n_heads)
        writes = written(scores, apart, None if bias is None else bias.detach())
        weights = self._output(layer, scores.v)
        parts = contributions.stack().to(scores.v)
        norm = self._post_norm(layer, seen, scores.length)
        living = [list(apart).index(self.subjects[s].position) for s in mine if layer in self.subjects[s].layers]
        beyond = off_manifold(writes, living, None if bias is None else bias.detach())
        shared: dict[str, Tensor] = {}
        if weights is not None:
            after_first = writes.output[:, 1:]
            shared["stable_rank"] = stable_rank(after_first, weights[0])
            shared["direction"] = direction(writes, weights[1])
        n = self.layers.index(layer)
        for s in mine:
            sink = self.subjects[s].position
            queries = far_queries(scores, sink, FAR)
            if not len(queries):
                continue
            split = split_margin(scores, sink, queries, mean_q[layer].to(scores.v), mean_k[layer].to(scores.v))
            found = split.means | shared
            if living:
                found["off_manifold"] = beyond[:, queries].mean(-1)
            index = list(apart).index(sink)
            if weights is not None:
                found |= numbers(scores, writes, weights[1], bias, sink, index, queries)
                attention = writes.attention[:, queries, index]
                vectors = torch.einsum("hd,hdm->hm", writes.values[:, index], weights[0])
                vectors = vectors * residual_multiplier(self.model)
                found["residual_share"] = _residual_share(attention, vectors, norm, seen["resid_pre"], queries)
                self.logits.keep(s, n, layer, attention, vectors, norm, queries)
                self.held.append(Held(s, layer, writes.values[:, index].cpu()))
            for name, value in found.items():
                if name in NUMBERS:
                    self.values[s, n, :, NUMBERS.index(name)] = value.to(self.values)
            self._components(s, n, sink, queries, inputs, parts)

    def _components(
        self, s: int, n: int, sink: int, queries: Tensor, inputs: LayerInputs, parts: Float[Tensor, "c pos d_model"]
    ) -> None:
        """The raw gap by what stands in the sink's key, in the other keys (with a minus), and in the queries."""
        scores = inputs.scores
        keys = key_weights(scores, sink, queries, scores.q.whole)
        own = torch.zeros_like(keys)
        own[:, sink] = keys[:, sink]
        pairs = ((own, inputs.key), (keys - own, inputs.key), (query_weights(scores, sink, queries), inputs.query))
        for side, (weights, projected) in enumerate(pairs):
            gradient = projected.back(weights)
            amounts = torch.einsum("ctd,htd->hc", parts, gradient)
            self._sides[side][s, n, :, : parts.shape[0]] = amounts.to(self.values)
            self._sides[side][s, n, :, -1] = (weights * projected.bias).sum((1, 2)).to(self.values)

    def _output(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """W_O by head and its Gram matrix."""
        if layer not in self.weights:
            found = output_weights(self.model, layer)
            w_o = None if found is None else found.detach().to(like)
            self.weights[layer] = None if w_o is None else (w_o, w_o @ w_o.mT)
        return self.weights[layer]

    def _post_norm(self, layer: int, seen: dict[str, Tensor], length: int) -> FrozenNorm | None:
        """The norm between a layer's attention and the stream, where there is one (Gemma 2 and 3, OLMo 2)."""
        if "ln1_post.hook_in" not in seen:
            return None
        block: Any = self.model.blocks[layer]
        x, y = (flat(seen[f"ln1_post.hook_{end}"], length) for end in ("in", "out"))
        return frozen_norm(original(block.ln1_post), x, y)

    def finish(self) -> Float[Tensor, "sink layer head number"]:
        """The numbers, with ``same_elsewhere`` filled in: it needs all sinks."""
        at = NUMBERS.index("same_elsewhere")
        by_layer: dict[int, list[Held]] = {}
        for held in self.held:
            if held.layer in self.subjects[held.sink].layers:
                by_layer.setdefault(held.layer, []).append(held)
        for layer, rows in by_layer.items():
            weights = self.weights[layer]
            assert weights is not None
            gram = weights[1].float().cpu()
            for held in rows:
                me = self.subjects[held.sink]
                others = [
                    o.value
                    for o in rows
                    if self.subjects[o.sink].kind == me.kind and self.subjects[o.sink].document != me.document
                ]
                if others:
                    mean = torch.stack(others).mean(0)
                    dot, own, other = (
                        torch.einsum("hd,hde,he->h", a.float(), gram, b.float())
                        for a, b in ((held.value, mean), (held.value, held.value), (mean, mean))
                    )
                    self.values[held.sink, self.layers.index(layer), :, at] = dot / (own * other).sqrt().clamp(
                        min=1e-30
                    )
        return self.values


def _residual_share(
    attention: Float[Tensor, "head query"],
    vectors: Float[Tensor, "head d_model"],
    norm: FrozenNorm | None,
    x: Float[Tensor, "pos d_model"],
    queries: Tensor,
) -> Float[Tensor, " head"]:
    """Mean length of what all heads together add to the stream from the sink, over the stream's; one number."""
    added = attention.mT @ vectors
    if norm is not None:
        added = norm.at(queries).linear(added)
    share = (added.norm(dim=-1) / x[queries].norm(dim=-1).clamp(min=1e-30)).mean()
    return share.expand(attention.shape[0])
