"""Causal proof of a trace: what becomes of a sink when a component's output at it is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sinklens.bridge.requirements import refuse_unless_softmax
from sinklens.find.lifetimes import activity
from sinklens.residual.batched_edits import Row, check_writing, run_rows
from sinklens.residual.components import Component
from sinklens.trace.phases import WRITER, Traced

if TYPE_CHECKING:
    from sinklens.trace.gathered import Looked

PART = 0.05  # of what is written: components that are replaced together to unmake a sink
AFTER = 3  # layers behind a phase in which an eraser's replacement is judged


class Causes:
    """Rows of interventions for one traced phase after the other.

    For each writer by share (and each eraser) what it adds at the sink is replaced: at the sink alone, at all sinks of
    the sequence at once; every component before the last writer is replaced too (its total effect: what it does by
    itself and by feeding the writer). Controls: the same replacement in a random later layer of the phase, and the
    writer's output at a random ordinary token.
    """

    def __init__(
        self,
        model: TransformerBridge,
        own: Looked,
        extra: Looked | None,
        replacements: Sequence[str],
        doses: Sequence[float],
        *,
        loss: bool,
        seed: int,
    ) -> None:
        refuse_unless_softmax(model, "what a replacement does to the margin (trace_sinks with causal=True)")
        self.model, self.own, self.extra, self.loss = model, own, extra, loss
        self.replacements, self.doses = tuple(replacements), tuple(doses)
        self.draw = torch.Generator().manual_seed(seed)
        self.notes: list[str] = []
        self._same: dict[int, Tensor] = {}
        self._checked: set[str] = set()

    def of(self, one: Traced) -> list[dict[str, Any]]:
        """Every replacement of one phase, with its effects."""
        ids = self.own.found.tokens[one.sequence].trim().ids.to(self.model.cfg.device)
        no_sink = self.own.no_sink[one.sequence]
        writers = _writing(one, WRITER)
        erasers = one.erasers()
        rows: list[Row] = [Row(None)]
        labels: list[dict[str, Any]] = [{"component": "", "layer": -1, "at": "", "replacement": ""}]

        def add(component: Component, positions: Sequence[int], delta: Tensor, at: str, replacement: str) -> None:
            rows.append(Row(component, tuple(positions), delta))
            labels.append({"component": component[0], "layer": component[1], "at": at, "replacement": replacement})

        others = [s for s in self.own.found if s.sequence == one.sequence]
        for component in [*writers, *erasers]:
            self._check(ids, component, one.position)
            for name in self.replacements:
                add(
                    component,
                    [one.position],
                    self._delta(one, one.position, one.token_id, component, name),
                    "sink",
                    name,
                )
        for component in writers:
            old = self._old(one.sequence, one.position, component)
            for dose in self.doses:
                add(component, [one.position], (dose - 1) * old[None], "sink", f"x {dose:g}")
            if len(others) > 1:
                deltas = [self._delta(one, s.position, s.token_id, component, "same_id") for s in others]
                add(component, [s.position for s in others], torch.cat(deltas), "all sinks", "same_id")
            self._controls(one, component, no_sink, add)
        if writers:
            last = self.own.components.index(writers[-1])
            for component in self.own.components[:last]:
                if component not in writers and component[0] in ("attn", "mlp"):
                    delta = self._delta(one, one.position, one.token_id, component, "same_id")
                    add(component, [one.position], delta, "sink", "same_id")
        scored = None
        if self.loss:
            kept = no_sink[:-1].nonzero().flatten()
            scored = kept if len(kept) else None
        last = None if self.doses else one.phase.end + AFTER
        seen = run_rows(
            self.model, ids, rows, [one.position], no_sink, scored, last=last, state_layer=one.phase.reference
        )
        lives = self._lives(one, seen.beta[:, 0])
        rho = [_rho(state, one.direction) for state in seen.states[:, 0]]
        table = []
        for r, label in enumerate(labels):
            first = max(one.phase.onset, label["layer"] + 1)
            inside = slice(min(first, one.phase.end), one.phase.end + 1)
            behind = slice(one.phase.end + 1, one.phase.end + 1 + AFTER)
            row = label | {"trace": one.sink, "phase": one.number, "writer": self._is(label, writers)}
            for name in ("margin", "alpha", "beta"):
                values = getattr(seen, name)[:, 0]
                row[name] = float(values[r, inside].nanmean())
                row[f"d_{name}"] = row[name] - float(values[0, inside].nanmean())
            row |= {"life": lives[r], "d_life": lives[r] - lives[0], "rho": rho[r], "d_rho": rho[r] - rho[0]}
            row["d_margin_after"] = float((seen.margin[r, 0, behind] - seen.margin[0, 0, behind]).nanmean())
            row["loss"] = float(seen.loss[r])
            row["d_loss"] = float(seen.loss[r] - seen.loss[0])
            table.append(row)
        return table

    def _lives(self, one: Traced, beta: Float[Tensor, "row layer"]) -> list[int]:
        """How many layers behind the phase's onset, among those that were run, the sink is active in, in every row."""
        found = self.own.found
        layers = slice(one.phase.onset, None)
        uniform = found.uniform[one.sequence][:, one.position]
        mass = beta.T.nan_to_num()[None]  # a batch of one, rows in the place of positions
        even = uniform[None, :, None].expand_as(mass)
        return activity(mass, even, found.thresholds)[0, layers].sum(0).tolist()

    def primary(self, sequence: int, traced: Sequence[Traced]) -> dict[str, Any] | None:
        """What becomes of the primary when the secondary sinks of its sequence are not written.

        Whatever writes at least 5 % of them is replaced at all of them by its mean over tokens of the same id; where
        many layers write, replacing the largest alone would leave the sinks in place. The mean itself is put there, not
        the difference to what stood there: what feeds a writer is replaced too, so less than that may stand there by
        then, and the same sink may have several phases. None where the sequence lacks a primary or a secondary.
        """
        position = self.own.found.strongest[sequence]
        secondary = [one for one in traced if one.sequence == sequence and one.kind == "secondary"]
        edits = []
        for one in secondary:
            for component in _writing(one, PART):
                stands = self._same_id(one.token_id)[self.own.components.index(component)]
                edits.append(Row(component, (one.position,), instead=stands[None]))
        if position is None or not edits:
            return None
        ids = self.own.found.tokens[sequence].trim().ids.to(self.model.cfg.device)
        for edit in edits:
            self._check(ids, edit.component, edit.positions[0])
        whole = replace(edits[0], also=tuple(edits[1:]))
        tracked = [position, *sorted({one.position for one in secondary} - {position})]
        seen = run_rows(self.model, ids, [Row(None), whole], tracked, self.own.no_sink[sequence])
        found, n_layers = self.own.found, seen.margin.shape[2]
        active = activity(found.mass[sequence], found.uniform[sequence], found.thresholds)[:, position]
        alive = [sum(one.phase.onset <= n <= one.phase.end for one in secondary) for n in range(n_layers)]
        return {
            "sequence": sequence,
            "document": self.own.found.tokens.documents[sequence],
            "position": position,
            "secondary": len(tracked) - 1,
            "active": active.tolist(),
            "alive": alive,
            "alpha": seen.alpha[0, 0].tolist(),
            "margin": seen.margin[0, 0].tolist(),
            "alpha_without": seen.alpha[1, 0].tolist(),
            "margin_without": seen.margin[1, 0].tolist(),
            "secondary_alpha": seen.alpha[0, 1:].sum(0).tolist(),
            "secondary_alpha_without": seen.alpha[1, 1:].sum(0).tolist(),
        }

    def _check(self, ids: Tensor, component: Component | None, position: int) -> None:
        if component is not None and component[0] not in self._checked:
            check_writing(self.model, ids, component, position)
            self._checked.add(component[0])

    @staticmethod
    def _is(label: dict[str, Any], writers: Sequence[Component]) -> bool:
        return (label["component"], label["layer"]) in writers

    def _controls(self, one: Traced, component: Component, no_sink: Tensor, add: Any) -> None:
        later = [c for c in self.own.components if c[0] == component[0] and component[1] < c[1] < one.phase.end]
        small = [c for c in later if abs(one.share(c)) < 0.05]
        if small:
            chosen = small[int(torch.randint(len(small), (1,), generator=self.draw))]
            delta = self._delta(one, one.position, one.token_id, chosen, "same_id")
            add(chosen, [one.position], delta, "random layer", f"same_id for {component[0]} {component[1]}")
        known = [p for p in self.own.positions[one.sequence] if bool(no_sink[p])]
        if known:
            token = known[int(torch.randint(len(known), (1,), generator=self.draw))]
            delta = self.own.ordinary()[self.own.components.index(component)] - self._old(
                one.sequence, token, component
            )
            add(component, [token], delta[None], "random token", "mean")

    def _old(self, sequence: int, position: int, component: Component) -> Float[Tensor, " d_model"]:
        return self.own.at(sequence, position)[0][self.own.components.index(component)]

    def _delta(
        self, one: Traced, position: int, token_id: int, component: Component, replacement: str
    ) -> Float[Tensor, "1 d_model"]:
        old = self._old(one.sequence, position, component)
        c = self.own.components.index(component)
        if replacement == "zero":
            return -old[None]
        if replacement == "mean":
            return (self.own.ordinary()[c] - old)[None]
        if replacement == "project":
            u = one.direction.to(old)
            return -((old @ u) * u)[None]
        return (self._same_id(token_id)[c] - old)[None]

    def _same_id(self, token_id: int) -> Float[Tensor, "component d_model"]:
        if token_id not in self._same:
            mean, count = self.own.same_id(token_id)
            if not count and self.extra is not None:
                mean, count = self.extra.same_id(token_id)
            if not count:
                mean = self.own.ordinary()
                self.notes.append(
                    f"token id {token_id} is always a sink: its replacement is the mean over ordinary tokens"
                )
            self._same[token_id] = mean
        return self._same[token_id]


def _writing(one: Traced, least: float) -> list[Component]:
    return [c for c, share in one.shares() if share >= least and c[0] in ("attn", "mlp")]


def _rho(state: Float[Tensor, " d_model"], u: Float[Tensor, " d_model"]) -> float:
    """``<x, u> / |x - <x, u> u|``."""
    along = float(state @ u.to(state))
    return along / max(float((state - along * u.to(state)).norm()), 1e-30)
