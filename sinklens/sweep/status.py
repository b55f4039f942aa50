"""``SweepStatus``: how far a sweep is, and what failed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sinklens.core.validation import public
from sinklens.show.notebook import ShownInJupyter
from sinklens.sweep.folder import ResultFolder


@dataclass(frozen=True)
class SweepStatus(ShownInJupyter):
    """How far a sweep is.

    Attributes:
        total: different jobs of its table.
        done: results that are there.
        failures: per failed job its labels, the last line of its traceback, and the file with all of it.
        missing: neither done nor failed.
        ran: jobs that the latest call finished itself; 0 from :func:`sweep_status`.
        deaths: workers that died during that call.
    """

    total: int
    done: int
    failures: tuple[dict[str, Any], ...]
    ran: int = 0
    deaths: int = 0

    @property
    def failed(self) -> int:
        """Jobs that failed."""
        return len(self.failures)

    @property
    def missing(self) -> int:
        """Jobs that are neither done nor failed."""
        return self.total - self.done - self.failed

    def __repr__(self) -> str:
        told = f"{self.done} of {self.total} jobs done, {self.failed} failed, {self.missing} missing"
        deaths = f"; {self.deaths} worker(s) died" if self.deaths else ""
        return "\n".join(
            [f"SweepStatus: {told}{deaths}"]
            + [f"  failed: {f['model']} | {f['text']} | {f['task']}: {f['error']}" for f in self.failures[:5]]
        )

    def to_dataframe(self) -> pd.DataFrame:
        """The failures: ``model, text, intervention, task, seed, attempts, error, file``."""
        columns = ["model", "text", "intervention", "task", "seed", "attempts", "error", "file"]
        return pd.DataFrame(list(self.failures), columns=pd.Index(columns))


@public
def sweep_status(folder: str | os.PathLike[str]) -> SweepStatus:
    """How far the latest sweep of a folder is; also while it runs.

    Raises:
        BadInputError: no sweep there.
    """
    return status_of(ResultFolder(folder))


def status_of(folder: ResultFolder, *, ran: int = 0, deaths: int = 0) -> SweepStatus:
    """The same of an open folder."""
    jobs = folder.jobs()
    failures = []
    for key, job in jobs.items():
        if folder.failed(key):
            why = folder.why(key)
            error = (why["traceback"].strip().splitlines() or [""])[-1]
            file = str(folder.failure(key))
            failures.append(job.labels() | {"attempts": why["attempts"], "error": error, "file": file})
    return SweepStatus(len(jobs), sum(folder.has(key) for key in jobs), tuple(failures), ran, deaths)
