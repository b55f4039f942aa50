"""Sweeps: a text in pieces gives the table of the whole, and rows are what the public functions give."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SUPPORT
from sweeping import EDITS, EFFECT, SENTENCES, TASKS, TEXT, here, save_models, value_of

import sinklens as sl
from sinklens.sweep import (
    collect,
    make_jobs,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def own_functions_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_a_split_text_gives_exactly_the_table_of_the_whole(models: list[str], tmp_path: Path) -> None:
    text = {"texts": SENTENCES[:4], "label": "words"}
    for pieces in (1, 2):
        split_text = {**text, "pieces": pieces}
        jobs = make_jobs(models[0], split_text, EDITS[1:], TASKS[:1], 5)
        jobs += make_jobs(models[0], split_text, EDITS[1:2], TASKS[1:], 5)
        found = here(jobs, tmp_path / str(pieces))
        assert found.failed == found.missing == 0, found
    whole, split = collect(tmp_path / "1"), collect(tmp_path / "2")
    assert len(split.timings) == 2 * len(whole.timings)
    assert whole.table.equals(split.table)
    losses = {t: split.to_dataframe(task=t) for t in ("token_loss", "token_loss(per=token, most_scored=9)")}
    assert not losses["token_loss"].loss.duplicated().all()
    effects = split.to_dataframe(task="experiment(controls=random+recent, most_scored=20)")
    assert effects.edited.any()
    assert not effects.edited.all(), "some sequences have no sinks, so that pieces without any were merged"


def test_every_sequence_is_scored_alone(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in a batch change the last bits of a large model's numbers, though not of the tiny ones here."""
    sizes = []

    def watched(model: Any, tokens: sl.Tokens, **options: Any) -> sl.SinkScores:
        sizes.append(len(tokens))
        return sl.sink_scores(model, tokens, **options)

    for module in ("measurement.sink_scores", "tasks.scores_of"):
        monkeypatch.setattr(f"sinklens.sweep.{module}", watched)
    here(make_jobs(models[0], {**TEXT, "n_seqs": 2}, EDITS[1:2]), tmp_path / "s")
    assert sizes == [1] * 4


def test_rows_are_what_the_functions_give_when_called_directly(models: list[str], tmp_path: Path) -> None:
    edits = [EDITS[0], EDITS[2], EDITS[3]]
    here(make_jobs(models[1], {**TEXT, "pieces": 2}, edits, ["sink_scores", "token_loss", EFFECT], 3), tmp_path / "s")
    model = sl.load_model(models[1])
    tokens = sl.load_tokens(model, SENTENCES, seed=3)
    off = sl.swap_attention(model, "off-by-one")
    with model.hooks(fwd_hooks=list(off)):
        patterns = model.run_with_cache(tokens.ids)[1]
    swapped = "swap_attention(kind=off-by-one)"
    scores = value_of(tmp_path / "s", task="sink_scores")
    for edit, expected in (
        ("none", sl.sink_scores(model, tokens).alpha[..., 0]),
        (swapped, torch.stack([patterns[f"blocks.{n}.attn.hook_pattern"][..., 0].mean(-1) for n in range(2)], 1)),
    ):
        mine = torch.tensor(scores[scores.intervention == edit].alpha.to_numpy()).view(expected.shape)
        assert torch.allclose(mine, expected, atol=1e-6)
    losses = value_of(tmp_path / "s", task="token_loss")
    direct = sl.token_loss(model, tokens, hooks=off).double()
    assert torch.allclose(
        torch.tensor(losses[losses.intervention == swapped].loss.to_numpy()), direct.nanmean(1), atol=1e-12, rtol=0
    )
    label = edits[1]["build"] + "(sinks=0, mode=renormalize, layers=1, heads=0+2)"
    hooks = sl.ablate_sinks(model, [0], "renormalize", layers=[1], heads=[0, 2])
    experiment = sl.run_experiment(
        model, tokens, {label: hooks}, controls=("random", "matched"), most_scored=20, seed=3
    )
    table = experiment.to_dataframe()
    for row in (
        collect(tmp_path / "s").summary(task=make_jobs("m", "t", EDITS[2], EFFECT)[0].task.label).to_dict("records")
    ):
        if row["intervention"] == label:
            same = table[(table.label == label) & (table.control == row["control"])].iloc[0]
            for name in ("loss", "d_loss", "kl", "top1"):
                assert row[name] == pytest.approx(same[name], abs=1e-7)
            assert row["sequences"] == same.sequences


