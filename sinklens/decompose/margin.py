"""Why a sink's margin is high: one layer's scores taken apart, as pure tensor maths on one unpadded sequence.

For sink k, query i and the tokens R(i) that the query sees and that are no sink::

    margin m_i = s_ik - lse_R = g_i - log |R_i| - J_i - learned_i
    gap    g_i = s_ik - mean_R s_ij              peakedness J_i = lse_R - mean_R s_ij - log |R_i| >= 0

with the learned logit's share of the denominator apart. The gap is linear in the query and in the keys, so it is the
sum of the gaps of any parts that they are split into. Nothing of the size T x T is kept: log-sum-exps go block by
block, means of keys are differences of running sums. Source: docs/definitions.md, section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinklens.core.visibility import row_blocks
from sinklens.residual.linear_maps import Rotation

PARAMETERS = ("content_content", "content_bk", "bq_content", "bq_bk")
MEANS = ("distance", "key_side", "query_distance", "query_specific")
GEOMETRY = ("norm", "angle", "covariance")
BEYOND = ("softcap", "position")
SPLITS = {"parameters": PARAMETERS, "means": MEANS, "geometry": GEOMETRY}


@dataclass(frozen=True, eq=False)
class Scoring:
    """How a layer's scores come out of rotated queries and keys, and who sees whom.

    Attributes:
        scale, softcap: ``s = cap(scale q.k)``, ``cap(x) = softcap tanh(x / softcap)``.
        causal, window: as everywhere.
        slopes: ALiBi: ``slope * j`` is added per head; None without.
        learned: a logit per head in the denominator; None without.
    """

    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    slopes: Float[Tensor, " head"] | None = None
    learned: Float[Tensor, " head"] | None = None

    def capped(self, raw: Tensor) -> Tensor:
        """The softcap, where there is one."""
        return raw if self.softcap is None else self.softcap * (raw / self.softcap).tanh()

    def range(self, length: int, device: torch.device) -> tuple[Int[Tensor, " query"], Int[Tensor, " query"]]:
        """The first visible key of each query, and the one after the last."""
        index = torch.arange(length, device=device)
        reach = length if self.window is None else self.window
        last = index + 1 if self.causal else (index + reach).clamp(max=length)
        return (index - reach + 1).clamp(min=0), last


@dataclass(frozen=True, eq=False)
class Side:
    """Queries or keys as scored (rotated, after QK norm): what comes from the residual stream, and from parameters."""

    content: Float[Tensor, "head pos d"]
    bias: Float[Tensor, "head pos d"]

    @property
    def whole(self) -> Float[Tensor, "head pos d"]:
        """Their sum."""
        return self.content + self.bias


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One layer of one sequence.

    Attributes:
        q, k: rotated; ``rotation`` turns further vectors alike.
        v: values by query head.
        rest: the tokens that are no sink.
        scoring: how scores are made.
    """

    q: Side
    k: Side
    v: Float[Tensor, "head pos d_v"]
    rotation: Rotation
    rest: Bool[Tensor, " pos"]
    scoring: Scoring

    @property
    def length(self) -> int:
        """Tokens."""
        return self.rest.shape[0]

    def sees(self, key: int) -> Bool[Tensor, " query"]:
        """Which queries see a key."""
        low, high = self.scoring.range(self.length, self.rest.device)
        return (low <= key) & (key < high)

    @cached_property
    def rest_seen(self) -> Float[Tensor, " query"]:
        """``|R_i|``."""
        return self._between(self.rest.double()[None, :, None])[0, :, 0]

    def _between(self, values: Float[Tensor, "head key d"]) -> Float[Tensor, "head query d"]:
        low, high = self.scoring.range(self.length, self.rest.device)
        total = torch.nn.functional.pad(values.double().cumsum(1), (0, 0, 1, 0))
        return total[:, high] - total[:, low]

    def rest_mean(self, keys: Float[Tensor, "head key d"]) -> Float[Tensor, "head query d"]:
        """The mean over R(i), for every query; NaN where R(i) is empty."""
        return (self._between(keys * self.rest[:, None]) / self.rest_seen[:, None]).to(keys)

    def column(self, q: Float[Tensor, "head query d"], key: int) -> Float[Tensor, "head query"]:
        """Raw scores (before softcap and position) of one key."""
        return self.scoring.scale * (q * self.k.whole[:, key : key + 1]).sum(-1)

    @cached_property
    def mean_key(self) -> tuple[Tensor, Tensor]:
        """Means over R(i) of the keys' content and bias."""
        return self.rest_mean(self.k.content), self.rest_mean(self.k.bias)

    @cached_property
    def position_mean(self) -> Float[Tensor, "head query"] | None:
        """Mean over R(i) of the position term."""
        if self.scoring.slopes is None:
            return None
        index = torch.arange(self.length, device=self.rest.device, dtype=torch.float64)
        mean = self.rest_mean(index[None, :, None])[0, :, 0]
        return self.scoring.slopes[:, None] * mean.to(self.scoring.slopes)

    def scores(self, q: Float[Tensor, "head row d"], rows: slice) -> Float[Tensor, "head row key"]:
        """Scores of some query rows as the softmax gets them; -inf where a key is not seen."""
        raw = self.scoring.capped(self.scoring.scale * (q @ self.k.whole.mT))
        index = torch.arange(self.length, device=q.device)
        if self.scoring.slopes is not None:
            raw = raw + self.scoring.slopes[:, None, None] * index
        low, high = self.scoring.range(self.length, q.device)
        seen = (low[rows, None] <= index) & (index < high[rows, None])
        return raw.masked_fill(~seen, -math.inf)

    @cached_property
    def over_rest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Over R(i), without the learned logit: log-sum-exp, softmax-weighted mean of v, mean of (capped - raw)."""
        lse = self.q.content.new_empty(self.q.content.shape[:2])
        output = self.v.new_zeros(lse.shape[0], self.length, self.v.shape[-1])
        bent = torch.zeros_like(lse)
        for rows in row_blocks(self.length):
            scores = self.scores(self.q.whole[:, rows], rows).masked_fill(~self.rest, -math.inf)
            lse[:, rows] = scores.logsumexp(-1)
            output[:, rows] = (scores - lse[:, rows, None]).exp().nan_to_num() @ self.v
        if self.scoring.softcap is not None:
            bent = self.bent(self.q.whole)
        return lse, output, bent

    def bent(self, q: Float[Tensor, "head query d"]) -> Float[Tensor, "head query"]:
        """Mean over R(i) of what the softcap takes from the scores: ``cap(raw) - raw``; 0 without softcap."""
        found = q.new_zeros(q.shape[:2])
        if self.scoring.softcap is None:
            return found
        low, high = self.scoring.range(self.length, q.device)
        index = torch.arange(self.length, device=q.device)
        for rows in row_blocks(self.length):
            raw = self.scoring.scale * (q[:, rows] @ self.k.whole.mT)
            seen = (low[rows, None] <= index) & (index < high[rows, None]) & self.rest
            found[:, rows] = ((self.scoring.capped(raw) - raw) * seen).sum(-1)
        return found / self.rest_seen.to(found)

    @cached_property
    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """|q|; |k|; and the unit keys' mean over R(i)."""
        size = self.k.whole.norm(dim=-1)
        unit = self.k.whole / size[..., None].clamp(min=1e-30)
        return self.q.whole.norm(dim=-1), size, self.rest_mean(unit)


