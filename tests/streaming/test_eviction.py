"""Losses under a rolling cache, and the study of which tokens must stay in it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from architectures import build_pair, random_rows
from batches import batch_of, planted_map

import sinklens as sl
from sinklens.streaming import (
    EvictionStudy,
    StreamingLoss,
    eviction_study,
    loss as streaming_losses,
    streaming_attention,
    streaming_loss,
    write_streaming,
)

PLACES = {(0, 0): ("primary", range(2)), (0, 30): ("secondary", range(1)), (1, 7): ("primary", range(2))}


@functools.cache
def model_of(name: str) -> Any:
    return build_pair(name)[1]


@functools.cache
def study_of() -> EvictionStudy:
    model = model_of("llama")
    rows = random_rows((90, 80))
    sinks = planted_map(model, rows, PLACES)
    return eviction_study(model, sinks.tokens, (9, 20), first=(1, 2), sinks=sinks, progress=False)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # Gemma 2 caps its logits behind the unembedding
def test_losses_are_the_cross_entropy_of_the_streamed_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    tokens = batch_of(model, random_rows((150, 90)))
    found = streaming_loss(model, tokens, sinks=2, recent=20, progress=False)
    for b in range(2):
        ids = tokens.row(b)[None]
        with streaming_attention(model, 2, 20), torch.no_grad():
            want = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        assert (found.losses[b, : len(want)] - want).abs().max() < 1e-5
        assert found.losses[b, len(want) :].isnan().all()
    assert found.kept == ((0, 1), (0, 1))
    monkeypatch.setattr(streaming_losses, "logit_factor", lambda _: 3.0)  # a head that is not known here
    slow = streaming_loss(model, tokens, sinks=2, recent=20, progress=False)
    assert torch.allclose(slow.losses, found.losses, atol=1e-5, equal_nan=True)


def test_without_a_window_the_loss_is_the_models_own() -> None:
    model = model_of("llama")
    tokens = batch_of(model, random_rows((70, 50)))
    found = streaming_loss(model, tokens, recent=None, progress=False)
    assert torch.allclose(found.losses, sl.token_loss(model, tokens), atol=1e-5, equal_nan=True)
    assert found.kept == ((), ())
    assert "full attention" in repr(found)


def test_a_result_is_saved_loaded_and_tabled(tmp_path: Path) -> None:
    model = model_of("llama")
    tokens = batch_of(model, random_rows((150, 90)))
    found = streaming_loss(model, tokens, sinks=[3, 1], recent=20, progress=False)
    again = StreamingLoss.load(found.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.losses[:, :80], found.losses[:, :80])
    assert (again.kept, again.recent) == (((1, 3), (1, 3)), 20)
    assert len(found.to_dataframe("token")) == 149 + 89
    bins = found.to_dataframe("position")
    assert list(zip(bins["first"], bins["last"], strict=True)) == [(0, 63), (64, 127), (128, 148)]
    assert bins.loss[0] == pytest.approx(float(found.losses[:, :64].mean()), abs=1e-5)
    assert bins.loss[2] == pytest.approx(float(found.losses[0, 128:149].mean()), abs=1e-5)
    assert found.perplexity == pytest.approx(
        float((found.losses[0, :149].mean() / 2 + found.losses[1, :89].mean() / 2).exp()), rel=1e-5
    )
    assert len(found.plot().to_dict()["data"]) == 1


def test_a_study_keeps_what_it_names_and_its_losses_are_those_of_each_cache() -> None:
    study = study_of()
    by = {(c.keeps, c.recent): (n, c) for n, c in enumerate(study.caches)}
    assert by["full attention", None][0] == 0
    assert by["window only", 9][1].kept == ((), ())
    assert by["first 2", 20][1].kept == ((0, 1), (0, 1))
    assert by["primary sinks", 9][1].kept == ((0,), (7,))
    assert by["all sinks", 9][1].kept == ((0, 30), (7,))
    few, many = by["random 2", 9][1].kept, by["random, as many as sinks", 20][1].kept
    assert [len(row) for row in few] == [2, 2]
    assert [len(row) for row in many] == [2, 1]
    assert all(2 <= p < 9 and p != 7 - 7 * (b == 0) for b, row in enumerate(few) for p in row)
    assert not set(many[0]) & {0, 30}
    model = model_of("llama")
    for key in (("full attention", None), ("first 1", 9), ("all sinks", 20), ("random 2", 20)):
        n, cache = by[key]
        rows: Any = [list(row) for row in cache.kept]
        want = streaming_loss(model, study.tokens, sinks=rows, recent=cache.recent, progress=False)
        assert torch.equal(study.losses[n].nan_to_num(), want.losses.nan_to_num())


def test_cost_and_gain_are_paired_differences_and_need_sixteen_documents_for_an_interval() -> None:
    study = study_of()
    table = study.to_dataframe().set_index(["keeps", "recent"])
    means = {(c.keeps, c.recent): study.losses[n].double().nanmean(1).mean() for n, c in enumerate(study.caches)}
    for keeps, recent in (("first 1", 9), ("all sinks", 20)):
        row = table.loc[(keeps, recent)]
        assert row["cost"] == pytest.approx(float(means[keeps, recent] - means["full attention", None]))
        assert row["gain"] == pytest.approx(float(means["window only", recent] - means[keeps, recent]))
    assert pd.isna(table["cost_low"]).all()
    assert pd.isna(table.loc[("window only", 9), "gain"])
    many = EvictionStudy.concatenate([study] * 8)
    rows = many.to_dataframe()
    assert len(many.tokens) == 16
    assert many.losses.shape[1] == 16
    assert rows.cost_low.notna().sum() == len(rows) - 1
    assert (rows.cost_low.dropna() <= rows.cost.dropna()).all()
    with pytest.raises(sl.BadInputError, match="same conditions"):
        EvictionStudy.concatenate([study, EvictionStudy(study.losses[:1], study.caches[:1], study.tokens)])


def test_a_study_is_saved_drawn_and_written(tmp_path: Path) -> None:
    study = study_of()
    again = EvictionStudy.load(study.save(tmp_path / "a.safetensors"))
    assert again.caches == study.caches
    assert torch.equal(again.losses.nan_to_num(), study.losses.nan_to_num())
    assert len(study.plot().to_dict()["data"]) == 2
    assert len(study.plot_positions(20).to_dict()["data"]) == 8
    with pytest.raises(sl.BadInputError, match="not measured"):
        study.plot_positions(10)
    paths = write_streaming(study, tmp_path / "out", command=["x"])
    assert all(path.is_file() for path in paths.values())
    assert "random, as many as sinks" in paths["streaming.html"].read_text()
    assert len(pd.read_csv(paths["caches.csv"])) == len(study.caches)


def test_a_study_says_what_is_wrong() -> None:
    model = model_of("llama")
    ids = torch.stack(random_rows((60,)))
    for options, words in (
        ({"recent": 60}, "evicts nothing"),
        ({"recent": 0}, "recent"),
        ({"first": (0,)}, "first="),
        ({"sinks": planted_map(model, random_rows((90, 80)), PLACES)}, "other sequences"),
    ):
        with pytest.raises(sl.BadInputError, match=words):
            eviction_study(model, ids, **{"recent": 9, **options})
    with pytest.raises(sl.BadInputError, match="other sequences"):
        streaming_loss(model, ids, sinks=planted_map(model, random_rows((90, 80)), PLACES), recent=9)
    with pytest.raises(sl.BadInputError, match="2 lists"):
        streaming_loss(model, ids, sinks=[[1], [2]], recent=9)
    with pytest.raises(sl.UnsupportedModelError, match="encoder"):
        streaming_loss(model_of("bert"), ids)
