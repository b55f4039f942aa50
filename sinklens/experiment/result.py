"""``Experiment``: every token's metrics in every run, with intervals over documents."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import interval
from sinklens.core.storage import load_tensors, save_tensors
from sinklens.core.validation import public_methods
from sinklens.inputs.tokens import Tokens
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Run:
    """One row of an experiment: an intervention's label and, for its controls, the control's name."""

    label: str
    control: str


@public_methods
@dataclass(frozen=True, eq=False)
class Experiment(ShownInJupyter):
    """What interventions and controls changed.

    Attributes:
        runs: base first, then each intervention with its controls.
        metrics: by name, every scored token's value: [run, batch, pos], at the position that predicts (encoders: that
            is masked); NaN where it is not scored, or where the run does not count (nothing to edit, too few control
            tokens).
        side: side effects per run and sequence, see :meth:`side_effects`.
        tokens: the sequences that were measured.
        discovery: the sources of the other half, where the documents were split.
        notes: what the reader should know.
        info: model, versions, seed, thresholds.
    """

    runs: tuple[Run, ...]
    metrics: dict[str, Float[Tensor, "run batch pos"]]
    side: tuple[dict[str, Any], ...]
    tokens: Tokens
    discovery: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        table = self.to_dataframe()
        columns = [c for c in table if c not in ("label", "control")]
        lines = [f"Experiment on {len(self.tokens)} sequence(s): {', '.join(self.metrics)}"]
        for row in table.to_dict("records"):
            name = f"{row['label']} / {row['control']}" if row["control"] else row["label"]
            shown = ", ".join(f"{c} {row[c]:.4g}" for c in columns if row[c] == row[c])
            lines.append(f"  {name}: {shown}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def index(self, label: str, control: str = "") -> int:
        """The row of a run."""
        if Run(label, control) not in self.runs:
            known = ", ".join(f"{r.label!r}" + (f" / {r.control!r}" if r.control else "") for r in self.runs)
            raise BadInputError(f"no run {label!r} / {control!r}; there are {known}")
        return self.runs.index(Run(label, control))

    def change(self, metric: str, label: str, control: str = "") -> Float[Tensor, " batch"]:
        """Per sequence the mean change over scored tokens: from base for the loss and user metrics, else the value."""
        if metric not in self.metrics:
            raise BadInputError(f"no metric {metric!r}; there are {', '.join(self.metrics)}")
        values = self.metrics[metric].double()
        run = values[self.index(label, control)]
        if metric in ("kl", "top1"):
            return run.nanmean(-1)
        base = values[self.index("base", UNTRAINED if control == UNTRAINED else "")]
        return (run - base).nanmean(-1)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run: means over sequences, with 95 % bootstrap-t intervals over documents (16 or more, else NaN).

        ``loss`` is the run's own mean, ``d_loss`` its change from base on the same tokens; ``kl`` and ``top1`` compare
        with base by themselves. For controls ``beyond`` is the intervention's effect minus the control's on the
        sequences that have both, for the first metric that has a change.
        """
        main = next((m for m in self.metrics if m not in ("top1",)), next(iter(self.metrics)))
        rows = []
        for r, run in enumerate(self.runs):
            row: dict[str, Any] = {"label": run.label, "control": run.control}
            counted = ~self.metrics[main][r].isnan().all(-1)
            row["sequences"] = int(counted.sum())
            for name, values in self.metrics.items():
                own = values[r].double().nanmean(-1)
                row[name] = float(own.nanmean())
                if run.label == "base":
                    continue
                change = self.change(name, run.label, run.control)
                low, high = self._interval(change)
                if name in ("kl", "top1"):
                    row |= {f"{name}_low": low, f"{name}_high": high}
                else:
                    row |= {f"d_{name}": float(change.nanmean()), f"d_{name}_low": low, f"d_{name}_high": high}
            if run.control:
                effect = self.change(main, run.label) - self.change(main, run.label, run.control)
                low, high = self._interval(effect)
                row |= {"beyond": float(effect.nanmean()), "beyond_low": low, "beyond_high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def side_effects(self) -> pd.DataFrame:
        """One row per run: means over sequences of what else changed.

        ``freed``: attention per query and head that was taken away in the edited layers; ``to_edited``,
        ``to_other_sinks``, ``to_ordinary``, ``to_nothing`` (a learned sink, or parked): where it went. ``entropy``: of
        attention, in nats, every fourth query; ``median_norm``, ``largest_norm``: residual norms after the blocks;
        ``new_sinks``, ``lost_sinks``: per sequence, by the thresholds of :func:`sinklens.find_sinks`.
        """
        rows = []
        for run in self.runs:
            mine = [row for row in self.side if (row["label"], row["control"]) == (run.label, run.control)]
            if mine:
                numbers = [name for name in mine[0] if name not in ("label", "control", "sequence")]
                means = {name: sum(row[name] for row in mine) / len(mine) for name in numbers}
                rows.append({"label": run.label, "control": run.control, **means})
        return pd.DataFrame(rows)

    def plot(self, metric: str | None = None) -> Figure:
        """Forest plot: the effect of every intervention, its controls below it."""
        from sinklens.experiment.figures import forest  # plotly is slow to load

        return forest(self, metric)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {f"metric.{name}": values for name, values in self.metrics.items()}
        tensors |= {f"tokens.{name}": t for name, t in self.tokens.tensors().items()}
        meta = {
            "runs": [asdict(run) for run in self.runs],
            "metrics": list(self.metrics),
            "side": list(self.side),
            "discovery": self.discovery,
            "notes": list(self.notes),
            "info": self.info,
            "tokens": self.tokens.meta(),
        }
        return save_tensors(path, "Experiment", tensors, meta)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Experiment:
        """Read what :meth:`save` wrote."""
        tensors, meta = load_tensors(path, "Experiment")
        batch = {n.removeprefix("tokens."): t for n, t in tensors.items() if n.startswith("tokens.")}
        return cls(
            runs=tuple(Run(**run) for run in meta["runs"]),
            metrics={name: tensors[f"metric.{name}"] for name in meta["metrics"]},
            side=tuple(meta["side"]),
            tokens=Tokens.from_parts(batch, meta["tokens"]),
            discovery=None if meta["discovery"] is None else tuple(meta["discovery"]),
            notes=tuple(meta["notes"]),
            info=meta["info"],
        )

    def _interval(self, values: Float[Tensor, " batch"]) -> tuple[float, float]:
        known = (~values.isnan()).nonzero().flatten().tolist()
        documents: Sequence[int] = [self.tokens.documents[i] for i in known]
        found = interval(values[known], documents) if known else None
        return found if found is not None else (math.nan, math.nan)
