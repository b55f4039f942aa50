"""``ResultFolder``: one Parquet file per finished job, one JSON file per failed one, each written whole or not at all.

::

    sweep.json        the folder's own id, by which a worker knows that it sees the same folder as the driver
    jobs.json         the job table of the latest run: key and job
    results/KEY.parquet   the rows; job, notes, versions, seconds in the file's metadata
    failed/KEY.json   job and traceback
    files.json        hashes of model files
    lock              held by the running driver
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from sinklens.core.errors import BadInputError
from sinklens.core.storage import atomic_path, write_text
from sinklens.sweep.jobs import Job

FORMAT = 1
MAGIC = b"PAR1"  # first and last bytes of a Parquet file
STALE = 3600.0  # seconds after which a temporary file has no writer any more


class ResultFolder:
    """Results on disk; several workers may write at once, one driver at a time runs.

    Raises:
        BadInputError: no such folder (unless ``create``), or a folder of something else.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = Path(path).expanduser().resolve()
        about = self.path / "sweep.json"
        if not about.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise BadInputError(f"{str(self.path)!r} is no folder of a sweep, and not empty; give a new folder")
            if not create:
                raise BadInputError(f"there is no sweep in {str(self.path)!r}; `sinklens sweep run` begins one")
            write_text(about, json.dumps({"format": FORMAT, "id": uuid.uuid4().hex}))
        try:
            content = json.loads(about.read_text(encoding="utf-8"))
            written, self.id = int(content["format"]), str(content["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{str(about)!r} is damaged ({error}); take a new folder") from error
        if written > FORMAT:
            raise BadInputError(f"{str(self.path)!r} was written by a newer sinklens; upgrade to use it")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one driver per folder; the lock goes with its process."""
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInputError(
                f"another sweep is running in {str(self.path)!r}; wait for it, or take another folder"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def result(self, key: str) -> Path:
        """Where a job's rows are."""
        return self.path / "results" / f"{_name(key)}.parquet"

    def failure(self, key: str) -> Path:
        """Where a failed job's traceback is."""
        return self.path / "failed" / f"{_name(key)}.json"

    def has(self, key: str) -> bool:
        """Whether a job is finished; half a file (after a crash of the machine) is none."""
        try:
            with self.result(key).open("rb") as file:
                file.seek(-len(MAGIC), os.SEEK_END)
                return file.read() == MAGIC
        except OSError:
            return False

    def failed(self, key: str) -> bool:
        """Whether a job is recorded as failed."""
        return self.failure(key).is_file() and not self.has(key)

    def write(self, key: str, rows: pa.Table, about: dict[str, Any]) -> None:
        """Keep a job's rows."""
        kept = rows.replace_schema_metadata({"sinklens": json.dumps({"format": FORMAT, **about})})
        with atomic_path(self.result(key)) as partial:
            pq.write_table(kept, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())

    def read(self, key: str) -> tuple[pa.Table, dict[str, Any]]:
        """A job's rows, and what is known of their making."""
        try:
            rows = pq.ParquetFile(self.result(key)).read()
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(
                f"{str(self.result(key))!r} is damaged ({error}); delete it and run the sweep again"
            ) from error
        about = json.loads((rows.schema.metadata or {})[b"sinklens"])
        return rows.replace_schema_metadata(None), about

    def fail(self, key: str, job: Job, traceback: str, attempts: int) -> None:
        """Record that a job failed."""
        content = {"key": key, "job": job.to_json(), "attempts": attempts, "traceback": traceback, "time": time.time()}
        write_text(self.failure(key), json.dumps(content, indent=1))

    def why(self, key: str) -> dict[str, Any]:
        """What :meth:`fail` wrote."""
        return json.loads(self.failure(key).read_text(encoding="utf-8"))

    def write_jobs(self, jobs: dict[str, Job]) -> None:
        """Keep the job table."""
        write_text(self.path / "jobs.json", json.dumps([{"key": k, "job": j.to_json()} for k, j in jobs.items()]))

    def jobs(self) -> dict[str, Job]:
        """The job table of the latest run, by key, in order."""
        path = self.path / "jobs.json"
        if not path.is_file():
            raise BadInputError(f"no sweep was run in {str(self.path)!r} yet")
        return {row["key"]: Job.from_json(row["job"]) for row in json.loads(path.read_text(encoding="utf-8"))}

    def sweep_up(self) -> None:
        """Remove temporary files of writers that were killed, once no writer can be left."""
        for folder in (self.path, self.path / "results", self.path / "failed"):
            for partial in folder.glob(".*.*"):
                with contextlib.suppress(OSError):
                    if partial.is_file() and time.time() - partial.stat().st_mtime > STALE:
                        partial.unlink()


def _name(key: str) -> str:
    """A key as a file's name: a hash, so that nothing a job table says can lead out of the folder."""
    if not key.isalnum():
        raise BadInputError(f"{key!r} is no key of a job: keys are hashes; the job table is damaged")
    return key
