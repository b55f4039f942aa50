"""Every notebook runs from top to bottom; what it keeps reads on a code host and holds nothing of the machine."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

FOLDER = ROOT / "notebooks"
sys.path.insert(0, str(FOLDER))
execute: Any = import_module("execute")
FIGURE, faults_of = execute.FIGURE, execute.faults_of

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_500_000


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.real
@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = outputs_of(notebook)
    assert not [o.output_type for o in outputs if o.output_type in ("error", "stream")], "an error, or noise"
    assert any(FIGURE in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_keeps_reads_everywhere(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults_of(notebook) == []
    data = [output.data for output in outputs_of(notebook)]
    assert any("image/png" in one for one in data)
    assert all("image/png" in one for one in data if FIGURE in one), "a figure without an image"
    assert path.stat().st_size < MOST_BYTES
    assert not any(cell.metadata for cell in notebook.cells), "volatile metadata"
    assert "widgets" not in notebook.metadata


def test_there_are_the_seven_stories_in_order() -> None:
    stories = ["find_sinks", "ablate", "bos_in_gemma", "key_or_value", "trace", "mixing", "encoders_and_your_model"]
    assert [path.stem for path in NOTEBOOKS][:7] == [f"{n:02d}_{story}" for n, story in enumerate(stories, 1)]


@pytest.mark.parametrize(
    "output",
    [
        {"output_type": "stream", "name": "stderr", "text": "a warning"},
        {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []},
        {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "'/home/someone/model'"}},
        {"output_type": "display_data", "metadata": {}, "data": {"text/plain": "C:\\Users\\someone"}},
    ],
    ids=["noise", "error", "path", "windows path"],
)
def test_noise_errors_and_paths_are_not_kept(output: dict[str, Any]) -> None:
    good = nbformat.v4.new_output("display_data", data={"text/plain": "1/2 of /s/ <a href='https://x.org/home/'>"})
    cell = nbformat.v4.new_code_cell("1", outputs=[good], execution_count=1)
    assert faults_of(nbformat.v4.new_notebook(cells=[cell])) == []
    cell.outputs = [good, nbformat.from_dict(output)]
    assert len(faults_of(nbformat.v4.new_notebook(cells=[cell]))) == 1
