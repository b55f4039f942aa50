"""``sinklens sweep run | status | collect``: many jobs from a YAML file."""

from __future__ import annotations

import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import sinklens as sl
from sinklens.cli.options import friendly, plain, say_written, stdout
from sinklens.core.errors import BadInputError

app = typer.Typer(help="Run many jobs: models x texts x interventions x tasks x seeds.", no_args_is_help=True)
SHOWN = 20


class ExecutorName(str, Enum):
    """Where jobs run."""

    processes = "processes"
    ray = "ray"
    submitit = "submitit"


StoreOption = Annotated[Path, typer.Option("--store", help="The folder of the results.")]


@app.command()
@friendly
def run(
    config: Annotated[Path, typer.Argument(help="YAML: models, texts, interventions, tasks, seeds.")],
    store: StoreOption,
    executor: Annotated[ExecutorName, typer.Option(help="Where jobs run.")] = ExecutorName.processes,
    workers: Annotated[int, typer.Option(help="Jobs at a time; each worker holds a model.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of each worker.")] = 1,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster, such as auto.")] = None,
    gpus: Annotated[float, typer.Option(help="GPUs of each worker (ray).")] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed jobs again.")] = False,
) -> None:
    """Run what the store has no result of. Ctrl-C stops; the same command goes on."""
    if executor is not ExecutorName.ray and (address is not None or gpus):
        raise BadInputError("--address and --gpus go with --executor ray")
    jobs = sl.sweep.load_jobs(config)
    sys.path.insert(0, str(Path.cwd()))  # users' functions, as `python script.py` would find them
    chosen: Any = executor.value
    if executor is ExecutorName.ray:
        options = {"address": address, "gpus_per_worker": gpus, "cpus_per_worker": float(threads)}
        chosen = partial(sl.sweep.RayExecutor, workers, **options)
    found = sl.sweep.run_sweep(
        jobs, store, executor=chosen, workers=workers, threads=threads, retry_failed=retry_failed
    )
    show(found)
    if found.failed:
        raise typer.Exit(1)


@app.command()
@friendly
def status(store: StoreOption) -> None:
    """How far a sweep is, and what failed."""
    show(sl.sweep.sweep_status(store))


@app.command()
@friendly
def collect(store: StoreOption, out: Annotated[Path, typer.Option("--out", help="A .parquet or .csv file.")]) -> None:
    """All results as one table."""
    found = sl.sweep.collect(store)
    stdout.print(f"{found.table.num_rows} rows of {len(found.timings)} jobs", highlight=False)
    if found.missing:
        stdout.print(f"{found.missing} job(s) have no result yet", highlight=False)
    for note in found.notes:
        stdout.print(f"note: {plain(note)}", highlight=False)
    say_written({"table": found.save(out)})


def show(found: Any) -> None:
    """The counts, the failures, and where their tracebacks are."""
    counts = f"{found.done} of {found.total} jobs done, {found.failed} failed, {found.missing} missing"
    here = f"; {found.ran} ran now" if found.ran else ""
    deaths = f"; {found.deaths} worker(s) died" if found.deaths else ""
    stdout.print(f"{counts}{here}{deaths}", highlight=False)
    if not found.failed:
        return
    for row in found.failures[:SHOWN]:
        named = ", ".join(str(row[name]) for name in ("model", "text", "intervention", "task", "seed"))
        stdout.print(f"failed: {plain(named)}: {plain(row['error'])}", highlight=False, soft_wrap=True)
    if found.failed > SHOWN:
        stdout.print(f"... and {found.failed - SHOWN} more", highlight=False)
    where = str(Path(found.failures[0]["file"]).parent)
    stdout.print(
        f"tracebacks are in {plain(where)}; --retry-failed runs these jobs again", highlight=False, soft_wrap=True
    )
