"""Sweeps: nothing runs twice, nothing stale is taken, failures are kept, every executor gives the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from places import SUPPORT
from sweeping import EDITS, EFFECT, SENTENCES, TEXT, here, save_models, value_of

import sinklens as sl
from sinklens.sweep import (
    Job,
    Processes,
    RayExecutor,
    SubmititExecutor,
    collect,
    make_jobs,
    run_sweep,
    sweep_status,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def own_functions_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_a_restart_runs_what_is_missing_and_nothing_else(models: list[str], tmp_path: Path) -> None:
    jobs = make_jobs(models[0], {**TEXT, "pieces": 4}, EDITS[:2], "token_loss")
    assert here(jobs[:3], tmp_path / "s").ran == 3
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s" / "results").iterdir()}
    assert here([*jobs, *jobs], tmp_path / "s").ran == 5
    assert here(jobs, tmp_path / "s").ran == 0
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s" / "results").iterdir()}
    assert {name: after[name] for name in before} == before
    whole = collect(tmp_path / "s").table
    half = sorted((tmp_path / "s" / "results").iterdir())[0]
    half.write_bytes(half.read_bytes()[:-100])
    (half.parent / f".{half.name}.rest").write_bytes(b"PAR1")
    assert sweep_status(tmp_path / "s").missing == 1
    assert collect(tmp_path / "s").missing == 1
    assert here(jobs, tmp_path / "s").ran == 1
    assert collect(tmp_path / "s").table.equals(whole)


def test_results_of_another_run_in_the_folder_are_not_mixed_in(models: list[str], tmp_path: Path) -> None:
    here(make_jobs(models[0], TEXT, tasks="token_loss", seeds=0), tmp_path / "s")
    here(make_jobs(models[0], TEXT, tasks="token_loss", seeds=1), tmp_path / "s")
    assert set(value_of(tmp_path / "s").seed) == {1}
    assert len(list((tmp_path / "s" / "results").iterdir())) == 2


def test_a_job_that_raises_is_recorded_and_the_sweep_goes_on(models: list[str], tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    broken = {"task": "sweeping:raises", "unless": str(mended), "label": "broken"}
    jobs = make_jobs(models[0], {**TEXT, "pieces": 2}, tasks=[broken, "token_loss"])
    found = here(jobs, tmp_path / "s")
    assert (found.done, found.failed, found.missing) == (2, 2, 0)
    row = found.to_dataframe().iloc[0]
    assert row.error == "ValueError: broken on purpose"
    assert 'raise ValueError("broken on purpose")' in json.loads(Path(row.file).read_text())["traceback"]
    mended.touch()
    assert here(jobs, tmp_path / "s").ran == 0
    found = here(jobs, tmp_path / "s", retry_failed=True)
    assert (found.ran, found.done, found.failed) == (2, 4, 0)
    assert not list((tmp_path / "s" / "failed").iterdir())
    assert value_of(tmp_path / "s", task="broken").value.tolist() == [1.0, 1.0]


def test_a_model_that_cannot_be_loaded_fails_its_jobs_only(models: list[str], tmp_path: Path) -> None:
    bad = shutil.copytree(models[0], tmp_path / "bad")
    weights = next(bad.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-50])
    found = here(make_jobs([str(bad), models[1]], TEXT, tasks=["token_loss", "sink_scores"]), tmp_path / "s")
    assert (found.done, found.failed) == (2, 2)
    assert all("safetensors" in failure["error"] for failure in found.failures)


def test_a_worker_with_other_code_or_text_refuses(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_jobs(models[0], {"source": "python-docs", "n_seqs": 1, "seq_len": 8}, tasks="token_loss")
    with monkeypatch.context() as patch:
        patch.setattr("sinklens.sweep.worker.code_version", lambda: "older")
        assert "runs older" in here(jobs, tmp_path / "s").failures[0]["error"]
    with monkeypatch.context() as patch:
        patch.setattr("sinklens.sweep.keys.text_digest", lambda source: "0" * 64)
        assert "another text on this worker" in here(jobs, tmp_path / "t").failures[0]["error"]


def test_a_worker_that_cannot_see_the_folder_hands_its_rows_back(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_jobs(models[0], TEXT, EDITS[:2], ["token_loss", "find_sinks"])
    here(jobs, tmp_path / "seen")
    monkeypatch.setattr("sinklens.sweep.worker._shared", lambda bundle: None)
    assert here(jobs, tmp_path / "unseen").ran == 4
    assert collect(tmp_path / "unseen").table.equals(collect(tmp_path / "seen").table)


class Fragile(Executor):
    """Runs calls together, and breaks with all of them if one is a job that kills its worker."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.calls: list[tuple[Future[Any], Any, Any]] = []
        self.killed = False

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((future, fn, args[0]))
        threading.Timer(0.02, self.flush).start()
        return future

    def flush(self) -> None:
        calls, self.calls = self.calls, []
        deadly = any(item.job["task"]["label"] == "deadly" for _, _, bundle in calls for item in bundle.items)
        for future, fn, bundle in calls:
            if deadly:
                future.set_exception(BrokenProcessPool("a worker died"))
            else:
                future.set_result(fn(bundle))

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(("size", "most"), [(1, 3), (3, 3), (1, 1)])
def test_only_the_job_that_kills_its_worker_is_given_up(
    models: list[str], tmp_path: Path, size: int, most: int
) -> None:
    deadly = {"task": "sweeping:kills", "label": "deadly"}
    jobs = make_jobs(models[0], {**TEXT, "pieces": 3}, tasks=["token_loss", deadly, "sink_scores"])
    Fragile.made = 0
    found = run_sweep(jobs, tmp_path / "s", executor=Fragile, workers=2, jobs_per_task=size, max_attempts=most)
    assert (found.done, found.failed, found.missing) == (6, 3, 0)
    assert {failure["task"] for failure in found.failures} == {"deadly"}
    assert {failure["attempts"] for failure in found.failures} == {most}
    assert (
        f"the worker died {most} times with this job"
        in json.loads(Path(found.failures[0]["file"]).read_text())["traceback"]
    )
    assert found.deaths == Fragile.made - 1


