"""What runs in a worker: a bundle of jobs of one model. The model stays loaded for the next bundle.

A bundle and what comes back are plain data. A worker that sees the driver's folder writes results there itself, so that
they outlive the driver; one that does not (another machine without a common disk) hands them back.
"""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch

from sinklens.core.errors import BadInputError, SinklensError, SinklensWarning
from sinklens.inputs.tokens import Tokens
from sinklens.models.load import load_model
from sinklens.sweep.edits import load_text
from sinklens.sweep.folder import ResultFolder
from sinklens.sweep.jobs import Job
from sinklens.sweep.keys import code_version
from sinklens.sweep.measurement import Measurement
from sinklens.sweep.specs import ModelSpec
from sinklens.sweep.tasks import run_task

_turn = threading.Lock()  # hooks stand on the model itself, so threads of one process take turns
_loaded: dict[str, Any] = {}
_texts: dict[str, Tokens] = {}
KEPT_TEXTS = 8


@dataclass(frozen=True)
class Item:
    """One job of a bundle: its key, the job as JSON, the hash of its text's source."""

    key: str
    job: dict[str, Any]
    text: str | None


@dataclass(frozen=True)
class Bundle:
    """Jobs of one model, in order, for one worker.

    Attributes:
        folder, folder_id: where results go, if the worker sees the same folder.
        code: the driver's code; a worker with another one refuses.
        threads: how many a worker may use.
        items: the jobs.
    """

    folder: str
    folder_id: str
    code: str
    threads: int
    items: tuple[Item, ...]

    @property
    def affinity(self) -> str:
        """What a worker must have loaded to begin at once."""
        return json.dumps(self.items[0].job["model"], sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its traceback, or, where the worker cannot see the folder, its rows."""

    key: str
    traceback: str | None = None
    rows: pa.Table | None = None
    about: dict[str, Any] | None = None


def run_bundle(bundle: Bundle) -> list[Outcome]:
    """Run the jobs of a bundle; a job that raises does not stop the others."""
    with _turn, _threads(bundle.threads):
        folder = _shared(bundle)
        return [_outcome(bundle, item, folder) for item in bundle.items]


def _outcome(bundle: Bundle, item: Item, folder: ResultFolder | None) -> Outcome:
    if folder is not None and folder.has(item.key):
        return Outcome(item.key)
    job = Job.from_json(item.job)
    try:
        if code_version() != bundle.code:
            raise SinklensError(
                f"this worker ({platform.node()}) runs {code_version()}, the driver {bundle.code}: install the same"
            )
        began = time.time()
        rows, notes = measure(job, item.text)
        about = {"key": item.key, "job": item.job, "code": bundle.code, "notes": notes, "host": platform.node()}
        about |= {"began": began, "seconds": time.time() - began}
        if folder is None:
            return Outcome(item.key, rows=rows, about=about)
        folder.write(item.key, rows, about)
    except (Exception, SystemExit):  # whatever a job raises is its result
        return Outcome(item.key, traceback=traceback.format_exc())
    return Outcome(item.key)


def measure(job: Job, text: str | None) -> tuple[pa.Table, list[str]]:
    """A job's rows and notes; the model and the text come from memory where they are there.

    Raises:
        BadInputError: the text is not the one that the driver saw.
    """
    model = _model(job.model)
    tokens = _tokens(model, job)
    seen = tokens.info.get("corpus_sha256")
    if text is not None and seen is not None and seen != text:
        raise BadInputError(
            f"{job.text.label!r} is another text on this worker ({platform.node()}) than at the driver: python-docs "
            f"differs between Python versions, and a file may have changed"
        )
    first, end = job.text.rows or (0, len(tokens))
    if end > len(tokens):
        raise BadInputError(
            f"{job.text.label!r} has {len(tokens)} sequences, those from {first} to {end} were asked for"
        )
    measured = Measurement(model, tokens, (first, end), job.intervention, job.seed)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", SinklensWarning)  # the notes say it
        torch.manual_seed(job.seed)
        table = run_task(job.task, measured)
    return pa.Table.from_pandas(table, preserve_index=False), measured.collect_notes()


def _model(spec: ModelSpec) -> Any:
    """The model, loaded once per worker; one model at a time. One that cannot be loaded is not tried again."""
    name = json.dumps(asdict(spec), sort_keys=True, default=str)
    if name not in _loaded:
        _loaded.clear()
        _texts.clear()
        gc.collect()
        try:
            _loaded[name] = load_model(spec.name, **spec.options())
        except SinklensError as error:
            _loaded[name] = error
    found = _loaded[name]
    if isinstance(found, SinklensError):
        raise found.with_traceback(None)
    return found


def _tokens(model: Any, job: Job) -> Tokens:
    name = json.dumps([asdict(job.text.whole), job.text_seed], sort_keys=True)
    if name not in _texts:
        while len(_texts) >= KEPT_TEXTS:
            del _texts[next(iter(_texts))]
        _texts[name] = load_text(model, job.text, job.text_seed)
    return _texts[name]


def _shared(bundle: Bundle) -> ResultFolder | None:
    """The driver's folder, if this worker sees it."""
    try:
        folder = ResultFolder(bundle.folder)
    except (BadInputError, OSError):
        return None
    return folder if folder.id == bundle.folder_id else None


@contextlib.contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
