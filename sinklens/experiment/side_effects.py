"""What else an intervention changes: where freed attention goes, new sinks, attention's entropy, residual norms.

On the hooks backend hooks that only read stand around an edit, one set before it, one after; the flash backend shows
its blocks of query rows before and after edits. Nothing larger than what comes in is held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention.importance import ColumnSums, visibility
from sinklens.attention.kernels import Block, View, blocks
from sinklens.bridge.adapters import attention_hook, block_output, either_backend
from sinklens.bridge.capabilities import capabilities

ENTROPY_STEP = 4  # every fourth query
ROWS = 128
MOVED = ("freed", "to_edited", "to_other_sinks", "to_ordinary", "to_nothing")


@dataclass(eq=False)
class Watch:
    """Side effects of one forward of one unpadded sequence.

    Attributes:
        edited: the columns that the edit acts on: [layer, pos].
        sinks: every other sink of the sequence: [pos].
        moved: per edited layer, attention per query and head: what was freed (all decreases), and what went to edited
            tokens, other sinks, ordinary tokens, nothing (a learned sink, or parked).
        blind: where the host shows only the edited pattern, moved attention is NaN.
        norms: per layer the median and the largest residual norm over tokens.
    """

    model: TransformerBridge
    length: int
    edited: Bool[Tensor, "layer pos"]
    sinks: Bool[Tensor, " pos"]
    moved: dict[int, Float[Tensor, "5"]] = field(default_factory=dict)
    norms: list[tuple[float, float]] = field(default_factory=list)
    blind: bool = False
    _sums: dict[int, ColumnSums] = field(default_factory=dict)
    _entropy: dict[int, tuple[float, int]] = field(default_factory=dict)

    def norm(self, residual: Float[Tensor, "pos d_model"]) -> None:
        """See a block's output."""
        size = residual.float().norm(dim=-1)
        self.norms.append((float(size.median()), float(size.max())))

    def look(
        self,
        layer: int,
        block: Block,
        before: Float[Tensor, "1 head row key"],
        after: Float[Tensor, "1 head row key"],
    ) -> None:
        """See a block of query rows of a layer's pattern, unedited and edited."""
        if before.data_ptr() != after.data_ptr() and (self.edited[layer].any() or not torch.equal(before, after)):
            self._compare(layer, block, before, after)  # else the edit is of another row's layers
        if layer not in self._sums:
            self._sums[layer] = ColumnSums((1, after.shape[1], self.length), after.device)
        self._sums[layer].add(slice(0, 1), block, after.float())
        some = after[0, :, (-block.start) % ENTROPY_STEP :: ENTROPY_STEP].float()
        total, count = self._entropy.get(layer, (0.0, 0))
        entropy = float(-torch.xlogy(some, some).sum())
        self._entropy[layer] = (total + entropy, count + some.shape[0] * some.shape[1])

    @property
    def mass(self) -> Float[Tensor, "layer pos"]:
        """Mean far importance over heads."""
        facts = capabilities(self.model)
        mask = torch.ones(1, self.length, dtype=torch.bool, device=next(iter(self._sums.values())).far.device)
        seen_by = {w: visibility(mask, causal=facts.causal, window=w) for w in set(facts.windows)}
        means = [self._sums[n].means(seen_by[window])[1][0] for n, window in enumerate(facts.windows)]
        return torch.stack([mean.double().mean(0).float().cpu() for mean in means])

    def _compare(self, layer: int, block: Block, before: Tensor, after: Tensor) -> None:
        change = (after - before)[0].float()
        gained = change.clamp(min=0).sum((0, 1))
        edited = self.edited[layer, block.keys].to(change.device)
        others = self.sinks[block.keys].to(change.device) & ~edited
        parts = [
            gained.sum() - change.sum(),
            gained[edited].sum(),
            gained[others].sum(),
            gained[~(edited | others)].sum(),
            -change.sum(),
        ]
        share = torch.stack(parts).cpu() / (change.shape[0] * self.length)
        self.moved[layer] = self.moved.get(layer, 0) + share

    def summary(self) -> dict[str, float]:
        """Means over layers: shares of attention that moved (edited layers), entropy, norms."""
        moved = [math.nan if self.blind else 0.0] * len(MOVED)
        if self.moved:
            moved = torch.stack(list(self.moved.values())).mean(0).tolist()
        return {
            **dict(zip(MOVED, moved, strict=True)),
            "entropy": sum(total / count for total, count in self._entropy.values()) / len(self._entropy),
            "median_norm": sum(a for a, _ in self.norms) / len(self.norms),
            "largest_norm": max(b for _, b in self.norms),
        }


class Watches:
    """One :class:`Watch` for each row of a forward, and the hooks that show them what passes."""

    def __init__(self, rows: Sequence[Watch]) -> None:
        self.rows = rows
        self._before: Tensor | None = None

    def look(
        self,
        layer: int,
        block: Block,
        before: Float[Tensor, "batch head row key"],
        after: Float[Tensor, "batch head row key"],
    ) -> None:
        """See a block of query rows of a layer's pattern, unedited and edited."""
        for b, watch in enumerate(self.rows):
            watch.look(layer, block, before[b : b + 1], after[b : b + 1])

    def hooks(self) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
        """The hooks that belong before the edit's, and those after it; under flash only residual norms are hooked."""
        first: list[tuple[str, Any]] = []
        last: list[tuple[str, Any]] = []
        length = self.rows[0].length
        for layer in range(capabilities(self.rows[0].model).n_layers):

            def keep(pattern: Tensor, hook: Any) -> None:
                self._before = pattern

            def look(pattern: Tensor, hook: Any, layer: int = layer) -> None:
                before = pattern if self._before is None else self._before
                self._before = None
                for block in blocks(View(1.0, causal=False), length, length, ROWS):
                    self.look(layer, block, before[:, :, block.rows], pattern[:, :, block.rows])

            def norm(residual: Tensor, hook: Any) -> None:
                for watch, row in zip(self.rows, residual, strict=True):
                    watch.norm(row)

            point = attention_hook(layer, "hook_pattern")
            first.append((point, either_backend(keep)))
            last += [(point, either_backend(look)), (block_output(layer), norm)]
        return first, last
