"""``decompose_sinks``: one pass for the means, one pass that takes every layer apart, then the 2x2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.anatomy import stable_rank
from sinklens.attention import attention_hook, original, output_weights, residual_multiplier, value_bias
from sinklens.components import Component, Contributions
from sinklens.console import progress_bar
from sinklens.controls import slots
from sinklens.decomposition import NUMBERS, SinkDecomposition, Subject
from sinklens.errors import BadInputError, UnsupportedModelError
from sinklens.frozen import FrozenNorm, frozen_norm
from sinklens.head_inputs import LayerInputs, points_of, read_layer
from sinklens.importance import FAR
from sinklens.key_or_value import EXACT_HEADS, SCOPES, by_head, by_layer, check_metrics, whole
from sinklens.logit_effects import LogitEffects
from sinklens.mean_inputs import MeanInputs, gather_means
from sinklens.places import Places, Sinks, find_places
from sinklens.proof import capabilities, has_hook, same_model
from sinklens.reference import DEFAULT_SEQUENCES, sinks_of
from sinklens.running import run_blocks
from sinklens.score_terms import PARAMETERS, far_queries, key_weights, query_weights, split_margin
from sinklens.selection import Layers, select
from sinklens.sinkmap import SinkMap
from sinklens.sinks import find_sinks
from sinklens.stream_parts import flat, stream_hooks
from sinklens.tokens import Tokens, as_tokens, load_tokens
from sinklens.two_by_two import Claims, TwoByTwo
from sinklens.written import numbers, off_manifold, written

POST_NORM = ("ln1_post.hook_in", "ln1_post.hook_out")


def decompose_sinks(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    sinks: Sinks | None = None,
    *,
    layers: Layers = None,
    reference: str | Sequence[str] | Tensor | Tokens | None = None,
    effects: Sequence[str] | str = ("all",),
    metrics: Sequence[str] | str | None = None,
    exact_heads: int | None = EXACT_HEADS,
    most_scored: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> SinkDecomposition:
    """Why a sink's margin is high, what it writes, and whether it acts through its key or through its value.

    Args:
        model: from :func:`sinklens.load_model`.
        tokens: the sequences; intervals need 16 documents.
        sinks: a SinkMap of these tokens, positions, or a predicate on the ids; default :func:`sinklens.find_sinks`.
        layers: which to take apart; default, for each sink, those of its life.
        reference: sequences for the mean query and key; default the other documents of ``tokens``, or 16 of python-docs
            where there is only one.
        effects: the 2x2 for "all" heads at once (with the tests of the four claims), for every "layer" by itself, for
            every "head" (on the first 128 tokens of each sequence); () for none.
        metrics: of the 2x2: "loss", "kl" (default where the model predicts a next token) or "embedding" (encoders:
            1 - cos of the mean-pooled embedding to the unedited one).
        exact_heads: with effects="head": so many heads, those with the largest first-order effect, are measured, the
            others stay estimates; None measures all.
        most_scored: score at most so many predictions per sequence.
        seed: of that draw.
        progress: show bars.

    Queries are those at least 16 tokens from the sink (on both sides in encoders) that see it and some token that is no
    sink; a sink that none sees is NaN. Keys and queries are rebuilt from the residual stream with the scales of layer
    norm and QK norm frozen, and compared with the host's scores in every layer.

    Cost: one forward per reference sequence, and one per sequence in which every layer costs about as much again per
    sink; memory: the stream's contributions, (2 L + 1) x T x d_model floats. effects="all": 6 forwards per sequence;
    "layer": 3 sweeps of half of L forwards; "head": 3 forwards and backwards and 3 x exact_heads forwards of 128
    tokens.

    Raises:
        BadInputError: no sink, sinks of other tokens, unknown effects or metrics, a loss on an encoder.
        UnsupportedModelError: queries and keys that cannot be rebuilt (MLA; the message says where they differ).
    """
    facts = capabilities(model)
    if model.cfg.dtype not in (torch.float32, torch.float64):
        raise UnsupportedModelError(
            f"{facts.model} runs in {model.cfg.dtype}: scores are rebuilt to 1e-3 of their size, which takes float32 "
            f"or float64; load_model(..., dtype=torch.float32)"
        )
    if (exact_heads is not None and exact_heads < 1) or (most_scored is not None and most_scored < 1):
        raise BadInputError("exact_heads and most_scored must be at least 1, or None for all")
    scopes = [effects] if isinstance(effects, str) else list(effects or ())
    if set(scopes) - set(SCOPES):
        raise BadInputError(f"effects must be of {', '.join(SCOPES)}, got {scopes}")
    chosen_metrics = check_metrics(model, metrics)
    batch = as_tokens(model, tokens).to("cpu")
    found: Sinks = find_sinks(model, batch, progress=progress) if sinks is None else sinks
    if isinstance(found, SinkMap) and not same_model(found.info, facts):
        raise BadInputError("the sinks were found in another model; find them again")
    places = find_places(found)
    if places.learned:
        raise BadInputError(
            "a learned sink is one constant per head: there is nothing to decompose; give its positions"
        )
    if isinstance(found, SinkMap) and found.tokens.digest != batch.digest:
        raise BadInputError("the sinks were found in other tokens; pass those, or find them again")
    chosen = select(facts, None, layers).layers
    subjects = _subjects(places, batch, facts.n_layers)
    if not subjects:
        raise BadInputError("none of these sequences holds such a sink")
    own = reference is None and len(set(batch.documents)) > 1
    if own and places.tokens is None:  # known sequences, so that means leave out the document itself
        everywhere = tuple(e for b in range(len(batch)) for e in slots(places, batch, b))
        places = Places(tokens=batch, entries=everywhere, others=tuple((e.sequence, e.position) for e in everywhere))
    where, apart = _ordinary(model, batch, places, own=own, reference=reference)
    means = gather_means(model, where, apart, progress=progress)
    notes = [] if own else [f"mean queries and keys come from {where.info.get('source', 'reference=')}"]
    reading = _Reading(model, batch, subjects, chosen, means, everywhere=layers is not None)
    with progress_bar("decomposition", len(batch), progress) as advance:
        for b in range(len(batch)):
            reading.run(b, _apart(places, batch, b))
            advance()
    squares: dict[str, TwoByTwo] = {}
    claims: Claims | None = None
    values = reading.finish()
    if scopes:
        known = found if isinstance(found, SinkMap) and found.method == "attention" else None
        square, changes, more = whole(
            model, batch, places, known, chosen_metrics, reference, most_scored, seed, progress
        )
        squares["all"] = square
        claims = _claims(chosen_metrics[0], changes, values, subjects, chosen, batch, more)
    if "layer" in scopes:
        squares["layer"] = by_layer(model, batch, places, chosen_metrics, most_scored, seed, progress)
    if "head" in scopes:
        squares["head"] = by_head(model, batch, places, chosen_metrics, exact_heads, most_scored, seed, progress)
    return SinkDecomposition(
        subjects=tuple(subjects),
        layers=chosen,
        values=values,
        key_side=reading.key_side,
        rest_side=reading.rest_side,
        query_side=reading.query_side,
        components=tuple(reading.components),
        effects=squares,
        claims=claims,
        tokens=batch,
        notes=tuple([*notes, *reading.notes, *(claims.notes if claims else ())]),
        info={
            "model": facts.model,
            "sinklens": version("sinklens"),
            "seed": seed,
            "reference": where.info.get("source", "given"),
            "capabilities": asdict(facts),
        },
    )


def _ordinary(
    model: TransformerBridge, batch: Tokens, places: Places, *, own: bool, reference: Any
) -> tuple[Tokens, list[list[int]]]:
    """The sequences over which queries and keys are averaged, and the sinks to leave out of each."""
    if own:
        return batch, [_apart(places, batch, b) for b in range(len(batch))]
    if reference is None:
        context = capabilities(model).context
        length = 512 if context is None else min(512, context)
        reference = load_tokens(model, "python-docs", n_seqs=DEFAULT_SEQUENCES, seq_len=length)
    where = as_tokens(model, reference).to("cpu")
    if places.tokens is None:
        return where, [_apart(places, where, b) for b in range(len(where))]
    found = sinks_of(model, where)
    return where, [[p for s, p in found.places or () if s == b] for b in range(len(where))]


def _apart(places: Places, tokens: Tokens, sequence: int) -> list[int]:
    """Every position of a sequence that is a sink, or is treated as one: what "the rest" leaves out."""
    if places.tokens is not None and places.tokens.digest == tokens.digest:
        known = {p for b, p in places.others if b == sequence}
    else:
        known = set()
    length = int(tokens.lengths[sequence])
    if places.predicate is None and places.tokens is None:
        return sorted({p for p in places.positions if p < length})
    return sorted(known | {e.position for e in slots(places, tokens, sequence)})


def _subjects(places: Places, tokens: Tokens, n_layers: int) -> list[Subject]:
    found = []
    for b in range(len(tokens)):
        for entry in slots(places, tokens, b):
            alive = tuple(range(n_layers)) if entry.layers is None else tuple(sorted(entry.layers))
            kind = entry.group if places.tokens is not None else "chosen" if places.predicate else entry.group
            label = tokens.labels[b][entry.position]
            found.append(Subject(b, entry.position, label, kind, tokens.documents[b], alive))
    return found


def _claims(
    metric: str,
    changes: dict[str, Tensor],
    values: Float[Tensor, "sink layer head number"],
    subjects: Sequence[Subject],
    layers: Sequence[int],
    tokens: Tokens,
    notes: Sequence[str],
) -> Claims:
    """The tests of the four claims: three edits, and the bilinear terms at the layers of each sink's life."""
    with_parameters = [NUMBERS.index(name) for name in PARAMETERS[1:]]
    parameters, gaps = [], []
    for s, subject in enumerate(subjects):
        alive = [n for n, layer in enumerate(layers) if layer in subject.layers]
        parameters.append(values[s, alive][..., with_parameters].double().sum(-1).nanmean())
        gaps.append(values[s, alive][..., NUMBERS.index("gap")].double().nanmean())
    return Claims(
        metric,
        {label: change.double() for label, change in changes.items()},
        torch.stack(parameters),
        torch.stack(gaps),
        tokens.documents,
        tuple(s.document for s in subjects),
        tuple(notes),
    )


@dataclass(eq=False)
class _Held:
    """What one sink's row of one layer needs again at the end: what it writes, and how lengths are taken there."""

    sink: int
    layer: int
    value: Float[Tensor, "head d_v"]


class _Reading:
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
        self.values = torch.full((*shape, len(NUMBERS)), math.nan)
        self.wide = 2 * self.facts.n_layers + 4
        self._sides = [torch.full((*shape, self.wide), math.nan) for _ in range(3)]
        self.components: list[Component] = []
        self.notes: list[str] = []
        self.held: list[_Held] = []
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
                self.held.append(_Held(s, layer, writes.values[:, index].cpu()))
            for name, value in found.items():
                if name in NUMBERS:
                    self.values[s, n, :, NUMBERS.index(name)] = value.float().cpu()
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
            self._sides[side][s, n, :, : parts.shape[0]] = amounts.float().cpu()
            self._sides[side][s, n, :, -1] = (weights * projected.bias).sum((1, 2)).float().cpu()

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
        by_layer: dict[int, list[_Held]] = {}
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
