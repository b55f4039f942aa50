"""The table of doses: mass and life of a sink against how much of its writer is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinklens.residual.components import component_name
from sinklens.trace.phases import Traced

if TYPE_CHECKING:
    from sinklens.trace.result import SinkTrace


def dose_table(trace: SinkTrace, kind: str | None = None) -> list[dict[str, Any]]:
    """One row per (phase, dose) of its main writer's output, the unedited one as dose 1: alpha, life, margin, rho."""
    rows = []
    for one in of_kind(trace, kind):
        mine = [r for r in trace.causes if (r["trace"], r["phase"]) == (one.sink, one.number)]
        writers = one.writers()
        if not mine or not writers:
            continue
        writer = max(writers, key=one.share)
        dosed = [r for r in mine if (r["component"], r["layer"]) == writer and r["replacement"].startswith("x ")]
        known = [(float(r["replacement"].removeprefix("x ")), r) for r in dosed if r["at"] == "sink"]
        if not known:
            continue
        first = known[0][1]
        clean = {name: first[name] - first[f"d_{name}"] for name in ("alpha", "life", "margin", "rho")}
        known = [(d, r) for d, r in known if d != 1]
        rows += [
            sink_label(one) | {"writer": component_name(writer), "dose": dose} | {name: row[name] for name in clean}
            for dose, row in sorted([*known, (1.0, clean)], key=lambda pair: pair[0])
        ]
    return rows


def of_kind(trace: SinkTrace, kind: str | None) -> list[Traced]:
    """The traced phases of sinks of a kind; None: of all."""
    return [one for one in trace.traced if kind is None or one.kind == kind]


def sink_label(one: Traced) -> dict[str, Any]:
    """The columns that say which sink and which phase a row is about."""
    label = {"sequence": one.sequence, "document": one.document, "position": one.position, "token": one.token}
    return label | {"kind": one.kind, "phase": one.number}