def far_queries(layer: LayerScores, sink: int, far: int) -> Int[Tensor, " query"]:
    """The queries at least ``far`` away that see the sink and something that is no sink."""
    distance = (torch.arange(layer.length, device=layer.rest.device) - sink).abs()
    return ((distance >= far) & layer.sees(sink) & (layer.rest_seen > 0)).nonzero().flatten()


def gap(
    layer: LayerScores,
    q: Float[Tensor, "head query d"],
    key: Float[Tensor, "head d"],
    mean: Float[Tensor, "head query d"],
) -> Float[Tensor, "head query"]:
    """``scale q_i . (k_S - mean_R k)`` for any parts of queries and keys."""
    return layer.scoring.scale * (q * (key[:, None] - mean)).sum(-1)


@dataclass(frozen=True, eq=False)
class Split:
    """One sink in one layer, per head: means over its queries.

    Attributes:
        means: by name, [head]; see :mod:`sinklens.decompose.result`.
        margins: competitor-free margin per query: [head, query].
        gaps: the gap per query.
        queries: which queries.
    """

    means: dict[str, Float[Tensor, " head"]]
    margins: Float[Tensor, "head query"]
    gaps: Float[Tensor, "head query"]
    queries: Int[Tensor, " query"]


def split_margin(
    layer: LayerScores,
    sink: int,
    queries: Int[Tensor, " query"],
    mean_q: Float[Tensor, "head d"],
    mean_k: Float[Tensor, "head d"],
) -> Split:
    """The margin of one sink in all heads, split in every way; the means are those before rotation, after QK norm."""
    scoring, whole_q = layer.scoring, layer.q.whole[:, queries]
    mean_content, mean_bias = (m[:, queries] for m in layer.mean_key)
    found: dict[str, Tensor] = {}
    # (a) parameters
    for q_name, q in (("content", layer.q.content), ("bq", layer.q.bias)):
        for k_name, k, mean in (("content", layer.k.content, mean_content), ("bk", layer.k.bias, mean_bias)):
            found[f"{q_name}_{k_name}"] = gap(layer, q[:, queries], k[:, sink], mean)
    raw_gap = found["content_content"] + found["content_bk"] + found["bq_content"] + found["bq_bk"]
    # (b) means
    flat = layer.rotation(mean_k[:, None].expand(-1, layer.length, -1))
    flat_mean = layer.rest_mean(flat)[:, queries]
    q_bar = layer.rotation.at(queries)(mean_q[:, None].expand(-1, len(queries), -1))
    sink_key, mean_whole = layer.k.whole[:, sink], mean_content + mean_bias
    d_key, d_mean, d_q = sink_key - flat[:, sink], mean_whole - flat_mean, whole_q - q_bar
    found["distance"] = gap(layer, q_bar, flat[:, sink], flat_mean)
    found["key_side"] = gap(layer, q_bar, d_key, d_mean)
    found["query_distance"] = gap(layer, d_q, flat[:, sink], flat_mean)
    found["query_specific"] = gap(layer, d_q, d_key, d_mean)
    # (c) norms and angle
    found |= _geometry(layer, sink, queries, mean_whole)
    # beyond q.k
    raw = layer.column(layer.q.whole, sink)[:, queries]
    lse_rest, _, bent = (t[:, queries] for t in layer.over_rest)
    found["softcap"] = scoring.capped(raw) - raw - bent
    found["position"] = torch.zeros_like(raw)
    score = scoring.capped(raw)
    if scoring.slopes is not None and layer.position_mean is not None:
        found["position"] = scoring.slopes[:, None] * sink - layer.position_mean[:, queries]
        score = score + scoring.slopes[:, None] * sink
    # the margin
    log_rest = layer.rest_seen[queries].log().to(raw)
    full = raw_gap + found["softcap"] + found["position"]
    mean_score = score - full
    found["log_rest"] = log_rest.expand_as(raw)
    found["peakedness"] = lse_rest - mean_score - log_rest
    lse = lse_rest
    if scoring.learned is not None:
        lse = torch.logaddexp(lse_rest, scoring.learned.to(lse_rest)[:, None].expand_as(lse_rest))
    found["learned"] = lse - lse_rest
    found["gap"] = full
    margins = score - lse
    found["margin"] = margins
    means = {name: value.mean(-1) for name, value in found.items()}
    means |= _bias_share(layer, sink, queries, q_bar, margins, full, sink_key[:, None] - mean_whole)
    return Split(means, margins, full, queries)


