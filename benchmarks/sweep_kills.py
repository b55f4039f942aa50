"""A sweep that is killed at random, again and again, beside one that is not: the tables must be the same to the bit.

    python benchmarks/sweep_kills.py [--models smollm2-135m gemma3-270m] [--kills 6] [--executor processes] [--smoke]

1. The reference: all jobs on the standard library's processes, undisturbed.
2. The same jobs in another folder, on ``--executor``, by a driver in a process of its own; at random moments SIGKILL
   hits the driver or one of its workers in turn, and a killed driver is started again, until everything is done.
3. Counts, and the comparison of the two tables.

``--executor ray`` is a Ray of 2 workers on this machine; ``submitit`` its local executor.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import smoke

from sinklens.sweep import Job, collect, make_jobs, run_sweep, sweep_status


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Models x pieces of texts of 64 tokens x interventions x tasks: 100 jobs of each model."""
    sizes = {"n_seqs": options.pieces, "seq_len": 64, "pieces": options.pieces}
    texts = [{"source": "python-docs", **sizes}, {"source": "random", **sizes}]
    edits: list[Any] = [
        "none",
        {"build": "ablate_sinks", "sinks": [0], "mode": "renormalize"},
        {"build": "ablate_sinks", "sinks": "all", "mode": "zero"},
        {"build": "swap_attention", "kind": "off-by-one"},
        {"build": "restrict_attention", "sinks": 4, "recent": 16},
    ]
    return make_jobs(options.models, texts, edits, [{"task": "sink_scores", "positions": [0, 1]}, "token_loss"])


def drive(options: argparse.Namespace) -> None:
    """What the victim does."""
    run_sweep(jobs_of(options), options.store, executor=options.executor, workers=options.workers)


def workers_of(driver: psutil.Process, executor: str) -> list[psutil.Process]:
    """The processes that run jobs."""
    words = {"processes": "multiprocessing.spawn", "ray": "ray::_Worker", "submitit": "submitit.core._submit"}[executor]
    found = []
    for child in driver.children(recursive=True):
        try:
            if words in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def start(options: argparse.Namespace, store: Path) -> subprocess.Popen[bytes]:
    """The driver, in a process of its own."""
    command = [sys.executable, __file__, "--store", str(store), "--executor", options.executor]
    command += ["--models", *options.models, "--pieces", str(options.pieces), "--workers", str(options.workers)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def ended(before: list[psutil.Process]) -> float:
    """Seconds until none of these processes is left, at most 60."""
    began = time.monotonic()
    psutil.wait_procs(before, timeout=60)
    return time.monotonic() - began


def torment(options: argparse.Namespace, store: Path) -> None:
    """Kill the driver or a worker after every so many finished jobs, until nothing is left to do."""
    chance = random.Random(options.seed)
    total = len(jobs_of(options))
    step = total // (options.kills + 1)
    driver, drivers, killed = start(options, store), 1, {"driver": 0, "worker": 0}
    while True:
        goal = step * (sum(killed.values()) + 1) if sum(killed.values()) < options.kills else total + 1
        while driver.poll() is None and len(list(store.glob("results/*.parquet"))) < goal:
            time.sleep(0.05)
        if driver.poll() is not None and driver.returncode == 0:
            break
        time.sleep(chance.uniform(0, options.pause))  # somewhere inside a job
        done = len(list(store.glob("results/*.parquet")))
        if driver.poll() is None:
            process = psutil.Process(driver.pid)
            workers = workers_of(process, options.executor)
            whom = "driver" if sum(killed.values()) % 2 == 0 or not workers else "worker"
            if whom == "worker":
                chance.choice(workers).kill()
            else:
                driver.kill()
                driver.wait()
                print(f"  its {len(workers)} worker(s) were gone after {ended(workers):.2f} s")
            killed[whom] += 1
            print(f"killed the {whom} with {done} of {total} jobs done", flush=True)
        if driver.poll() is not None:
            driver, drivers = start(options, store), drivers + 1
    status = sweep_status(store)
    print(f"{options.executor}: {drivers} starts, killed {killed['driver']} drivers and {killed['worker']} workers")
    print(status)


def main() -> int:
    """Read the command line; a driver of the tormented sweep is this script too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--executor", default="processes", choices=["processes", "ray", "submitit"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, help="folder of the undisturbed sweep; kept, and used if it is there")
    parser.add_argument("--pieces", type=int, default=5, help="of each text, a job each")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=1.0, help="the longest from a finished job to the kill, in s")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help=smoke.HELP)
    options = parser.parse_args()
    if options.store is not None:
        drive(options)
        return 0
    with smoke.small(options, models=[smoke.TINY], kills=2, pieces=1, workers=1, pause=0.0):
        return int(not alike(options))


def alike(options: argparse.Namespace) -> bool:
    """An undisturbed sweep and a tormented one: whether they give the same table."""
    folder = Path(tempfile.mkdtemp(dir=Path.cwd() if options.smoke else None))
    reference = options.reference or folder / "reference"
    began = time.monotonic()
    found = run_sweep(jobs_of(options), reference, workers=options.workers)
    print(f"undisturbed, processes: {found}, {found.ran} ran now, {time.monotonic() - began:.0f} s", flush=True)
    torment(options, folder / "tormented")
    first, second = collect(reference), collect(folder / "tormented")
    same = first.table.equals(second.table)
    print(f"{first.table.num_rows} and {second.table.num_rows} rows; equal to the bit: {same}")
    return same


if __name__ == "__main__":
    sys.exit(main())
