"""Tokens: one correct BOS, padding that never matters, reproducible sampling, clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build, build_pair
from transformer_lens.model_bridge import TransformerBridge
from wording import model_with, word_tokenizer

import sinklens as sl
from sinklens.inputs.corpora import pieces_in_order, sample_pieces
from sinklens.inputs.load import as_tokens
from sinklens.models.load import native_tokenizer


@pytest.fixture(scope="module")
def plain() -> TransformerBridge:
    return model_with(adds_bos=False)


@pytest.fixture(scope="module")
def with_bos() -> TransformerBridge:
    return model_with(adds_bos=True)


def test_bos_follows_the_training_and_not_the_host(plain: TransformerBridge, with_bos: TransformerBridge) -> None:
    assert sl.load_tokens(plain, ["the cat sat"]).ids.tolist() == [[5, 6, 7]]
    assert plain.to_tokens("the cat sat").tolist() == [[1, 5, 6, 7]], "the host prepends whatever it finds"
    assert sl.load_tokens(with_bos, ["the cat sat"]).ids.tolist() == [[1, 5, 6, 7]]


def test_bos_can_be_forced_either_way_and_is_never_doubled(
    plain: TransformerBridge, with_bos: TransformerBridge
) -> None:
    assert sl.load_tokens(plain, ["the cat"], prepend_bos=True).ids.tolist() == [[1, 5, 6]]
    assert sl.load_tokens(with_bos, ["the cat"], prepend_bos=False).ids.tolist() == [[5, 6]]
    for model in (plain, with_bos):
        assert sl.load_tokens(model, ["<bos> the cat"], prepend_bos=True).ids.tolist() == [[1, 5, 6]]
    assert sl.load_tokens(with_bos, ["<bos> the cat"]).ids.tolist() == [[1, 5, 6]]


def test_a_bridge_that_sinklens_did_not_load_gets_its_native_tokenizer_back(tmp_path: Path) -> None:
    word_tokenizer(adds_bos=False).save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    hf = build("llama")
    hf.config.architectures = ["LlamaForCausalLM"]
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer, device="cpu")
    assert bridge.to_tokens("the cat").tolist() == [[1, 5, 6]]
    assert sl.load_tokens(sl.load_model(bridge), ["the cat"]).ids.tolist() == [[5, 6]]


def test_special_tokens_are_found_by_id_wherever_they_stand(with_bos: TransformerBridge) -> None:
    tokens = sl.load_tokens(with_bos, ["the cat <bos> sat", "a mat"])
    assert tokens.special.tolist() == [
        [True, False, False, True, False],
        [True, False, False, True, True],
    ], "BOS in front, BOS in the middle of a packed text, and padding"


def test_texts_of_different_lengths_are_padded_masked_and_labelled(plain: TransformerBridge) -> None:
    tokens = sl.load_tokens(plain, ["the cat sat on the mat", "a cat"])
    assert tokens.mask.sum(1).tolist() == [6, 2]
    assert tokens.labels == (("the", "cat", "sat", "on", "the", "mat"), ("a", "cat"))
    assert tokens.sources == ("text 0", "text 1")
    assert tokens.row(1).tolist() == [4, 6]
    assert tokens[1].labels == (("a", "cat"),)
    assert tokens[[1, 0]].sources == ("text 1", "text 0")


def test_padding_and_saving_keep_the_digest(plain: TransformerBridge, tmp_path: Path) -> None:
    tokens = sl.load_tokens(plain, ["the cat sat on the mat", "a cat"])
    assert tokens.pad("left", 3).pad("right", 2).digest == tokens.digest
    assert tokens.pad("left", 3).starts.tolist() == [3, 3]
    assert tokens.pad("left", 3).trim().ids.tolist() == tokens.ids.tolist()
    loaded = sl.Tokens.load(tokens.save(tmp_path / "tokens"))
    assert (loaded.digest, loaded.labels, loaded.sources) == (tokens.digest, tokens.labels, tokens.sources)
    assert sl.load_tokens(plain, ["the cat sat on the mat", "a mat"]).digest != tokens.digest


def test_everything_a_user_passes_becomes_the_same_tokens(plain: TransformerBridge) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for given in ("the cat sat", ["the cat sat"], ids, ids[0], sl.load_tokens(plain, ["the cat sat"])):
        assert as_tokens(plain, given).ids.tolist() == [[5, 6, 7]]


def test_random_and_repeat_are_reproducible_ordinary_ids(plain: TransformerBridge, with_bos: TransformerBridge) -> None:
    first = sl.load_tokens(plain, "random", n_seqs=3, seq_len=20, seed=5)
    assert first.digest == sl.load_tokens(plain, "random", n_seqs=3, seq_len=20, seed=5).digest
    assert first.digest != sl.load_tokens(plain, "random", n_seqs=3, seq_len=20, seed=6).digest
    assert int(first.ids.min()) >= 4, "no special token is drawn"
    repeated = sl.load_tokens(with_bos, "repeat", n_seqs=4, seq_len=20)
    assert (repeated.ids[:, 0] == 1).all()
    assert all(len(set(row.tolist())) == 1 for row in repeated.ids[:, 1:])
    assert repeated.ids.shape == (4, 20), "special tokens count"


def test_python_docs_gives_one_piece_per_document_until_documents_run_out(plain: TransformerBridge) -> None:
    tokens = sl.load_tokens(plain, "python-docs", n_seqs=16, seq_len=64)
    assert len(set(tokens.documents)) == 16
    assert all(source.startswith("python-docs/") and source.endswith("[0:64]") for source in tokens.sources)
    assert len(tokens.info["corpus_sha256"]) == 64
    other = sl.load_tokens(plain, "python-docs", n_seqs=16, seq_len=64, seed=1)
    assert other.sources != tokens.sources
    assert sl.load_tokens(plain, n_seqs=16, seq_len=64).digest == tokens.digest


def test_files_are_documents(plain: TransformerBridge, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat\n")
    assert sl.load_tokens(plain, text).ids.tolist() == [[5, 6, 7]], "a short file is taken whole, its last newline not"
    lines = tmp_path / "b.jsonl"
    lines.write_text("\n".join(json.dumps({"text": t}) for t in ("the cat", "a mat sat")) + "\n")
    tokens = sl.load_tokens(plain, str(lines), seed=0)
    assert sorted(len(row) for row in tokens.labels) == [2, 3]
    lines.write_text('{"text": "the cat"}\n{"text": "the c')
    with pytest.raises(sl.BadInputError, match=r"line 2 is not JSON .*half a file"):
        sl.load_tokens(plain, str(lines))
    lines.write_text('{"body": "the cat"}\n')
    with pytest.raises(sl.BadInputError, match="no string under the key 'text'"):
        sl.load_tokens(plain, str(lines))
    text.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(sl.BadInputError, match="not UTF-8"):
        sl.load_tokens(plain, text)


def test_pieces_come_from_new_documents_first_and_then_go_on() -> None:
    documents = [("x", list(range(10))), ("y", list(range(100, 104))), ("z", list(range(200, 210)))]
    pieces = sample_pieces(documents, 5, 4, exact=True, seed=0)
    assert sorted(p.document for p in pieces[:3]) == [0, 1, 2]
    assert all(p.ids[0] in (0, 100, 200) for p in pieces[:3])
    assert sorted(p.ids for p in pieces[3:]) == [(4, 5, 6, 7), (204, 205, 206, 207)]
    with pytest.raises(sl.BadInputError, match="shorter than asked: 24 tokens in 3 document"):
        sample_pieces(documents, 6, 4, exact=True, seed=0)
    assert len(sample_pieces(documents, None, 50, exact=False, seed=0)) == 3, "short documents are pieces themselves"


def test_every_document_that_is_long_enough_gives_its_beginning(plain: TransformerBridge, tmp_path: Path) -> None:
    texts = ["the cat", "the cat sat on", "a mat on the cat sat on the mat"]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tokens = sl.load_tokens(plain, path, seq_len=5, min_len=4)
    assert sorted(len(row) for row in tokens.labels) == [4, 5]
    assert len(sl.load_tokens(plain, path, seq_len=5, min_len=2)) == 3
    with pytest.raises(sl.BadInputError, match=r"2 of 3 document\(s\) have at least 4 tokens, 3 were asked"):
        sl.load_tokens(plain, path, n_seqs=3, min_len=4)
    with pytest.raises(sl.BadInputError, match="min_len chooses documents"):
        sl.load_tokens(plain, ["the cat"], min_len=2)


@pytest.mark.parametrize(
    ("texts", "n_seqs", "length", "message"),
    [
        ([], None, None, "list of texts is empty"),
        ([("t", [])], None, None, "is empty"),
        ([("t", [1, 2])], 2, None, "2 sequences were asked for"),
        ([("t", [1, 2])], None, 3, "has 2 tokens, 3 were asked for"),
    ],
)
def test_bad_lists_of_texts_are_refused(texts, n_seqs, length, message) -> None:
    with pytest.raises(sl.BadInputError, match=message):
        pieces_in_order(texts, n_seqs, length)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([""], {}, "text is empty"),
        (["cat"], {}, "has 1 token"),
        ("no-such-source", {}, "no text source"),
        ("python-docs", {"seq_len": 257}, "past the context window"),
        ("python-docs", {"seq_len": 1}, "seq_len must be at least 2"),
        ("python-docs", {"n_seqs": 0}, "n_seqs must be at least 1"),
        (["the cat " * 200], {}, "past the context window"),
        ("python-docs", {"n_seqs": 10**5, "seq_len": 200}, "shorter than asked"),
    ],
)
def test_bad_requests_say_what_to_do(plain: TransformerBridge, source, options, message) -> None:
    with pytest.raises(sl.BadInputError, match=message):
        sl.load_tokens(plain, source, **options)


def test_a_dataset_without_a_hub_names_what_works(plain: TransformerBridge, monkeypatch) -> None:
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(sl.BadInputError, match=r"no route.*python-docs"):
        sl.load_tokens(plain, "some/dataset")


def test_a_dataset_is_read_from_its_text_column(plain: TransformerBridge, monkeypatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["the cat sat on the mat", "a cat sat"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    tokens = sl.load_tokens(plain, "some/dataset", n_seqs=2, seq_len=3)
    assert sorted(tokens.labels) == [("a", "cat", "sat"), ("the", "cat", "sat")]
    wrong = datasets.Dataset.from_dict({"body": ["x"]}).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: wrong)
    with pytest.raises(sl.BadInputError, match="no 'text' column; it has body"):
        sl.load_tokens(plain, "some/dataset")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 97]]), "token id 97 is outside the vocabulary"),
        (torch.tensor([[3, -1]]), "token id -1 is outside the vocabulary"),
        (torch.tensor([[3]]), "has 1 token"),
        (torch.zeros(0, 4, dtype=torch.long), "not be empty"),
        (torch.ones(1, 4), "must be integers"),
        (torch.ones(1, 1, 4, dtype=torch.long), "shape"),
        (torch.full((1, 257), 5), "past the context window"),
    ],
)
def test_bad_ids_are_refused(ids: torch.Tensor, message: str) -> None:
    _, model = build_pair("llama")
    with pytest.raises(sl.BadInputError, match=message):
        sl.sink_scores(model, ids)


def test_a_mask_with_holes_is_refused(plain: TransformerBridge) -> None:
    tokens = sl.load_tokens(plain, ["the cat sat on"])
    holes = {**tokens.tensors(), "mask": torch.tensor([[True, False, True, True]])}
    with pytest.raises(sl.BadInputError, match="holes"):
        sl.sink_scores(plain, sl.Tokens.from_parts(holes, tokens.meta()))


def test_text_for_a_model_without_a_tokenizer_is_refused() -> None:
    _, model = build_pair("llama")
    assert native_tokenizer(model) is None
    with pytest.raises(sl.BadInputError, match="without a tokenizer"):
        sl.sink_scores(model, "the cat")
    assert sl.load_tokens(model, "random", n_seqs=2, seq_len=8).ids.shape == (2, 8)


def test_a_byte_order_mark_and_unicode_line_breaks_belong_to_no_token(plain: TransformerBridge, tmp_path: Path) -> None:
    text = tmp_path / "bom.txt"
    text.write_bytes(b"\xef\xbb\xbfthe cat sat")
    assert sl.load_tokens(plain, text).ids.tolist() == [[5, 6, 7]]
    lines = tmp_path / "bom.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "the\u2028cat\u0085sat"}, ensure_ascii=False).encode())
    assert len(sl.load_tokens(plain, lines)) == 1


def test_short_documents_are_not_dropped_because_one_is_long(plain: TransformerBridge, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    texts = ["the cat sat on the mat"] * 20 + ["the cat " * 200]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tokens = sl.load_tokens(plain, path)
    assert len(tokens) == 16
    assert tokens.sources[0].endswith("[0:256]"), "the long one comes first"
    assert len(set(tokens.documents)) == 16
    with pytest.raises(sl.BadInputError, match="shorter than asked"):
        sl.load_tokens(plain, path, n_seqs=3, seq_len=256)


def test_the_length_is_exact_also_where_a_text_brings_its_own_bos(plain: TransformerBridge) -> None:
    texts = ["<bos> the cat sat on the mat", "the cat sat on the mat"]
    assert sl.load_tokens(plain, texts, prepend_bos=True, seq_len=6).lengths.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[3, 4, 5]], "source must be a text"),
        ([b"the cat"], "source must be a text"),
        ([None, "the cat"], "source must be a text"),
        (["the \ud800 cat"], "no valid Unicode"),
    ],
)
def test_lists_of_something_else_are_refused(plain: TransformerBridge, given, message: str) -> None:
    with pytest.raises(sl.BadInputError, match=message):
        load_untyped(plain, given)


def load_untyped(model: TransformerBridge, source: Any) -> sl.Tokens:
    """As a user without a type checker calls it."""
    return sl.load_tokens(model, source)


@pytest.mark.parametrize("text", ["a long sentence " * 40, "He said and/or she said", "a\x00b"])
def test_a_text_in_place_of_a_source_is_recognised(plain: TransformerBridge, text: str) -> None:
    with pytest.raises(sl.BadInputError, match="or the text itself in a list"):
        sl.load_tokens(plain, text)
