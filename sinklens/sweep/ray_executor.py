"""``RayExecutor``: Ray's actors behind ``submit()`` and futures, on this machine or on any cluster.

One actor per worker; it keeps the model that it has loaded, and gets bundles of that model first. Needs
``pip install "sinklens[ray]"``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from importlib import import_module
from typing import Any

from sinklens.core.errors import BadInputError, UnsupportedModelError

OBJECT_STORE = 100 * 2**20  # results are small; Ray's default is a third of the memory
_QUIET = {
    "RAY_worker_niceness": "0",  # workers would start at nice 15 and starve beside anything else
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES alone where no GPU is asked for
}


class RayExecutor(Executor):
    """Workers on Ray.

    Args:
        workers: actors at a time.
        address: of a running cluster, such as ``ray://head:10001`` or ``auto``; default: a Ray of its own on this
            machine, which ends with the executor.
        gpus_per_worker, cpus_per_worker: the resources of an actor; Ray places it where they are free and shows it
            only its GPUs. A model on several GPUs takes ``gpus_per_worker`` of them and ``device_map="auto"``.
        resources: custom resources of an actor, as Ray names them.
        runtime_env: as in ``ray.init``: what workers on other machines need (packages, variables, a working folder).

    Raises:
        UnsupportedModelError: Ray is not installed.
        BadInputError: workers below 1, a cluster that does not answer.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        address: str | None = None,
        gpus_per_worker: float = 0.0,
        cpus_per_worker: float = 1.0,
        resources: dict[str, float] | None = None,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        if workers < 1:
            raise BadInputError(f"workers must be at least 1, got {workers}")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise UnsupportedModelError("executor='ray' needs Ray: pip install 'sinklens[ray]'") from error
        self._ray = ray
        self._max_workers = workers
        self._began = not ray.is_initialized()
        if self._began:
            self._init(address, workers, gpus_per_worker, cpus_per_worker, resources, runtime_env)
        options = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker, "resources": resources, "max_restarts": 0}
        self._actor = ray.remote(**{k: v for k, v in options.items() if v is not None})(_Worker)
        self._lock = threading.Lock()
        self._idle: list[tuple[Any, str | None]] = []
        self._busy: dict[Future[Any], Any] = {}
        self._waiting: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args)`` on an actor, one that has loaded ``args[0].affinity`` if it is idle."""
        if kwargs or self._closed:
            raise RuntimeError("RayExecutor takes positional arguments only, and none after shutdown")
        future: Future[Any] = Future()
        with self._lock:
            self._waiting.append((future, fn, args))
        self._dispatch()
        return future

    def kill(self) -> None:
        """End every worker now."""
        self.shutdown(wait=False, cancel_futures=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the actors, and the Ray that this executor began."""
        with self._lock:
            closed, self._closed = self._closed, True
            dropped, self._waiting = (self._waiting, []) if cancel_futures else ([], self._waiting)
            running = list(self._busy)
        if closed:
            return
        for future, _, _ in dropped:
            future.cancel()
        for future in running if wait else ():
            future.exception()
        with self._lock:
            for actor in [*(a for a, _ in self._idle), *self._busy.values()]:
                self._ray.kill(actor)
        if self._began:
            self._ray.shutdown()

    def _init(
        self,
        address: str | None,
        workers: int,
        gpus: float,
        cpus: float,
        resources: dict[str, float] | None,
        runtime_env: dict[str, Any] | None,
    ) -> None:
        if address is not None:
            own: dict[str, Any] = {"address": address}
        else:
            own = {"num_cpus": max(1, round(workers * cpus)), "include_dashboard": False}
            own |= {
                "object_store_memory": OBJECT_STORE,
                "resources": {k: v * workers for k, v in (resources or {}).items()},
            }
        try:
            self._ray.init(**own, runtime_env=runtime_env, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadInputError(f"no Ray at {address!r}: {error}") from error
        there = self._ray.cluster_resources().get("GPU", 0)
        if address is None and there < gpus:  # a cluster may grow
            self._ray.shutdown()
            raise BadInputError(f"a worker wants {gpus:g} GPUs and this machine has {there:g}: it would wait for ever")

    def _dispatch(self) -> None:
        with self._lock:
            while self._waiting and len(self._busy) < self._max_workers:
                future, fn, args = self._waiting.pop(0)
                if not future.set_running_or_notify_cancel():
                    continue
                affinity = getattr(args[0], "affinity", None) if args else None
                actor = self._take(affinity)
                self._busy[future] = actor
                done = actor.run.remote(fn, *args).future()
                done.add_done_callback(lambda d, f=future, a=actor, n=affinity: self._finish(d, f, a, n))

    def _take(self, affinity: str | None) -> Any:
        """An idle actor with the model, else a new one while there is room, else any idle one."""
        index = next((i for i, (_, loaded) in enumerate(self._idle) if loaded == affinity), None)
        if index is None and self._idle and len(self._idle) + len(self._busy) >= self._max_workers:
            index = 0
        return self._actor.remote() if index is None else self._idle.pop(index)[0]

    def _finish(self, done: Future[Any], future: Future[Any], actor: Any, affinity: str | None) -> None:
        error = done.exception()
        with self._lock:
            del self._busy[future]
            if not isinstance(error, self._ray.exceptions.RayActorError):  # a dead actor is replaced by a new one
                self._idle.append((actor, affinity))
        if error is None:
            future.set_result(done.result())
        else:
            future.set_exception(error)
        if not self._closed:
            self._dispatch()


class _Worker:
    """An actor's body: a process that stays, and so keeps its model."""

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Call it."""
        return fn(*args)
