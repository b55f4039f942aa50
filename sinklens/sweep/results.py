"""``SweepResults``: every job's rows as one table, and means over all pieces of a text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import summary as mean_and_interval
from sinklens.core.storage import atomic_path
from sinklens.core.validation import public, public_methods
from sinklens.show.notebook import ShownInJupyter
from sinklens.sweep.folder import ResultFolder

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LABELS = ("model", "text", "intervention", "task", "seed")
_PLACES = ("sequence", "document", "source", "position", "token_id", "layer", "head", "edited", "control")


@public_methods
@dataclass(frozen=True, eq=False)
class SweepResults(ShownInJupyter):
    """The rows of finished jobs.

    Attributes:
        table: the labels of the job (``model, text, intervention, task, seed``), then the union of the columns of its
            tasks. Jobs stand in the order of the job table, the pieces of a text one after the other: a text that was
            split gives the very table that one job over all of it gives.
        notes: what tasks noted, each once.
        missing: jobs of the table without a result.
        timings: per job its labels, rows, seconds and host.
    """

    table: pa.Table
    notes: tuple[str, ...]
    missing: int
    timings: pd.DataFrame

    def __repr__(self) -> str:
        short = f"; {self.missing} job(s) missing" if self.missing else ""
        return f"SweepResults: {self.table.num_rows} rows of {len(self.timings)} jobs{short}"

    def to_dataframe(self, **chosen: Any) -> pd.DataFrame:
        """The rows, or those with some labels: ``to_dataframe(task="token_loss")``; columns without a value left out.

        Raises:
            BadInputError: a label that no row has.
        """
        table = self.table
        for name, value in chosen.items():
            here = table[name].to_pylist() if name in LABELS else []
            kept = [known == value for known in here]
            if not any(kept):
                known = ", ".join(map(str, dict.fromkeys(here) or LABELS))
                raise BadInputError(f"no row has {name}={value!r}; there are {known}")
            table = table.filter(pa.array(kept))
        empty = [n for n in table.column_names if n not in LABELS and table[n].null_count == table.num_rows]
        return table.drop_columns(empty if chosen else []).to_pandas()

    def summary(self, task: str | None = None, *, by: Sequence[str] = ()) -> pd.DataFrame:
        """Means of every number per (model, text, intervention, task, seed, control), with 95 % intervals.

        A number is first averaged over the rows of a sequence, then over sequences; bootstrap-t intervals are over
        documents (16 or more, else NaN). ``sequences`` counts those with a scored token, where tokens are scored.
        ``by``: more columns to keep apart, such as ``["layer"]`` or ``["layer", "head"]``.

        Raises:
            BadInputError: several tasks and none chosen, a column that there is not.
        """
        tasks = list(dict.fromkeys(self.table["task"].to_pylist()))
        if task is None and len(tasks) != 1:
            raise BadInputError(f"name the task: there are {', '.join(map(repr, tasks))}")
        rows = self.to_dataframe(task=task or tasks[0])
        if "sequence" not in rows:
            raise BadInputError(f"{task or tasks[0]!r} gave no rows per sequence, so there is no mean over sequences")
        unknown = [name for name in by if name not in rows]
        if unknown:
            raise BadInputError(f"no column {', '.join(unknown)}; there are {', '.join(rows)}")
        if "scored" in rows:
            rows = rows[rows["scored"] > 0]
        groups = [*LABELS, *([] if "control" not in rows else ["control"]), *by]
        numbers = [n for n in rows.select_dtypes(["number", "bool"]) if n not in (*groups, *_PLACES)]
        found = []
        group: Any
        for _, group in rows.groupby(groups, sort=False, dropna=False):
            means: Any = group.groupby(["sequence", "document"], sort=False)[numbers].mean()
            documents = means.index.get_level_values("document").tolist()
            row = {name: group[name].iloc[0] for name in groups} | {"sequences": len(means)}
            for name in numbers:
                values = torch.tensor(means[name].to_numpy("float64"))
                row |= mean_and_interval(values, documents, name)
            found.append(row)
        return pd.DataFrame(found)

    def plot(self, value: str, task: str | None = None) -> Figure:
        """The mean of a number per intervention, with intervals; a colour per model and text."""
        from plotly.graph_objects import Figure, Scatter  # plotly is slow to load

        rows = self.summary(task)
        if value not in rows:
            raise BadInputError(f"no number {value!r}; there are {', '.join(rows.columns[5:])}")
        figure = Figure()
        for names, group in rows.groupby(["model", "text"], sort=False):
            control = group["control"].fillna("") if "control" in group else pd.Series("", index=group.index)
            where = [
                f"{edit} / {c}" if c else str(edit) for edit, c in zip(group["intervention"], control, strict=True)
            ]
            above, below = group[f"{value}_high"] - group[value], group[value] - group[f"{value}_low"]
            bars = {"type": "data", "array": above, "arrayminus": below, "symmetric": False}
            name = ", ".join(map(str, names if isinstance(names, tuple) else (names,)))
            figure.add_trace(Scatter(x=group[value], y=where, error_x=bars, mode="markers", name=name))
        return figure.update_layout(xaxis_title=value, template="plotly_white")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as .parquet or .csv, whole or not at all.

        Raises:
            BadInputError: another suffix.
        """
        suffix = Path(path).suffix
        if suffix not in (".parquet", ".csv"):
            raise BadInputError(f"{os.fspath(path)!r} must end in .parquet or .csv")
        with atomic_path(path) as partial:
            if suffix == ".parquet":
                pq.write_table(self.table, partial)
            else:
                self.table.to_pandas().to_csv(partial, index=False)
        return Path(path)


@public
def collect(folder: str | os.PathLike[str]) -> SweepResults:
    """The results of a folder's latest sweep, as far as it is; also while it runs.

    Raises:
        BadInputError: no sweep there, no finished job, a damaged file.
    """
    kept = ResultFolder(folder)
    jobs = kept.jobs()
    tables, notes, timings = [], [], []
    for key, job in jobs.items():
        if not kept.has(key):
            continue
        rows, about = kept.read(key)
        labels = job.labels()
        first = {name: pa.array([value] * rows.num_rows, _type(value)) for name, value in labels.items()}
        taken = [name for name in rows.column_names if name in first]
        if taken:
            raise BadInputError(f"{job.task.label!r} gives columns {taken}, which name jobs; call them something else")
        columns = first | {name: rows[name] for name in rows.column_names}
        tables.append(pa.table(columns))
        notes += about["notes"]
        timings.append(labels | {"rows": rows.num_rows, "seconds": about["seconds"], "host": about["host"]})
    if not tables:
        raise BadInputError(
            f"no job of the {len(jobs)} in {str(kept.path)!r} is finished; `sinklens sweep status` says why"
        )
    joined = pa.concat_tables(tables, promote_options="permissive")
    return SweepResults(joined, tuple(dict.fromkeys(notes)), len(jobs) - len(tables), pd.DataFrame(timings))


def _type(value: Any) -> pa.DataType:
    return pa.int64() if isinstance(value, int) else pa.string()
