"""``sink_anatomy``: what a sink looks like from inside, layer by layer and head by head.

Every ratio compares the sink with the sequence's tokens that are no sink. Queries are those at least 16 tokens away.

====================  ==============================================================================================
``residual_ratio``    ``|x_k|`` over the median ``|x_j|``, x = resid_pre
``max_ratio``         largest ``|x_k|`` entry over the median entry of the same hidden state
``massive_dims``      dimensions with ratio > 100; ``strict``: > 100 and > 1000 x median too (Sun et al. 2024)
``cosine_raw``        ``cos(x_k, x_P)``; ``cosine_centred``: both minus mu, the mean over tokens below 3 medians
``mass``              mean over heads of far importance beta
``margin``            competitor-free: mean over queries of ``log p_k - log sum of p_j over tokens that are no sink``
``k_ratio``           ``|k|``; ``v_ratio``: ``|v - b_V|``; ``ov_ratio``: ``|(v - b_V) W_O|``, each over the median
``qk``                mean ``q.k`` after RoPE (unscaled) = mean of ``|q| |k| cos``; ``q_norm``, ``k_norm``, ``cosine``
                      are the means of its factors; ``other_*`` the same over keys that are no sink (Gu et al. 2025)
====================  ==============================================================================================

Sources: norms of residual, key and value and the split of ``q.k``: Gu et al. 2025, section 3.1; massive activations:
Sun et al. 2024; what a value writes through W_O: Kobayashi et al. 2020; the margin: docs/definitions.md, section 1.

A head's **class** (thresholds of arXiv 2606.08105): a sink *event* is one column that at least 90 % of the queries
after the first give at least 0.5; then NOP if ``|u_s| / mean |u_j| <= 0.2`` (``u = (v - b_V) W_O``), broadcast if the
ratio is at least 0.5 and the stable rank ``|O|_F^2 / |O|_2^2`` of the head's output ``O = (Z - b_V) W_O`` over the
queries after the first is at most 1.5, else mixed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.importance import FAR, MIN_FAR_QUERIES
from sinklens.attention.run import run_blocks
from sinklens.bridge.adapters import attention_hook, block_input, by_head, output_weights, scored_points, value_bias
from sinklens.bridge.capabilities import Capabilities, capabilities, same_model
from sinklens.bridge.requirements import refuse_unless_softmax
from sinklens.core.errors import BadInputError
from sinklens.core.storage import atomic_path
from sinklens.core.validation import public, public_methods
from sinklens.core.visibility import allowed_keys
from sinklens.find.sinkmap import Sink, SinkMap
from sinklens.forward.states import typical_mean
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter
from sinklens.show.progress import progress_bar

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

EVENT_ATTENTION = 0.5
EVENT_SHARE = 0.9
NOP_RATIO = 0.2
BROADCAST_RATIO = 0.5
BROADCAST_RANK = 1.5


@public_methods
@dataclass(frozen=True, eq=False)
class Anatomy(ShownInJupyter):
    """Tables of a sink map's insides; columns as the module's text defines them.

    Attributes:
        layers: one row per (sink, layer).
        heads: one row per (sink, layer, head).
        use: one row per (sequence, layer, head): which sink the head uses, and the head's class.
        notes: quantities that this architecture does not show.
    """

    layers: pd.DataFrame
    heads: pd.DataFrame
    use: pd.DataFrame
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Anatomy: {len(self.layers)} rows per sink and layer, {len(self.heads)} per sink, layer and head"

    def to_dataframe(self) -> pd.DataFrame:
        """The table per (sink, layer)."""
        return self.layers

    def head_classes(self) -> pd.DataFrame:
        """Layer x head: the commonest class over sequences, the commonest sink kind, and in how many sequences."""
        rows = []
        for place, group in self.use.groupby(["layer", "head"]):
            layer, head = place if isinstance(place, tuple) else (place, 0)
            classes, kinds = group["class"].value_counts(), group["kind"].value_counts()
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "class": classes.index[0],
                    "sequences": int(classes.iloc[0]),
                    "of": len(group),
                    "kind": kinds.index[0],
                    "beta": group.beta.mean(),
                    "value_ratio": group.value_ratio.mean(),
                    "stable_rank": group.stable_rank.mean(),
                }
            )
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Residual norm, mass, margin and value ratio of each sink over the layers."""
        from sinklens.find.anatomy_figures import anatomy_curves  # plotly is slow to load

        return anatomy_curves(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``layers.parquet``, ``heads.parquet`` and ``use.parquet`` into a folder, each whole or not at all."""
        for name in ("layers", "heads", "use"):
            with atomic_path(Path(folder) / f"{name}.parquet") as partial:
                getattr(self, name).to_parquet(partial, index=False)
        return Path(folder)


@public
def sink_anatomy(model: TransformerBridge, sinks: SinkMap, *, progress: bool | None = None) -> Anatomy:
    """Describe every sink of a map per layer and head, and classify the heads.

    Cost: one forward per sequence; nothing larger than one layer's pattern is held.

    Raises:
        BadInputError: the map belongs to another model.
    """
    facts = capabilities(model)
    refuse_unless_softmax(model, "the anatomy of a sink")
    if not same_model(sinks.info, facts):
        found_in = sinks.info["capabilities"]["model"]
        raise BadInputError(f"the sinks were found in another model ({found_in}) than {facts.model}; find them again")
    layers: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    use: list[dict[str, Any]] = []
    with progress_bar("sink anatomy", len(sinks.tokens), progress) as advance:
        for sequence in range(len(sinks.tokens)):
            found = [sink for sink in sinks if sink.sequence == sequence]
            subject = _Subject(model, facts, sinks, sequence, found)
            subject.run()
            layers += subject.layers
            heads += subject.heads
            use += subject.use
            advance()
    notes = []
    if scored_points(facts.fires, facts.rope) is None:
        notes.append(f"{facts.architecture}: the host shows q and k only before RoPE; cosine and qk are NaN")
    if output_weights(model, 0) is None:
        notes.append(
            f"{facts.architecture}: the host does not show W_O by head; ov_ratio, value_ratio and class are NaN"
        )
    return Anatomy(pd.DataFrame(layers), pd.DataFrame(heads), pd.DataFrame(use), tuple(notes))


def far_mean(attention: Float[Tensor, "*head query"]) -> Float[Tensor, "*head"]:
    """The mean over far queries, NaN with fewer than 32 of them."""
    enough = attention.shape[-1] >= MIN_FAR_QUERIES
    return attention.mean(-1) if enough else attention.new_full(attention.shape[:-1], torch.nan)


def competitor_free_margin(
    pattern: Float[Tensor, "head query key"], sink: int, no_sink: Bool[Tensor, " key"], queries: Bool[Tensor, " query"]
) -> Float[Tensor, " head"]:
    """Mean over queries of ``log p_k - log sum_{j in no sink} p_j``, both summed directly; NaN without queries."""
    rest = pattern[:, :, no_sink].sum(-1)
    margin = pattern[:, :, sink].log() - rest.log()
    return margin[:, queries].mean(-1)


def stable_rank(output: Float[Tensor, "head query d_head"], w_o: Float[Tensor, "head d_head d_model"]) -> Tensor:
    """``|O|_F^2 / |O|_2^2`` of ``O = output @ W_O`` per head, through the small Gram matrix."""
    root = torch.linalg.cholesky_ex(
        w_o.double() @ w_o.double().mT + 1e-12 * torch.eye(w_o.shape[1], dtype=torch.float64, device=w_o.device)
    ).L
    written = output.double() @ root
    energies = torch.linalg.eigvalsh(written.mT @ written)  # squared singular values, ascending
    return energies.sum(-1) / energies[:, -1]


def head_class(event_share: float, value_ratio: float, rank: float) -> str:
    """``none`` without a sink event, else ``nop``, ``broadcast`` or ``mixed``."""
    if not event_share >= EVENT_SHARE:  # also NaN
        return "none"
    if value_ratio <= NOP_RATIO:
        return "nop"
    return "broadcast" if value_ratio >= BROADCAST_RATIO and rank <= BROADCAST_RANK else "mixed"


class _Subject:
    """One sequence under examination: hooks that reduce what they see to table rows."""

    def __init__(
        self, model: TransformerBridge, facts: Capabilities, sinks: SinkMap, sequence: int, found: Sequence[Sink]
    ) -> None:
        self.model, self.facts, self.sinks, self.sequence, self.found = model, facts, sinks, sequence, found
        self.one: Tokens = sinks.tokens[sequence].trim().to(str(model.cfg.device))
        self.length = int(self.one.lengths[0])
        self.no_sink = torch.ones(self.length, dtype=torch.bool, device=self.one.ids.device)
        self.no_sink[[p for b, p in sinks.places or () if b == sequence]] = False
        position = torch.arange(self.length, device=self.one.ids.device)
        self.far = (position[:, None] - position).abs() >= FAR
        self.scored = scored_points(facts.fires, facts.rope)
        self.seen: dict[str, Tensor] = {}
        self.layers: list[dict[str, Any]] = []
        self.heads: list[dict[str, Any]] = []
        self.use: list[dict[str, Any]] = []

    def run(self) -> None:
        """One forward; each layer is described as soon as its attention is complete."""
        points = {"hook_pattern", "hook_v", "hook_z", *(self.scored or ("hook_q", "hook_k"))}
        hooks: list[Any] = []
        for layer in range(self.facts.n_layers):
            hooks.append((block_input(layer), self._keep("resid_pre")))
            hooks += [(attention_hook(layer, point), self._keep(point)) for point in sorted(points)]
            hooks.append((f"blocks.{layer}.hook_out", self._describe(layer)))
        run_blocks(self.model, self.one.ids, hooks)

    def _keep(self, name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            self.seen[name] = tensor.detach()

        return hook

    def _describe(self, layer: int) -> Any:
        def hook(_: Tensor, hook: Any) -> None:
            self._residual(layer)
            self._attention(layer)
            self.seen.clear()

        return hook

    def _label(self, sink: Sink, layer: int) -> dict[str, Any]:
        return {
            "sequence": sink.sequence,
            "position": sink.position,
            "token": sink.token,
            "kind": sink.kind,
            "layer": layer,
        }

    def _residual(self, layer: int) -> None:
        x = self.seen["resid_pre"][0].float()
        norm = x.norm(dim=-1)
        typical = norm[self.no_sink].median() if self.no_sink.any() else torch.tensor(torch.nan)
        mu = typical_mean(x, self.sinks.thresholds.norm_ratio)[0]
        top = self.sinks.strongest[self.sequence]
        for sink in self.found:
            state = x[sink.position].abs()
            ratio = state / state.median()
            massive = (ratio > 100).nonzero().flatten().tolist()
            row = self._label(sink, layer) | {
                "residual_norm": float(norm[sink.position]),
                "residual_ratio": float(norm[sink.position] / typical),
                "max_abs": float(state.max()),
                "max_ratio": float(ratio.max()),
                "massive_dims": " ".join(map(str, massive)),
                "strict": bool(((state > 100) & (ratio > 1000)).any()),
                "cosine_raw": torch.nan,
                "cosine_centred": torch.nan,
                "mass": sink.masses[layer],
            }
            if top is not None:
                row["cosine_raw"] = float(torch.cosine_similarity(x[sink.position], x[top], dim=0))
                row["cosine_centred"] = float(torch.cosine_similarity(x[sink.position] - mu, x[top] - mu, dim=0))
            self.layers.append(row)

    def _attention(self, layer: int) -> None:
        n_heads, first = self.facts.n_heads, self.facts.heads_first
        pattern = self.seen["hook_pattern"][0].float()
        allowed = allowed_keys(
            self.one.mask, slice(0, self.length), causal=self.facts.causal, window=self.facts.windows[layer]
        )[0]
        q_point, k_point = self.scored or ("hook_q", "hook_k")
        q = by_head(self.seen[q_point], first, n_heads).float()
        k = by_head(self.seen[k_point], first, n_heads).float()
        v = by_head(self.seen["hook_v"], first, n_heads).float()
        bias = value_bias(self.model, layer, n_heads)
        written = v if bias is None else v - bias.float()[:, None]
        w_o = output_weights(self.model, layer)
        u = None if w_o is None else (written @ w_o.float()).norm(dim=-1)
        sizes = {"k_ratio": k.norm(dim=-1), "v_ratio": written.norm(dim=-1)} | ({} if u is None else {"ov_ratio": u})
        ratios = {name: size / size[:, self.no_sink].median(-1, keepdim=True).values for name, size in sizes.items()}
        geometry = self._geometry(q, k, allowed) if self.scored else None
        margins = []
        for sink in self.found:
            queries = self.far[:, sink.position] & allowed[:, sink.position]
            margin = competitor_free_margin(pattern, sink.position, self.no_sink, queries)
            margins.append(margin)
            beta = far_mean(pattern[:, queries, sink.position])
            for head in range(n_heads):
                row = self._label(sink, layer) | {
                    "head": head,
                    "beta": float(beta[head]),
                    "margin": float(margin[head]),
                }
                row |= {name: float(ratio[head, sink.position]) for name, ratio in ratios.items()}
                row["k_norm"] = float(k[head, sink.position].norm())
                row["q_norm"] = float(q[head, queries].norm(dim=-1).mean())
                if geometry is not None:
                    dot, cosine, others = geometry
                    row["qk"] = float(dot[head, queries, sink.position].mean())
                    row["cosine"] = float(cosine[head, queries, sink.position].mean())
                    row |= {name: float(value[head]) for name, value in others.items()}
                self.heads.append(row)
        for row, margin in zip(self.layers[len(self.layers) - len(self.found) :], margins, strict=True):
            row["margin"] = float(margin.mean())
        self._use(layer, pattern, allowed, u, w_o, bias)

    def _geometry(self, q: Tensor, k: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """q.k and its cosine for all pairs, and their means over far keys that are no sink."""
        dot = q @ k.mT
        cosine = dot / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, None]).clamp(min=1e-30)
        pairs = (allowed & self.far & self.no_sink).to(dot)
        others = {
            "other_qk": (dot * pairs).sum((1, 2)) / pairs.sum(),
            "other_cosine": (cosine * pairs).sum((1, 2)) / pairs.sum(),
            "other_k_norm": k[:, self.no_sink].norm(dim=-1).mean(-1),
        }
        return dot, cosine, others

    def _use(
        self, layer: int, pattern: Tensor, allowed: Tensor, u: Tensor | None, w_o: Tensor | None, bias: Tensor | None
    ) -> None:
        """Which sink each head uses, and the head's class."""
        rank = torch.full((self.facts.n_heads,), torch.nan)
        if w_o is not None and self.facts.z_is_pattern_v:
            z = self.seen["hook_z"][0].float().transpose(0, 1)
            if bias is not None:
                z = z - pattern.sum(-1)[..., None] * bias.float()[:, None]
            rank = stable_rank(z[:, 1:], w_o.float())
        for head in range(self.facts.n_heads):
            row: dict[str, Any] = {"sequence": self.sequence, "layer": layer, "head": head, "position": -1, "token": ""}
            row |= {"kind": "none", "beta": torch.nan, "event_share": 0.0, "value_ratio": torch.nan}
            row |= {"stable_rank": float(rank[head]), "class": "none"}
            used = [s for s in self.found if (layer, head) in s.heads]
            if used:
                at = {s.position: self._event(pattern[head], allowed, s.position) for s in used}
                sink = max(used, key=lambda s: at[s.position][0])
                beta, share = at[sink.position]
                ratio = torch.nan if u is None else float(u[head, sink.position] / u[head, self.no_sink].mean())
                row |= {"position": sink.position, "token": sink.token, "kind": sink.kind, "beta": beta}
                row |= {"event_share": share, "value_ratio": ratio}
                row["class"] = "unknown" if u is None else head_class(share, ratio, float(rank[head]))
            self.use.append(row)

    def _event(self, pattern: Tensor, allowed: Tensor, position: int) -> tuple[float, float]:
        """Far importance of the column, and the share of queries after the first that give it at least 0.5."""
        far = self.far[:, position] & allowed[:, position]
        queries = allowed[:, position].clone()
        queries[[0, position]] = False
        share = (pattern[queries, position] >= EVENT_ATTENTION).double().mean() if queries.any() else torch.tensor(0.0)
        return float(far_mean(pattern[far, position])), float(share)
