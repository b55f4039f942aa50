"""What a job measures: a small closed set of tasks, and users' functions. Each gives rows, one sequence at a time.

``sink_scores``   a row per sequence, position, layer and head: alpha, beta, uniform share, 1 where alpha > epsilon
``find_sinks``    a row per sink, or per sequence its counts
``token_loss``    a row per sequence, or per token, in nats
``experiment``    a row per sequence (or token) for the intervention and for each control: base, edited, differences

All but the last measure the model with the intervention in place. A sequence in which the intervention has nothing to
edit (it has no such sink) has ``edited`` False: the first three give the unedited model's numbers there,
``experiment`` gives NaN.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch

from sinklens.attention.backend import Backend
from sinklens.core.errors import BadInputError, SinklensWarning
from sinklens.experiment.controls import CONTROLS, Control
from sinklens.experiment.experiment import run_experiment
from sinklens.experiment.result import Experiment
from sinklens.find.scores import sink_scores as scores_of
from sinklens.find.sinks import find_sinks as sinks_of
from sinklens.forward.metrics import METRICS, token_loss as loss_per_token
from sinklens.inputs.tokens import check_positions
from sinklens.sweep.edits import function_of
from sinklens.sweep.measurement import Measurement
from sinklens.sweep.specs import TaskSpec

PER = ("sequence", "token")
Task = Callable[..., pd.DataFrame]


def sink_scores(m: Measurement, *, positions: Sequence[int] = (0,), epsilon: float = 0.3) -> pd.DataFrame:
    """Alpha and beta at some positions: ``sequence, edited, position, layer, head, alpha, beta, uniform, above``."""
    wanted = check_positions(positions)
    tables = []
    for b in range(len(m.tokens)):
        with m.edited(b):
            scores = scores_of(m.model, m.one(b), progress=False)
        here = [p for p in wanted if p < scores.alpha.shape[-1]]
        alpha, beta = (getattr(scores, name)[0][..., here] for name in ("alpha", "beta"))
        uniform = scores.uniform[0][:, None][..., here].expand_as(alpha)
        layer, head, position = (
            axis.flatten() for axis in torch.meshgrid(*map(torch.arange, alpha.shape), indexing="ij")
        )
        table = {
            "position": torch.tensor(here, dtype=torch.long)[position],
            "layer": layer,
            "head": head,
            "alpha": alpha.flatten(),
            "beta": beta.flatten(),
            "uniform": uniform.flatten(),
            "above": (alpha > epsilon).flatten().long(),
        }
        first = {"sequence": b, "edited": m.edits(b)}
        tables.append(pd.DataFrame({**{n: [v] * len(layer) for n, v in first.items()}, **_numpy(table)}))
    if not any(len(table) for table in tables):
        raise BadInputError(f"no sequence reaches any of the positions {list(wanted)}; nothing was measured")
    return pd.concat(tables, ignore_index=True)


def find_sinks(m: Measurement, *, per: str = "sink", **options: Any) -> pd.DataFrame:
    """The sinks of every sequence: ``SinkMap.to_dataframe`` per sink, or counts and the strongest sink per sequence."""
    if per not in ("sink", "sequence"):
        raise BadInputError(f"per must be 'sink' or 'sequence', got {per!r}")
    tables: list[pd.DataFrame] = []
    for b in range(len(m.tokens)):
        with m.edited(b), warnings.catch_warnings():
            warnings.simplefilter("ignore", SinklensWarning)  # the notes say it
            found = sinks_of(m.model, m.one(b), progress=False, **options)
        m.note(*found.notes)
        first = {"sequence": b, "edited": m.edits(b)}
        if per == "sink":
            table = found.to_dataframe().drop(columns="sequence")
            for place, (name, value) in enumerate(first.items()):
                table.insert(place, name, value)
            tables.append(table)
            continue
        top = found.strongest[0]
        strongest = next((s for s in found if s.position == top), None)
        counts = {kind: len(found.where(kind=kind)) for kind in ("primary", "secondary", "undetermined")}
        at_top = {"strongest": -1, "onset": -1, "end": -1, "mass": math.nan}
        if strongest is not None:
            at_top = {"strongest": top, "onset": strongest.onset, "end": strongest.end, "mass": strongest.mass}
        tables.append(pd.DataFrame([first | {"sinks": len(found), **counts, **at_top}]))
    filled = [table for table in tables if len(table)]
    return pd.concat(filled or tables[:1], ignore_index=True)


def token_loss(m: Measurement, *, per: str = "sequence", most_scored: int | None = None) -> pd.DataFrame:
    """Loss in nats: ``scored, loss_sum, loss`` per sequence, or ``position, token_id, loss`` per token."""
    _check_per(per)
    rows: list[dict[str, Any]] = []
    for b in range(len(m.tokens)):
        one, hooks = m.one(b), m.hooks if m.edits(b) else ()
        values = loss_per_token(m.model, one, hooks=hooks, most_scored=most_scored, seed=m.seed_here + b)[0].double()
        known = values.isfinite()
        first = {"sequence": b, "edited": m.edits(b)}
        if per == "sequence":
            total = float(values[known].sum())
            rows.append(first | {"scored": int(known.sum()), "loss_sum": total, "loss": float(values.nanmean())})
            continue
        ids = one.row(0).tolist()
        scored = known.nonzero().flatten().tolist()
        rows += [first | {"position": p, "token_id": ids[p], "loss": float(values[p])} for p in scored]
    return pd.DataFrame(rows)


def experiment(
    m: Measurement,
    *,
    controls: Sequence[Control] = ("random",),
    metrics: Sequence[Literal["loss", "kl", "top1"]] = ("loss", "kl", "top1"),
    most_scored: int | None = None,
    per: str = "sequence",
    backend: Backend = "auto",
) -> pd.DataFrame:
    """:func:`sinklens.run_experiment`: a row per sequence (or scored token), for the intervention and each control.

    Columns: ``control`` ("" is the intervention), ``scored``, ``base_loss, loss, d_loss, kl, top1``: means over the
    scored tokens; per token the values. NaN where nothing is edited, or the control has too few tokens to take.
    """
    _check_per(per)
    unknown = [c for c in controls if c not in CONTROLS] + [n for n in metrics if n not in METRICS]
    if unknown or isinstance(controls, str) or isinstance(metrics, str):
        raise BadInputError(
            f"controls are a list of {', '.join(CONTROLS)}, metrics of {', '.join(METRICS)}; got {unknown or controls}"
        )
    label, there = m.edit.label, [m.edits(b) for b in range(len(m.tokens))]
    if not any(there):
        return _unedited(m, controls, metrics, per)
    found = run_experiment(
        m.model,
        m.tokens,
        {label: m.hooks},
        controls=controls,
        metrics=metrics,
        sinks=m.found,
        most_scored=most_scored,
        seed=m.seed_here,
        backend=backend,
        progress=False,
    )
    m.note(*found.notes)
    ran = {(run.label, run.control) for run in found.runs}
    tables = [
        _effects(found, label, control, there, per)
        if (label, control) in ran
        else _unedited(m, [control], metrics, per, alone=True)
        for control in ("", *controls)
    ]
    order = ["sequence", "position", "row"] if per == "token" else ["sequence", "row"]
    ranked = [table.assign(row=n) for n, table in enumerate(tables)]
    joined = pd.concat([t for t in ranked if len(t)] or ranked[:1], ignore_index=True)
    return joined.sort_values(order, kind="stable", ignore_index=True).drop(columns="row")


def _effects(found: Experiment, label: str, control: str, there: Sequence[bool], per: str) -> pd.DataFrame:
    """The rows of one run."""
    base, run = found.index("base"), found.index(label, control)
    rows: list[dict[str, Any]] = []
    for b in range(len(found.tokens)):
        values = {n: (v[base, b].double(), v[run, b].double()) for n, v in found.metrics.items()}
        scored = next(iter(values.values()))[1].isfinite().nonzero().flatten().tolist()
        first = {"sequence": b, "edited": there[b], "control": control}
        if per == "token":
            rows += [
                first
                | {"position": p}
                | _differences({n: (x[p : p + 1], y[p : p + 1]) for n, (x, y) in values.items()})
                for p in scored
            ]
        else:
            kept = {n: (x[scored], y[scored]) for n, (x, y) in values.items()}
            rows.append(first | {"scored": len(scored)} | _differences(kept))
    return pd.DataFrame(rows)


def _differences(values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Means over tokens: of the loss before and after, of what compares with base by itself."""
    row: dict[str, float] = {}
    for name, (before, after) in values.items():
        row |= {f"base_{name}": float(before.mean())} if name == "loss" else {}
        row[name] = float(after.mean())
        row |= {f"d_{name}": float((after - before).mean())} if name == "loss" else {}
    return row