def test_workers_that_all_die_at_once_stop_the_sweep(models: list[str], tmp_path: Path) -> None:
    deadly = {"task": "sweeping:kills", "label": "deadly"}
    jobs = make_jobs(models, {**TEXT, "pieces": 4}, tasks=deadly)
    with pytest.raises(sl.SinklensError, match="9 workers died before any job had finished"):
        run_sweep(jobs, tmp_path / "s", executor=Fragile, workers=1)


def test_an_executor_of_the_caller_is_neither_shut_down_nor_replaced(models: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        run_sweep(make_jobs(models[0], TEXT), tmp_path / "s", executor=pool, workers=1)
        assert pool.submit(int, "7").result() == 7
    broken = Fragile()
    deadly = make_jobs(models[0], TEXT, tasks={"task": "sweeping:kills", "label": "deadly"})
    with pytest.raises(sl.SinklensError, match="your executor broke"):
        run_sweep(deadly, tmp_path / "s", executor=broken)
    assert not broken.killed


def test_an_interruption_kills_the_workers_and_keeps_what_is_done(models: list[str], tmp_path: Path) -> None:
    jobs = make_jobs(models[0], {**TEXT, "pieces": 4}, tasks="token_loss")
    pools: list[Any] = []

    class Interrupted(Fragile):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            if len(list((tmp_path / "s").glob("results/*.parquet"))) == 2:
                raise KeyboardInterrupt
            pools.append(self)
            return super().submit(fn, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(jobs, tmp_path / "s", executor=Interrupted, workers=1)
    assert pools[-1].killed
    assert sweep_status(tmp_path / "s").done == 2
    assert here(jobs, tmp_path / "s").ran == 2, "the lock is free again"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("end", ["killed", "interrupted"])
def test_workers_do_not_outlive_their_driver(tmp_path: Path, end: str) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a background shell may have set to ignore
        "from sinklens.sweep.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    pool = Processes(2)\n"
        "    told = [pool.submit(os.getpid) for _ in range(2)]\n"
        "    pids = {f.result() for f in told} | set(pool._processes)\n"
        "    calls = [pool.submit(time.sleep, 600) for _ in range(2)]\n"
        "    assert 'torch' not in sys.modules\n"
        "    print(*pids, flush=True)\n"
        "    try:\n"
        "        calls[0].result()\n"
        "    except KeyboardInterrupt:\n"
        "        pool.kill()\n"
    )
    root = str(Path(sl.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert pids
        assert all(alive(pid) for pid in pids)
        driver.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
        driver.wait(30)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_killed_worker_breaks_the_pool_and_threads_are_limited() -> None:
    pool = Processes(1, threads=3)
    assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "3"
    with pytest.raises(BrokenProcessPool):
        pool.submit(os.kill, next(iter(pool._processes)), signal.SIGKILL).result()
    pool.kill()


@pytest.fixture(scope="module")
def demonstration(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Job], Any]:
    """Jobs of two models, and their table from this process."""
    folder = tmp_path_factory.mktemp("here") / "s"
    text = {"texts": SENTENCES[3:6], "label": "words", "pieces": 2}
    jobs = make_jobs(models, text, EDITS[1:3], ["token_loss", {**EFFECT, "controls": ["random"]}])
    found = here(jobs, folder)
    assert found.failed == 0, found
    return jobs, collect(folder).table


def test_processes_give_the_same_bits(demonstration: tuple[list[Job], Any], tmp_path: Path) -> None:
    jobs, expected = demonstration
    found = run_sweep(jobs, tmp_path / "s", workers=1)
    assert (found.ran, found.done, found.failed, found.deaths) == (len(jobs), len(jobs), 0, 0), found
    assert collect(tmp_path / "s").table.equals(expected)


def test_ray_gives_the_same_bits(demonstration: tuple[list[Job], Any], tmp_path: Path) -> None:
    jobs, expected = demonstration
    found = run_sweep(jobs, tmp_path / "s", executor=lambda: RayExecutor(1), workers=1)
    assert (found.ran, found.done, found.failed, found.deaths) == (len(jobs), len(jobs), 0, 0), found
    assert collect(tmp_path / "s").table.equals(expected)


def test_submitit_gives_the_same_bits(demonstration: tuple[list[Job], Any], tmp_path: Path) -> None:
    jobs, expected = demonstration
    first = [job for job in jobs if job.model == jobs[0].model]

    def local() -> SubmititExecutor:
        return SubmititExecutor(1, folder=tmp_path / "submitit", cluster="local", poll=0.1)

    found = run_sweep(first, tmp_path / "s", executor=local, workers=1, jobs_per_task=100)
    assert (found.ran, found.done, found.failed, found.deaths) == (len(first), len(first), 0, 0), found
    mine = [name == jobs[0].model.label for name in expected["model"].to_pylist()]
    assert collect(tmp_path / "s").table.equals(expected.filter(pa.array(mine)))
