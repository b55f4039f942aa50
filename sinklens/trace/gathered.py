"""What components write at sinks, at tokens of their ids, and everywhere: one pass over the sequences of a map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.find.sinkmap import SinkMap
from sinklens.residual.components import Component
from sinklens.residual.contributions import StreamParts, stream_parts
from sinklens.show.progress import progress_bar

SAME_ID = 16  # tokens of one id per sequence that are kept for comparison


class Looked:
    """One pass over the sequences of a map: what is written at its sinks, at tokens of their ids, and everywhere.

    Attributes:
        found: the map.
        parts: per sequence.
        positions: which positions of each sequence ``parts`` holds.
    """

    def __init__(self, model: TransformerBridge, found: SinkMap, ids: set[int] | None = None, *, progress: Any) -> None:
        self.found = found
        self.parts: list[StreamParts] = []
        self.positions: list[list[int]] = []
        self.no_sink: list[Bool[Tensor, " pos"]] = []
        wanted = {s.token_id for s in found} if ids is None else ids
        with progress_bar("what components write", len(found.tokens), progress) as advance:
            for b in range(len(found.tokens)):
                one = found.tokens[b].trim().to(str(model.cfg.device))
                row = one.ids[0].tolist()
                no_sink = torch.ones(len(row), dtype=torch.bool, device=one.ids.device)
                no_sink[[p for s, p in found.places or () if s == b]] = False
                top = found.strongest[b]
                chosen = _some(row, wanted) | {s.position for s in found if s.sequence == b}
                positions = sorted(chosen | ({top} if top is not None else set()))
                self.positions.append(positions)
                self.no_sink.append(no_sink)
                self.parts.append(stream_parts(model, one.ids, positions, no_sink))
                advance()

    @property
    def components(self) -> tuple[Component, ...]:
        """The components, in the order in which they write."""
        return self.parts[0].components

    def at(self, sequence: int, position: int) -> tuple[Tensor, Tensor]:
        """What every component adds at a token [component, d_model], and its stream [layer, d_model]."""
        n = self.positions[sequence].index(position)
        return self.parts[sequence].added[:, n], self.parts[sequence].states[:, n]

    def directions(self, without: int | None) -> Float[Tensor, "primary layer d_model"]:
        """Unit ``x_P - mu`` of the strongest sink of every sequence of another document."""
        rows = []
        for b, top in enumerate(self.found.strongest):
            if top is not None and self.found.tokens.documents[b] != without:
                centred = self.at(b, top)[1] - self.parts[b].mu
                rows.append(centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-30))
        return torch.stack(rows) if rows else torch.zeros(0, *self.parts[0].mu.shape)

    def same_id(self, token_id: int) -> tuple[Float[Tensor, "component d_model"], int]:
        """The mean of what components add at tokens of an id that are no sink, and how many there are."""
        total, count = torch.zeros_like(self.parts[0].ordinary), 0
        for added in self.alike(token_id):
            total, count = total + added.sum(1), count + added.shape[1]
        return total / max(count, 1), count

    def alike(self, token_id: int) -> Iterator[Float[Tensor, "component token d_model"]]:
        """What components add at the tokens of an id that are no sink, sequence by sequence."""
        for b, parts in enumerate(self.parts):
            row = self.found.tokens.row(b)
            at = [n for n, p in enumerate(self.positions[b]) if int(row[p]) == token_id and bool(self.no_sink[b][p])]
            if at:
                yield parts.added[:, at]

    def ordinary(self) -> Float[Tensor, "component d_model"]:
        """The mean of what components add over all tokens that are no sink, sequences alike."""
        return torch.stack([parts.ordinary for parts in self.parts]).mean(0)


def _some(row: list[int], wanted: set[int]) -> set[int]:
    """At most 16 positions of each wanted id, evenly spread: a comma occurs in every line."""
    found: set[int] = set()
    for token_id in wanted:
        at = [p for p, i in enumerate(row) if i == token_id]
        found |= set(at[:: max(1, math.ceil(len(at) / SAME_ID))])
    return found
