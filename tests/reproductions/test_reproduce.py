"""The catalogue of published results: every protocol runs on tiny models, and only a right number is reproduced."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import build, build_pair
from typer.testing import CliRunner
from wording import letters

import sinklens as sl
from sinklens.cli import app
from sinklens.inputs.load import as_tokens
from sinklens.reproductions import CATALOGUE, ORIGINALS, Above, Below, Claim, Equals, Quantity, Subject, verdict
from sinklens.reproductions.claims import measured
from sinklens.reproductions.gu import first_token_norms, moved_positions
from sinklens.reproductions.massive import first_massive_layer
from sinklens.reproductions.originals import subject_of
from sinklens.reproductions.ran_milo import bias_logits, without_query_bias
from sinklens.reproductions.wong import _count


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"gpt2": build_pair("gpt2")[1], "llama": build_pair("llama")[1], "bert": build_pair("bert")[1]}


def subject(original: str = "", name: str = "some model", **facts: Any) -> Subject:
    return Subject(name, None, original, "", False, "", False, **facts)


def claim(rule: Any) -> Claim:
    return Claim("x", "says so", rule, "1.0", "A")


@pytest.mark.parametrize(
    ("rule", "span", "expected"),
    [
        (Above(1.0), (1.01, 1.5), "reproduced"),
        (Above(1.0), (0.5, 0.99), "differs"),
        (Above(1.0), (0.9, 1.1), "not comparable"),
        (Below(1.0), (0.5, 0.99), "reproduced"),
        (Below(1.0), (1.01, 1.5), "differs"),
        (Below(1.0), (0.9, 1.1), "not comparable"),
        (Equals({"gpt2": 0.77}, 0.05), (0.73, 0.81), "reproduced"),
        (Equals({"gpt2": 0.77}, 0.05), (0.60, 0.71), "differs"),
        (Equals({"gpt2": 0.77}, 0.05), (0.83, 0.90), "differs"),
        (Equals({"gpt2": 0.77}, 0.05), (0.70, 0.81), "not comparable"),
        (Equals({"gpt2": 8.0}, 0.1, 0.25), (6.1, 9.9), "reproduced"),
        (Equals({"gpt2": 8.0}, 0.1, 0.25), (5.0, 5.9), "differs"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(rule: Any, span: tuple[float, float], expected: str) -> None:
    quantity = Quantity("x", sum(span) / 2, *span, 20)
    word, reason = verdict(claim(rule), quantity, subject("gpt2"))
    assert word == expected
    assert bool(reason) == (word == "not comparable")


def test_a_printed_number_is_compared_only_with_its_own_model() -> None:
    quantity = Quantity("x", 0.77, 0.769, 0.771, 20)
    word, reason = verdict(claim(Equals({"gpt2-xl": 0.77}, 0.05)), quantity, subject("", "smollm2-135m"))
    assert word == "not comparable"
    assert "printed for gpt2-xl, measured on smollm2-135m" in reason


def test_numbers_without_interval_are_not_judged_unless_there_is_nothing_to_sample() -> None:
    few = measured("x", torch.ones(15) * 5, list(range(15)))
    assert verdict(claim(Above(1.0)), few, subject())[0] == "not comparable"
    enough = measured("x", torch.ones(16) * 5, list(range(16)))
    assert verdict(claim(Above(1.0)), enough, subject())[0] == "reproduced"
    assert verdict(claim(Above(1.0)), Quantity("x", 5.0, exact=True), subject())[0] == "reproduced"
    assert verdict(claim(Above(1.0)), Quantity("x", 0.5, exact=True), subject())[0] == "differs"
    assert verdict(claim(Above(1.0)), Quantity("x", math.nan, exact=True), subject())[0] == "not comparable"
    assert verdict(claim(Above(1.0)), None, subject(), "no such sink") == ("not comparable", "no such sink")


def test_a_claim_about_other_models_is_not_comparable_with_its_reason() -> None:
    only = replace(claim(Above(0.0)), only=lambda _: "the claim is about encoders")
    quantity = Quantity("x", 5.0, exact=True)
    assert verdict(only, quantity, subject()) == ("not comparable", "the claim is about encoders")


def test_a_model_with_the_name_but_other_sizes_is_not_the_original(models: dict[str, Any]) -> None:
    found = subject_of(models["gpt2"], "some/folder/gpt2-xl")
    assert found.original == ""
    assert "has the name but" in found.doubt
    # the same name with the sizes that the original has is taken for it
    facts = models["gpt2"].cfg
    sizes = replace(ORIGINALS["gpt2"], n_layers=facts.n_layers, n_heads=facts.n_heads, d_model=facts.d_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ORIGINALS, "gpt2", sizes)
        assert subject_of(models["gpt2"], "openai-community/gpt2").original == "gpt2"


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_every_entry_runs_or_says_why_not(models: dict[str, Any], architecture: str) -> None:
    found = sl.reproduce(model=models[architecture], source="random", n_seqs=16, progress=False)
    assert {row["entry"] for row in found.rows} == set(CATALOGUE)
    for row in found.rows:
        assert row["verdict"] in ("reproduced", "differs", "not comparable")
        assert bool(row["reason"]) == (row["verdict"] == "not comparable")
        assert "could not be measured" not in row["reason"]
        if "within" in row["rule"]:  # no tiny model is a published one
            assert row["verdict"] == "not comparable"
    ran = {row["entry"] for row in found.rows if row["measured"] == row["measured"]}
    expected = {
        "gpt2": {"gu-sink-rates", "gu-position-swap", "gu-norms", "barbero-bos", "ran-milo-query-bias"},
        "llama": {"gu-sink-rates", "gu-norms", "barbero-sink-rate", "barbero-perturbation", "xiao-windows"},
        "bert": {"xiao-bert-sep"},
    }
    assert expected[architecture] <= ran
    assert "Published results" in found.to_markdown()
    assert "<table" in found._repr_html_()


def test_the_protocol_on_bert_reads_the_papers_sentence() -> None:
    model = sl.load_model(build("bert"), tokenizer=letters())
    found = sl.reproduce("xiao-bert-sep", model=model, source="random", n_seqs=16, progress=False)
    heads = [row for row in found.others if row["quantity"].startswith("sentence, head 0: attention on [SEP]")]
    assert len(heads) == 2
    words = sl.load_tokens(model, ["StreamingLLM can work on infinite-length texts"])
    assert found.rows[1]["measured"] == found.rows[1]["measured"]
    assert words.labels[0][-1] == "[SEP]"


def test_massive_activations_set_to_zero_and_mean_are_measured_where_they_are(models: dict[str, Any]) -> None:
    """A first token whose stream is made massive by its embedding: zero changes the loss, its own mean nothing."""
    model: Any = sl.load_model(build("llama", seed=1))
    embedding = model.embed.original_component.weight
    with torch.no_grad():
        embedding[1, 5] = 5000.0
        embedding[:, 6] = 0.01
    rows = torch.randint(3, 97, (16, 255), generator=torch.Generator().manual_seed(0))
    tokens = as_tokens(model, torch.cat([torch.ones(16, 1, dtype=torch.long), rows], 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinklens.reproductions.claims.Setting.text", lambda *_, **__: tokens)
        found = sl.reproduce("massive-activations", model=model, n_seqs=16, progress=False)
    numbers = {row["quantity"]: row["measured"] for row in (*found.rows, *found.others)}
    assert numbers["edited before block"] == 0
    assert numbers["share of texts that meet the strict criterion"] == 1.0
    assert numbers["loss added by mean"] == 0.0  # behind a BOS the mean is what stands there
    assert abs(numbers["loss added by zero"]) > 1e-4


def test_the_first_massive_layer_is_where_the_entry_has_grown() -> None:
    states = torch.ones(4, 8)
    assert first_massive_layer([states]) is None
    states[2:, 3] = torch.tensor([150.0, 1000.0])
    assert first_massive_layer([states]) == 3
    states[2, 3] = 600.0
    assert first_massive_layer([states]) == 2


def test_moved_position_vectors_are_those_of_the_table() -> None:
    vectors = torch.arange(6.0).view(1, 6, 1)
    replaced, swapped = (moved_positions(5, swap)(vectors, None).flatten().tolist() for swap in (False, True))
    assert replaced == [4, 1, 2, 3, 4, 5]
    assert swapped == [4, 1, 2, 3, 0, 5]


def test_swapping_position_vectors_in_the_model_equals_swapping_them_in_its_weights() -> None:
    hf = build("gpt2")
    edited: Any = build("gpt2")
    with torch.no_grad():
        edited.transformer.wpe.weight[[0, 4]] = edited.transformer.wpe.weight[[4, 0]]
    ids = torch.full((1, 64), 7)
    one, other = sl.load_model(hf), sl.load_model(edited)
    with one.hooks(fwd_hooks=[("pos_embed.hook_out", moved_positions(5, True))]):
        got = sl.sink_scores(one, ids, backend="hooks").alpha
    assert torch.allclose(got, sl.sink_scores(other, ids).alpha, atol=1e-6, equal_nan=True)
    assert not torch.allclose(got, sl.sink_scores(one, ids).alpha, atol=1e-3, equal_nan=True)


def test_taking_out_the_query_bias_equals_a_model_without_one() -> None:
    hf, bare = build("gpt2"), cast(Any, build("gpt2"))
    width = bare.config.n_embd
    with torch.no_grad():
        for block in bare.transformer.h:
            block.attn.c_attn.bias[:width] = 0
    ids = torch.randint(3, 97, (2, 48), generator=torch.Generator().manual_seed(0))
    one, other = sl.load_model(hf), sl.load_model(bare)
    with one.hooks(fwd_hooks=without_query_bias(one)):
        got = sl.sink_scores(one, ids, backend="hooks").alpha
    assert torch.allclose(got, sl.sink_scores(other, ids).alpha, atol=1e-6, equal_nan=True)
    with one.hooks(fwd_hooks=without_query_bias(one, seed=0)):
        random = sl.sink_scores(one, ids, backend="hooks").alpha
    assert not torch.allclose(random, got, atol=1e-3, equal_nan=True)


def test_bias_logits_are_the_bias_times_the_keys() -> None:
    plain, model = build_pair("gpt2")
    hf: Any = plain
    ids = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(0))
    got = bias_logits(model, as_tokens(model, ids))
    with torch.no_grad():
        x: Any = hf.transformer.wte(ids) + hf.transformer.wpe(torch.arange(20))
        normed = hf.transformer.h[0].ln_1(x)
        q_bias = hf.transformer.h[0].attn.c_attn.bias[:32]
        keys = hf.transformer.h[0].attn.c_attn(normed[None])[0, :, 32:64]
    for head in range(4):
        at = slice(8 * head, 8 * head + 8)
        assert torch.allclose(got[0, head], keys[:, at] @ q_bias[at], atol=1e-5)


def test_first_token_norms_are_those_of_the_plain_model() -> None:
    plain, model = build_pair("llama")
    hf: Any = plain
    ids = torch.randint(3, 97, (24,), generator=torch.Generator().manual_seed(0))
    hidden, keys, values = first_token_norms(model, as_tokens(model, ids))
    with torch.no_grad():
        out = hf(ids[None], output_hidden_states=True, use_cache=True)
    norms = out.hidden_states[1][0].norm(dim=-1)
    assert float(hidden[0]) == pytest.approx(float(norms[0] / norms[1:].mean()), rel=1e-5)
    for found, cached in ((keys, out.past_key_values.layers[1].keys), (values, out.past_key_values.layers[1].values)):
        size = cached[0].norm(dim=-1).mean(0)  # over KV heads, [pos]
        assert float(found[1]) == pytest.approx(float(size[0] / size[1:].mean()), rel=1e-5)


def test_a_result_comes_back_from_its_file(models: dict[str, Any], tmp_path: Path) -> None:
    found = sl.reproduce("barbero-sink-rate", model=models["llama"], source="random", n_seqs=16, progress=False)
    back = sl.reproductions.Reproductions.load(found.save(tmp_path / "found.json"))
    assert back.to_dataframe().equals(found.to_dataframe())
    assert back.to_markdown() == found.to_markdown()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(sl.BadInputError, match="holds no Reproductions"):
        sl.reproductions.Reproductions.load(tmp_path / "other.json")


def test_unknown_entries_are_named_with_those_there_are(models: dict[str, Any]) -> None:
    with pytest.raises(sl.BadInputError, match="no entry 'gu-table-99'; there are gu-sink-rates, gu-position-swap"):
        sl.reproduce("gu-table-99", model=models["llama"])


def test_every_entry_says_where_its_numbers_come_from() -> None:
    for entry in CATALOGUE.values():
        assert entry.protocol
        assert entry.deviations
        assert set(entry.originals) <= set(ORIGINALS)
        assert {c.grade for c in entry.claims} <= set("ABCD")
        for one in entry.claims:
            assert isinstance(one.rule, Equals) or one.published
            if isinstance(one.rule, Equals):
                assert set(one.rule.values) <= set(entry.originals)


def test_the_command_lists_and_refuses() -> None:
    listed = CliRunner().invoke(app, ["reproduce", "--list"])
    assert listed.exit_code == 0
    assert "gu-sink-rates" in listed.output
    refused = CliRunner().invoke(app, ["reproduce", "--entry", "nothing"])
    assert refused.exit_code == 2


def test_a_count_over_sinks_is_judged_only_from_sixteen_documents_on() -> None:
    few, enough = (_count("x", 2.0, list(range(n))) for n in (15, 16))
    assert verdict(claim(Below(6.5)), few, subject())[0] == "not comparable"
    assert verdict(claim(Below(6.5)), enough, subject())[0] == "reproduced"
    assert verdict(claim(Below(1.5)), enough, subject())[0] == "differs"
