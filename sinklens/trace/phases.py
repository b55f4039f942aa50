"""``Traced``: one phase of one sink, and what every component adds along its direction."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.residual.components import Component

WRITER = 0.25  # smallest share of a writer
ERASER = 0.05  # of what was written, taken away between the reference layer and the end of the phase


@dataclass(frozen=True)
class Phase:
    """A run of active layers of a life, and the one where the sink's mass is largest."""

    onset: int
    end: int
    reference: int


@dataclass(frozen=True, eq=False)
class Traced:
    """One phase of one sink: what every component adds along the direction.

    Attributes:
        sink: its number in the map; sequence, position, token, token_id, kind, document: as there.
        number, phase: which phase of its life.
        components, contributions: ``<out, u>``, in the order in which they write.
        before: which of them write before the reference layer.
        cosines, norms: of what every component adds: its cosine with u, its length.
        same_cosines, same_norms: their means over tokens of the same id that are no sink; NaN where there is none.
        same: how many of them.
        projection: ``<x_ref, u>``; rho: over the length of the rest of the stream; norm: the stream's.
        direction: u.
    """

    sink: int
    sequence: int
    position: int
    token: str
    token_id: int
    kind: str
    document: int
    number: int
    phase: Phase
    components: tuple[Component, ...]
    contributions: Float[Tensor, " component"]
    before: Bool[Tensor, " component"]
    cosines: Float[Tensor, " component"]
    norms: Float[Tensor, " component"]
    same_cosines: Float[Tensor, " component"]
    same_norms: Float[Tensor, " component"]
    same: int
    projection: float
    rho: float
    norm: float
    direction: Float[Tensor, " d_model"]

    def share(self, component: Component) -> float:
        """``<out, u> / <x_ref, u>``."""
        return float(self.contributions[self.components.index(component)]) / self.projection

    def shares(self) -> list[tuple[Component, float]]:
        """Those that write before the reference layer, with their shares; they sum to 1."""
        return [(c, self.share(c)) for c, early in zip(self.components, self.before.tolist(), strict=True) if early]

    def writers(self) -> list[Component]:
        """The layers whose share is at least 0.25."""
        return [c for c, share in self.shares() if share >= WRITER and c[0] in ("attn", "mlp")]

    def erasers(self) -> list[Component]:
        """Those that take away at least 5 % between the reference layer and the end of the phase."""
        inside = [
            c for c in self.components if c[0] in ("attn", "mlp") and self.phase.reference <= c[1] <= self.phase.end
        ]
        return [c for c in inside if self.share(c) <= -ERASER]
