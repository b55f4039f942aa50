"""The 2x2 and the four claims: planted heads told apart, and the parts against naive edits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import build_pair, random_rows
from editing import bias_of
from naive_edits import naive_logits, naive_row
from torch import Tensor

import sinklens as sl
from sinklens.decompose.key_or_value import _by_forwards, embedding_changes, shortened
from sinklens.decompose.two_by_two import CELLS, Claims, TwoByTwo, shapley
from sinklens.find.locations import Place, Places, find_places
from sinklens.inputs.load import as_tokens

X, ORDINARY, SIZE = 3, range(4, 12), 16
LENGTH, DOCUMENTS = 64, 16


def planted_head(kind: str) -> Any:
    """One head whose sink token X is a key bias, a constant offset, or a value writer; nothing else in the model.

    Embeddings are orthogonal and already normalised, so that weights read each token's own number.
    """
    config = tf.GPT2Config(
        vocab_size=12, n_positions=128, n_embd=SIZE, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = tf.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln" not in name:
                weight.zero_()
        noise = torch.randn(SIZE, SIZE, generator=generator)
        noise[:, 0] = 1.0
        basis = torch.linalg.qr(noise)[0][:, 1:].T * math.sqrt(SIZE)  # rows of mean 0, orthogonal, of unit variance
        embedding = model.transformer.wte.weight
        embedding[3:] = basis[: len(embedding) - 3]
        read = embedding / SIZE  # <read_t, LN(e_s)> = 1 if s = t, else 0
        q, k, v = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
        k[:, 0] = read[X]
        strength = torch.linspace(-1.0, 7.0, len(ORDINARY)) if kind != "offset" else torch.zeros(len(ORDINARY))
        for token, s in zip(ORDINARY, strength, strict=True):
            q[:, 0] += s * math.sqrt(SIZE) * read[token]
        writers = [X] if kind == "writer" else list(ORDINARY)
        for token in writers:
            v += read[token][:, None] * torch.randn(SIZE, generator=generator)
        attention = model.transformer.h[0].attn
        attention.c_attn.weight.copy_(torch.cat([q, k, v], 1))
        if kind == "offset":
            attention.c_attn.bias[0] = 6.0 * math.sqrt(SIZE)
        attention.c_proj.weight.copy_(3.0 * torch.eye(SIZE))
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=generator))
    return sl.load_model(model)


def texts() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (DOCUMENTS, LENGTH), generator=generator)
    ids[:, 0] = X
    return ids


@pytest.mark.parametrize(
    ("kind", "verdicts"),
    [
        ("key bias", ("supported", "supported", "contradicted", "contradicted")),
        ("offset", ("supported", "supported", "supported", "supported")),
        ("writer", ("contradicted", "contradicted", "contradicted", "contradicted")),
    ],
)
def test_planted_heads_are_told_apart(kind: str, verdicts: tuple[str, ...]) -> None:
    model = planted_head(kind)
    found = sl.decompose_sinks(model, texts(), [0], metrics=("kl",), progress=False)
    assert found.claims is not None
    table = found.claims.to_dataframe()
    assert tuple(table.verdict) == verdicts, table.to_string()
    square = found.effects["all"]
    mass, value = (square.part("kl", n).mean().abs() for n in ("mass_part", "value_part"))
    if kind == "writer":
        assert mass < 1e-6
        assert value > 0.1
    else:
        assert value < 1e-6
        assert mass > 0.02
    share = found.number("bias_share")[:, 0, 0]
    if kind == "offset":  # the same for every query: nothing but |R| makes the mass vary, and the mean query knows it
        assert share.isnan().all() or share.nanmedian() > 0.999
    else:
        assert share.nanmedian() < 0.5
    assert "supported" in found.summary() or kind == "writer"


def test_parts_follow_the_formula_and_sum_to_the_whole() -> None:
    f11, f10, f01, f00 = 1.0, 1.7, 0.6, 2.5
    parts = shapley(torch.tensor([[f00 - f11], [f10 - f11], [f01 - f11]], dtype=torch.float64))
    assert float(parts["mass_part"]) == pytest.approx(((f10 - f00) + (f11 - f01)) / 2)
    assert float(parts["value_part"]) == pytest.approx(((f01 - f00) + (f11 - f10)) / 2)
    assert float(parts["interaction"]) == pytest.approx(f11 - f10 - f01 + f00)
    assert float(parts["mass_part"] + parts["value_part"]) == pytest.approx(f11 - f00)
    assert float(parts["total"]) == pytest.approx(f11 - f00)


def test_no_share_where_the_total_may_be_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 1, 20, generator=generator, dtype=torch.float64)
    documents = tuple(range(20))
    unsure = TwoByTwo(
        "all", ("all",), {"loss": noise}, {"loss": noise[:, 0]}, torch.ones(1, dtype=torch.bool), documents, 8
    )
    assert unsure.to_dataframe().mass_share.isna().all()
    clear = noise * 0.01 + torch.tensor([2.0, 0.5, 1.2])[:, None, None]
    row = TwoByTwo(
        "all", ("all",), {"loss": clear}, {"loss": clear[:, 0]}, torch.ones(1, dtype=torch.bool), documents, 8
    ).to_dataframe()
    assert float(row.mass_share[0]) == pytest.approx(1.35 / 2, abs=0.01)
    few = TwoByTwo(
        "all",
        ("all",),
        {"loss": clear[..., :4]},
        {"loss": clear[:, 0, :4]},
        torch.ones(1, dtype=torch.bool),
        documents[:4],
        8,
    )
    assert few.to_dataframe().mass_share.isna().all()
    opposed = noise * 0.01 + torch.tensor([2.0, 2.5, -1.0])[:, None, None]
    row = TwoByTwo(
        "all", ("all",), {"loss": opposed}, {"loss": opposed[:, 0]}, torch.ones(1, dtype=torch.bool), documents, 8
    ).to_dataframe()
    assert row.mass_share.isna().all()


def test_embedding_of_an_encoder_against_naive_edits() -> None:
    hf: Any
    hf, model = build_pair("bert")
    batch = as_tokens(model, torch.stack(random_rows((20, 20))))
    kept: list[Tensor] = []
    hf.bert.encoder.layer[-1].register_forward_hook(
        lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )

    def pooled(mode: str | None, b: int) -> Tensor:
        def row(layer: int, _: int, h: int, i: int, scores: Tensor, values: Tensor, seen: list[int]) -> Tensor:
            sinks = {0, 5} if mode else set()
            return naive_row(scores, values, seen, sinks, mode or "zero", b_v=bias_of(model, layer, h))

        naive_logits(hf, batch.ids[b : b + 1], row)
        return kept[-1].reshape(20, -1).double().mean(0)

    found = sl.decompose_sinks(model, batch, [0, 5], progress=False, effects=("all", "layer"))
    assert set(found.effects["all"].values) == {"embedding"}
    for b in range(2):
        base = pooled(None, b)
        for c, cell in enumerate(CELLS):
            expected = float(1 - torch.cosine_similarity(base, pooled(cell, b), dim=0))
            assert float(found.effects["all"].values["embedding"][c, 0, b]) == pytest.approx(expected, abs=1e-5)
    assert found.effects["layer"].values["embedding"].shape == (3, 2, 2)
    places = find_places([0, 5])
    with torch.no_grad():
        nothing = embedding_changes(model, batch, places, 0, [sl.ablate_sinks(model, [0], "scale", g=1.0)])
    assert float(nothing[0]) == pytest.approx(0.0, abs=1e-12)


def test_layers_and_heads_agree_between_the_routes() -> None:
    """The growing batch against one forward per key; heads that are not measured are the first-order estimate."""
    _, model = build_pair("llama")
    batch = as_tokens(model, torch.stack(random_rows((40, 40))))
    options: dict[str, Any] = {"progress": False, "metrics": ("loss", "kl")}
    found = sl.decompose_sinks(model, batch, [0, 3], effects=("layer", "head"), exact_heads=None, **options)
    places = find_places([0, 3])
    for scope, keys in (("layer", [0, 1]), ("head", [(n, h) for n in (0, 1) for h in range(4)])):
        slow = _by_forwards(model, batch.to("cpu"), places, ("loss", "kl"), keys, None, 0, False)
        assert found.effects[scope].keys == tuple(keys)
        for metric in ("loss", "kl"):
            assert (found.effects[scope].values[metric] - slow.values[metric]).abs().max() < 1e-5
    few = sl.decompose_sinks(model, batch, [0, 3], effects=("head",), exact_heads=3, **options).effects["head"]
    assert int(few.exact.sum()) == 3
    exact = found.effects["head"]
    assert (few.values["loss"][:, few.exact] - exact.values["loss"][:, few.exact]).abs().max() < 1e-5
    assert few.values["kl"][:, ~few.exact].isnan().all()
    assert few.part("loss", "interaction")[~few.exact].abs().max() < 1e-5  # linear: no interaction
    assert few.part("loss", "interaction")[few.exact].abs().max() > 1e-4
    whole = found.effects["all"]
    for scope in ("layer", "head"):  # no other sink here, so all predictions are common
        assert (found.effects[scope].together["loss"] - whole.values["loss"][:, 0]).abs().max() < 1e-5
    gaps = {(r["metric"], r["part"]): r for r in exact.additive_gap().to_dict("records")}
    summed = exact.part("loss", "total").sum(0) - whole.part("loss", "total")[0]
    assert gaps["loss", "total"]["gap"] == pytest.approx(float(summed.mean()), abs=1e-5)
    assert abs(gaps["loss", "total"]["gap"]) > 1e-4


def test_heads_use_the_first_128_tokens() -> None:
    _, model = build_pair("llama")
    batch = as_tokens(model, torch.stack(random_rows((150,))))
    short, places = shortened(batch, find_places([0, 140]))
    assert int(short.lengths[0]) == 128
    assert short.labels[0] == batch.labels[0][:128]
    assert places.positions == (0,)
    with pytest.raises(sl.BadInputError, match="hold none of the sinks"):
        shortened(batch, find_places([140]))


def claims_of(changes: dict[str, list[float]], parameters: float, gaps: float) -> dict[str, str]:
    documents = tuple(range(20))
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
    values = {name: noise + value[0] for name, value in changes.items()}
    made = Claims("loss", values, noise + parameters, noise.flip(0) + gaps, documents, documents)
    return dict(zip(made.to_dataframe().claim, made.to_dataframe().verdict, strict=True))


def test_verdicts_follow_the_intervals_and_signs() -> None:
    def changes(renormalize: float, zero: float, key: float, logit: float) -> dict[str, list[float]]:
        named = {"renormalize": renormalize, "zero": zero, "value_only": 0.0}
        return {n: [v] for n, v in (named | {"fixed_key, neutral value": key, "fixed_logit": logit}).items()}

    good = claims_of(changes(1.0, 0.2, 0.02, 0.5), parameters=3.0, gaps=4.0)
    assert good == {
        "mass effect": "supported", "key bias": "supported", "constant offset": "contradicted",
        "parameter bias": "supported",
    }  # fmt: skip
    worse = claims_of(changes(1.0, 3.0, 0.1, 0.1), parameters=0.02, gaps=4.0)
    assert worse["mass effect"] == "contradicted"  # the mass alone is worse than no sink at all
    assert worse["key bias"] == "undecided"
    assert worse["parameter bias"] == "contradicted"
    assert claims_of(changes(0.0, 0.5, 0.5, 0.5), 1.0, 1.0)["key bias"] == "nothing to explain"
    assert claims_of(changes(1.0, 0.2, 0.0, 0.0), parameters=-0.05, gaps=-3.0)["parameter bias"] == "undecided"
    assert claims_of(changes(1.0, 0.2, 0.0, 0.0), math.nan, math.nan)["parameter bias"] == "not tested"


def test_a_sequence_without_a_living_sink_counts_as_nothing() -> None:
    _, model = build_pair("llama")
    batch = as_tokens(model, torch.stack(random_rows((40, 40)))).to("cpu")
    entries = (Place(0, 0, frozenset({0, 1}), "a"), Place(1, 0, frozenset({1}), "a"))
    places = Places(tokens=batch, entries=entries)
    slow = _by_forwards(model, batch, places, ("loss",), [0, 1], None, 0, False)
    assert slow.values["loss"][:, 0, 1].isnan().all()
    assert slow.values["loss"][:, 1].isfinite().all()
    assert len(slow.additive_gap()) == 4