def _geometry(
    layer: LayerScores, sink: int, queries: Int[Tensor, " query"], mean_whole: Float[Tensor, "head query d"]
) -> dict[str, Tensor]:
    """``|k| cos`` of the sink against its mean over R: by norm, by angle (symmetrically), by covariance over R."""
    size_q, size_k, mean_unit = layer.norms
    q = layer.q.whole[:, queries]
    size = size_q[:, queries].clamp(min=1e-30)
    cosine = (q * layer.k.whole[:, sink : sink + 1]).sum(-1) / (size * size_k[:, sink, None].clamp(min=1e-30))
    other_size = layer.rest_mean(size_k[..., None])[:, queries, 0]
    other_cosine = (q * mean_unit[:, queries]).sum(-1) / size
    covariance = (q * mean_whole).sum(-1) / size - other_size * other_cosine
    factor = layer.scoring.scale * size
    own = size_k[:, sink, None]
    return {
        "norm": factor * (own - other_size) * (cosine + other_cosine) / 2,
        "angle": factor * (cosine - other_cosine) * (own + other_size) / 2,
        "covariance": -factor * covariance,
        "k_norm": own.expand_as(cosine),
        "k_norm_rest": other_size,
        "cosine": cosine,
        "cosine_rest": other_cosine,
        "q_norm": size,
    }