def _unedited(
    m: Measurement, controls: Sequence[str], metrics: Sequence[str], per: str, *, alone: bool = False
) -> pd.DataFrame:
    """The rows of runs that did not take place: NaN per sequence, nothing per token."""
    if per == "token":
        return pd.DataFrame()
    empty = torch.zeros(0, dtype=torch.float64)
    values = _differences(dict.fromkeys(metrics, (empty, empty)))
    return pd.DataFrame(
        {"sequence": b, "edited": m.edits(b), "control": control, "scored": 0} | values
        for b in range(len(m.tokens))
        for control in (controls if alone else ("", *controls))
    )


TASKS: dict[str, Task] = {
    "sink_scores": sink_scores,
    "find_sinks": find_sinks,
    "token_loss": token_loss,
    "experiment": experiment,
}


def check_task(spec: TaskSpec) -> None:
    """Refuse an unknown task or parameter before anything runs.

    Raises:
        BadInputError: as said.
    """
    if ":" in spec.task:
        function_of(spec.task)
        return
    if spec.task not in TASKS:
        raise BadInputError(f"no task {spec.task!r}; there are {', '.join(TASKS)}, and package.module:function")
    asked = inspect.signature(TASKS[spec.task]).parameters
    known = set(asked) - {"m", "options"}
    if "options" in asked:
        known |= set(inspect.signature(sinks_of).parameters) - {"model", "tokens", "scores", "progress"}
    unknown = sorted(set(spec.parameters) - known)
    if unknown:
        raise BadInputError(f"{spec.task} has no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def run_task(spec: TaskSpec, m: Measurement) -> pd.DataFrame:
    """The rows of a job, with the number of each sequence in the whole text, its document and its source.

    Raises:
        BadInputError: a user's function that gives no rows.
    """
    rows = _own(spec, m) if ":" in spec.task else TASKS[spec.task](m, **spec.parameters)
    if "sequence" not in rows or not len(rows):
        return rows
    here = rows["sequence"].tolist()
    if not all(isinstance(b, int) and 0 <= b < len(m.tokens) for b in here):
        raise BadInputError(f"{spec.task} gave sequences outside 0 to {len(m.tokens) - 1}, the ones of its tokens")
    placed = rows.drop(columns="sequence")
    placed.insert(0, "sequence", [b + m.rows[0] for b in here])
    placed.insert(1, "document", [m.tokens.documents[b] for b in here])
    placed.insert(2, "source", [m.tokens.sources[b] for b in here])
    return placed


def _own(spec: TaskSpec, m: Measurement) -> pd.DataFrame:
    given = function_of(spec.task)(m.model, m.tokens, hooks=m.hooks, seed=m.seed, **spec.parameters)
    if isinstance(given, pd.DataFrame):
        return given.reset_index(drop=True)
    rows = [given] if isinstance(given, Mapping) else list(given) if isinstance(given, Iterable) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise BadInputError(
            f"{spec.task} must give a DataFrame, a mapping or a list of these, not {type(given).__name__}"
        )
    return pd.DataFrame(rows)


def _check_per(per: str) -> None:
    if per not in PER:
        raise BadInputError(f"per must be one of {', '.join(PER)}, got {per!r}")


def _numpy(columns: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: values.numpy() for name, values in columns.items()}
