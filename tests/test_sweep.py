"""Sweeps: split texts merge exactly, nothing runs twice, nothing stale is taken, failures are kept."""

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

import pandas as pd
import pyarrow as pa
import pytest
import torch
from sweeping import SENTENCES, save_models
from typer.testing import CliRunner

import sinklens as sl
from sinklens.cli import app
from sinklens.sweep import (
    Job,
    ModelSpec,
    Processes,
    RayExecutor,
    SubmititExecutor,
    TextSpec,
    collect,
    load_jobs,
    make_jobs,
    run_sweep,
    sweep_status,
)
from sinklens.sweep.folder import ResultFolder
from sinklens.sweep.keys import Keys, code_version

EDITS = [
    "none",
    {"build": "ablate_sinks", "sinks": "all", "mode": "zero"},
    {"build": "ablate_sinks", "sinks": [0], "mode": "renormalize", "layers": [1], "heads": [0, 2]},
    {"build": "swap_attention", "kind": "off-by-one"},
    {"build": "restrict_attention", "sinks": 2, "recent": 8},
    {"build": "patch_bos", "source": "zero"},
    {"build": "ablate_sinks", "sinks": "all", "mode": "mean_value", "reference": {"texts": SENTENCES[4:]}},
]
TASKS = [
    {"task": "sink_scores", "positions": [0, 6]},
    "find_sinks",
    {"task": "find_sinks", "per": "sequence"},
    "token_loss",
    {"task": "token_loss", "per": "token", "most_scored": 9},
    {"task": "experiment", "controls": ["random", "recent"], "most_scored": 20},
    {"task": "experiment", "controls": ["random"], "per": "token"},
]
TEXT = {"texts": SENTENCES, "label": "words"}
EFFECT = {"task": "experiment", "controls": ["random", "matched"], "most_scored": 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def own_functions_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def here(jobs: list[Job], folder: Path, **options: Any) -> Any:
    """Run in this process."""
    with ThreadPoolExecutor(1) as pool:
        return run_sweep(jobs, folder, executor=pool, workers=1, **options)


def value_of(folder: Path, **chosen: Any) -> pd.DataFrame:
    return collect(folder).to_dataframe(**chosen)


def test_a_split_text_gives_exactly_the_table_of_the_whole(models: list[str], tmp_path: Path) -> None:
    text = {"texts": SENTENCES[:4], "label": "words"}
    for pieces in (1, 2):
        split_text = {**text, "pieces": pieces}
        jobs = make_jobs(models[0], split_text, EDITS[1:], TASKS[:1], 5)
        jobs += make_jobs(models[0], split_text, EDITS[1:2], TASKS[1:], 5)
        found = here(jobs, tmp_path / str(pieces))
        assert found.failed == found.missing == 0, found
    whole, split = collect(tmp_path / "1"), collect(tmp_path / "2")
    assert len(split.timings) == 2 * len(whole.timings)
    assert whole.table.equals(split.table)
    losses = {t: split.to_dataframe(task=t) for t in ("token_loss", "token_loss(per=token, most_scored=9)")}
    assert not losses["token_loss"].loss.duplicated().all()
    effects = split.to_dataframe(task="experiment(controls=random+recent, most_scored=20)")
    assert effects.edited.any()
    assert not effects.edited.all(), "some sequences have no sinks, so that pieces without any were merged"


def test_every_sequence_is_scored_alone(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in a batch change the last bits of a large model's numbers, though not of the tiny ones here."""
    sizes = []

    def watched(model: Any, tokens: sl.Tokens, **options: Any) -> sl.SinkScores:
        sizes.append(len(tokens))
        return sl.sink_scores(model, tokens, **options)

    for module in ("measurement.sink_scores", "tasks.scores_of"):
        monkeypatch.setattr(f"sinklens.sweep.{module}", watched)
    here(make_jobs(models[0], {**TEXT, "n_seqs": 2}, EDITS[1:2]), tmp_path / "s")
    assert sizes == [1] * 4


def test_rows_are_what_the_functions_give_when_called_directly(models: list[str], tmp_path: Path) -> None:
    edits = [EDITS[0], EDITS[2], EDITS[3]]
    here(make_jobs(models[1], {**TEXT, "pieces": 2}, edits, ["sink_scores", "token_loss", EFFECT], 3), tmp_path / "s")
    model = sl.load_model(models[1])
    tokens = sl.load_tokens(model, SENTENCES, seed=3)
    off = sl.swap_attention(model, "off-by-one")
    with model.hooks(fwd_hooks=list(off)):
        patterns = model.run_with_cache(tokens.ids)[1]
    swapped = "swap_attention(kind=off-by-one)"
    scores = value_of(tmp_path / "s", task="sink_scores")
    for edit, expected in (
        ("none", sl.sink_scores(model, tokens).alpha[..., 0]),
        (swapped, torch.stack([patterns[f"blocks.{n}.attn.hook_pattern"][..., 0].mean(-1) for n in range(2)], 1)),
    ):
        mine = torch.tensor(scores[scores.intervention == edit].alpha.to_numpy()).view(expected.shape)
        assert torch.allclose(mine, expected, atol=1e-6)
    losses = value_of(tmp_path / "s", task="token_loss")
    direct = sl.token_loss(model, tokens, hooks=off).double()
    assert torch.allclose(
        torch.tensor(losses[losses.intervention == swapped].loss.to_numpy()), direct.nanmean(1), atol=1e-12, rtol=0
    )
    label = edits[1]["build"] + "(sinks=0, mode=renormalize, layers=1, heads=0+2)"
    hooks = sl.ablate_sinks(model, [0], "renormalize", layers=[1], heads=[0, 2])
    experiment = sl.run_experiment(
        model, tokens, {label: hooks}, controls=("random", "matched"), most_scored=20, seed=3
    )
    table = experiment.to_dataframe()
    for row in (
        collect(tmp_path / "s").summary(task=make_jobs("m", "t", EDITS[2], EFFECT)[0].task.label).to_dict("records")
    ):
        if row["intervention"] == label:
            same = table[(table.label == label) & (table.control == row["control"])].iloc[0]
            for name in ("loss", "d_loss", "kl", "top1"):
                assert row[name] == pytest.approx(same[name], abs=1e-7)
            assert row["sequences"] == same.sequences


def test_summaries_have_the_intervals_of_run_experiment(models: list[str], tmp_path: Path) -> None:
    text = {"source": "random", "n_seqs": 16, "seq_len": 24, "pieces": 4}
    edit = {"build": "swap_attention", "kind": "off-by-one", "label": "off"}
    here(make_jobs(models[0], text, edit, {"task": "experiment", "controls": []}), tmp_path / "s")
    model = sl.load_model(models[0])
    tokens = sl.load_tokens(model, "random", n_seqs=16, seq_len=24)
    experiment = sl.run_experiment(model, tokens, {"off": sl.swap_attention(model, "off-by-one")}, controls=())
    expected = experiment.to_dataframe().iloc[1]
    row = collect(tmp_path / "s").summary().iloc[0]
    for name in ("d_loss", "d_loss_low", "d_loss_high", "kl", "kl_low", "kl_high"):
        assert row[name] == pytest.approx(expected[name], rel=1e-6)
    layers = make_jobs(models[0], text, tasks="sink_scores")
    here(layers, tmp_path / "s")
    by_layer = collect(tmp_path / "s").summary(by=["layer"])
    scores = sl.sink_scores(model, tokens)
    assert by_layer.above.tolist() == pytest.approx(scores.layer_table().sink_rate.tolist())
    whole = collect(tmp_path / "s").summary().iloc[0]
    assert (whole.above_low, whole.above_high) == pytest.approx(scores.sink_rate_interval())
    assert by_layer.alpha.tolist() == pytest.approx(scores.layer_table().alpha.tolist(), abs=1e-6)
    assert collect(tmp_path / "s").plot("alpha").to_dict()["data"][0]["y"][0] == "none"


def test_every_sequence_weighs_the_same_whatever_its_length(models: list[str], tmp_path: Path) -> None:
    texts = {"texts": [SENTENCES[0], "the cat sat on the mat ."], "label": "of two lengths"}
    here(make_jobs(models[0], texts, tasks=["token_loss", {"task": "token_loss", "per": "token"}]), tmp_path / "s")
    found = collect(tmp_path / "s")
    per_sequence, per_token = found.summary("token_loss"), found.summary("token_loss(per=token)")
    assert per_token.loss[0] == pytest.approx(per_sequence.loss[0], abs=1e-12)
    assert per_token.loss[0] != pytest.approx(found.to_dataframe(task="token_loss(per=token)").loss.mean(), abs=1e-3)


def test_the_reference_leaves_out_documents_that_are_measured(models: list[str], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    text = {"source": str(file), "n_seqs": 4, "seq_len": 64}
    edit = {"build": "ablate_sinks", "sinks": [0], "mode": "mean_value", "reference": {**text, "n_seqs": 8}}
    here(make_jobs(models[0], text, edit, "token_loss"), tmp_path / "s")
    model = sl.load_model(models[0])
    all_of_it = sl.load_tokens(model, str(file), n_seqs=8, seq_len=64)
    tokens, rest = all_of_it[:4], all_of_it[4:]
    expected = sl.token_loss(model, tokens, hooks=sl.ablate_sinks(model, [0], "mean_value", reference=rest))
    leaking = sl.token_loss(model, tokens, hooks=sl.ablate_sinks(model, [0], "mean_value", reference=all_of_it))
    mine = torch.tensor(value_of(tmp_path / "s").loss.to_numpy())
    assert torch.allclose(mine, expected.double().nanmean(1), atol=1e-12, rtol=0)
    assert not torch.allclose(mine, leaking.double().nanmean(1), atol=1e-6)
    inside = make_jobs(models[0], text, {**edit, "reference": text}, "token_loss")
    assert "every document of reference= is in the measured text" in here(inside, tmp_path / "s").failures[0]["error"]


def test_a_key_depends_on_contents_and_not_on_names(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(models[0], folder)
    file.write_text("the cat sat")
    own = tmp_path / "own_module.py"
    own.write_text("def f(*_, **__): return {}")
    monkeypatch.syspath_prepend(str(tmp_path))

    def key(**other: Any) -> str:
        fields = {"models": str(folder), "texts": str(file), "tasks": "own_module:f"} | other
        return Keys(tmp_path / "none.json").key(make_jobs(**fields)[0])

    first = key()
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    there = shutil.copy(file, tmp_path / "elsewhere" / "other.txt")
    assert key(models={"name": str(moved), "label": "m"}, texts=str(there)) == first
    changed = {
        "dtype": key(models={"name": str(folder), "dtype": "float64"}),
        "seed": key(seeds=1),
        "length": key(texts={"source": str(file), "seq_len": 2}),
        "edit": key(interventions={"build": "swap_attention", "kind": "off-by-one"}),
    }
    file.write_text("the cat sat on")
    changed["text"] = key()
    own.write_text("def f(*_, **__): return {'a': 1}")
    changed["function"] = key()
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    changed["weights"] = key()
    monkeypatch.setattr("sinklens.sweep.keys.code_version", lambda: "another")
    changed["code"] = key()
    assert len({first, *changed.values()}) == 1 + len(changed)
    assert "torch" in code_version()


def test_hashes_of_files_are_kept_until_they_change(models: list[str], tmp_path: Path) -> None:
    job = make_jobs(models[0], TEXT)[0]
    keys = Keys(tmp_path / "files.json")
    first = keys.key(job)
    keys.save()
    kept = json.loads((tmp_path / "files.json").read_text())
    assert any("model.safetensors" in name for name in kept)
    again = Keys(tmp_path / "files.json")
    assert again.key(job) == first
    (tmp_path / "files.json").write_text(json.dumps(dict.fromkeys(kept, "x")))
    assert Keys(tmp_path / "files.json").key(job) != first, "the kept hashes are used"


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
        "import os, sys, time\n"
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


def test_jobs_are_plain_data(models: list[str]) -> None:
    big = {"name": models[0], "device_map": {"model": 0, "lm_head": "cpu"}, "max_memory": {0: "20GB", "cpu": "9GB"}}
    jobs = make_jobs([big], {**TEXT, "pieces": 2}, EDITS, TASKS, [0, 1])
    assert len(jobs) == 2 * (7 * 7 - 2) * 2, "every combination but the experiment without an intervention"
    for job in jobs:
        assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert jobs[0].model.options()["max_memory"] == {0: "20GB", "cpu": "9GB"}
    assert [job.text.rows for job in jobs[:4]] == [(0, 4), (4, 8), (0, 4), (4, 8)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": []}, "texts is empty"),
        ({"texts": {"source": "a", "pieces": 2}}, "cannot be split"),
        ({"texts": {"source": "a", "n_seqs": 1, "pieces": 2}}, "cannot be split"),
        ({"texts": {"n_seqs": 1}}, "needs 'source'"),
        ({"texts": {"source": "a", "texts": ["b"]}}, "not both"),
        ({"texts": {"source": "a", "length": 2}}, "has no 'length'"),
        ({"models": {"dtype": "float32"}}, "needs 'name'"),
        ({"models": [{"name": "a", "dtype": "float64"}, "a"]}, "two models are both called 'a'"),
        ({"interventions": {"build": "none", "sinks": [0]}}, "takes nothing"),
        ({"tasks": {"task": "token_loss", "x": object()}}, "plain data"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"tasks": "experiment"}, "there is no job"),
    ],
)
def test_what_makes_no_jobs_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(sl.BadInputError, match=message):
        make_jobs(**({"models": "a", "texts": "b"} | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": "scan"}, "no task 'scan'"),
        ({"tasks": {"task": "token_loss", "per_token": True}}, "no parameter per_token"),
        ({"tasks": "no_such_module:f"}, "cannot import"),
        ({"tasks": "sweeping:SENTENCES"}, "is no function"),
        ({"interventions": "ablate"}, "no intervention 'ablate'"),
        ({"interventions": "ablate_sinks"}, "needs sinks="),
        ({"interventions": {"build": "swap_attention", "sinks": [0]}}, "takes no sinks="),
        ({"interventions": {"build": "ablate_sinks", "sinks": "tertiary"}}, "is unknown"),
        ({"interventions": {"build": "ablate_sinks", "sinks": [0], "mod": "zero"}}, "no parameter mod"),
        ({"interventions": {"build": "ablate_sinks", "sinks": "all", "mode": "mean_value"}}, "give reference"),
        ({"texts": "no-such-text"}, "no text source"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    models: list[str], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    jobs = make_jobs(**({"models": models[0], "texts": TEXT} | given))
    with pytest.raises(sl.BadInputError, match=message):
        here(jobs, tmp_path / "s")
    assert not list(tmp_path.glob("s/results/*"))


def test_what_cannot_run_is_refused(models: list[str], tmp_path: Path) -> None:
    jobs = make_jobs(models[0], TEXT)
    with pytest.raises(sl.BadInputError, match="executor must be one of"):
        run_sweep(jobs, tmp_path / "s", executor="dask")
    with pytest.raises(sl.BadInputError, match="at least 1"):
        run_sweep(jobs, tmp_path / "s", workers=0)
    with pytest.raises(sl.BadInputError, match="no job"):
        run_sweep([], tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(sl.BadInputError, match="no folder of a sweep"):
        run_sweep(jobs, tmp_path / "other")
    with pytest.raises(sl.BadInputError, match="there is no sweep"):
        collect(tmp_path / "nothing")
    kept = ResultFolder(tmp_path / "s", create=True)
    with kept.locked(), pytest.raises(sl.BadInputError, match="another sweep is running"):
        here(jobs, tmp_path / "s")
    with pytest.raises(sl.BadInputError, match="at least 1"):
        Processes(0)
    with pytest.raises(sl.BadInputError, match="rows must be"):
        TextSpec(source="random", rows=(3, 3))
    assert ModelSpec(models[0]).label == "llama"


def test_the_command_line_runs_shows_and_collects(models: list[str], tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        f"models:\n  - {{name: {models[0]}, label: tiny}}\n"
        "texts:\n  - {source: random, n_seqs: 2, seq_len: 16, pieces: 2}\n"
        "interventions:\n  - none\n  - {build: ablate_sinks, sinks: [0], mode: zero}\n"
        "tasks: [token_loss, {task: sweeping:raises, label: broken}]\n"
    )
    assert len(load_jobs(config)) == 8
    here(load_jobs(config), tmp_path / "s")
    runner = CliRunner()

    def run(*arguments: str) -> tuple[int, str]:
        done = runner.invoke(app, ["sweep", *arguments], env={"COLUMNS": "250"})
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.output

    store = ("--store", str(tmp_path / "s"))
    code, shown = run("run", str(config), *store)
    assert code == 1
    assert "4 of 8 jobs done, 4 failed, 0 missing" in shown
    assert "broken on" in shown  # the table may wrap it
    assert run("status", *store)[1].startswith("4 of 8 jobs done")
    code, shown = run("collect", *store, "--out", str(tmp_path / "out.parquet"))
    assert code == 0
    assert "4 job(s) have no result yet" in shown
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert table.loss.notna().all()
    assert table.model.unique().tolist() == ["tiny"]
    run("collect", *store, "--out", str(tmp_path / "out.csv"))
    assert pd.read_csv(tmp_path / "out.csv").loss.tolist() == pytest.approx(table.loss.tolist(), abs=0)
    assert run("collect", *store, "--out", str(tmp_path / "out.xlsx"))[0] == 2
    assert run("run", str(config), *store, "--gpus", "1")[0] == 2
    config.write_text("models: [a]\nmodel: b\n")
    assert run("run", str(config), *store)[0] == 2
