"""What ``run_experiment`` decides before anything runs: sinks, controls, scored positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sinklens.ablate.hooks import Hooks
from sinklens.core.errors import BadInputError
from sinklens.experiment.controls import CONTROLS, Candidates, candidates, control_places, slots
from sinklens.experiment.result import Run
from sinklens.find.locations import Place
from sinklens.find.sinkmap import SinkMap
from sinklens.forward.predictions import Predictions, drawn
from sinklens.inputs.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Planned(Run):
    """A run with its hooks and, per sequence, whether it counts and where it acts."""

    hooks: Sequence[Any] = ()
    counts: tuple[bool, ...] = ()
    places: tuple[tuple[Place, ...], ...] = ()


class Plan:
    """Everything that is decided before the first intervention runs: sinks, controls, scored positions."""

    def __init__(
        self,
        tokens: Tokens,
        found: SinkMap,
        named: dict[str, Sequence[Any]],
        controls: Sequence[str] | Mapping[str, Mapping[str, Sequence[Any]]],
        seed: int,
        most_scored: int | None,
        read: Predictions,
    ) -> None:
        self.tokens, self.found, self.seed, self.read = tokens, found, seed, read
        everywhere = range(len(tokens))
        wanted = {label: [_places(hooks, tokens, b) for b in everywhere] for label, hooks in named.items()}
        taken = [sorted({e.position for rows in wanted.values() for e in rows[b]}) for b in everywhere]
        among = [candidates(self.found, tokens, b, taken[b]) for b in everywhere]
        self.notes: list[str] = list(self.found.notes)
        if read.masked:
            self.notes.append("loss, kl and top1 are of masked tokens: -log p(token | the rest), [MASK] in its place")
        nothing: tuple[tuple[Place, ...], ...] = ((),) * len(tokens)
        self.runs: list[Planned] = [Planned("base", "", (), (True,) * len(tokens), nothing)]
        for label, hooks in named.items():
            rows = wanted[label]
            positional = isinstance(hooks, Hooks) and hooks.places is not None
            counts = (
                tuple(bool(row) for row in rows) if positional and hooks_have_tokens(hooks) else (True,) * len(rows)
            )
            if not any(counts):
                raise BadInputError(f"{label!r} has nothing to edit in any of these sequences")
            self.runs.append(Planned(label, "", hooks, counts, tuple(map(tuple, rows))))
            self.runs += self._controls(label, hooks, controls, rows, among)
        self.scored = [self._scored(b, most_scored) for b in everywhere]

    def _controls(
        self,
        label: str,
        hooks: Sequence[Any],
        controls: Sequence[str] | Mapping[str, Mapping[str, Sequence[Any]]],
        rows: list[list[Place]],
        among: list[Candidates],
    ) -> list[Planned]:
        everywhere = (True,) * len(rows)
        if isinstance(controls, Mapping):
            own = controls.get(label, {})
            return [Planned(label, n, h, everywhere, ((),) * len(rows)) for n, h in own.items()]
        if not isinstance(hooks, Hooks) or hooks.places is None or not hooks_have_tokens(hooks):
            return []
        made: list[Planned] = []
        for kind in controls:
            if kind == "recent" and hooks.residual:
                self.notes.append(f"{label}: no 'recent' control; an edit of the residual stream has no queries")
                continue
            places, complete = control_places(kind, rows, among, self.tokens, self.found, self.seed)
            if not any(complete):
                self.notes.append(f"{label}: no {kind!r} control; no sequence has as many such tokens as sinks")
                continue
            try:
                rebuilt = hooks.rebuilt(places)
            except BadInputError as error:
                self.notes.append(f"{label}: no {kind!r} control; {error}")
                continue
            at = [tuple(e for e in places.entries if e.sequence == b) for b in range(len(rows))]
            kept = ((),) * len(rows) if kind == "recent" else tuple(at)
            made.append(Planned(label, kind, rebuilt, tuple(complete), kept))
            if sum(complete) < sum(bool(row) for row in rows):
                self.notes.append(
                    f"{label}: {kind!r} control in {sum(complete)} of {sum(bool(r) for r in rows)} sequences; the "
                    f"others have fewer such tokens than sinks"
                )
        return made

    def _scored(self, b: int, most: int | None) -> Int[Tensor, " scored"]:
        """Where predictions are judged: not at sinks, nor where any run edits."""
        length = int(self.tokens.lengths[b])
        left_out = {p for s, p in self.found.places or () if s == b}
        left_out |= {e.position for run in self.runs for e in run.places[b]}
        kept = torch.tensor([p for p in self.read.scorable(self.tokens, b) if p not in left_out], dtype=torch.long)
        if not len(kept):
            raise BadInputError(
                f"sequence {b} ({self.tokens.sources[b]}, {length} tokens) has no position left to score: each one is "
                f"a sink, edited, a control, or a special token of an encoder; give longer sequences or fewer edits"
            )
        return drawn(kept, most, self.seed + b)


def hooks_have_tokens(hooks: Sequence[Any]) -> bool:
    """Whether an intervention acts at tokens (not at the learned logit alone, nor everywhere)."""
    return isinstance(hooks, Hooks) and hooks.places is not None and hooks.places.columns_wanted


def _places(hooks: Sequence[Any], tokens: Tokens, sequence: int) -> list[Place]:
    if not isinstance(hooks, Hooks) or hooks.places is None:
        return []
    return slots(hooks.places, tokens, sequence)


def check_controls(controls: Any, named: dict[str, Sequence[Any]]) -> None:
    """Refuse names and controls that cannot be honoured, before anything runs."""
    if "base" in named:
        raise BadInputError("'base' is the unedited run; call your intervention something else")
    if isinstance(controls, Mapping):
        unknown = sorted(set(controls) - set(named))
        if unknown:
            raise BadInputError(f"controls are given for {unknown}, which are no interventions")
        return
    unknown = [c for c in controls if c not in CONTROLS] if not isinstance(controls, str) else [controls]
    if unknown:
        raise BadInputError(f"controls must be names from {', '.join(CONTROLS)}, in a list; got {unknown}")
    plain = [label for label, hooks in named.items() if not isinstance(hooks, Hooks)]
    if controls and plain:
        raise BadInputError(
            f"{plain} are plain lists of hooks, so sinklens cannot make controls for them: pass controls=() or your "
            f"own, controls={{label: {{name: hooks}}}}"
        )
