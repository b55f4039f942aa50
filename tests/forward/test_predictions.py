"""Encoders: the pseudo-loss of masked tokens against a loop over plain Hugging Face forwards, edited and not."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import VOCABULARY, build, build_pair, random_rows
from batches import left, planted_map
from editing import bias_of
from naive import naive_scores
from naive_edits import naive_logits, naive_row, plain_row
from torch import Tensor
from wording import LETTERS, letters

import sinklens as sl
from sinklens.forward.predictions import predictions
from sinklens.inputs.load import as_tokens

MASK = 7
ENCODERS = ("bert", "roberta")


@pytest.fixture(scope="module")
def worded() -> tuple[Any, Any]:
    """A tiny BERT with a tokenizer: the plain model and the bridge."""
    hf = build("bert")
    return copy.deepcopy(hf), sl.load_model(hf, tokenizer=letters())


def ids_of(*lengths: int) -> list[Tensor]:
    """Random rows without the mask's id, which is never scored."""
    return [torch.where(row == MASK, MASK + 1, row) for row in random_rows(lengths)]


def naive_pseudo(hf: Any, ids: Tensor, p: int, mask: int, row: Any = None) -> Tensor:
    """log p(. | the rest) at one masked position, by one forward of the plain model."""
    masked = torch.tensor([mask if i == p else int(x) for i, x in enumerate(ids)])[None]
    with torch.no_grad():
        logits = hf(masked).logits if row is None else naive_logits(hf, masked, row)
    return logits[0, p].double().log_softmax(-1)


@pytest.mark.parametrize("name", ENCODERS)
def test_pseudo_loss_equals_masking_one_token_at_a_time(name: str) -> None:
    hf, model = build_pair(name)
    rows = ids_of(9, 20)
    found = sl.token_loss(model, left(sl.Tokens.concatenate([as_tokens(model, r) for r in rows])), mask_id=MASK)
    assert found.shape == (2, 20)
    assert found[0, 9:].isnan().all()
    for b, ids in enumerate(rows):
        for p, token in enumerate(ids.tolist()):
            expected = -naive_pseudo(hf, ids, p, MASK)[token]
            assert float(found[b, p]) == pytest.approx(float(expected), abs=1e-5), (b, p)
    few = sl.token_loss(model, rows[1], mask_id=MASK, most_scored=5, seed=3)
    kept = ~few[0].isnan()
    assert int(kept.sum()) == 5
    torch.testing.assert_close(few[0][kept], found[1][kept], atol=1e-6, rtol=0)
    assert not torch.equal(kept, ~sl.token_loss(model, rows[1], mask_id=MASK, most_scored=5, seed=4)[0].isnan())


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("backend", ["hooks", "flash"])
def test_experiments_on_encoders_equal_the_naive_edit_of_every_masked_copy(name: str, backend: Any) -> None:
    """Positions, a SinkMap whose sinks live in one layer each, and a predicate on the ids of the text."""
    hf, model = build_pair(name)
    rows = ids_of(13, 11)
    lives = {(0, 0): range(2), (0, 5): range(1, 2), (1, 2): range(1)}
    found = planted_map(model, rows, {place: ("primary", layers) for place, layers in lives.items()})
    token = int(rows[0][5])
    edits: dict[str, Any] = {
        "positions": sl.ablate_sinks(model, [0, 3], "zero"),
        "map": sl.ablate_sinks(model, found),
        "named": sl.ablate_sinks(model, sl.inputs.named_tokens(model, token, int(rows[1][1])), "scale", g=3.0),
    }
    e = sl.run_experiment(
        model, found.tokens, edits, controls=(), sinks=None, mask_id=MASK, backend=backend, progress=False
    )
    assert e.info["backend"] == backend
    assert e.info["loss"] == "pseudo-loss of masked tokens"
    for b, ids in enumerate(rows):
        where: dict[str, Any] = {
            "positions": lambda layer: {0, 3},
            "map": lambda layer, b=b: {p for (s, p), alive in lives.items() if s == b and layer in alive},
            "named": lambda layer, ids=ids: {p for p, i in enumerate(ids.tolist()) if i in (token, int(rows[1][1]))},
        }
        mode: dict[str, Any] = {"positions": ("zero", {}), "map": ("renormalize", {}), "named": ("scale", {"g": 3.0})}
        edited = {0, 3, 5} | ({2} if b else set()) | where["named"](0)
        scored = (~e.metrics["loss"][0, b].isnan()).nonzero().flatten().tolist()
        assert edited.isdisjoint(scored) or b  # sequence 1 is scored at 5, where nothing is edited
        assert len(scored) >= len(ids) - 6
        for p in scored[::3]:
            base = naive_pseudo(hf, ids, p, MASK)
            assert float(e.metrics["loss"][0, b, p]) == pytest.approx(float(-base[ids[p]]), abs=1e-4)
            for label in edits:

                def row(layer: int, _: int, h: int, i: int, scores: Tensor, v: Tensor, visible: list[int]) -> Tensor:
                    sinks = where[label](layer)  # noqa: B023
                    if not sinks:
                        return plain_row(scores, v, visible)
                    kind, options = mode[label]  # noqa: B023
                    return naive_row(scores, v, visible, sinks, kind, b_v=bias_of(model, layer, h), **options)

                log = naive_pseudo(hf, ids, p, MASK, row)
                r = e.index(label)
                assert float(e.metrics["loss"][r, b, p]) == pytest.approx(float(-log[ids[p]]), abs=2e-4), (label, b, p)
                kl = float((base.exp() * (base - log)).sum())
                assert float(e.metrics["kl"][r, b, p]) == pytest.approx(kl, abs=2e-4)
                assert float(e.metrics["top1"][r, b, p]) == float(base.argmax() == log.argmax())
        if b == 0:
            assert float(e.change("kl", "map")[0]) > 1e-3


