"""``attention_statistics``: what every query of every head does with some sinks, without storing a pattern.

====================  ================================================================================================
``mass``              ``sigma_i = sum_{k in S} A_ik``
``margin``            ``m_i = lse_S - lse_R``, the log-odds of the mass; R holds a learned logit, where there is one
``free_margin``       per sink k, competitor-free: mean over queries ``i >= k + 16`` of ``log p_ik - log sum_{j in no
                      sink} p_ij`` (a learned logit is no token, so it is not in the sum)
``entropy``           ``- sum_k A_ik log A_ik`` in nats, over the keys
``value_norm``        ``|v_k - b_V|`` per KV head
====================  ================================================================================================

Source: docs/definitions.md, section 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.backend import Backend
from sinklens.attention.flash import flash
from sinklens.attention.importance import FAR
from sinklens.attention.kernels import Block, View, blocked, dense_scores, fused, fused_takes, grouped, without
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, grouped_by_head, learned_sink_logits, value_bias
from sinklens.bridge.capabilities import Capabilities, capabilities
from sinklens.bridge.requirements import refuse_unless_softmax
from sinklens.core.errors import BadInputError, UnsupportedModelError
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public, public_methods
from sinklens.find.flash_scores import choose_backend
from sinklens.find.locations import Places, Sinks, find_places
from sinklens.forward.follow import Forward
from sinklens.inputs.load import as_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@public_methods
@dataclass(frozen=True, eq=False)
class AttentionStatistics(ShownInJupyter):
    """What heads do with some sinks, query by query; positions count from each sequence's first unpadded token.

    Attributes:
        mass: sigma of S; 0 where S is not visible, NaN beyond a sequence's end.
        margin: in nats; +inf where nothing but S is visible, -inf where S is not.
        free_margin: per sink, in the order of ``sinks`` of the sequence; NaN without a query that far away.
        value_norm: per KV head.
        entropy: in nats, or None where it was not asked for.
        sinks: S of each sequence.
        tokens, info: what was measured, and how.
    """

    mass: Float[Tensor, "batch layer head pos"]
    margin: Float[Tensor, "batch layer head pos"]
    free_margin: Float[Tensor, "batch layer head sink"]
    value_norm: Float[Tensor, "batch layer kv_head pos"]
    entropy: Float[Tensor, "batch layer head pos"] | None
    sinks: tuple[tuple[int, ...], ...]
    tokens: Tokens
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        layers, heads = self.mass.shape[1:3]
        return f"AttentionStatistics of {len(self.tokens)} sequence(s), {layers} layers x {heads} heads, {self.sinks=}"

    def to_dataframe(self) -> pd.DataFrame:
        """Per (sequence, layer, head): means over the queries that see both S and something else."""
        both = self.margin.isfinite()
        count = both.sum(-1)
        table: dict[str, Tensor] = {
            "mass": torch.where(both, self.mass, 0).sum(-1) / count,
            "margin": torch.where(both, self.margin, 0).sum(-1) / count,
            "free_margin": self.free_margin.nanmean(-1),
        }
        if self.entropy is not None:
            table["entropy"] = self.entropy.nanmean(-1)
        index = pd.MultiIndex.from_product([range(n) for n in self.mass.shape[:3]], names=["sequence", "layer", "head"])
        frame = pd.DataFrame({name: values.flatten().tolist() for name, values in table.items()}, index=index)
        return frame.reset_index()

    def plot(self) -> Figure:
        """Layer x head heat map of the mean mass of S; hover shows margin and competitor-free margin."""
        from sinklens.heads.figures import statistics_map  # plotly is slow to load

        return statistics_map(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        names = ("mass", "margin", "free_margin", "value_norm", "entropy")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {"tokens": self.tokens.meta(), "info": self.info, "sinks": self.sinks}
        return save_tensors(path, "AttentionStatistics", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionStatistics:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "AttentionStatistics")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        own = {n: t for n, t in tensors.items() if not n.startswith("tokens.")}
        sinks = tuple(tuple(row) for row in meta["sinks"])
        tokens = Tokens.from_parts(batch, meta["tokens"])
        return cls(**{"entropy": None, **own}, sinks=sinks, tokens=tokens, info=meta["info"])


@public
def attention_statistics(
    model: TransformerBridge,
    tokens: str | Sequence[str] | Tensor | Tokens,
    sinks: Sinks,
    *,
    entropy: bool = False,
    backend: Backend = "auto",
    progress: bool | None = None,
) -> AttentionStatistics:
    """Mass, margins, value norms and (on request) entropy of every query in every head.

    Args:
        model, tokens: as everywhere.
        sinks: S: a SinkMap of these tokens (all its sinks, in every layer), positions, or a predicate on the ids.
        entropy: of every query, over its keys.
        backend: "flash" needs O(T) memory; "hooks" reads scores; "auto" takes flash where the proof allows it.
        progress: show a bar.

    Cost: one forward without the unembedding; entropy doubles the attention. Memory: ``batch x layers x heads x T``
    numbers per statistic, on the CPU.

    Raises:
        BadInputError: no sink, or one beyond a sequence's end.
    """
    batch = as_tokens(model, tokens).to("cpu")
    facts = capabilities(model)
    refuse_unless_softmax(model, "the margin")
    places = find_places(sinks)
    if places.learned or places.recent:
        raise BadInputError("attention_statistics is about tokens; sink_scores has a learned sink's mass")
    if places.tokens is not None and places.tokens.digest != batch.digest:
        raise BadInputError("this SinkMap belongs to other tokens; find sinks on these")
    way = choose_backend(model, backend)
    found: list[list[_Layer]] = []
    chosen: list[tuple[int, ...]] = []
    with progress_bar("attention statistics", len(batch) * facts.n_layers, progress) as advance:
        for b in range(len(batch)):
            one = batch[b].trim().to(str(model.cfg.device))
            where = _positions(model, places, batch, b)
            chosen.append(where)
            found.append(_one(model, facts, one, where, entropy, way, advance))
    longest, most = int(batch.lengths.max()), max(len(row) for row in chosen)

    def stacked(name: str, width: int) -> Tensor:
        rows = [torch.stack([getattr(layer, name) for layer in layers]) for layers in found]
        return torch.stack([torch.nn.functional.pad(r, (0, width - r.shape[-1]), value=torch.nan) for r in rows])

    return AttentionStatistics(
        mass=stacked("mass", longest),
        margin=stacked("margin", longest),
        free_margin=stacked("free_margin", most),
        value_norm=stacked("value_norm", longest),
        entropy=stacked("entropy", longest) if entropy else None,
        sinks=tuple(chosen),
        tokens=batch,
        info={"capabilities": asdict(facts), "dtype": str(model.cfg.dtype), "backend": way},
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer of one sequence, on the CPU."""

    mass: Float[Tensor, "head pos"]
    margin: Float[Tensor, "head pos"]
    free_margin: Float[Tensor, "head sink"]
    value_norm: Float[Tensor, "kv_head pos"]
    entropy: Float[Tensor, "head pos"] | None