def test_summaries_have_the_intervals_of_run_experiment(models: list[str], tmp_path: Path) -> None:
    text = {"source": "random", "n_seqs": 16, "seq_len": 24, "pieces": 4}
    edit = {"build": "swap_attention", "kind": "off-by-one", "label": "off"}
    here(make_jobs(models[0], text, edit, {"task": "experiment", "controls": []}), tmp_path / "s")
    model = sl.load_model(models[0])
    tokens = sl.load_tokens(model, "random", n_seqs=16, seq_len=24)
    experiment = sl.run_experiment(model, tokens, {"off": sl.swap_attention(model, "off-by-one")}, controls=())
    expected = experiment.to_dataframe().iloc[1]
    row = collect(tmp_path / "s").summary().iloc[0]
    for name in ("d_loss", "d_loss_low", "d_loss_high", "kl", "kl_low", "kl_high"):
        assert row[name] == pytest.approx(expected[name], rel=1e-6)
    layers = make_jobs(models[0], text, tasks="sink_scores")
    here(layers, tmp_path / "s")
    by_layer = collect(tmp_path / "s").summary(by=["layer"])
    scores = sl.sink_scores(model, tokens)
    assert by_layer.above.tolist() == pytest.approx(scores.layer_table().sink_rate.tolist())
    whole = collect(tmp_path / "s").summary().iloc[0]
    assert (whole.above_low, whole.above_high) == pytest.approx(scores.sink_rate_interval())
    assert by_layer.alpha.tolist() == pytest.approx(scores.layer_table().alpha.tolist(), abs=1e-6)
    assert collect(tmp_path / "s").plot("alpha").to_dict()["data"][0]["y"][0] == "none"


def test_every_sequence_weighs_the_same_whatever_its_length(models: list[str], tmp_path: Path) -> None:
    texts = {"texts": [SENTENCES[0], "the cat sat on the mat ."], "label": "of two lengths"}
    here(make_jobs(models[0], texts, tasks=["token_loss", {"task": "token_loss", "per": "token"}]), tmp_path / "s")
    found = collect(tmp_path / "s")
    per_sequence, per_token = found.summary("token_loss"), found.summary("token_loss(per=token)")
    assert per_token.loss[0] == pytest.approx(per_sequence.loss[0], abs=1e-12)
    assert per_token.loss[0] != pytest.approx(found.to_dataframe(task="token_loss(per=token)").loss.mean(), abs=1e-3)


def test_the_reference_leaves_out_documents_that_are_measured(models: list[str], tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    text = {"source": str(file), "n_seqs": 4, "seq_len": 64}
    edit = {"build": "ablate_sinks", "sinks": [0], "mode": "mean_value", "reference": {**text, "n_seqs": 8}}
    here(make_jobs(models[0], text, edit, "token_loss"), tmp_path / "s")
    model = sl.load_model(models[0])
    all_of_it = sl.load_tokens(model, str(file), n_seqs=8, seq_len=64)
    tokens, rest = all_of_it[:4], all_of_it[4:]
    expected = sl.token_loss(model, tokens, hooks=sl.ablate_sinks(model, [0], "mean_value", reference=rest))
    leaking = sl.token_loss(model, tokens, hooks=sl.ablate_sinks(model, [0], "mean_value", reference=all_of_it))
    mine = torch.tensor(value_of(tmp_path / "s").loss.to_numpy())
    assert torch.allclose(mine, expected.double().nanmean(1), atol=1e-12, rtol=0)
    assert not torch.allclose(mine, leaking.double().nanmean(1), atol=1e-6)
    inside = make_jobs(models[0], text, {**edit, "reference": text}, "token_loss")
    assert "every document of reference= is in the measured text" in here(inside, tmp_path / "s").failures[0]["error"]
