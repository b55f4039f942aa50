"""Saved results come back, by the kind in their header: also those that earlier versions wrote."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from public_names import CLASSES, named
from safetensors import safe_open

import sinklens as sl

SAVED = ROOT / "tests" / "data" / "saved_by_0.1.tar.xz"  # benchmarks/result_hashes.py --keep wrote them, on 0.1.0
READERS: dict[str, str] = sl._READERS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(SAVED) as archive:
        archive.extractall(folder, filter="data")
    return {path.stem: path for path in folder.iterdir()}


def contents(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["sinklens"])
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


@pytest.mark.parametrize("kind", sorted({*READERS, "Images"}))
def test_load_opens_every_kind_by_its_header(saved: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Files of 0.1, which knew other module paths: the same class, and the same file when it is saved again."""
    found = sl.load(saved[kind])
    assert type(found).__name__ == ("TransformerBridge" if kind == "LabModel" else kind)
    if kind in ("LabModel", "Reproductions"):
        return
    again = found.save(tmp_path / "again.safetensors")
    tensors, header = contents(saved[kind])
    others, second = contents(again)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[n].nan_to_num(7), others[n].nan_to_num(7)) for n in tensors)
    assert header["meta"] == second["meta"]


def test_every_result_that_can_be_read_back_has_its_reader() -> None:
    readable = {name.rpartition(".")[2] for name in CLASSES if hasattr(named(name), "load")}
    assert readable - {"Images"} == set(READERS) - {"LabModel"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no complete file"),
        (b"{}", "not written by"),
        (b"\x00" * 40, "no complete file"),
        (b'{"kind": 3}', "not wr"),
    ],
)
def test_load_refuses_what_is_no_result(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)
    with pytest.raises(sl.BadInputError, match=message):
        sl.load(path)


def test_load_refuses_parts_of_longer_runs_and_half_files(saved: dict[str, Path], tmp_path: Path) -> None:
    part = tmp_path / "part.json"
    part.write_text('{"kind": "ExperimentSequence"}')
    with pytest.raises(sl.BadInputError, match="part of a longer run"):
        sl.load(part)
    half = tmp_path / "half.safetensors"
    half.write_bytes(saved["SinkMap"].read_bytes()[:-100])
    with pytest.raises(sl.BadInputError, match="complete"):
        sl.load(half)
    with pytest.raises(sl.BadInputError, match="no result file"):
        sl.load(tmp_path / "nothing")