def test_side_effects_are_those_of_the_text_without_a_mask() -> None:
    _, model = build_pair("bert")
    (ids,) = ids_of(60)
    hooks = sl.ablate_sinks(model, [0], "zero")
    e = sl.run_experiment(
        model, ids, {"zero": hooks}, controls=("random",), mask_id=MASK, most_scored=4, backend="flash", progress=False
    )
    side = e.side_effects().set_index(["label", "control"])
    shown: list[Tensor] = []
    names = [f"blocks.{n}.attn.hook_pattern" for n in range(2)]
    model.run_with_hooks(ids[None], fwd_hooks=[(n, lambda t, hook: shown.append(t[0].double())) for n in names])
    mass = sum(float(pattern[:, :, 0].mean()) for pattern in shown[:1])
    assert 0 < side.freed[("zero", "")] < 2 * mass
    assert side.to_nothing[("zero", "")] == pytest.approx(side.freed[("zero", "")], rel=0.02)
    entropy = [float(-torch.xlogy(p[:, ::4], p[:, ::4]).sum(-1).mean()) for p in shown]
    assert side.entropy[("base", "")] == pytest.approx(sum(entropy) / 2, rel=1e-5)
    assert int((~e.metrics["kl"][1, 0].isnan()).sum()) == 4


def test_special_tokens_are_not_scored_and_the_mask_is_found(worded: tuple[Any, Any]) -> None:
    hf, model = worded
    text = "a b c d [MASK] e f g"
    loss = sl.token_loss(model, text)
    ids = sl.load_tokens(model, [text]).ids[0]
    assert ids.tolist()[:2] == [2, 5]
    assert loss[0].isnan().nonzero().flatten().tolist() == [0, 5, 9]
    assert float(loss[0, 2]) == pytest.approx(float(-naive_pseudo(hf, ids, 2, 4)[6]), abs=1e-5)
    e = sl.run_experiment(
        model,
        text,
        {"cls": sl.ablate_sinks(model, sl.inputs.named_tokens(model, "[CLS]"))},
        controls=(),
        progress=False,
    )
    scored = (~e.metrics["loss"][1, 0].isnan()).nonzero().flatten().tolist()
    assert scored == [1, 2, 3, 4, 6, 7, 8]
    with pytest.raises(sl.BadInputError, match="special tokens only"):
        sl.token_loss(model, torch.tensor([[2, 4, 3]]))


