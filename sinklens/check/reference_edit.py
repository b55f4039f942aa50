"""Edits of the whole pattern, from the formulas: what every intervention is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinklens.check.reference_forward import Edit, Layer, capped, plain, with_learned, write_out
from sinklens.check.subject import SINKS, Subject


def naive_edit(
    mode: str,
    positions: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    means: Means | None = None,
    **options: Any,
) -> Edit:
    """z of definitions.md, section 3, from the whole pattern: ``o_R`` and ``o_S`` from softmaxes of their own."""

    def edit(n: int, layer: Layer) -> Tensor:
        z = plain(n, layer)
        if layers is not None and n not in layers:
            return z
        scores, v = layer.scores, layer.v
        inside = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        inside[list(positions)] = True
        if mode == "fixed_key":
            assert means is not None
            scores = means.with_keys(n, layer, positions)
        own, rest = scores[..., inside], scores.masked_fill(inside, -torch.inf)
        lse_s, lse_r = own.logsumexp(-1), with_learned(layer, rest.logsumexp(-1))
        values = v if mode != "mean_value" or means is None else means.with_values(n, v, positions)
        o_s = (own - lse_s[..., None]).exp().nan_to_num() @ values[:, :, inside]
        o_r = (rest - lse_r[..., None]).exp().nan_to_num() @ v
        m = lse_s - lse_r
        m = m + math.log(options["g"]) if mode == "scale" else -lse_r if mode == "null" else m
        if mode == "fixed_logit":
            assert means is not None
            m = means.margins(n, layer)
        sigma, kept = m.sigmoid()[..., None], (-m).sigmoid()[..., None]
        bias = torch.zeros_like(z) if layer.bias is None else layer.bias[:, None].expand_as(z)
        seen = rest > -torch.inf
        made = {
            "renormalize": lambda: o_r,
            "zero": lambda: kept * o_r + sigma * bias,
            "value_only": lambda: o_r + sigma * (o_s - bias),
            "null": lambda: kept * o_r,
            "move": lambda: kept * o_r + sigma * v[:, :, [options["target"]]],
            "uniform": lambda: kept * o_r + sigma * ((seen.double() / seen.sum(-1, keepdim=True).clamp(min=1)) @ v),
        }.get(mode, lambda: kept * o_r + sigma * o_s)()
        rows = lse_s.isfinite() & lse_r.isfinite()
        if mode == "move":
            rows = rows & scores[..., options["target"]].isfinite()
        if mode == "uniform":
            rows = rows & seen.any(-1)
        return torch.where(rows[..., None], made, z)

    return edit


class Means:
    """Mean keys (as scored), values and margins at the sinks over reference sequences, from the written-out run."""

    def __init__(self, subject: Subject) -> None:
        ids = subject.reference.ids.to(subject.model.cfg.device)
        self.layers = write_out(subject.model, ids).layers

    def with_values(self, n: int, v: Tensor, positions: Sequence[int]) -> Tensor:
        """The values with those at the sinks replaced."""
        new = v.clone()
        for p in positions:
            new[:, :, p] = self.layers[n].v[:, :, p].mean(0)
        return new

    def with_keys(self, n: int, layer: Layer, positions: Sequence[int]) -> Tensor:
        """The scores with the keys at the sinks replaced: rotation is linear, so the mean of rotated keys will do."""
        assert layer.q is not None
        assert layer.k is not None
        scores = layer.scores.clone()
        kept = self.layers[n].k
        assert kept is not None
        for p in positions:
            if layer.softcap is None:  # by difference: what else is in a score (ALiBi) stays
                change = layer.scale * torch.einsum("bhqd,bhd->bhq", layer.q, kept[:, :, p].mean(0) - layer.k[:, :, p])
                scores[..., p] = scores[..., p] + change
            else:
                raw = layer.scale * torch.einsum("bhqd,hd->bhq", layer.q, kept[:, :, p].mean(0))
                scores[..., p] = capped(raw, layer.softcap).masked_fill(scores[..., p].isinf(), -torch.inf)
        return scores

    def margins(self, n: int, layer: Layer) -> Tensor:
        """The mean margin of queries that see as many keys, in octaves."""
        reference = self.layers[n]
        scores = reference.scores
        inside = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        inside[list(SINKS)] = True
        rest = scores.masked_fill(inside, -torch.inf).logsumexp(-1)
        m = scores[..., inside].logsumexp(-1) - with_learned(reference, rest)
        octave = scores.isfinite().sum(-1).log2().floor()
        result = torch.full_like(m[:1].expand(layer.scores.shape[0], -1, -1), math.nan).clone()
        own = layer.scores.isfinite().sum(-1).log2().floor()
        for h in range(m.shape[1]):
            for o in own.unique().tolist():
                chosen = (octave[:, h] == o) & m[:, h].isfinite()
                if bool(chosen.any()):
                    result[:, h][own[:, h] == o] = m[:, h][chosen].mean()
        return result