def _bias_share(
    layer: LayerScores,
    sink: int,
    queries: Int[Tensor, " query"],
    q_bar: Float[Tensor, "head query d"],
    margins: Float[Tensor, "head query"],
    gaps: Float[Tensor, "head query"],
    difference: Float[Tensor, "head query d"],
) -> dict[str, Tensor]:
    """``1 - sum (sigma - sigma_bar)^2 / sum (sigma - mean sigma)^2``: the mean query's gap, J and |R| kept."""
    scoring = layer.scoring
    raw = scoring.scale * (q_bar * difference).sum(-1)
    if scoring.softcap is not None:
        full = q_bar.new_zeros(q_bar.shape[0], layer.length, q_bar.shape[-1])
        full[:, queries] = q_bar
        column = layer.column(full, sink)[:, queries]
        raw = raw + scoring.capped(column) - column - layer.bent(full)[:, queries]
    if scoring.slopes is not None and layer.position_mean is not None:
        raw = raw + scoring.slopes[:, None] * sink - layer.position_mean[:, queries]
    sigma, guessed = margins.sigmoid().double(), (margins - gaps + raw).sigmoid().double()
    mean, spread = sigma.mean(-1), sigma.std(-1, unbiased=False)
    share = 1 - (sigma - guessed).pow(2).sum(-1) / (sigma - mean[:, None]).pow(2).sum(-1)
    defined = (mean >= MIN_SIGMA) & (spread >= MIN_SPREAD)
    return {
        "bias_share": torch.where(defined, share, torch.nan).to(margins),
        "bias_error": (sigma - guessed).abs().mean(-1).to(margins),
        "sigma": mean.to(margins),
        "sigma_sd": spread.to(margins),
    }


MIN_SIGMA = 0.05  # below these the bias share says nothing: NaN
MIN_SPREAD = 0.02


def key_weights(
    layer: LayerScores, sink: int, queries: Int[Tensor, " query"], q: Float[Tensor, "head pos d"]
) -> Float[Tensor, "head pos d"]:
    """A with ``mean over queries of the raw gap = sum_j <A_j, k_j>`` for keys before rotation: its gradient.

    The row of the sink is the part of its own key, the other rows are minus the means over the rest.
    """
    share = layer.scoring.scale / max(len(queries), 1)
    chosen = torch.zeros_like(q)
    chosen[:, queries] = q[:, queries] * share
    weights = torch.zeros_like(q)
    weights[:, sink] = chosen.sum(1)
    per_query = chosen.double() / layer.rest_seen.clamp(min=1)[:, None]
    # key j belongs to R(i) iff low_i <= j < high_i: add at low_i, take away at high_i, sum up
    low, high = layer.scoring.range(layer.length, q.device)
    steps = torch.zeros(q.shape[0], layer.length + 1, q.shape[-1], dtype=torch.float64, device=q.device)
    steps.index_add_(1, low, per_query)
    steps.index_add_(1, high, -per_query)
    weights -= (steps.cumsum(1)[:, :-1] * layer.rest[:, None]).to(q)
    return layer.rotation.back(weights)


def query_weights(layer: LayerScores, sink: int, queries: Int[Tensor, " query"]) -> Float[Tensor, "head pos d"]:
    """B with ``mean over queries of the raw gap = sum_i <B_i, q_i>`` for queries before rotation."""
    content, bias = layer.mean_key
    weights = torch.zeros_like(layer.q.content)
    difference = layer.k.whole[:, sink : sink + 1] - (content + bias)[:, queries]
    weights[:, queries] = layer.scoring.scale / max(len(queries), 1) * difference
    return layer.rotation.back(weights)
