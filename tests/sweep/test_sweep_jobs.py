"""Sweeps: jobs as data, the keys of results, mistakes that are found early, the command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from places import SUPPORT
from sweeping import EDITS, TASKS, TEXT, here, save_models
from typer.testing import CliRunner

import sinklens as sl
from sinklens.cli import app
from sinklens.sweep import (
    Job,
    ModelSpec,
    Processes,
    TextSpec,
    collect,
    load_jobs,
    make_jobs,
    run_sweep,
)
from sinklens.sweep.folder import ResultFolder
from sinklens.sweep.keys import Keys, code_version


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def own_functions_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


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
    assert "ValueError: broken on purpose" in shown
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
