"""The documentation's code runs, its names exist, and the site is built without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_code import DOCS, blocks, unknown_names
from public_names import NAMES, ROOMS, TOP

import sinklens as sl

PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("howto/*.md"), DOCS.parent / "README.md"])
RUN = [
    "quickstart", "howto/find", "howto/ablate", "howto/bos", "howto/key_or_value", "howto/trace", "howto/mixing",
    "howto/long_texts", "howto/streaming", "howto/images_and_encoders", "howto/your_model", "howto/share",
]  # fmt: skip


@pytest.mark.real
@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Any) -> None:
    load_model, load_tokens = sl.load_model, sl.load_tokens

    def model(name: Any) -> Any:  # decoders: one for all, loaded once
        return smollm2 if name in ("smollm2-135m", "gemma3-270m") else load_model(name)

    def few(subject: Any, source: Any = "python-docs", **asked: Any) -> sl.Tokens:  # less of the same texts
        asked |= {"n_seqs": min(asked["n_seqs"], 2), "seq_len": min(asked["seq_len"], 112)}
        return load_tokens(subject, source, **asked)

    monkeypatch.setattr(sl, "load_model", model)
    monkeypatch.setattr(sl, "load_tokens", few)
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / f"{page}.md")
    assert code
    names: dict[str, Any] = {}
    with torch.no_grad():
        for block in code:
            exec(compile(block, f"{page}.md", "exec"), names)


def test_every_how_to_is_run() -> None:
    assert {f"howto/{path.stem}" for path in DOCS.glob("howto/*.md")} == {page for page in RUN if "/" in page}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_name_in_the_code_of_a_page_exists(page: Path) -> None:
    assert [name for block in blocks(page) for name in unknown_names(block)] == []


def test_a_wrong_name_or_keyword_would_be_seen() -> None:
    assert unknown_names("import sinklens as sl\nsl.find_sink(model)") == ["sinklens.find_sink"] * 2
    assert unknown_names("sl.find_sinks(model, tokens, methods='wong')") == ["find_sinks(methods=)"]


def test_every_public_name_has_its_place_in_the_reference() -> None:
    written = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("api/*.md"))
    assert [name for name in NAMES if f":: sinklens.{name}\n" not in written] == []
    assert {path.stem for path in DOCS.glob("api/*.md")} == {*ROOMS, "errors", "index"}
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    assert [name for name in TOP if f"`{name}`" not in index] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_is_built_without_a_warning(site: Path) -> None:
    for page in ("index", "quickstart", "howto/find", "api/find", "findings", "citation", "search"):
        assert (site / f"{page}.html").is_file()
    assert "sink_rate" in (site / "api" / "find.html").read_text(encoding="utf-8"), "docstrings are in it"
