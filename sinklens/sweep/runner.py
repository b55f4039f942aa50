"""``run_sweep``: keeps a borrowed executor busy with what is missing, and keeps the books."""

from __future__ import annotations

import os
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from itertools import groupby
from typing import Any

from sinklens.core.errors import BadInputError, SinklensError
from sinklens.core.validation import public
from sinklens.show.progress import Advance, progress_bar
from sinklens.sweep.edits import check_edit
from sinklens.sweep.folder import ResultFolder
from sinklens.sweep.jobs import Job
from sinklens.sweep.keys import Keys, code_version
from sinklens.sweep.processes import Processes
from sinklens.sweep.status import SweepStatus, status_of
from sinklens.sweep.tasks import check_task
from sinklens.sweep.worker import Bundle, Item, Outcome, run_bundle

EXECUTORS = ("processes", "ray", "submitit")
MOST_PER_TASK = 100  # jobs of one queued task of a cluster, where nothing else is said


@public
def run_sweep(
    jobs: Iterable[Job],
    folder: str | os.PathLike[str],
    *,
    executor: str | Executor | Callable[[], Executor] = "processes",
    workers: int = 2,
    threads: int = 1,
    retry_failed: bool = False,
    max_attempts: int = 3,
    jobs_per_task: int | None = None,
    progress: bool | None = None,
) -> SweepStatus:
    """Run the jobs that a folder holds no result of.

    Args:
        jobs: from :func:`make_jobs` or :func:`load_jobs`. Equal ones run once.
        folder: where results are; a new one, or that of an earlier run. Other jobs may have results in it.
        executor: ``processes`` (the standard library's), ``ray``, ``submitit``, a ``concurrent.futures.Executor`` of
            your own, or a function that makes one: then a broken one is replaced, as ours are.
        workers: how many bundles run at a time; for your own executor as many as it has workers.
        threads: of each worker. Results are the same to the bit only for the same number, on the same kind of machine.
        retry_failed: run jobs again that are recorded as failed.
        max_attempts: a job that is alone with its worker when that dies has had one attempt; after so many it is
            recorded as failed.
        jobs_per_task: how many jobs of one model go to a worker at once. Default 1; for ``submitit`` an equal share,
            at most 100.
        progress: show a bar with the time left; default in terminals and notebooks.

    A job that raises is recorded with its traceback, and the sweep goes on. Ctrl-C, and anything else that stops the
    driver, ends the workers (tasks on SLURM are cancelled by Ctrl-C, and outlive a killed driver); what is finished
    stays, and the next call goes on from there.

    Cost: the jobs; hashing the model's files once per folder; 1 process per worker, each with its model in memory.

    Raises:
        BadInputError: no job, unknown tasks, interventions, parameters or executors, a text or model that there is
            not, a folder in which a sweep is running.
        SinklensError: workers die before any job has finished, or your own executor broke.
    """
    listed = list(jobs)
    if not listed:
        raise BadInputError("there is no job to run")
    if workers < 1 or threads < 1 or max_attempts < 1 or (jobs_per_task is not None and jobs_per_task < 1):
        raise BadInputError("workers, threads, max_attempts and jobs_per_task must be at least 1")
    for job in listed:
        check_edit(job.intervention)
        check_task(job.task)
    make = _maker(executor, workers, threads, folder)
    kept = ResultFolder(folder, create=True)
    with kept.locked():
        kept.sweep_up()
        keys = Keys(kept.path / "files.json")
        table: dict[str, Job] = {}
        for job in listed:
            table.setdefault(keys.key(job), job)
        keys.save()
        kept.write_jobs(table)
        todo = {k: j for k, j in table.items() if not kept.has(k) and (retry_failed or not kept.failed(k))}
        for key in todo:
            kept.failure(key).unlink(missing_ok=True)
        size = jobs_per_task or (_share(len(todo), workers) if executor == "submitit" else 1)
        run = _Run(kept, todo, keys, threads, max_attempts)
        if todo:
            with progress_bar("sweep", len(todo), progress) as advance:
                run.all(make, workers, size, advance)
        return status_of(kept, ran=run.ran, deaths=run.deaths)


