"""Files that something happened to: a fifth of the fuzz cases. Each loads as it was saved, or is refused with words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from counting import count
from fuzzing import CASES, SECONDS, deadline, fuzz
from hypothesis import given, strategies as st
from killing import whole_gguf
from public_calls import World

import sinklens as sl

SAVED = ("sink_scores", "find_sinks", "trace_sinks", "run_experiment", "compare_mixing", "decompose_sinks",
         "mixing.perturbation_spread", "sweep_ablation", "heads.attention_statistics",
         "mixing.measure_collapse")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int = 400) -> bytes:
    """Cut, flipped, overwritten, emptied; half of the time in the header."""
    size = len(content)
    at = draw(st.integers(0, min(head, size) - 1) | st.integers(0, size - 1))
    kind = draw(st.sampled_from(["cut", "flip", "bytes", "drop", "empty", "garbage"]))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if kind == "bytes":
        new = draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 8))
        return content[:at] + new + content[at + len(new) :]
    return {"cut": content[:at], "drop": content[:at] + content[at + 1 :], "empty": b"", "garbage": b"{" * 40}[kind]


@pytest.mark.parametrize("name", SAVED)
def test_a_damaged_result_is_refused_or_the_very_one(world: World, tmp_path: Path, name: str) -> None:
    result = world.result(name)
    whole = result.save(tmp_path / "whole")
    content, path = whole.read_bytes(), tmp_path / "damaged"

    @fuzz(max(1, CASES * 12 // 100 // len(SAVED)))
    @given(damaged(content))
    def run(changed: bytes) -> None:
        count("cases fuzzed", 1)
        path.write_bytes(changed)
        with deadline(SECONDS):
            try:
                found = type(result).load(path)
            except sl.SinklensError:
                return
        again = found.save(tmp_path / "again").read_bytes()
        assert again == content, "another result came back"

    run()


def test_a_result_of_another_kind_is_refused(world: World, tmp_path: Path) -> None:
    results = [world.result(name) for name in SAVED]
    for one in results:
        path = one.save(tmp_path / "one")
        for other in {type(r) for r in results} - {type(one)}:
            with pytest.raises(sl.BadInputError, match=f"holds a {type(one).__name__}, not a"):
                other.load(path)


def test_wild_gguf_headers_are_refused_or_read(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path_factory.mktemp("cache")))
    content = whole_gguf(tmp_path / "whole.gguf").read_bytes()

    @fuzz(max(1, CASES * 2 // 100))
    @given(damaged(content, head=1500))
    def run(changed: bytes) -> None:
        count("cases fuzzed", 1)
        (tmp_path / "wild.gguf").write_bytes(changed)
        with deadline(SECONDS):
            try:
                model = sl.load_model(tmp_path / "wild.gguf")
            except sl.SinklensError:
                return
        assert model.cfg.n_layers >= 1

    run()


def test_a_damaged_model_folder_is_refused_or_loads(world: World, tmp_path: Path) -> None:
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    whole = {name: (world.model_folder / name).read_bytes() for name in names}

    @fuzz(max(1, CASES * 2 // 100))
    @given(st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(whole[name]))))
    def run(case: tuple[str, bytes]) -> None:
        count("cases fuzzed", 1)
        for name, content in whole.items():
            (tmp_path / name).write_bytes(case[1] if name == case[0] else content)
        with deadline(SECONDS):
            try:
                model: Any = sl.load_model(tmp_path)
                sl.load_tokens(model, ["a text to try it"])
            except sl.SinklensError:
                return
        assert isinstance(model.cfg.n_layers, int)

    run()


def test_broken_lines_of_jsonl_are_named(world: World, tmp_path: Path) -> None:
    good = '{"text": "one whole document of bytes"}'
    line = st.sampled_from([good, "", "{", "[]", "null", '{"text": 1}', '{"text": ""}', '{"txt": "a"}', "\x00", '"a"'])

    @fuzz(max(1, CASES * 4 // 100))
    @given(st.lists(line | st.text(max_size=9), max_size=5), st.binary(max_size=3))
    def run(lines: list[str], tail: bytes) -> None:
        count("cases fuzzed", 1)
        path = tmp_path / "text.jsonl"
        path.write_bytes("\n".join(lines).encode("utf-8", "replace") + tail)
        with deadline(SECONDS):
            try:
                found = sl.load_tokens(world.model, path, seq_len=10)
            except sl.BadInputError as error:
                assert "text.jsonl" in str(error) or "tokens" in str(error) or "text" in str(error)  # noqa: PT017
                return
        assert found.ids.shape[1] == 10
        assert lines.count(good) >= 1

    run()


def test_a_flipped_bit_of_a_number_is_noticed(world: World, tmp_path: Path) -> None:
    path = world.scores.save(tmp_path / "scores")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(sl.BadInputError, match="another SHA-256"):
        sl.SinkScores.load(path)


def test_a_gguf_header_that_speaks_of_a_billion_blocks_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINKLENS_CACHE", str(tmp_path / "cache"))
    path = whole_gguf(tmp_path / "wild.gguf")
    content = path.read_bytes()
    at = content.index(b".block_count") + len(b".block_count") + 4  # behind the type of the value
    path.write_bytes(content[:at] + (10**9).to_bytes(4, "little") + content[at + 4 :])
    with deadline(5), pytest.raises(sl.BadInputError, match="speaks of 1000000000 blocks"):
        sl.load_model(path)