def test_tokens_are_named_by_name_text_or_id(worded: tuple[Any, Any]) -> None:
    _, model = worded
    assert sl.inputs.named_tokens(model, "[CLS]", "[SEP]", 5, "a").ids == (2, 3, 5)
    assert sl.inputs.named_tokens(model).labels == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    where = sl.inputs.named_tokens(model, "[SEP]")(sl.load_tokens(model, ["a b", "c d e"]).ids)
    assert where.nonzero().tolist() == [[0, 3], [1, 4]]
    text = sl.load_tokens(model, ["a b c d e f"])
    by_name = sl.ablate_sinks(model, sl.inputs.named_tokens(model, "[CLS]", "[SEP]"))
    by_place = sl.ablate_sinks(model, [0, 7])
    edited = [model.run_with_hooks(text.ids, fwd_hooks=hooks) for hooks in (by_name, by_place)]
    assert torch.equal(*edited)
    assert not torch.equal(edited[0], model(text.ids))
    for name, message in (("a b", "no token of this model but 2"), (99999, "outside the vocabulary")):
        with pytest.raises(sl.BadInputError, match=message):
            sl.inputs.named_tokens(model, name)
    _, bare = build_pair("bert")
    for names, message in ((("[CLS]",), "give the token's id"), ((), "names no special tokens")):
        with pytest.raises(sl.BadInputError, match=message):
            sl.inputs.named_tokens(bare, *names)


def test_found_sinks_say_whether_they_are_special_tokens(worded: tuple[Any, Any], tmp_path: Path) -> None:
    _, model = worded
    tokens = sl.load_tokens(model, [" ".join(LETTERS[5 + (7 * i) % 26] for i in range(60))])
    found = sl.find_sinks(model, tokens, activity=0.001, uniform_factor=0.001, min_life=0.01)
    special = {s.position for s in found if s.special}
    assert special == {0, 61} & {s.position for s in found}
    assert special
    assert {s.position for s in found.where(special=True)} == special
    assert len(found.where(special=False)) == len(found) - len(special)
    back = sl.SinkMap.load(found.save(tmp_path / "map.safetensors"))
    assert [s.special for s in back] == [s.special for s in found]
    assert back.to_dataframe().special.tolist() == [s.special for s in found]


@pytest.mark.parametrize("name", ENCODERS)
def test_importance_on_encoders_equals_a_loop_with_padding_on_both_sides(name: str) -> None:
    hf, model = build_pair(name)
    rows = random_rows((60, 45))
    batch = sl.Tokens.concatenate([as_tokens(model, r) for r in rows])
    middle = dataclasses.replace(
        left(batch).pad("right", 5), labels=batch.labels, sources=batch.sources, documents=batch.documents
    )
    hf.set_attn_implementation("eager")
    for padded in (batch, left(batch), middle):
        for way in ("hooks", "flash"):
            scores = sl.sink_scores(model, padded, backend=way)
            for b, ids in enumerate(rows):
                with torch.no_grad():
                    patterns = hf(ids[None], output_attentions=True).attentions
                for layer, pattern in enumerate(patterns):
                    alpha, beta, uniform, _ = naive_scores(pattern[0].double(), False, None)
                    close: dict[str, Any] = {"atol": 2e-5, "rtol": 0, "equal_nan": True}
                    n = len(ids)
                    torch.testing.assert_close(scores.alpha[b, layer, :, :n].double(), alpha, **close)
                    torch.testing.assert_close(scores.beta[b, layer, :, :n].double(), beta, **close)
                    torch.testing.assert_close(scores.uniform[b, layer, :n].double(), uniform, **close)


def test_pictures_show_attention_both_ways() -> None:
    hf, model = build_pair("bert")
    (ids,) = ids_of(9)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        expected = hf(ids[None], output_attentions=True).attentions
    grid: Any = sl.heads.attention_grid(model, ids, head=2)
    assert len(grid.data) == 2
    for layer, cell in enumerate(grid.data):
        shown = torch.tensor([[float(v) for v in row] for row in cell.z])
        torch.testing.assert_close(shown, expected[layer][0, 2], atol=1e-5, rtol=0)
        assert shown.triu(1).max() > 0.01
    one: Any = sl.attention_map(model, ids, layer=1, head=2)
    torch.testing.assert_close(torch.tensor(one.data[0].z), expected[1][0, 2], atol=1e-5, rtol=0)


