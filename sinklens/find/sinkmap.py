"""``Sink`` and ``SinkMap``: the objects that a person reasons about."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.find.lifetimes import Kind, Life, Thresholds, activity, kind_of, lives, main_life, strongest
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from sinklens.show.circuitsvis import TokenView


@dataclass(frozen=True)
class Sink(ShownInJupyter, table="_fields"):
    """One sink of one sequence.

    Attributes:
        sequence, position: where; the position counts from the sequence's first unpadded token.
        token, token_id: what stands there.
        kind: ``"primary"``, ``"secondary"`` or ``"undetermined"`` (fewer than 6 layers).
        reason: why it is not primary: late_onset, early_end, both, early_onset, late_end, no_primary; or why the
            kind is undetermined: few_layers, too_few_queries.
        onset, end, lifetime: layers in which attention uses it; of its life with the largest summed mass.
        mass: mean over that life of the mean far importance over heads; NaN where beta is undefined.
        bridged: inactive layers inside the life.
        episodes: all its lives as (onset, end, mass).
        masses: mean far importance over heads, per layer.
        heads: (layer, head) with far importance above ``head_use``.
        attended: whether it is active by attention in any layer; None where beta is undefined.
        special: whether a special token stands there (BOS, [CLS], [SEP], ...), by id.
    """

    sequence: int
    position: int
    token: str
    token_id: int
    kind: str
    reason: str
    onset: int
    end: int
    lifetime: int
    mass: float
    bridged: int
    episodes: tuple[tuple[int, int, float], ...]
    masses: tuple[float, ...]
    heads: tuple[tuple[int, int], ...]
    attended: bool | None
    special: bool = False

    @property
    def residual_onset(self) -> int:
        """The block whose output first carries it: one before attention's onset; -1 is the embedding."""
        return self.onset - 1


