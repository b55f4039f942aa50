"""Where finished stages lie: ``stages/NAME.safetensors`` with the result, ``stages/NAME.json`` with its key and times.

The JSON file is written after the result and removed before it is written anew, so whatever it names is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sinklens.core.errors import BadInputError
from sinklens.core.storage import make_folder, write_text


@dataclass(frozen=True)
class Entry:
    """One finished stage.

    Attributes:
        key: what the result depends on, hashed.
        seconds, cpu_seconds: what it took when it ran.
        refused: why it could not be done; empty where it was.
        facts: numbers that belong to the result and stand in no file of it.
    """

    key: str
    seconds: float
    cpu_seconds: float
    refused: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Shelf:
    """The finished stages of one report."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def file(self, name: str) -> Path:
        """The result file of a stage."""
        return self.folder / f"{name}.safetensors"

    def parts(self, name: str) -> Path:
        """A folder for the finished parts of a stage that is not finished."""
        return self.folder / f"{name}-parts-{self.key[:12]}"

    def entry(self, name: str) -> Entry | None:
        """The entry of a stage that is finished and belongs to this model, text, options and code."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            found = Entry(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            return None
        return found if found.key == self.key else None

    def clear(self, name: str) -> None:
        """Forget a stage before it is done anew."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def put(self, name: str, entry: Entry) -> None:
        """Say that a stage is finished; its result was written before."""
        if entry.refused:
            self.file(name).unlink(missing_ok=True)
        write_text(self.folder / f"{name}.json", json.dumps(asdict(entry), indent=1))
        self.tidy(name)

    def tidy(self, name: str) -> None:
        """Remove the parts of a finished stage; a run that was killed may have left them."""
        for left in self.folder.glob(f"{name}-parts-*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one report at a time in a folder; the lock goes with its process."""
        lock = FileLock(make_folder(self.folder) / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInputError(
                f"another report is being written into {str(self.folder.parent)!r}; wait, or give another folder"
            ) from None
        try:
            yield
        finally:
            lock.release()