class _Run:
    """The books of one call: what waits, what flies, which jobs have killed workers."""

    def __init__(self, folder: ResultFolder, todo: dict[str, Job], keys: Keys, threads: int, most: int) -> None:
        self.folder, self.todo, self.keys, self.threads, self.most = folder, todo, keys, threads, most
        self.waiting: deque[tuple[str, ...]] = deque()
        self.alone: deque[tuple[str, ...]] = deque()  # suspects: each runs with no other beside it
        self.flying: dict[Future[list[Outcome]], tuple[str, ...]] = {}
        self.attempts: Counter[str] = Counter()
        self.open = set(todo)
        self.ran = 0
        self.deaths = 0

    def all(self, make: Callable[[], Executor], workers: int, size: int, advance: Advance) -> None:
        """Run everything, on as many executors as it takes."""
        self.advance = advance
        for _, same in groupby(self.todo.items(), lambda pair: pair[1].model):
            names = [key for key, _ in same]
            self.waiting += [tuple(names[n : n + size]) for n in range(0, len(names), size)]
        pool = make()
        try:
            while self.waiting or self.alone or self.flying:
                if not self._fill(pool, workers) or self._land():
                    _end(pool)
                    pool = make()
        except BaseException:
            for future in self.flying:
                future.cancel()
            _end(pool)
            raise
        _end(pool)

    def _fill(self, pool: Executor, workers: int) -> bool:
        """Submit what there is room for: never more than run at once, so that a broken pool names its suspects."""
        while len(self.flying) < workers and (self.waiting or self.alone):
            queue = self.alone or self.waiting
            if self.alone and self.flying:
                break
            names = queue.popleft()
            try:
                future = pool.submit(run_bundle, self._bundle(names))
            except BrokenExecutor as error:  # it broke behind our back
                queue.appendleft(names)
                self.deaths += 1
                if self.deaths > self.ran + 4 * self.most:
                    raise SinklensError(f"the executor cannot be started: {error}") from error
                return bool(self.flying)
            self.flying[future] = names
            if queue is self.alone:
                break
        return True

    def _land(self) -> bool:
        """Wait for a bundle and account for it; True if the executor broke."""
        done, _ = wait(self.flying, return_when=FIRST_COMPLETED)
        broken = any(isinstance(future.exception(), BrokenExecutor) for future in done)
        if broken:
            done, _ = wait(self.flying)  # a broken pool fails them all
            self.deaths += 1
        lost: list[tuple[tuple[str, ...], BaseException]] = []
        for future in done:
            names, error = self.flying.pop(future), future.exception()
            if error is None:
                self._keep(future.result())
                continue
            for key in names:  # what a worker finished before it died
                if self.folder.has(key):
                    self._finish(key)
            left = tuple(key for key in names if key in self.open)
            if left:
                lost.append((left, error))
            self.deaths += not broken
        for names, error in lost:
            if isinstance(error, BrokenExecutor) and len(lost) > 1:
                self._again(names, suspects=1)
            else:
                self._blame(names, error)
        return broken

    def _again(self, names: Sequence[str], suspects: int) -> None:
        """Queue lost jobs again: the first, which was running, alone; the rest as they were."""
        self.alone += [(key,) for key in names[:suspects]]
        if names[suspects:]:
            self.waiting.appendleft(tuple(names[suspects:]))

    def _blame(self, names: Sequence[str], error: BaseException) -> None:
        """One attempt of the job that was running when its worker died."""
        first = names[0]
        self.attempts[first] += 1
        told = "".join(traceback.format_exception(error))
        if self.ran == 0 and self.deaths >= 3 * self.most:
            raise SinklensError(
                f"{self.deaths} workers died before any job had finished, the last with {error!r}. Is there memory for "
                f"the model in every worker? With processes: does the script run the sweep under "
                f'`if __name__ == "__main__":`?'
            ) from error
        if self.attempts[first] < self.most:
            self._again(names, suspects=1)
            return
        told += f"\nthe worker died {self.attempts[first]} times with this job\n{type(error).__name__}: {error}"
        self.folder.fail(first, self.todo[first], told, self.attempts[first])
        self._finish(first, ran=False)
        self._again(names[1:], suspects=0)

    def _keep(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            key = outcome.key
            if outcome.traceback is not None:
                self.folder.fail(key, self.todo[key], outcome.traceback, self.attempts[key] + 1)
            elif outcome.rows is not None:
                self.folder.write(key, outcome.rows, outcome.about or {})
            self._finish(key, ran=outcome.traceback is None)

    def _finish(self, key: str, ran: bool = True) -> None:
        if key in self.open:
            self.open.discard(key)
            self.ran += ran
            self.advance()

    def _bundle(self, names: Sequence[str]) -> Bundle:
        items = tuple(Item(key, self.todo[key].to_json(), self.keys.text(self.todo[key].text)) for key in names)
        return Bundle(str(self.folder.path), self.folder.id, code_version(), self.threads, items)


def _end(pool: Executor) -> None:
    """End an executor and its workers; one that the caller made only has its queue dropped."""
    kill = getattr(pool, "kill", None)
    if kill is not None:
        kill()
    elif not getattr(pool, "of_caller", False):
        pool.shutdown(wait=False, cancel_futures=True)


def _maker(
    executor: str | Executor | Callable[[], Executor], workers: int, threads: int, folder: str | os.PathLike[str]
) -> Callable[[], Executor]:
    """What makes an executor, and makes it again when it broke."""
    if isinstance(executor, Executor):
        return _Once(executor)
    if not isinstance(executor, str):
        return executor
    if executor == "processes":
        return lambda: Processes(workers, threads)
    if executor == "ray":
        from sinklens.sweep.ray_executor import RayExecutor  # optional

        return lambda: RayExecutor(workers, cpus_per_worker=float(threads))
    if executor == "submitit":
        from sinklens.sweep.submitit_executor import SubmititExecutor  # optional

        return lambda: SubmititExecutor(workers, folder=os.path.join(folder, "submitit"), cpus_per_task=threads)
    raise BadInputError(f"executor must be one of {', '.join(EXECUTORS)}, an Executor or a function, got {executor!r}")


class _Once:
    """The caller's own executor, which stays the caller's and cannot be made again."""

    def __init__(self, given: Executor) -> None:
        self.given: Executor | None = given

    def __call__(self) -> Executor:
        """The executor, the first time."""
        found, self.given = self.given, None
        if found is None:
            raise SinklensError(
                "your executor broke (a worker died); make a new one and run the sweep again: it goes on"
            )
        return _Borrowed(found)


class _Borrowed(Executor):
    """Forwards to the caller's executor and never shuts it down."""

    of_caller = True

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Forward."""
        return self.inner.submit(fn, *args, **kwargs)


def _share(count: int, workers: int) -> int:
    return max(1, min(MOST_PER_TASK, -(-count // workers)))
