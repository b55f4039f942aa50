"""Token or position: planted token sinks follow their token, a model's positional sink stays."""

from __future__ import annotations

import pytest
import torch
from architectures import build_pair, random_rows
from planted import X, planted_model, row

import sinklens as sl
from sinklens.find.contexts import kept_shares, shuffle


def test_shuffling_keeps_the_tokens_and_says_where_each_went() -> None:
    _, model = build_pair("llama")
    tokens = sl.sink_scores(model, torch.stack(random_rows((30, 30)))).tokens
    mixed, moved = shuffle(tokens, seed=1)
    for b in range(2):
        assert sorted(mixed.ids[b].tolist()) == sorted(tokens.ids[b].tolist())
        assert sorted(moved[b].tolist()) == list(range(30))
        for p in range(30):
            assert int(mixed.ids[b, moved[b, p]]) == int(tokens.ids[b, p])
            assert mixed.labels[b][int(moved[b, p])] == tokens.labels[b][p]
    assert mixed.digest != tokens.digest
    assert mixed.digest == shuffle(tokens, seed=1)[0].digest


def test_special_tokens_stay_in_place() -> None:
    from wording import model_with

    tokens = sl.load_tokens(model_with(adds_bos=True), ["the cat sat on a mat . the cat"])
    mixed, moved = shuffle(tokens)
    assert int(mixed.ids[0, 0]) == 1
    assert int(moved[0, 0]) == 0


def test_a_planted_token_sink_follows_its_token_and_not_its_position() -> None:
    model = planted_model(10, {X: 8.0}, {X: range(10)})
    natural = sl.sink_scores(model, row(200, {60: X})).tokens
    mixed, moved = shuffle(natural, seed=0)
    assert int(moved[0, 60]) not in (60, *range(150, 200))
    shares = kept_shares(sl.find_sinks(model, natural), sl.find_sinks(model, mixed), moved)
    assert shares["others"] == 1
    assert shares["others_kept_by_token"] == 1.0
    assert shares["others_kept_by_position"] == 0.0


def test_the_table_has_a_row_per_context_and_length() -> None:
    from wording import model_with

    table = sl.find.compare_contexts(
        model_with(adds_bos=False), lengths=(40, 64), n_seqs=16, contexts=("shuffled", "random")
    )
    assert table[["context", "seq_len"]].to_numpy().tolist() == [
        ["shuffled", 40],
        ["random", 40],
        ["shuffled", 64],
        ["random", 64],
    ]
    assert table.low.notna().all(), "sixteen documents carry an interval"
    with pytest.raises(sl.BadInputError, match="unknown contexts prose"):
        sl.find.compare_contexts(model_with(adds_bos=False), contexts=("prose",))
