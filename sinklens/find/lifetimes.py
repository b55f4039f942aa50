"""From activity per layer to lives and kinds: pure functions on plain numbers (docs/definitions.md, section 2).

A position is active at layer l if ``mean_h beta >= max(activity, uniform_factor * u)``. A life is a run of active
layers with gaps of at most ``gap`` layers bridged, at least ``max(1, ceil(min_life * L))`` long. The kind compares a
life with that of P, the position with the largest mass summed over its life.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public_methods
from sinklens.show.notebook import ShownInJupyter

Kind = Literal["primary", "secondary", "undetermined"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FEWEST_LAYERS_FOR_KINDS = 6


@public_methods
@dataclass(frozen=True)
class Thresholds(ShownInJupyter, table="_fields"):
    """Every threshold of detection, by name.

    Attributes:
        activity: smallest mean far importance over heads.
        uniform_factor: and at least so many times the uniform share.
        gap: longest run of inactive layers that a life bridges.
        min_life: shortest life, as a share of the layers.
        primary_mass: smallest mean mass over P's life.
        late: P must be active in this last share of the layers.
        onset_tolerance, end_tolerance: how far, as shares of the layers, a primary's life may differ from P's.
        head_use: beta above which a head uses the sink.
        norm_ratio, cosine: the direction method's criteria.
    """

    activity: float = 0.05
    uniform_factor: float = 3.0
    gap: int = 2
    min_life: float = 0.1
    primary_mass: float = 0.1
    late: float = 0.25
    onset_tolerance: float = 0.05
    end_tolerance: float = 0.1
    head_use: float = 0.3
    norm_ratio: float = 3.0
    cosine: float = 0.9

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            share = name in ("min_life", "late", "onset_tolerance", "end_tolerance", "cosine")
            if not 0 <= value < math.inf or (share and value > 1):
                raise BadInputError(f"{name} must be {'between 0 and 1' if share else 'at least 0'}, got {value}")

    def shortest_life(self, n_layers: int) -> int:
        """``max(1, ceil(min_life * L))``."""
        return max(1, math.ceil(self.min_life * n_layers - 1e-9))

    def onset_slack(self, n_layers: int) -> int:
        """``max(1, round(onset_tolerance * L))``, halves up."""
        return max(1, math.floor(self.onset_tolerance * n_layers + 0.5))

    def end_slack(self, n_layers: int) -> int:
        """``max(1, round(end_tolerance * L))``, halves up."""
        return max(1, math.floor(self.end_tolerance * n_layers + 0.5))


@dataclass(frozen=True)
class Life:
    """A run of active layers, from ``onset`` to ``end`` inclusive; ``bridged`` inactive layers lie inside.

    ``mass`` is the mean of ``mean_h beta`` over the life's layers, ``mass_sum`` its sum; layers where beta is
    undefined are left out of both.
    """

    onset: int
    end: int
    bridged: int
    mass_sum: float
    mass: float

    @property
    def lifetime(self) -> int:
        """Layers from onset to end."""
        return self.end - self.onset + 1


def activity(
    mass: Float[Tensor, "*batch layer pos"], uniform: Float[Tensor, "*batch layer pos"], thresholds: Thresholds
) -> Bool[Tensor, "*batch layer pos"]:
    """Where ``mean_h beta >= max(activity, uniform_factor * u)``; undefined (NaN) is not active."""
    least = min(
        thresholds.activity, torch.finfo(uniform.dtype).max
    )  # ReLU attention may exceed 1, so no number is wild
    floor = (thresholds.uniform_factor * uniform).clamp(min=least)
    return mass >= floor


def lives(
    active: Sequence[bool], mass: Sequence[float], thresholds: Thresholds, known: Sequence[bool] | None = None
) -> list[Life]:
    """The lives of one position, in order.

    ``known`` says in which layers activity could be judged (default: where the mass is no NaN); the others open no gap.
    """
    known = [not math.isnan(value) for value in mass] if known is None else known
    n_layers = len(active)
    runs: list[tuple[int, int, int]] = []
    for layer in (i for i in range(n_layers) if active[i]):
        if runs:
            onset, end, bridged = runs[-1]
            between = range(end + 1, layer)
            gap = sum(known[i] for i in between)
            if gap <= thresholds.gap:
                runs[-1] = (onset, layer, bridged + len(between))
                continue
        runs.append((layer, layer, 0))
    shortest = thresholds.shortest_life(n_layers)
    return [
        Life(onset, end, bridged, *_sum_and_mean(mass[onset : end + 1]))
        for onset, end, bridged in runs
        if end - onset + 1 >= shortest
    ]


def main_life(found: Sequence[Life]) -> Life:
    """The life with the largest summed mass; the longest where no mass is known."""
    return max(found, key=lambda life: (life.mass_sum, life.lifetime))


def strongest(
    found: Mapping[int, Sequence[Life]], last_active: Mapping[int, int], n_layers: int, thresholds: Thresholds
) -> int | None:
    """P: the position with the largest mass summed over its life, if it is strong and lasts; else None.

    Strong: mean mass over its life at least ``primary_mass``. Lasting: active in the last quarter of the layers.
    """
    if not found:
        return None
    position = max(found, key=lambda p: main_life(found[p]).mass_sum)
    life = main_life(found[position])
    lasts = last_active[position] >= math.floor((1 - thresholds.late) * n_layers)
    return position if lasts and life.mass >= thresholds.primary_mass else None


def kind_of(life: Life, primary: Life | None, n_layers: int, thresholds: Thresholds) -> tuple[str, str]:
    """``(kind, reason)``: primary if onset and end are near P's; else secondary, and why.

    Beside ``late_onset``, ``early_end`` and ``both``, a life that starts before P's or outlasts it is called
    ``early_onset`` or ``late_end``.
    """
    if n_layers < FEWEST_LAYERS_FOR_KINDS:
        return "undetermined", "few_layers"
    if primary is None:
        return "secondary", "no_primary"
    onset, end = life.onset - primary.onset, life.end - primary.end
    reasons = []
    if abs(onset) > thresholds.onset_slack(n_layers):
        reasons.append("late_onset" if onset > 0 else "early_onset")
    if abs(end) > thresholds.end_slack(n_layers):
        reasons.append("early_end" if end < 0 else "late_end")
    if not reasons:
        return "primary", ""
    return "secondary", "both" if reasons == ["late_onset", "early_end"] else "+".join(reasons)


def _sum_and_mean(values: Sequence[float]) -> tuple[float, float]:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known), math.fsum(known) / len(known) if known else math.nan