def test_a_head_that_ignores_the_text_has_the_loss_of_its_bias() -> None:
    """With the decoder's matrix at 0, log p(v) is the log-softmax of the bias, whatever is masked or edited."""
    hf: Any = build("bert")
    with torch.no_grad():
        hf.cls.predictions.decoder.weight = torch.nn.Parameter(torch.zeros(VOCABULARY, 32))
        hf.cls.predictions.bias.copy_(torch.linspace(-2, 3, VOCABULARY))
    model = sl.load_model(hf)
    (ids,) = ids_of(12)
    expected = -torch.linspace(-2, 3, VOCABULARY).double().log_softmax(-1)[ids]
    torch.testing.assert_close(sl.token_loss(model, ids, mask_id=MASK)[0].double(), expected, atol=1e-5, rtol=0)
    edit = sl.ablate_sinks(model, [0], "zero")
    e = sl.run_experiment(model, ids, {"zero": edit}, controls=(), mask_id=MASK, progress=False)
    assert e.change("kl", "zero").abs().max() == 0
    assert e.change("top1", "zero").min() == 1


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """A BERT that learned the alphabet: each letter follows the one before it, from a random start."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(LETTERS), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    hf = tf.BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=3e-3)
    for _ in range(450):
        start = torch.randint(0, 26, (32, 1))
        body = 5 + (start + torch.arange(14)) % 26
        ids = torch.cat([torch.full((32, 1), 2), body, torch.full((32, 1), 3)], 1)
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[:, 1:-1] = torch.rand(32, 14) < 0.3
        loss = hf(ids.masked_fill(hidden, 4), labels=ids.masked_fill(~hidden, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return hf.eval(), sl.load_model(copy.deepcopy(hf), tokenizer=letters())


def text_from(start: int, n: int = 14) -> str:
    return " ".join(LETTERS[5 + (start + i) % 26] for i in range(n))


def test_a_trained_encoder_predicts_what_is_masked_and_not_from_itself(trained: tuple[Any, Any]) -> None:
    _, model = trained
    good = float(sl.token_loss(model, text_from(3)).nanmean())
    assert good < 0.7 < 0.5 * math.log(26)
    wrong = text_from(3).replace("j", "x")
    loss = sl.token_loss(model, wrong)
    assert float(loss[0, 7]) > 3 * max(good, 1.0)  # an unmasked forward would read the x off its own place


def test_experiments_on_encoders_have_intervals_controls_and_can_be_resumed(
    trained: tuple[Any, Any], tmp_path: Path
) -> None:
    _, model = trained
    tokens = sl.load_tokens(model, [text_from(n) for n in range(16)])
    assert len(set(tokens.documents)) == 16
    edit = sl.ablate_sinks(model, [4], "zero")
    options: dict[str, Any] = {"controls": ("random",), "most_scored": 5, "progress": False}
    e = sl.run_experiment(model, tokens, {"zero": edit}, resume=tmp_path / "run", **options)
    table = e.to_dataframe()
    assert [r.control for r in e.runs] == ["", "", "random"]
    assert table.kl_low[1] <= table.kl[1] <= table.kl_high[1]
    assert table.kl[1] > 0.01
    assert table.beyond_low.notna()[2]
    assert (~e.metrics["kl"][1].isnan()).sum(-1).tolist() == [5] * 16
    back = sl.experiment.Experiment.load(e.save(tmp_path / "e.safetensors"))
    assert back.to_dataframe().equals(table)
    assert back.info["mask_id"] == 4
    assert any("masked tokens" in note for note in back.notes)
    calls: list[int] = []
    counted = [*edit, ("blocks.0.hook_in", lambda t, hook: calls.append(1))]
    again = sl.run_experiment(model, tokens, {"zero": edit}, resume=tmp_path / "run", **options)
    assert torch.equal(again.metrics["kl"].nan_to_num(), e.metrics["kl"].nan_to_num())
    with pytest.raises(sl.BadInputError, match="another experiment .it differs in .*mask_id"):
        sl.run_experiment(model, tokens, {"zero": edit}, resume=tmp_path / "run", mask_id=9, **options)
    sl.run_experiment(model, tokens[0], {"own": counted}, controls=(), most_scored=5, progress=False)
    assert len(calls) == 2  # one of the text as it is, one of its five masked copies
    twin = sl.run_experiment(model, tokens[:2], {"zero": edit}, controls=(), twin=True, most_scored=5, progress=False)
    assert twin.to_dataframe().loss.iloc[-1] > twin.to_dataframe().loss.iloc[0]


def test_bos_variants_and_matched_damage_use_the_pseudo_loss(trained: tuple[Any, Any]) -> None:
    hf, model = trained
    variants = sl.experiment.bos_variants(model, text_from(2))
    losses = variants.losses(model)
    for name, tokens in variants.items():
        ids = tokens.row(0)
        for p, found in zip(variants.targets[name][0], losses[name][0], strict=True):
            assert not tokens.special[0, p]
            assert float(found) == pytest.approx(float(-naive_pseudo(hf, ids, p, 4)[ids[p]]), abs=1e-4)
    assert len({tuple(tokens.row(0)[variants.targets[n][0]].tolist()) for n, tokens in variants.items()}) == 1
    edit = sl.ablate_sinks(model, [4, 5, 6], "zero")
    cost = float(sl.token_loss(model, text_from(2), hooks=edit).nanmean())
    matched = sl.experiment.matched_damage(model, text_from(2), edit, progress=False)
    assert matched.target == pytest.approx(cost, abs=1e-5)
    assert matched.loss == pytest.approx(cost, abs=0.021)


def test_what_has_no_pseudo_loss_is_refused_with_the_reason(worded: tuple[Any, Any], tmp_path: Path) -> None:
    _, model = worded
    _, bare = build_pair("bert")
    _, decoder = build_pair("gpt2")
    (ids,) = ids_of(40)
    edit = {"x": sl.ablate_sinks(bare, [0])}
    for call in (
        lambda: sl.token_loss(bare, ids),
        lambda: sl.run_experiment(bare, ids, edit, controls=()),
        lambda: sl.experiment.matched_damage(bare, ids, edit["x"], progress=False),
        lambda: sl.experiment.bos_variants(bare, ids).losses(bare),
    ):
        with pytest.raises(sl.UnsupportedModelError, match=r"no next token but masked ones.*mask_id="):
            call()
    with pytest.raises(sl.BadInputError, match="outside the vocabulary"):
        sl.token_loss(bare, ids, mask_id=VOCABULARY)
    with pytest.raises(sl.BadInputError, match="is a decoder"):
        sl.token_loss(decoder, ids, mask_id=MASK)
    with pytest.raises(sl.UnsupportedModelError, match="sweep is judged by; for the pseudo-loss"):
        sl.sweep_ablation(model, "a b c d e", [0])
    with pytest.raises(sl.BadInputError, match="predicts no next token"):
        sl.decompose_sinks(bare, ids, [0], metrics=("loss",))
    headless: Any = build("bert")
    headless.bert.save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    loaded = sl.load_model(tmp_path)
    with pytest.raises(sl.UnsupportedModelError, match="no trained language-model head"):
        sl.token_loss(loaded, "a b c")
    with pytest.raises(sl.UnsupportedModelError, match="no trained language-model head"):
        sl.run_experiment(loaded, "a b c d", {"x": sl.ablate_sinks(loaded, [0])}, controls=())
    assert predictions(decoder).mask_id is None


def test_a_host_that_reads_ids_elsewhere_too_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoBERTa numbers positions by its padding id: where that id stands in for [MASK], later tokens would shift."""
    _, model = build_pair("roberta")
    (ids,) = ids_of(12)
    config: Any = model.original_model.config
    with pytest.raises(sl.UnsupportedModelError, match="is not masked everywhere"):
        sl.token_loss(model, ids, mask_id=config.pad_token_id)
