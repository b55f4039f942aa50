"""``SubmititExecutor``: SLURM (or processes of this machine) behind ``submit()`` and futures, through submitit.

Needs ``pip install "sinklens[slurm]"`` and a folder that all machines see. The jobs of a killed driver go on, and write
their results; a restart finds them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from importlib import import_module
from typing import Any

from sinklens.core.errors import BadInputError, UnsupportedModelError


class SubmititExecutor(Executor):
    """Workers on SLURM.

    Args:
        workers: tasks that are queued or run at a time.
        folder: submitit's own folder (logs, pickled calls), seen by all machines.
        cluster: ``slurm``, ``local``, or None: SLURM where there is one, else local.
        poll: seconds between two looks at what is done.
        parameters: of ``submitit.AutoExecutor.update_parameters``: ``timeout_min``, ``gpus_per_node``, ``mem_gb``,
            ``slurm_partition``, ...

    Raises:
        UnsupportedModelError: submitit is not installed.
        BadInputError: workers below 1.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        folder: str | os.PathLike[str],
        cluster: str | None = None,
        poll: float = 1.0,
        **parameters: Any,
    ) -> None:
        if workers < 1:
            raise BadInputError(f"workers must be at least 1, got {workers}")
        try:
            submitit: Any = import_module("submitit")
        except ImportError as error:
            raise UnsupportedModelError("executor='submitit' needs submitit: pip install 'sinklens[slurm]'") from error
        self._max_workers = workers
        self._poll = poll
        self._inner = submitit.AutoExecutor(folder=os.fspath(folder), cluster=cluster)
        self._inner.update_parameters(name="sinklens", **{"timeout_min": 24 * 60, **parameters})
        self._running: dict[Future[Any], Any] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue ``fn(*args)`` as one task."""
        if self._ended.is_set():
            raise RuntimeError("this executor was shut down")
        job = self._inner.submit(fn, *args, **kwargs)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._running[future] = job
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
        return future

    def kill(self) -> None:
        """Cancel every task, queued or running."""
        self._ended.set()
        with self._lock:
            running = list(self._running.values())
        for job in running:
            job.cancel(check=False)
        deadline = time.monotonic() + 10  # a local process takes its time to end
        while time.monotonic() < deadline and not all(job.done() for job in running):
            time.sleep(0.1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; with ``wait`` wait for those that run."""
        if cancel_futures:
            self.kill()
        elif wait:
            for future in list(self._running):
                future.exception()
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._poll):
            with self._lock:
                looked = list(self._running.items())
            for future, job in looked:
                if not job.done():
                    continue
                try:
                    error = job.exception()
                    result = None if error is not None else job.result()
                except Exception as unreadable:  # a killed task leaves no result, or half of one
                    error, result = unreadable, None
                with self._lock:
                    del self._running[future]
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
