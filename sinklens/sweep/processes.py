"""``Processes``: the standard library's process pool, whose workers never outlive the driver.

Workers are spawned, not forked: torch and its threads do not survive a fork. As always with spawned processes, a script
that runs a sweep needs ``if __name__ == "__main__":`` around it.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection

from sinklens.core.errors import BadInputError

_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Processes(ProcessPoolExecutor):
    """A pool of spawned workers with a limited number of threads each.

    Every worker holds the reading end of a pipe of which the driver alone holds the writing end. When that closes,
    because :meth:`kill` was called or because the driver died in whatever way, the worker ends at once.

    Args:
        workers: how many.
        threads: how many each may use.
    """

    def __init__(self, workers: int = 2, threads: int = 1) -> None:
        if workers < 1 or threads < 1:
            raise BadInputError(f"workers and threads must be at least 1, got {workers} and {threads}")
        context = get_context("spawn")
        self._reader, self._writer = context.Pipe(duplex=False)
        super().__init__(workers, mp_context=context, initializer=_begin, initargs=(self._reader, threads))

    def kill(self) -> None:
        """End every worker now, whatever it does."""
        self._writer.close()
        self.shutdown(wait=True, cancel_futures=True)
        self._reader.close()


def _begin(lifeline: Connection, threads: int) -> None:
    """What a worker does first: nothing heavy is imported yet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers
    for name in _LIMITS:
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()


def _watch(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