@public_methods
@dataclass(frozen=True, eq=False)
class SinkMap(ShownInJupyter):
    """The sinks of a batch of sequences; iterate over it for :class:`Sink` objects.

    Attributes:
        sinks: sorted by sequence and position.
        strongest: per sequence the position of P, or None where nothing is strong and lasting.
        unattended: massive tokens that attention never uses (direction method): a class of their own.
        mass, uniform: mean far importance over heads, and the uniform share.
        tokens: the sequences.
        thresholds, method: how the sinks were found.
        notes: what the reader should know, such as sequences with too few queries.
        info: model and versions.
        places: (sequence, position) of all sinks that were found; a filtered map still knows them, since "no sink"
            means none of these.
    """

    sinks: tuple[Sink, ...]
    strongest: tuple[int | None, ...]
    unattended: tuple[Sink, ...]
    mass: Float[Tensor, "batch layer pos"]
    uniform: Float[Tensor, "batch layer pos"]
    tokens: Tokens
    thresholds: Thresholds
    method: str
    notes: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    places: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.places is None:
            object.__setattr__(self, "places", tuple((s.sequence, s.position) for s in self.sinks))

    def __iter__(self) -> Iterator[Sink]:
        return iter(self.sinks)

    def __len__(self) -> int:
        return len(self.sinks)

    def __repr__(self) -> str:
        lines = [
            f"SinkMap of {len(self.tokens)} sequence(s) by {self.method}: {len(self.primary)} primary, "
            f"{len(self.secondary)} secondary, {len(self.where(kind='undetermined'))} undetermined"
        ]
        for sink in self.sinks[:12]:
            reason = f" ({sink.reason})" if sink.reason else ""
            lines.append(
                f"  sequence {sink.sequence}, position {sink.position} {sink.token!r}: {sink.kind}{reason}, "
                f"layers {sink.onset} to {sink.end}, mass {sink.mass:.3f}"
            )
        if len(self.sinks) > 12:
            lines.append(f"  ... and {len(self.sinks) - 12} more: to_dataframe() has them all")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.mass.shape[1]

    @property
    def primary(self) -> SinkMap:
        """The primary sinks only."""
        return self.where(kind="primary")

    @property
    def secondary(self) -> SinkMap:
        """The secondary sinks only."""
        return self.where(kind="secondary")

    def where(
        self,
        *,
        kind: Kind | None = None,
        layer: int | None = None,
        token: str | None = None,
        sequence: int | None = None,
        special: bool | None = None,
    ) -> SinkMap:
        """The sinks of a kind, alive at a layer, of a token's text, of a sequence, or at special tokens (or not)."""
        if layer is not None and not 0 <= layer < self.n_layers:
            raise BadInputError(f"layer {layer} is out of range: the model has {self.n_layers}")
        if sequence is not None and not 0 <= sequence < len(self.tokens):
            raise BadInputError(f"sequence {sequence} is out of range: there are {len(self.tokens)}")
        kept = (
            sink
            for sink in self.sinks
            if (kind is None or sink.kind == kind)
            and (layer is None or any(a <= layer <= b for a, b, _ in sink.episodes))
            and (token is None or sink.token == token)
            and (sequence is None or sink.sequence == sequence)
            and (special is None or sink.special == special)
        )
        return replace(self, sinks=tuple(kept))

    def cut(self, sequences: Sequence[int], columns: int) -> SinkMap:
        """The sinks that stand in the first ``columns`` tokens of some sequences, as they were found in the whole text.

        Short texts have too few queries to tell sinks; in a causal model what a token is does not depend on what comes
        after it. Masses and lives stay those of the whole text.
        """
        index = list(sequences)
        if any(not 0 <= b < len(self.tokens) for b in index) or len(set(index)) < len(index):
            raise BadInputError(f"sequences {index} are out of range or not distinct: there are {len(self.tokens)}")
        kept, number = [], {b: n for n, b in enumerate(index)}
        inside = [s for s in (*self.sinks, *self.unattended) if s.sequence in number and s.position < columns]
        for sink in sorted(inside, key=lambda s: (number[s.sequence], s.position)):
            kept.append(replace(sink, sequence=number[sink.sequence]))
        alone = {(number[s.sequence], s.position) for s in self.unattended if s.sequence in number}
        first = [self.strongest[b] for b in index]
        return replace(
            self,
            sinks=tuple(s for s in kept if (s.sequence, s.position) not in alone),
            unattended=tuple(s for s in kept if (s.sequence, s.position) in alone),
            strongest=tuple(p if p is not None and p < columns else None for p in first),
            mass=self.mass[index][..., :columns],
            uniform=self.uniform[index][..., :columns],
            tokens=self.tokens[index].first(columns),
            places=tuple((number[b], p) for b, p in self.places or () if b in number and p < columns),
        )

    def positions(self, sequence: int = 0) -> list[int]:
        """The positions of the sinks of one sequence."""
        return [sink.position for sink in self.where(sequence=sequence)]

    def levels(self) -> pd.DataFrame:
        """How many sinks have each (onset, lifetime), with their kinds and mean mass (Wong et al.'s sink levels).

        For ``method="wong"`` the onset is the published one: the first block output, ``residual_onset``.
        """
        table = self.to_dataframe()
        if self.method == "wong":
            table["onset"] = table.residual_onset
        if table.empty:
            return pd.DataFrame(columns=pd.Index(["onset", "lifetime", "kind", "count", "mass"]))
        grouped = table.groupby(["onset", "lifetime", "kind"], as_index=False).agg(
            count=("position", "size"), mass=("mass", "mean")
        )
        return grouped.sort_values(["count", "onset"], ascending=[False, True], ignore_index=True)

    def sweep(self, name: str = "activity", values: Sequence[float | int] = (0.03, 0.05, 0.07, 0.1)) -> pd.DataFrame:
        """How the counts depend on a threshold: one row per value. Counts have no plateau; publish this with them.

        Only for sinks found by attention; costs no forward.
        """
        if self.method != "attention":
            raise BadInputError(f"sweep needs sinks found by method='attention', not {self.method!r}")
        if name not in asdict(self.thresholds):
            raise BadInputError(f"no threshold {name!r}; there are {', '.join(asdict(self.thresholds))}")
        if not values:
            raise BadInputError("sweep needs at least one value")
        rows = []
        for value in values:
            thresholds = replace(self.thresholds, **{name: value})
            found, _ = assemble(
                activity(self.mass, self.uniform, thresholds), self.mass, None, self.tokens, thresholds, attended=None
            )
            masses = torch.tensor([sink.mass for sink in found], dtype=torch.float64)
            counts = {kind: sum(s.kind == kind for s in found) for kind in ("primary", "secondary", "undetermined")}
            rows.append(
                {
                    name: value,
                    "sinks": len(found),
                    **counts,
                    "sequences_with_secondary": len({s.sequence for s in found if s.kind == "secondary"}),
                    "smallest_mass": float(masses.min()) if len(found) else math.nan,
                }
            )
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sink."""
        rows = [
            {
                "sequence": s.sequence,
                "position": s.position,
                "token": s.token,
                "token_id": s.token_id,
                "kind": s.kind,
                "reason": s.reason,
                "onset": s.onset,
                "end": s.end,
                "lifetime": s.lifetime,
                "residual_onset": s.residual_onset,
                "mass": s.mass,
                "bridged": s.bridged,
                "episodes": len(s.episodes),
                "heads": len(s.heads),
                "attended": s.attended,
                "special": s.special,
            }
            for s in self.sinks
        ]
        columns = ["sequence", "position", "token", "token_id", "kind", "reason", "onset", "end", "lifetime"]
        columns += ["residual_onset", "mass", "bridged", "episodes", "heads", "attended", "special"]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def plot(self) -> Figure:
        """The sinks' timeline: a row per sink, a column per layer, mass as colour."""
        from sinklens.find.figures import timeline  # plotly is slow to load

        return timeline(self)

    def plot_sweep(
        self, name: str = "activity", values: Sequence[float | int] = (0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2)
    ) -> Figure:
        """The counts of :meth:`sweep` as curves."""
        from sinklens.find.figures import sweep_curves  # plotly is slow to load

        return sweep_curves(self.sweep(name, values), name, getattr(self.thresholds, name))

    def token_view(self, sequence: int = 0) -> TokenView:
        """The text of one sequence, coloured by mass at a layer that the reader picks (circuitsvis, offline)."""
        from sinklens.find.token_view import token_view  # plotly is slow to load

        return token_view(self, sequence)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file with a JSON header, whole or not at all."""
        tensors = {"mass": self.mass, "uniform": self.uniform}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {
            "sinks": [asdict(sink) for sink in self.sinks],
            "unattended": [asdict(sink) for sink in self.unattended],
            "strongest": list(self.strongest),
            "places": [list(place) for place in self.places or ()],
            "thresholds": asdict(self.thresholds),
            "method": self.method,
            "notes": list(self.notes),
            "tokens": self.tokens.meta(),
            "info": self.info,
        }
        return save_tensors(path, "SinkMap", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SinkMap:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "SinkMap")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            sinks=tuple(sink_from_json(s) for s in meta["sinks"]),
            unattended=tuple(sink_from_json(s) for s in meta["unattended"]),
            strongest=tuple(meta["strongest"]),
            places=tuple((int(a), int(b)) for a, b in meta["places"]),
            mass=tensors["mass"],
            uniform=tensors["uniform"],
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            thresholds=Thresholds(**meta["thresholds"]),
            method=meta["method"],
            notes=tuple(meta["notes"]),
            info=meta["info"],
        )


def sink_from_json(content: dict[str, Any]) -> Sink:
    """A sink from its fields as JSON holds them."""
    episodes = tuple((int(a), int(b), float(m)) for a, b, m in content["episodes"])
    heads = tuple((int(a), int(b)) for a, b in content["heads"])
    return Sink(**{**content, "episodes": episodes, "heads": heads, "masses": tuple(content["masses"])})


def assemble(
    active: Bool[Tensor, "batch layer pos"],
    mass: Float[Tensor, "batch layer pos"],
    heads_in_use: Bool[Tensor, "batch layer head pos"] | None,
    tokens: Tokens,
    thresholds: Thresholds,
    *,
    attended: Bool[Tensor, "batch layer pos"] | None,
    given_strongest: Sequence[int | None] | None = None,
) -> tuple[tuple[Sink, ...], tuple[int | None, ...]]:
    """Turn activity into sinks with lives and kinds, and name P per sequence.

    ``attended`` is activity by attention, where ``active`` means something else; ``given_strongest`` fixes P.
    """
    n_layers = active.shape[1]
    sinks: list[Sink] = []
    chosen: list[int | None] = []
    for b in range(len(tokens)):
        length = int(tokens.lengths[b])
        found: dict[int, list[Life]] = {}
        for p in active[b, :, :length].any(0).nonzero().flatten().tolist():
            known = None if attended is None else [True] * n_layers  # other methods judge every layer
            at = lives(active[b, :, p].tolist(), mass[b, :, p].tolist(), thresholds, known)
            if at:
                found[p] = at
        last = {p: int(active[b, :, p].nonzero()[-1]) for p in found}
        top = strongest(found, last, n_layers, thresholds) if given_strongest is None else given_strongest[b]
        chosen.append(top)
        reference = main_life(found[top]) if top is not None and top in found else None
        for p, at in sorted(found.items()):
            life = main_life(at)
            kind, reason = kind_of(life, reference, n_layers, thresholds)
            if reason == "no_primary" and bool(mass[b].isnan().all()):
                kind, reason = "undetermined", "too_few_queries"
            use = [] if heads_in_use is None else heads_in_use[b, :, :, p].nonzero().tolist()
            unknown = bool(mass[b, :, p].isnan().all())
            by_attention = active if attended is None else attended
            sinks.append(
                Sink(
                    sequence=b,
                    position=p,
                    token=tokens.labels[b][p],
                    token_id=int(tokens.row(b)[p]),
                    kind=kind,
                    reason=reason,
                    onset=life.onset,
                    end=life.end,
                    lifetime=life.lifetime,
                    mass=life.mass,
                    bridged=life.bridged,
                    episodes=tuple((e.onset, e.end, e.mass) for e in at),
                    masses=tuple(mass[b, :, p].tolist()),
                    heads=tuple((layer, head) for layer, head in use),
                    attended=None if unknown else bool(by_attention[b, :, p].any()),
                    special=bool(tokens.special[b][tokens.mask[b]][p]),
                )
            )
    return tuple(sinks), tuple(chosen)
