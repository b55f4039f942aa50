"""A disk that takes no more: the error says so, what was there stays, and nothing half is left.

The disk is a limit on the size of any file that the process writes (RLIMIT_FSIZE): Python, safetensors, pandas and
pyarrow see the system refuse the write, as on a full disk.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from killing import whole_gguf
from public_calls import CALLS, PUBLIC, STUDY, Here, World, call

import sinklens as sl
from sinklens import lab, sweep
from sinklens.report import export as exporting

WRITERS = [name for name in PUBLIC if name.rpartition(".")[2].startswith("write_") and name != "write_report"]
SAVED = ("sink_scores", "find_sinks", "trace_sinks", "run_experiment", "compare_mixing", "decompose_sinks",
         "mixing.perturbation_spread", "sweep_ablation", "heads.attention_statistics", "mixing.measure_collapse",
         "sink_anatomy", "mixing.path_sums", "reproduce", "find.register_tokens")  # fmt: skip


@contextmanager
def room(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond so many bytes; what is printed goes nowhere, because pytest keeps it in files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sizes(path: Path) -> dict[str, int]:
    """Every file below a path, hidden ones included, but for locks."""
    there = path.rglob("*") if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.stat().st_size for p in there if p.is_file() and "lock" not in p.name}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_says_that_nothing_more_fits_and_leaves_nothing_half(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(exporting, "can_draw", lambda: False)  # a browser writes files of its own
    arguments = CALLS[name](world)
    target = "path" if "path" in arguments else "out"
    call(name, world, arguments)
    whole = sizes(arguments[target])
    for size in (10, max(whole.values()) - 1):
        arguments[target] = world.new(arguments[target].suffix)
        with room(size), pytest.raises(sl.SinklensError, match="cannot write"):
            call(name, world, arguments)
        left = sizes(arguments[target])
        assert {file: whole.get(file) for file in left} == left, "half a file"
        assert len(left) < len(whole)
        call(name, world, arguments)
        assert sizes(arguments[target]) == whole, "what was left stands in the way"


@pytest.mark.parametrize("name", SAVED)
def test_what_was_saved_before_stays(world: World, tmp_path: Path, name: str) -> None:
    result, path = world.result(name), tmp_path / "result"
    result.save(path)
    saved = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with room(min(map(len, saved.values())) - 1), pytest.raises(sl.BadInputError, match="cannot write"):
        result.save(path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == saved


def test_a_report_goes_on_when_there_is_room_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "can_draw", lambda: False)
    given = CALLS["write_report"](world) | {"path": tmp_path / "report"}
    with room(30_000), pytest.raises(sl.BadInputError, match="cannot write"):
        call("write_report", world, given)
    before = sizes(tmp_path / "report")
    assert "stages/scores.json" in before
    call("write_report", world, given)
    whole = sizes(tmp_path / "report")
    assert set(whole) > set(before)
    assert not [file for file in before if file.endswith(".safetensors") and before[file] != whole[file]]
    for file in (tmp_path / "report" / "stages").glob("*.json"):
        assert "cannot write" not in file.read_text(), "a full disk is no reason to leave a stage out"


def test_experiments_studies_and_sweeps_go_on_when_there_is_room_again(world: World, tmp_path: Path) -> None:
    def experiment() -> None:
        given = CALLS["run_experiment"](world) | {"resume": tmp_path / "experiment"}
        call("run_experiment", world, given)

    def study() -> None:
        lab.run_study(STUDY, tmp_path / "study", analysis=False, progress=False)

    def swept() -> None:
        sweep.run_sweep(world.jobs, tmp_path / "sweep", executor=Here(), workers=1, progress=False)

    assert world.jobs
    for work in (experiment, study, swept):
        for size in (10, 1000):
            with room(size), pytest.raises(sl.SinklensError, match="cannot write"):
                work()
            assert not [p for p in tmp_path.rglob(".*") if "lock" not in p.name]
        work()


def test_a_cache_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SINKLENS_CACHE", str(cache))
    gguf = whole_gguf(tmp_path / "tiny.gguf")
    for size in (10, 5000, 20_000):
        with room(size), pytest.raises(sl.SinklensError, match="make room, or set SINKLENS_CACHE"):
            sl.load_model(gguf)
        assert [p for p in cache.rglob("*") if p.is_file() and "lock" not in p.name] == []
    assert sl.load_model(gguf).cfg.n_layers == 2
