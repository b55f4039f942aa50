"""Ablations without a pattern: ``o_R`` and ``lse_R`` from one kernel call, the few sink columns apart.

``z = rest o_R + sink o_S`` with the coefficients of :func:`sinklens.ablate.partition.pair`; it costs about what
unedited attention does. Rows and heads that an edit leaves alone get the kernel's own output.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.ablate.attention_edit import Attached
from sinklens.ablate.partition import Parts, pair
from sinklens.ablate.reference import bins
from sinklens.ablate.sink_edit import SinkEdit, same_vector
from sinklens.attention.backend import plain
from sinklens.attention.kernels import View, blocked, dense_output, dense_scores, fused, fused_takes, without

MOST_COLUMNS = 64


def lean_attention(
    attached: Attached,
    layer: int,
    q: Float[Tensor, "batch head query d"],
    k: Float[Tensor, "batch kv_head key d"],
    v: Float[Tensor, "batch kv_head key d_v"],
    view: View,
) -> tuple[Float[Tensor, "batch head query d_v"], str] | None:
    """An ablation without any pattern, and which path ran; None where it needs one (recent tokens, many sinks)."""
    edit = attached.edit
    assert isinstance(edit, SinkEdit)
    if edit.places.recent:
        return None
    lean = _Lean(edit, attached, layer, q, k, v, view)
    if len(lean.columns) > MOST_COLUMNS:
        return None
    if not lean.marked.any() and not edit.places.learned:
        return plain(layer, q, k, v, view)
    if not len(lean.columns):
        return None  # the learned sink alone has no column
    return lean.run()


class _Lean:
    """One layer's ablation in the making."""

    def __init__(
        self, edit: SinkEdit, attached: Attached, layer: int, q: Tensor, k: Tensor, v: Tensor, view: View
    ) -> None:
        self.edit, self.attached, self.layer, self.view = edit, attached, layer, view
        self.q, self.k, self.v = q.contiguous(), k, v
        forward, places = attached.forward, edit.places
        self.first = forward.columns - k.shape[2]
        self.marked = places.columns(forward, layer)[:, self.first :]
        self.kept_apart = torch.zeros_like(self.marked)
        if edit.options.to == "ordinary":
            self.kept_apart = places.apart(forward)[:, self.first :] & ~self.marked
        self.heads = edit.chosen.mask(layer, q.shape[1], q.device)
        self.columns = (self.marked | self.kept_apart).any(0).nonzero().flatten()
        self.wide = torch.promote_types(q.dtype, torch.float32)

    def run(self) -> tuple[Tensor, str]:
        """The edited output and which path ran."""
        options, view = self.edit.options, self.view
        learned_in = "S" if self.edit.places.learned else "F" if options.to == "ordinary" else "R"
        scores = dense_scores(self.q, self.k[:, :, self.columns], view)
        shown = self._shown(self.columns)
        in_sinks = shown & self.marked[:, None, None, self.columns]
        in_apart = shown & self.kept_apart[:, None, None, self.columns]
        own_sinks = scores.masked_fill(~in_sinks, -math.inf)
        apart = scores.masked_fill(~in_apart, -math.inf)
        if options.mode == "mean_value":
            return self._exchanged(own_sinks, in_sinks)
        o_rest, lse_rest, path = without(self.q, self.k, self.v, view, self._gone())
        lse_rest = lse_rest.to(self.wide)
        o_own_rest = o_rest  # of rows and heads that are left alone: with a learned logit's share, wherever it belongs
        learned = None if view.learned is None else view.learned.to(self.wide)[:, None].expand_as(lse_rest)
        if learned is not None:
            o_own_rest = o_rest * (lse_rest - learned).sigmoid()[..., None].to(o_rest)
            if learned_in == "R":
                o_rest, lse_rest = o_own_rest, torch.logaddexp(lse_rest, learned)
        new_sinks, same = self._new_scores(own_sinks, in_sinks)
        extra = learned if learned_in == "S" else None
        lse_sinks, softmax_sinks = _parts(new_sinks, extra)
        lse_own = lse_sinks if new_sinks is own_sinks else _parts(own_sinks, extra)[0]
        lse_apart, softmax_apart = _parts(apart, learned if learned_in == "F" else None)
        together = torch.logaddexp(lse_own, lse_rest)
        shared = (together - lse_apart).sigmoid()
        parts = Parts(lse_sinks, lse_rest, shared)
        margin = self._fixed_margin(parts.margin) if options.mode == "fixed_logit" else None
        biased = options.writes_bias and self.attached.bias is not None
        weights = pair(options.mode, parts, g=options.g, margin=margin, value=options.value, biased=biased)
        rows = (lse_sinks > -math.inf) & (lse_rest > -math.inf) & self.heads[:, None]
        if same is not None and options.value != "neutral":
            rows = rows & ~same
        z, rows = self._combined(weights, parts, rows, o_rest, softmax_sinks, lse_apart - together, softmax_apart)
        own = self._own(rows, lse_rest, o_own_rest, scores.masked_fill(~(in_sinks | in_apart), -math.inf))
        return torch.where(rows[..., None], z.to(self.q), own.to(self.q)), path

    def _combined(
        self,
        weights: Any,
        parts: Parts,
        rows: Tensor,
        o_rest: Tensor,
        softmax_sinks: Tensor,
        apart_margin: Tensor,
        softmax_apart: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``z`` of edited rows, and which rows those are in the end."""
        options = self.edit.options
        rest = weights.rest if weights.rest is not None else parts.shared * (-parts.margin).sigmoid()
        z = rest[..., None] * o_rest.to(self.wide)
        if weights.sink is not None and options.mode not in ("renormalize", "zero", "null", "move", "uniform"):
            z += self._from_sinks(weights.sink[..., None] * softmax_sinks)
        elif options.mode == "value_only":
            z += self._from_sinks((parts.shared * parts.margin.sigmoid())[..., None] * softmax_sinks)
        if weights.bias is not None and options.writes_bias and self.attached.bias is not None:
            z += weights.bias[..., None] * self.attached.bias[:, None].to(z)
        if weights.moved is not None and options.target is not None:
            column = self.attached.forward.starts + options.target - self.first
            standing = self._target(options.target, column)
            rows = rows & standing
            values = self.v[torch.arange(len(column), device=column.device), :, column]
            repeat = self.q.shape[1] // self.v.shape[1]
            z += weights.moved[..., None] * values.repeat_interleave(repeat, 1)[:, :, None].to(z)
        if weights.spread is not None:
            means, some = self._mean_rest()
            rows = rows & some
            shape = (z.shape[0], self.v.shape[1], -1, *z.shape[2:])
            z.view(shape).addcmul_(weights.spread.view(shape[:-1])[..., None], means.to(z)[:, :, None])
        if self.kept_apart.any():
            z += apart_margin.sigmoid()[..., None] * dense_output(softmax_apart, self.v[:, :, self.columns])
        return z, rows

    def _gone(self) -> Bool[Tensor, "#batch #head key"]:
        gone = (self.marked | self.kept_apart)[:, None]
        if not self.heads.all():
            return gone & self.heads[:, None]
        return gone[:1] if bool((gone == gone[:1]).all()) else gone

    def _shown(self, columns: Tensor) -> Bool[Tensor, "batch 1 query column"]:
        """Which of some columns each query sees."""
        view, n_keys = self.view, self.k.shape[2]
        queries = torch.arange(n_keys - self.q.shape[2], n_keys, device=columns.device)[:, None]
        shown = torch.ones(len(queries), len(columns), dtype=torch.bool, device=columns.device)
        if view.causal:
            shown &= columns <= queries
        if view.window is not None:
            shown &= (queries - columns < view.window) & (columns - queries < view.window)
        shown = shown.expand(self.q.shape[0], 1, -1, -1)
        if view.mask is None:
            return shown
        return shown & view.mask[:, None, None, columns] & view.mask[:, None, queries[:, 0], None]

    def _new_scores(self, own: Tensor, in_sinks: Tensor) -> tuple[Tensor, Tensor | None]:
        """``fixed_key``'s scores, and the rows (per head) in which no visible sink's key differs."""
        edit, view = self.edit, self.view
        if edit.options.mode != "fixed_key":
            return own, None
        columns = [c + self.first for c in self.columns.tolist()]
        keys = self.k[:, :, self.columns].transpose(1, 2)
        means = edit.means("key", self.layer, columns, keys)
        repeat = self.q.shape[1] // keys.shape[2]
        equal = same_vector(means, keys)[..., 0].repeat_interleave(repeat, dim=2)  # batch column head
        replaced = in_sinks & ~equal.transpose(1, 2)[:, :, None]
        return torch.where(replaced, dense_scores(self.q, means.transpose(1, 2), view), own), ~replaced.any(-1)

    def _values(self) -> Float[Tensor, "batch kv_head column d_v"]:
        """The sinks' values, or their means elsewhere."""
        values = self.v[:, :, self.columns]
        if not self.edit.options.replaces_value:
            return values.to(self.wide)
        columns = [c + self.first for c in self.columns.tolist()]
        own = values.transpose(1, 2)
        means = self.edit.means("value", self.layer, columns, own)
        return torch.where(same_vector(means, own), own, means).transpose(1, 2).to(self.wide)

    def _from_sinks(self, weights: Tensor) -> Tensor:
        return dense_output(weights, self._values())

    def _exchanged(self, own_sinks: Tensor, in_sinks: Tensor) -> tuple[Tensor, str]:
        """``mean_value``: the kernel's own output, and ``sum_S A (v_mean - v)`` on top."""
        if fused_takes(self.q, self.k, self.v, self.view):
            (out, lse), path = fused(self.q, self.k, self.v, self.view), "fused"
        else:
            out, lse = blocked(self.q, self.k, self.v, self.view, want_lse=True)
            assert lse is not None
            path = "blocked"
        lse = lse.to(self.wide)
        if self.view.learned is not None:
            lse = torch.logaddexp(lse, self.view.learned.to(lse)[:, None].expand_as(lse))
        gain = self._values() - self.v[:, :, self.columns].to(self.wide)
        # A query that sees nothing but sinks is left alone.
        others = self._counts() > in_sinks.sum(-1) if self.view.learned is None else in_sinks.any(-1)
        chosen = self.heads[:, None] & others
        weights = (own_sinks - lse[..., None]).exp().nan_to_num(0) * chosen[..., None]
        if self.edit.options.to == "ordinary":
            weights = weights * (self._counts() > (in_sinks.sum(-1) + self._count_apart()))[..., None]
        return out + dense_output(weights, gain).to(out), path

    def _count_apart(self) -> Tensor:
        return (self._shown(self.columns) & self.kept_apart[:, None, None, self.columns]).sum(-1)

    def _counts(self) -> Tensor:
        """How many keys each query sees: [batch, 1, query]."""
        n_keys = self.k.shape[2]
        real = torch.ones(self.q.shape[0], n_keys, dtype=torch.bool, device=self.q.device)
        return self._sums((self.view.mask if self.view.mask is not None else real).double()[..., None])[..., 0].long()[
            :, None
        ]

    def _sums(self, what: Float[Tensor, "batch key d"]) -> Float[Tensor, "batch query d"]:
        """Sums over the keys that each query may see by causality and window."""
        view, n_keys = self.view, what.shape[1]
        total = torch.nn.functional.pad(what.cumsum(1), (0, 0, 1, 0))
        queries = torch.arange(n_keys - self.q.shape[2], n_keys, device=what.device)
        reach = n_keys if view.window is None else view.window
        low = (queries - reach + 1).clamp(min=0)
        high = queries + 1 if view.causal else (queries + reach).clamp(max=n_keys)
        return total[:, high] - total[:, low]

    def _mean_rest(self) -> tuple[Tensor, Tensor]:
        """The mean value of R for every query, [batch, kv_head, query, d_v], and which queries have any."""
        real = ~(self.marked | self.kept_apart)
        if self.view.mask is not None:
            real = real & self.view.mask
        weights = real.double()[..., None]
        counts = self._sums(weights)
        batch, n_kv, n_keys, size = self.v.shape
        values = self.v.transpose(1, 2).reshape(batch, n_keys, n_kv * size).double() * weights
        means = (self._sums(values) / counts.clamp(min=1)).view(batch, -1, n_kv, size).transpose(1, 2)
        return means, (counts[..., 0] > 0)[:, None]

    def _fixed_margin(self, own: Float[Tensor, "batch head query"]) -> Float[Tensor, "batch head query"]:
        return self.edit.fixed_margin(self.layer, bins(self._counts())[:, 0], own)

    def _target(self, target: int, column: Tensor) -> Bool[Tensor, "batch 1 query"]:
        """Which queries see the target."""
        self.edit.check_target(target, (self.marked | self.kept_apart).gather(1, column[:, None]).any())
        every = self._shown(torch.arange(int(column.min()), int(column.max()) + 1, device=column.device))
        index = (column - column.min())[:, None, None, None].expand(-1, 1, every.shape[2], 1)
        return every.gather(-1, index)[..., 0]

    def _own(self, rows: Tensor, lse_rest: Tensor, o_rest: Tensor, sinks_and_apart: Tensor) -> Tensor:
        """The kernel's own output where the edit leaves a row alone."""
        touched = (sinks_and_apart > -math.inf).any(-1) & self.heads[:, None]  # elsewhere nothing was left out
        lonely = touched & ~rows & (lse_rest == -math.inf)
        others = touched & ~rows & ~lonely
        if others.any():
            return self._kernels_own(others | lonely, o_rest)
        if not lonely.any():
            return o_rest
        at = lonely.any(0).any(0).nonzero().flatten()  # the first rows, which see nothing but sinks
        few = sinks_and_apart[:, :, at]
        if self.view.learned is not None:
            few = torch.cat([few, self.view.learned.to(few)[:, None, None].expand(*few.shape[:-1], 1)], -1)
        weights = few.softmax(-1).nan_to_num(0)[..., : len(self.columns)]
        own = o_rest.clone()
        dense = dense_output(weights, self.v[:, :, self.columns].to(self.wide)).to(own)
        own[:, :, at] = torch.where(lonely[:, :, at, None], dense, own[:, :, at])
        return own

    def _kernels_own(self, wanted: Tensor, o_rest: Tensor) -> Tensor:
        """Unedited attention of the wanted rows; in a causal layer they are often the first few."""
        view, length = self.view, self.q.shape[2]
        stop = length
        if view.causal and self.k.shape[2] == length:
            stop = int(wanted.any(0).any(0).nonzero().max()) + 1
        if stop == length:
            return plain(self.layer, self.q, self.k, self.v, view)[0]
        part = replace(view, mask=None if view.mask is None else view.mask[:, :stop])
        keys, values = self.k[:, :, :stop], self.v[:, :, :stop]
        first = plain(self.layer, self.q[:, :, :stop], keys, values, part)[0]
        return torch.cat([first, o_rest[:, :, stop:]], 2)


def _parts(scores: Tensor, learned: Tensor | None) -> tuple[Tensor, Tensor]:
    """The lse of a few columns and their softmax (0 where there are none); a learned logit takes its share."""
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    if learned is not None:
        lse = torch.logaddexp(lse, learned)
    return lse, (scores - lse[..., None]).exp().nan_to_num(0)
