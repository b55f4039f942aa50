"""Padded batches of rows, and maps of sinks written down by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import sinklens as sl
from sinklens.inputs.load import as_tokens


def batch_of(model: Any, rows: list[Tensor], side: str = "right") -> sl.Tokens:
    """Rows of different lengths as one padded batch."""
    parts = [as_tokens(model, row[None]) for row in rows]
    joined = sl.Tokens.concatenate(parts)
    return joined if side == "right" else left(joined)


def left(tokens: sl.Tokens) -> sl.Tokens:
    """The same batch, padded on the left."""
    width = int(tokens.lengths.max())
    ids, mask = torch.zeros_like(tokens.ids), torch.zeros_like(tokens.mask)
    for b in range(len(tokens)):
        row = tokens.row(b)
        ids[b, width - len(row) :], mask[b, width - len(row) :] = row, True
    return dataclasses.replace(tokens, ids=ids, mask=mask, special=~mask)


def left_padded(batch: sl.Tokens) -> sl.Tokens:
    """The same sequences, each ending in the last column."""
    width = batch.ids.shape[1]
    ids, mask = torch.zeros_like(batch.ids), torch.zeros_like(batch.mask)
    special = torch.ones_like(batch.special)
    for i in range(len(batch)):
        n = int(batch.lengths[i])
        ids[i, width - n :], mask[i, width - n :] = batch.row(i), True
        special[i, width - n :] = batch.special[i][batch.mask[i]]
    parts = {**batch.tensors(), "ids": ids, "mask": mask, "special": special}
    return sl.Tokens.from_parts(parts, batch.meta())


def planted_map(model: Any, rows: list[Tensor], places: dict[tuple[int, int], tuple[str, range]]) -> sl.SinkMap:
    """A SinkMap with hand-made sinks: {(sequence, position): (kind, layers)}."""
    tokens = batch_of(model, rows)
    n_layers = sl.models.capabilities(model).n_layers
    sinks = tuple(
        sl.find.Sink(b, p, "x", int(tokens.row(b)[p]), kind, "", layers[0], layers[-1], len(layers), 0.5, 0,
                ((layers[0], layers[-1], 0.5),), (0.5,) * n_layers, (), True)
        for (b, p), (kind, layers) in places.items()
    )  # fmt: skip
    shape = (len(rows), n_layers, int(tokens.lengths.max()))
    return sl.SinkMap(
        sinks,
        (None,) * len(rows),
        (),
        torch.zeros(shape),
        torch.zeros(shape),
        tokens,
        sl.find.Thresholds(),
        "attention",
    )
