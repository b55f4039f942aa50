"""What else an intervention changes: where freed attention goes, new sinks, attention's entropy, residual norms.

Hooks that only read, around an edit: one set before it, one after. Nothing larger than one layer's pattern is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.attention import attention_hook, block_output
from sinklens.importance import by_position, column_means, visibility
from sinklens.proof import capabilities

ENTROPY_STEP = 4  # every fourth query
MOVED = ("freed", "to_edited", "to_other_sinks", "to_ordinary", "to_nothing")


@dataclass(eq=False)
class Watch:
    """Side effects of one forward of one unpadded sequence.

    Attributes:
        edited: the columns that the edit acts on: [layer, pos].
        sinks: every other sink of the sequence: [pos].
        moved: per edited layer, attention per query and head: what was freed (all decreases), and what went to edited
            tokens, other sinks, ordinary tokens, nothing (a learned sink, or parked).
        mass: mean far importance over heads: [layer, pos].
        entropy: of each layer's attention in nats, mean over heads and every fourth query.
        norms: per layer the median and the largest residual norm over tokens.
    """

    model: TransformerBridge
    length: int
    edited: Bool[Tensor, "layer pos"]
    sinks: Bool[Tensor, " pos"]
    moved: dict[int, Float[Tensor, "5"]] = field(default_factory=dict)
    masses: list[Float[Tensor, " pos"]] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    norms: list[tuple[float, float]] = field(default_factory=list)
    _before: Tensor | None = None

    def before(self) -> list[tuple[str, Any]]:
        """Hooks that belong before the edit's."""

        def keep(pattern: Tensor, hook: Any) -> None:
            self._before = pattern

        layers = range(capabilities(self.model).n_layers)
        return [(attention_hook(layer, "hook_pattern"), keep) for layer in layers]

    def after(self) -> list[tuple[str, Any]]:
        """Hooks that belong after the edit's."""
        facts = capabilities(self.model)
        mask = torch.ones(1, self.length, dtype=torch.bool, device=self.model.cfg.device)
        seen_by = {w: visibility(mask, causal=facts.causal, window=w) for w in set(facts.windows)}
        hooks: list[tuple[str, Any]] = []
        for layer in range(facts.n_layers):

            def look(pattern: Tensor, hook: Any, layer: int = layer) -> None:
                window = facts.windows[layer]
                if self._before is not None and self._before.data_ptr() != pattern.data_ptr():
                    self._compare(layer, self._before, pattern)
                self._before = None
                found = column_means(pattern, mask, seen_by[window], causal=facts.causal, window=window)
                self.masses.append(by_position(found.beta, mask)[0].double().mean(0).float().cpu())
                some = pattern[0, :, ::ENTROPY_STEP].float()
                self.entropies.append(float(-torch.xlogy(some, some).sum(-1).mean()))

            def norm(residual: Tensor, hook: Any) -> None:
                size = residual[0].float().norm(dim=-1)
                self.norms.append((float(size.median()), float(size.max())))

            hooks += [(attention_hook(layer, "hook_pattern"), look), (block_output(layer), norm)]
        return hooks

    @property
    def mass(self) -> Float[Tensor, "layer pos"]:
        """Mean far importance over heads."""
        return torch.stack(self.masses)

    def _compare(self, layer: int, before: Tensor, after: Tensor) -> None:
        change = (after - before)[0].float()
        gained = change.clamp(min=0).sum((0, 1))
        edited = self.edited[layer].to(change.device)
        others = self.sinks.to(change.device) & ~edited
        parts = [
            gained.sum() - change.sum(),
            gained[edited].sum(),
            gained[others].sum(),
            gained[~(edited | others)].sum(),
            -change.sum(),
        ]
        self.moved[layer] = torch.stack(parts).cpu() / (change.shape[0] * change.shape[1])

    def summary(self) -> dict[str, float]:
        """Means over layers: shares of attention that moved (edited layers), entropy, norms."""
        moved = torch.stack(list(self.moved.values())).mean(0).tolist() if self.moved else [0.0] * len(MOVED)
        return {
            **dict(zip(MOVED, moved, strict=True)),
            "entropy": sum(self.entropies) / len(self.entropies),
            "median_norm": sum(a for a, _ in self.norms) / len(self.norms),
            "largest_norm": max(b for _, b in self.norms),
        }
