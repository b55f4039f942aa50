"""``compare``: runs side by side, every seed shown, as tables and as the figure of emergence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sinklens.core.errors import BadInputError
from sinklens.core.storage import write_text
from sinklens.core.validation import public, public_methods
from sinklens.lab.run import LabRun, by_variant, load_runs
from sinklens.show.notebook import ShownInJupyter

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

OPERATIONS = {
    "loss": "loss",
    "copy loss": "copy",
    "sink": "sink on the first token",
    "alpha": "alpha of the first token",
    "anywhere": "sink on any token",
    "slot_sink": "sink on the slot",
    "slot_mass": "mass on the slot",
    "row_sum": "row sum",
    "self": "self",
    "value_ratio": "value ratio",
}


@public_methods
@dataclass(frozen=True, eq=False)
class LabComparison(ShownInJupyter):
    """Finished runs of several variants, on the same sequences.

    Attributes:
        runs: all of them.
    """

    runs: tuple[LabRun, ...]

    def __repr__(self) -> str:
        return f"LabComparison of {len(self.runs)} run(s)"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per run at the end of training: losses, floors, sink figures, loss without the first token.

        ``sink`` is the share of sequences and heads whose first token's alpha exceeds 0.3, on relative weights where
        rows may sum to anything, else on the weights as they are (so that a slot's share counts against the token).
        """
        return pd.DataFrame([_row(run) for run in self.runs])

    def operations_table(self) -> pd.DataFrame:
        """Gu et al., Tables 4 and 6 at toy scale: one row per variant, each cell the values of all seeds."""
        return _all_seeds(self.to_dataframe(), OPERATIONS)

    def bos_table(self) -> pd.DataFrame:
        """Barbero et al., Table 2 at toy scale: loss and sink with the first token and without it, all seeds."""
        columns = {
            "loss_with": "loss, whole",
            "sink_with": "sink, whole",
            "loss_without": "loss, first token dropped",
            "sink_without": "sink, first token dropped",
            "cost of dropping": "cost in nats",
        }
        return _all_seeds(self.to_dataframe(), columns)

    def mechanisms_table(self) -> pd.DataFrame:
        """The 2x2 of the first token, all seeds: what it costs to take its write, its share, or both away (nats)."""
        return _all_seeds(self.to_dataframe(), {
            "sink": "sink", "ov_ratio": "size of its write", "without its write": "without its write",
            "without its share": "without its share", "without both": "without both",
            "mix without / with": "mixing without it", "spread without / with": "spread without it",
        })  # fmt: skip

    def emergence(self) -> pd.DataFrame:
        """One row per run and step: loss above the floor, and the sink rate (as :meth:`to_dataframe` has it)."""
        rows: list[dict[str, Any]] = []
        for run in self.runs:
            for step, group in run.metrics.groupby("step"):
                model, heads = group[group["head"] < 0].iloc[0], group[group["head"] >= 0]
                rows.append(
                    {"variant": run.config.name, "seed": run.seed, "step": int(str(step))}
                    | {"above floor": float(model["loss"] - model["floor"]), "loss": float(model["loss"])}
                    | {"sink": float(heads[sink_column(run)].mean()), "slot_sink": float(heads["slot_sink"].mean())}
                )
        return pd.DataFrame(rows)

    def plot(self, what: str = "emergence") -> Figure:
        """The figure "emergence" (loss and sink rate against steps) or "sinks" (every seed at the end of training)."""
        from sinklens.lab.figures import emergence, sinks_of_variants  # plotly is slow to load

        figures = {"emergence": emergence, "sinks": sinks_of_variants}
        if what not in figures:
            raise BadInputError(f"there is a figure of {' and of '.join(figures)}, not of {what!r}")
        return figures[what](self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The table of runs as CSV, whole or not at all."""
        write_text(path, self.to_dataframe().to_csv(index=False))
        return Path(path)


@public
def compare(runs: str | os.PathLike[str] | Sequence[LabRun | str | os.PathLike[str]]) -> LabComparison:
    """Runs side by side: from :func:`run_study`, or folders of it.

    Raises:
        BadInputError: no finished run, or runs that were evaluated on different sequences sizes.
    """
    given = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    found: list[LabRun] = []
    for one in given:
        found += [one] if isinstance(one, LabRun) else load_runs(one)
    if not found:
        raise BadInputError("there is no run to compare")
    if doubled := sorted({run.config.name for run in found} & _ambiguous(found)):
        raise BadInputError(f"two configurations are called {doubled[0]!r}; rename one, or compare them apart")
    return LabComparison(tuple(run for _, group in by_variant(found) for run in group))


def sink_column(run: LabRun) -> str:
    """Which figure says how often the first token is a sink, for this kind of attention."""
    return "relative_sink" if run.config.model.kind.rows == "any" else "sink"


def _ambiguous(runs: Sequence[LabRun]) -> set[str]:
    first: dict[str, Any] = {}
    return {run.config.name for run in runs if first.setdefault(run.config.name, run.config) != run.config}


def _row(run: LabRun) -> dict[str, Any]:
    last, dropped = run.last, run.dropped
    relative = run.config.model.kind.rows == "any"
    names = ("anywhere", "slot_sink", "slot_mass", "row_sum", "self", "value_ratio", "norm_ratio")
    row: dict[str, Any] = {"variant": run.config.name, "seed": run.seed, "attention": run.config.model.attention}
    row |= {name: value for name, value in last.items() if name.startswith(("loss", "floor"))}
    row["copy loss"] = last.get("loss_copy", last.get("loss_recall"))
    row["sink"], row["alpha"] = last[sink_column(run)], last["relative_alpha" if relative else "alpha"]
    row |= {name: last[name] for name in names}
    which = "relative_sink" if relative else "sink"
    row |= {"loss_with": dropped["loss_with"], "loss_without": dropped["loss_without"]}
    row |= {"sink_with": dropped[f"{which}_with"], "sink_without": dropped[f"{which}_without"]}
    row["cost of dropping"] = dropped["loss_without"] - dropped["loss_with"]
    losses, heads, mixing = (run.analysis.get(name) for name in ("losses", "heads", "mixing"))
    if losses:
        base = losses["base"]
        row |= {"without its write": losses["zero"] - base, "without its share": losses["value_only"] - base}
        row["without both"] = losses["renormalize"] - base
    if heads:
        sizes = [head["ov_ratio"] for head in heads if head["ov_ratio"] is not None]
        row["ov_ratio"] = sum(sizes) / len(sizes) if sizes else None
    if mixing:
        with_sink, without = mixing.values()
        row |= {f"{name} without / with": without[name] / with_sink[name] for name in ("mix", "spread")}
    return row


def _all_seeds(table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """One row per variant; each cell holds all seeds' values."""
    rows = []
    for variant, group in table.groupby("variant", sort=False):
        cells = {
            shown: " / ".join(_short(value) for value in group[name]) if name in group else ""
            for name, shown in columns.items()
        }
        rows.append({"variant": variant, "seeds": len(group), **cells})
    return pd.DataFrame(rows)


def _short(value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