def _positions(model: TransformerBridge, places: Places, batch: Tokens, b: int) -> tuple[int, ...]:
    """The sinks of one sequence."""
    if places.tokens is not None:
        found = tuple(sorted({e.position for e in places.entries if e.sequence == b}))
    elif places.predicate is not None:
        forward = Forward(model)
        forward.ids = batch[b].trim().ids
        found = tuple(places.columns(forward, 0)[0].nonzero().flatten().tolist())
    else:
        found = places.positions
    length = int(batch.lengths[b])
    if any(p >= length for p in found):
        raise BadInputError(f"position {max(found)} is out of range: sequence {b} has {length} tokens")
    return found


def _one(
    model: TransformerBridge,
    facts: Capabilities,
    one: Tokens,
    where: tuple[int, ...],
    entropy: bool,
    way: str,
    advance: Callable[[], None],
) -> list[_Layer]:
    """All layers of one unpadded sequence."""
    layers: list[_Layer] = []
    columns = torch.tensor(where, dtype=torch.long, device=one.ids.device)
    distance = torch.arange(one.ids.shape[1], device=one.ids.device)[:, None] - columns

    def finish(layer: int, own: Tensor, rest: Tensor, learned: Tensor | None, v: Tensor, h: Tensor | None) -> None:
        """From log-odds: ``own`` of each sink [head, query, sink], ``rest`` of all other keys [head, query]."""
        lse = own.logsumexp(-1) if len(where) else torch.full_like(rest, -torch.inf)
        full = rest if learned is None else torch.logaddexp(rest, learned)
        margin = lse - full
        free = own - rest[..., None]
        usable = (distance >= FAR) & (free > -torch.inf) & (rest[..., None] > -torch.inf)
        mean = torch.where(usable, free, 0).sum(1) / usable.sum(1)
        bias = value_bias(model, layer, facts.n_heads)
        if bias is not None:
            v = v - bias.view(v.shape[0], -1, bias.shape[-1])[:, :1].to(v)  # of the query heads that share a KV head
        if margin.isnan().any():
            raise UnsupportedModelError(f"{facts.model}: attention in layer {layer} is NaN on these tokens")
        kept = (margin.sigmoid(), margin, mean, v.float().norm(dim=-1), h)
        layers.append(_Layer(*(None if t is None else t.float().cpu() for t in kept)))  # type: ignore[arg-type]
        advance()

    if way == "flash":
        _by_flash(model, one, columns, entropy, finish)
    else:
        _by_hooks(model, facts, one, columns, entropy, finish)
    return layers


