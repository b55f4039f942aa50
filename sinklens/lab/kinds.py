"""The kinds of attention that a lab model may have: each with its formula, its source and a stable form.

``s`` are the scores ``q.k / sqrt(d_head)``, causal; ``A`` is what the values are multiplied with; ``z = A v``. Where a
kind has a *slot*, it is one more entry of the softmax, of no token, whose share of a row is ``1 - sum_j A_ij``.

| kind | formula | source |
|---|---|---|
| softmax | ``A_ij = e^s_ij / sum_k e^s_ik`` | Vaswani et al. 2017 |
| sigmoid | ``A_ij = sigmoid(s_ij)`` | Gu et al. 2025, Table 6 (Z = 1) |
| sigmoid_normalised | ``A_ij = sigmoid(s_ij) / sum_k sigmoid(s_ik)`` | Gu et al. 2025, Table 6 |
| off_by_one | ``A_ij = e^s_ij / (1 + sum_k e^s_ik)`` | Miller 2023; "zero sink" in Xiao et al. 2024 |
| sink_logit | ``A_ij = e^s_ij / (e^b + sum_k e^s_ik)``, b learned per head | gpt-oss |
| k_bias | the slot's score is ``q.k* / sqrt(d_head)``, its value 0 | Gu et al. 2025, Table 4 |
| kv_bias | the same, with a learned value v*: ``z = A v + (1 - sum A) v*`` | Gu et al. 2025, Table 4 |
| relu | ``A_ij = max(s_ij, 0)`` | Guo et al. 2024 |
| gated | softmax, then ``z * sigmoid(W_g x)`` before ``W_O`` | Qiu et al. 2025 (gate after attention) |

The slot's key is not rotated, nor is the query that meets it: the slot is as far from every token. ``k*``, ``v*`` and
``b`` are learned as ``bias_scale`` times a parameter, because a vector moves by the learning rate per step under Adam,
while a key or value made by a matrix moves by about d_model times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import BadInputError


@dataclass(frozen=True)
class AttentionKind:
    """A way to turn scores into weights.

    Attributes:
        name: how a configuration calls it.
        formula: in one line.
        source: where it comes from.
        rows: "one" where rows sum to 1, "at most one" where a slot takes the rest, "any" where nothing normalises.
        slot: the slot's score: "none", "zero", "logit" (learned), "key" (learned key, value 0) or "key and value".
        gated: z is multiplied by a gate.
    """

    name: str
    formula: str
    source: str
    rows: str = "one"
    slot: str = "none"
    gated: bool = False

    @property
    def label(self) -> str:
        """The name as tables and figures show it."""
        return _LABELS.get(self.name, self.name)


_LABELS = {
    "sigmoid": "sigmoid, not normalised",
    "sigmoid_normalised": "sigmoid, normalised",
    "off_by_one": "softmax off by one",
    "sink_logit": "sink logit",
    "k_bias": "K bias",
    "kv_bias": "KV bias",
    "relu": "ReLU, not normalised",
    "gated": "softmax, gated output",
}

KINDS = {
    kind.name: kind
    for kind in (
        AttentionKind("softmax", "exp(s_ij) / sum_k exp(s_ik)", "Vaswani et al. 2017"),
        AttentionKind("sigmoid", "sigmoid(s_ij)", "Gu et al. 2025, Table 6", rows="any"),
        AttentionKind("sigmoid_normalised", "sigmoid(s_ij) / sum_k sigmoid(s_ik)", "Gu et al. 2025, Table 6"),
        AttentionKind("off_by_one", "exp(s_ij) / (1 + sum_k exp(s_ik))", "Miller 2023", "at most one", "zero"),
        AttentionKind("sink_logit", "exp(s_ij) / (exp(b) + sum_k exp(s_ik))", "gpt-oss", "at most one", "logit"),
        AttentionKind("k_bias", "softmax over [q.k*, s_i]; v* = 0", "Gu et al. 2025, Table 4", "at most one", "key"),
        AttentionKind(
            "kv_bias", "softmax over [q.k*, s_i]; v* learned", "Gu et al. 2025, Table 4", "at most one", "key and value"
        ),
        AttentionKind("relu", "max(s_ij, 0)", "Guo et al. 2024", rows="any"),
        AttentionKind("gated", "softmax; z * sigmoid(W_g x)", "Qiu et al. 2025", gated=True),
    )
}


def kind_named(name: str) -> AttentionKind:
    """The kind of this name.

    Raises:
        BadInputError: there is none.
    """
    if name not in KINDS:
        raise BadInputError(f"attention must be one of {', '.join(KINDS)}; got {name!r}")
    return KINDS[name]


def weights(
    kind: AttentionKind,
    scores: Float[Tensor, "batch head query key"],
    visible: Bool[Tensor, "#batch 1 query key"],
    slot: Float[Tensor, "batch head query"] | None,
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query"] | None]:
    """The weights of the keys, and the slot's share; hidden keys, and rows that see nothing, get exactly 0.

    Args:
        kind: the kind of attention.
        scores: before masking or after: hidden entries are not read.
        visible: which keys each query sees.
        slot: the slot's score per query, for kinds that have one.
    """
    if kind.name == "sigmoid":
        return scores.sigmoid().masked_fill(~visible, 0), None
    if kind.name == "relu":
        return scores.relu().masked_fill(~visible, 0), None
    if kind.name == "sigmoid_normalised":  # a ratio of sigmoids is a softmax of their logarithms
        scores = torch.nn.functional.logsigmoid(scores)
    hidden = scores.masked_fill(~visible, -torch.inf)
    if slot is None:
        return hidden.softmax(-1).masked_fill(~visible, 0), None
    joint = torch.cat([slot[..., None], hidden], -1).softmax(-1)
    return joint[..., 1:], joint[..., 0]
