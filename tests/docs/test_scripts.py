"""Every script beside the package runs from its first line to its last: with ``--smoke``, small and without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "findings", "notebooks")
SCRIPTS = sorted(p for name in FOLDERS for p in (ROOT / name).glob("*.py") if "__main__" in p.read_text("utf-8"))
SECONDS = 900  # of a machine with much else to do

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks read a process's memory from /proc")


def kept() -> dict[Path, int]:
    """When the files that scripts could write were last changed."""
    files = (path for name in (*FOLDERS, "docs") for path in (ROOT / name).rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files if not {"__pycache__", "_build"} & set(path.parts)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_script_runs_to_its_end_and_leaves_nothing(script: Path, tmp_path: Path) -> None:
    here, home, before = tmp_path / "here", tmp_path / "home", kept()
    here.mkdir()
    home.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "SINKLENS", "HF_"))}
    offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "SINKLENS_CACHE": str(home / "cache")}
    given = {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--smoke"]
    done = subprocess.run(
        command, cwd=here, env=own | offline | given, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not list(here.iterdir()), "it wrote where it was called"
    assert kept() == before, "it wrote into the repository"


def test_there_are_scripts_in_every_folder() -> None:
    assert {path.parent.name for path in SCRIPTS} == set(FOLDERS)