def _by_flash(
    model: TransformerBridge, one: Tokens, columns: Tensor, entropy: bool, finish: Callable[..., None]
) -> None:
    gone = torch.zeros(1, 1, one.ids.shape[1], dtype=torch.bool, device=columns.device)
    gone[..., columns] = True

    def collect(layer: int, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, str]:
        rest = without(q, k, v, view, gone)[1][0].float()
        h = grouped(q, k.shape[1])[..., 0].float() * 0 if entropy else None

        def look(chunk: slice, block: Block, pattern: Tensor) -> None:
            if h is not None:
                h[chunk, :, block.rows] = torch.special.entr(pattern).sum(-1)

        if h is None and fused_takes(q, k, v, view):
            out, path = fused(q, k, v, view)[0], "fused"
        else:
            out, path = blocked(q, k, v, view, visit=look)[0], "blocked"
        scores = dense_scores(q, k.index_select(2, columns), view)[0]
        distance = torch.arange(q.shape[2], device=q.device)[:, None] - columns
        if view.causal:
            scores.masked_fill_(distance < 0, -torch.inf)
        if view.window is not None:
            scores.masked_fill_(distance.abs() >= view.window, -torch.inf)
        learned = None if view.learned is None else view.learned.float()[:, None].expand_as(rest)
        finish(layer, scores, rest, learned, v[0], None if h is None else h.flatten(0, 1))
        return out, path

    with flash(model) as state:
        state.collect = collect
        run_blocks(model, one.ids, [], flashing=True)


def _by_hooks(
    model: TransformerBridge,
    facts: Capabilities,
    one: Tokens,
    columns: Tensor,
    entropy: bool,
    finish: Callable[..., None],
) -> None:
    others = torch.ones(one.ids.shape[1], dtype=torch.bool, device=columns.device)
    others[columns] = False
    values: list[Tensor] = []
    shown: list[Tensor] = []
    hooks: list[Any] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        values.append(grouped_by_head(tensor, facts.n_kv_heads, facts.heads_first)[0].transpose(0, 1))

    def keep_scores(scores: Tensor, hook: Any) -> None:
        shown.append(scores[0].masked_fill(scores[0] < torch.finfo(scores.dtype).min / 2, -torch.inf))

    for layer in range(facts.n_layers):

        def look(pattern: Tensor, hook: Any, layer: int = layer) -> None:
            h = torch.special.entr(pattern[0].float()).sum(-1) if entropy else None
            scores = shown.pop().float() if facts.scores_are_logits else pattern[0].float().log()
            rest = scores[..., others].logsumexp(-1)
            logit = learned_sink_logits(model, layer)
            learned = None if logit is None else logit.float()[:, None].expand_as(rest)
            finish(layer, scores[..., columns], rest, learned, values.pop(), h)

        hooks.append((attention_hook(layer, "hook_v"), keep))
        if facts.scores_are_logits:
            hooks.append((attention_hook(layer, "hook_attn_scores"), keep_scores))
        hooks.append((attention_hook(layer, "hook_pattern"), look))
    run_blocks(model, one.ids, hooks)
