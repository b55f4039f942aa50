"""The sink partition: the algebra of every edit of attention, on tensors only.

For one head and one query the visible keys are split into sinks S, the rest R and, where freed mass may not go to
other sinks, keys F that keep exactly what they had::

    lse_S = log sum_{k in S} exp(s_ik)        lse_R likewise        m = lse_S - lse_R
    sigma = sigmoid(m)                        1 - sigma = sigmoid(-m), never a subtraction: sinks reach 0.9999
    z = P_F o_F + (1 - P_F) (a o_R + b o_S)   unedited: a = 1 - sigma, b = sigma

Each mode is a pair (a, b), possibly with new vectors (docs/definitions.md, section 3). Here it is rendered on the
attention pattern: weights ``(1 - P_F) a softmax_R`` on R and ``(1 - P_F) b softmax_S`` on S. A part that a mode leaves
alone keeps the kernel's own elements, so that a neutral edit is exactly 0.0. A learned logit (gpt-oss) is a key with
value 0 that every query sees; it belongs to R unless named in S, and to F where only ordinary tokens may gain.

Source: docs/definitions.md, section 3; StreamingLLM (Xiao et al. 2024) for ``null``. Nothing here imports the host.
Cost: a few temporaries of the pattern's size, in float32 at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import BadInputError

Mode = Literal[
    "renormalize",
    "zero",
    "value_only",
    "scale",
    "mean_value",
    "fixed_key",
    "fixed_logit",
    "null",
    "move",
    "uniform",
]
Value = Literal["kept", "neutral", "mean"]
MODES = get_args(Mode)


@dataclass(frozen=True)
class Partition:
    """The split of every query's keys, with what the kernel computed from them.

    Attributes:
        scores: masked entries are ignored, whatever they hold.
        pattern: the kernel's own softmax of them.
        sinks, rest: S and R.
        learned: the learned logit per head, where the model has one.
        learned_in: ``"S"``, ``"R"`` or ``"F"``.
        apart: whether there is an F: visible keys in neither S nor R, which keep their weight.
    """

    scores: Float[Tensor, "batch head query key"]
    pattern: Float[Tensor, "batch head query key"]
    sinks: Bool[Tensor, "batch #head #query key"]
    rest: Bool[Tensor, "batch #head #query key"]
    learned: Float[Tensor, " head"] | None = None
    learned_in: str = "R"
    apart: bool = False

    @cached_property
    def softmax_sinks(self) -> Float[Tensor, "batch head query key"]:
        """``softmax_S`` of the scores, 0 elsewhere (a learned logit in S takes its share)."""
        return self._softmax(self.sinks, "S")

    @cached_property
    def softmax_rest(self) -> Float[Tensor, "batch head query key"]:
        """``softmax_R`` of the scores, 0 elsewhere (a learned logit in R takes its share)."""
        return self._softmax(self.rest, "R")

    def _softmax(self, keys: Bool[Tensor, "batch #head #query key"], side: str) -> Tensor:
        visible = keys.any(-1, keepdim=True)  # rows without keys are never edited, but their gradient must not be NaN
        scores = self.scores.masked_fill(~keys & visible, -math.inf)
        learned = self._learned(side)
        if learned is not None:
            scores = torch.cat([scores, learned.expand(*scores.shape[:-1], 1)], -1)
        found = scores.softmax(-1)
        return found if learned is None else found[..., :-1]

    @cached_property
    def lse_sinks(self) -> Float[Tensor, "batch head query"]:
        """``lse_S``; -inf where S is empty."""
        return self._lse(self.sinks, self.softmax_sinks, "S")

    @cached_property
    def lse_rest(self) -> Float[Tensor, "batch head query"]:
        """``lse_R``; -inf where R is empty."""
        return self._lse(self.rest, self.softmax_rest, "R")

    def _lse(self, keys: Bool[Tensor, "batch #head #query key"], softmax: Tensor, side: str) -> Tensor:
        """``s_j - log softmax_j`` at the key with the largest score (torch's own logsumexp takes four passes)."""
        top = self.scores.masked_fill(~keys, -math.inf).amax(-1)
        learned = self._learned(side)
        lse = top - softmax.amax(-1).log()
        empty = ~keys.any(-1)
        if learned is None:
            return lse.masked_fill(empty, -math.inf)
        faint = softmax.amax(-1) < 1e-30  # the learned logit has everything
        return torch.where(empty | faint, learned[..., 0].expand_as(lse), lse)

    def _learned(self, side: str) -> Tensor | None:
        if self.learned is None or self.learned_in != side:
            return None
        return self.learned[:, None, None].to(self.scores)

    @cached_property
    def margin(self) -> Float[Tensor, "batch head query"]:
        """``m = lse_S - lse_R``; only to be read in editable rows."""
        return self.lse_sinks - self.lse_rest

    @property
    def editable(self) -> Bool[Tensor, "batch #head query"]:
        """Rows in which both S and R hold something: the others stay untouched."""
        has_sink, has_rest = self.sinks.any(-1), self.rest.any(-1)
        if self.learned is not None and self.learned_in == "S":
            has_sink = torch.ones_like(has_sink)
        if self.learned is not None and self.learned_in == "R":
            has_rest = torch.ones_like(has_rest)
        return has_sink & has_rest

    @cached_property
    def shared(self) -> Float[Tensor, "batch head query"]:
        """``1 - P_F``, the mass that S and R have between them: 1 where nothing is kept apart."""
        if not self.apart:
            return self.scores.new_ones(self.scores.shape[:-1])
        shared = self.pattern.masked_fill(~(self.sinks | self.rest), 0).sum(-1).to(self.scores)
        if self.learned is not None and self.learned_in != "F":
            shared = shared + (1 - self.pattern.sum(-1)).to(shared)
        return shared


@dataclass(frozen=True)
class Parts:
    """What a mode's pair depends on, without a pattern: the flash backend has no more.

    Attributes:
        lse_sinks, lse_rest: of S and of R.
        shared: ``1 - P_F``.
    """

    lse_sinks: Float[Tensor, "batch head query"]
    lse_rest: Float[Tensor, "batch head query"]
    shared: Float[Tensor, "batch head query"]

    @property
    def margin(self) -> Float[Tensor, "batch head query"]:
        """``m = lse_S - lse_R``; only to be read in editable rows."""
        return self.lse_sinks - self.lse_rest


@dataclass(frozen=True)
class Pair:
    """What a mode does to a row: the weight of each part, None where the kernel's own elements stay.

    ``z = rest o_R + sink o_S + bias b_V + spread mean_R v + moved v_target``; ``spread`` and ``moved`` come on top.
    """

    rest: Float[Tensor, "batch head query"] | None = None
    sink: Float[Tensor, "batch head query"] | None = None
    bias: Float[Tensor, "batch head query"] | None = None
    spread: Float[Tensor, "batch head query"] | None = None
    moved: Float[Tensor, "batch head query"] | None = None


def pair(
    mode: str,
    part: Partition | Parts,
    *,
    g: float | None = None,
    margin: Float[Tensor, "batch head query"] | None = None,
    value: str = "kept",
    biased: bool = True,
) -> Pair:
    """The pair of a mode.

    Args:
        mode: one of ``MODES``.
        part: the partition; for ``fixed_key`` with the new scores in it.
        g: factor of ``scale``: ``lse_S += log g``.
        margin: the fixed margin of ``fixed_logit``.
        value: for ``fixed_key`` and ``fixed_logit``: "neutral" writes nothing but b_V.
        biased: whether the coefficient of b_V is wanted (``zero`` needs no margin without it).
    """
    share = part.shared
    nothing = torch.zeros_like(share)
    if mode == "renormalize":
        return Pair(rest=share, sink=nothing)
    if mode == "mean_value":
        return Pair()
    if mode == "null":
        return Pair(rest=share * part.lse_rest.sigmoid(), sink=nothing)
    sigma = share * part.margin.sigmoid() if mode in ("value_only", "move", "uniform") or biased else None
    if mode == "zero":
        return Pair(sink=nothing, bias=sigma)
    if mode == "value_only":
        return Pair(rest=share, bias=None if sigma is None else -sigma)
    if mode == "move":
        return Pair(sink=nothing, moved=sigma)
    if mode == "uniform":
        return Pair(sink=nothing, spread=sigma)
    if mode == "scale" and g is not None:
        new = part.margin + math.log(g) if g > 0 else nothing - math.inf
    elif mode == "fixed_key":
        new = part.margin
    elif mode == "fixed_logit" and margin is not None:
        new = margin
    else:
        raise BadInputError(f"no mode {mode!r} that is complete; there are {', '.join(MODES)}")
    if value == "neutral":
        return Pair(rest=share * (-new).sigmoid(), sink=nothing, bias=share * new.sigmoid())
    return Pair(rest=share * (-new).sigmoid(), sink=share * new.sigmoid())


def edited_pattern(
    part: Partition,
    weights: Pair,
    rows: Bool[Tensor, "batch #head query"],
    *,
    target: Bool[Tensor, "batch #query key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """The pattern with the pair in it, in the rows asked for; every other element is the kernel's own.

    ``target`` marks the one key that ``moved`` mass lands on.
    """
    new = part.pattern
    if weights.rest is not None:
        new = torch.where(part.rest, (weights.rest[..., None] * part.softmax_rest).to(new), new)
    if weights.sink is not None and not weights.sink.any():
        new = new.masked_fill(part.sinks, 0)
    elif weights.sink is not None:
        new = torch.where(part.sinks, (weights.sink[..., None] * part.softmax_sinks).to(new), new)
    if weights.spread is not None:
        count = part.rest.sum(-1, keepdim=True).clamp(min=1)
        new = new + (weights.spread[..., None] / count * part.rest).to(new)
    if weights.moved is not None and target is not None:
        new = new + (weights.moved[..., None] * target[:, None]).to(new)
    return torch.where(rows[..., None], new, part.pattern)
