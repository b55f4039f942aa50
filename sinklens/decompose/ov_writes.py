"""What a sink writes through a layer's heads, beside what everything else writes; pure tensor maths.

``|p_k (v_k - b_V) W_O|`` against ``|(1 - sigma) (o_R - b_V) W_O|``, p_k the attention on the sink; lengths are taken
through the Gram matrix ``W_O W_O^T``, so that nothing of the size of the residual stream is held per query. Sources:
Kobayashi et al. 2020 (norms of what is written); arXiv 2606.08105 (NOP and broadcast heads); docs/definitions.md,
section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinklens.decompose.margin import LayerScores


@dataclass(frozen=True, eq=False)
class Written:
    """What one layer's heads write, by source.

    Attributes:
        attention: on each sink: [head, query, sink].
        values: ``v_k - b_V`` of each sink: [head, sink, d_v].
        rest: ``(1 - sigma) (o_R - b_V)``: [head, query, d_v].
        output: all of the head's output without b_V.
        share, learned: of the weights: on the tokens that are no sink, and on a learned logit: [head, query].
    """

    attention: Float[Tensor, "head query sink"]
    values: Float[Tensor, "head sink d_v"]
    rest: Float[Tensor, "head query d_v"]
    output: Float[Tensor, "head query d_v"]
    share: Float[Tensor, "head query"]
    learned: Float[Tensor, "head query"]


def written(layer: LayerScores, sinks: Sequence[int], bias: Float[Tensor, "head d_v"] | None) -> Written:
    """Split a layer's output between the sinks and everything else (a learned logit writes nothing)."""
    lse_rest, o_rest, _ = layer.over_rest
    b_v = layer.v.new_zeros(layer.v.shape[0], layer.v.shape[-1]) if bias is None else bias.to(layer.v)
    columns = torch.stack([_column(layer, k) for k in sinks], -1)
    lse = torch.logaddexp(lse_rest, columns.logsumexp(-1))
    if layer.scoring.learned is not None:
        lse = torch.logaddexp(lse, layer.scoring.learned.to(lse)[:, None].expand_as(lse))
    attention = (columns - lse[..., None]).exp()
    share = (lse_rest - lse).exp()
    values = layer.v[:, list(sinks)] - b_v[:, None]
    rest = (share[..., None] * (o_rest - b_v[:, None])).nan_to_num()
    of_sinks = attention @ values
    output = rest + of_sinks
    mass = attention.sum(-1, keepdim=True)
    learned = 1 - share - mass[..., 0] if layer.scoring.learned is not None else torch.zeros_like(share)
    return Written(attention, values, rest, output, share, learned)


def off_manifold(
    found: Written, chosen: Sequence[int], bias: Float[Tensor, "head d_v"] | None
) -> Float[Tensor, "head query"]:
    """``|o_R + sigma (o_S - b_V)|`` over ``|z|`` for S the chosen ones of the sinks (by number), R everything else.

    How far from anything the model ever sees the cell (0, 1) of the 2x2 is. R holds the other sinks, a learned logit.
    """
    others = [i for i in range(found.attention.shape[-1]) if i not in set(chosen)]
    b_v = (
        found.values.new_zeros(found.values.shape[0], found.values.shape[-1]) if bias is None else bias.to(found.values)
    )
    z = found.output + (1 - found.learned[..., None]) * b_v[:, None]
    weight = found.share + found.attention[..., others].sum(-1)
    of_rest = found.rest + found.attention[..., others] @ found.values[:, others] + weight[..., None] * b_v[:, None]
    kept = (weight + found.learned)[..., None].clamp(min=1e-30)  # the learned logit stays in o_R's denominator
    cell = of_rest / kept + found.attention[..., list(chosen)] @ found.values[:, list(chosen)]
    return cell.norm(dim=-1) / z.norm(dim=-1).clamp(min=1e-30)


def _column(layer: LayerScores, key: int) -> Float[Tensor, "head query"]:
    """Scores of one key as the softmax gets them; -inf where it is not seen."""
    score = layer.scoring.capped(layer.column(layer.q.whole, key))
    if layer.scoring.slopes is not None:
        score = score + layer.scoring.slopes[:, None] * key
    return score.masked_fill(~layer.sees(key), -torch.inf)


def length(x: Float[Tensor, "head *any d_v"], gram: Float[Tensor, "head d_v d_v"]) -> Float[Tensor, "head *any"]:
    """``|x W_O|``."""
    spread = gram.reshape(gram.shape[0], *([1] * (x.ndim - 3)), *gram.shape[1:]) if x.ndim >= 3 else gram
    product = (x @ spread) if x.ndim >= 3 else torch.einsum("hd,hde->he", x, gram)
    return (product * x).sum(-1).clamp(min=0).sqrt()


def numbers(
    layer: LayerScores,
    found: Written,
    gram: Float[Tensor, "head d_v d_v"],
    bias: Float[Tensor, "head d_v"] | None,
    sink: int,
    index: int,
    queries: Int[Tensor, " query"],
) -> dict[str, Float[Tensor, " head"]]:
    """One sink's row: ``mass``, ``written``, ``written_rest``, ``value_ratio``, ``event_share``."""
    own = length(found.values[:, index : index + 1], gram)[:, 0]
    attention = found.attention[:, queries, index]
    b_v = 0 if bias is None else bias.to(layer.v)[:, None]
    others = length(layer.v[:, layer.rest] - b_v, gram).mean(-1)
    after_first = layer.sees(sink).clone()
    after_first[0] = False
    return {
        "mass": attention.mean(-1),
        "written": attention.mean(-1) * own,
        "written_rest": length(found.rest[:, queries], gram).mean(-1),
        "value_ratio": own / others.clamp(min=1e-30),
        "event_share": (found.attention[:, after_first, index] >= 0.5).double().mean(-1).to(own),
    }


def direction(found: Written, gram: Float[Tensor, "head d_v d_v"]) -> Float[Tensor, " head"]:
    """``|mean_i w_i / |w_i||`` of what all sinks together write at each query that sees one: 1 if always the same."""
    seen = found.attention.sum(-1).amin(0) > 0
    writes = (found.attention @ found.values)[:, seen]
    size = length(writes, gram)
    unit = writes / size[..., None].clamp(min=1e-30)
    return length(unit.mean(1, keepdim=True), gram)[:, 0]
