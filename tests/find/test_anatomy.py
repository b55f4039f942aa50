"""The anatomy against independent recomputation from Hugging Face weights and states."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import build_pair, random_rows
from naive import eager_patterns
from planted import X, planted_model, row

import sinklens as sl
from sinklens.find.anatomy import competitor_free_margin, head_class, stable_rank
from sinklens.find.lifetimes import Thresholds
from sinklens.find.sinkmap import assemble

LENGTH = 60
PLACES = (0, 7)


def declared_sinks(model: Any, ids: torch.Tensor) -> sl.SinkMap:
    """A map that calls positions 0 and 7 sinks in every layer, whatever the random model does."""
    scores = sl.sink_scores(model, ids)
    mass = scores.beta.mean(2)
    active = torch.zeros_like(mass, dtype=torch.bool)
    active[:, :, list(PLACES)] = True
    in_use = torch.zeros_like(scores.beta, dtype=torch.bool)
    in_use[..., 0] = True
    thresholds = Thresholds()
    sinks, _ = assemble(
        active, mass, in_use, scores.tokens, thresholds, attended=None, given_strongest=[0] * len(scores.tokens)
    )
    return sl.SinkMap(sinks, (0,), (), mass, scores.uniform, scores.tokens, thresholds, "attention", (), scores.info)


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert", "gpt-oss", "opt"])
def case(request) -> tuple[str, Any, Any, torch.Tensor, sl.find.Anatomy]:
    reference, model = build_pair(request.param)
    ids = random_rows((LENGTH,))[0]
    return request.param, reference, model, ids, sl.sink_anatomy(model, declared_sinks(model, ids))


def at(table: pd.DataFrame, **where: int) -> pd.Series:
    for column, value in where.items():
        table = pd.DataFrame(table[table[column] == value])
    assert len(table) == 1
    return table.iloc[0]


def test_residual_quantities_equal_a_recomputation_from_hidden_states(case) -> None:
    name, reference, _, ids, anatomy = case
    with torch.no_grad():
        states = reference(ids[None], output_hidden_states=True).hidden_states
    others = [i for i in range(LENGTH) if i not in PLACES]
    for layer in range(2):
        x = states[layer][0].double().numpy()
        norms = np.linalg.norm(x, axis=1)
        lower_median = sorted(norms)[(LENGTH - 1) // 2]
        mu = x[norms < 3 * lower_median].mean(0)
        for position in PLACES:
            found = at(anatomy.layers, position=position, layer=layer)
            assert found.residual_norm == pytest.approx(norms[position], rel=1e-4)
            assert found.residual_ratio == pytest.approx(norms[position] / sorted(norms[others])[28], rel=1e-4)
            magnitude = np.abs(x[position])
            assert found.max_ratio == pytest.approx(magnitude.max() / sorted(magnitude)[15], rel=1e-4)
            raw = x[position] @ x[0] / (norms[position] * norms[0])
            a, b = x[position] - mu, x[0] - mu
            assert found.cosine_raw == pytest.approx(raw, abs=1e-5), name
            assert found.cosine_centred == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_margin_and_beta_equal_loops_over_queries(case) -> None:
    name, reference, model, ids, anatomy = case
    causal = sl.models.capabilities(model).causal
    for layer, pattern in enumerate(eager_patterns(reference, ids)):
        for position in PLACES:
            queries = [i for i in range(LENGTH) if abs(i - position) >= 16 and (i > position or not causal)]
            for head in range(4):
                values = []
                for i in queries:
                    if float(pattern[head, i, position]) == 0:
                        continue  # outside a window
                    rest = sum(float(pattern[head, i, j]) for j in range(LENGTH) if j not in PLACES)
                    values.append(math.log(float(pattern[head, i, position])) - math.log(rest))
                found = at(anatomy.heads, position=position, layer=layer, head=head)
                assert found.margin == pytest.approx(sum(values) / len(values), abs=1e-4), (name, layer, position)


def test_value_and_output_norms_leave_the_value_bias_out(case) -> None:
    name, reference, model, ids, anatomy = case
    values: dict[int, torch.Tensor] = {}

    def keep(layer):
        def hook(v, hook):
            values[layer] = v[0].double()

        return hook

    with torch.no_grad():
        model.run_with_hooks(ids[None], fwd_hooks=[(f"blocks.{i}.attn.hook_v", keep(i)) for i in range(2)])
    others = [i for i in range(LENGTH) if i not in PLACES]
    for layer in range(2):
        bias, w_o = value_parameters(name, reference, layer)
        v = values[layer].transpose(0, 1).repeat_interleave(4 // values[layer].shape[1], dim=0)
        v = v - bias[:, None]
        u = v @ w_o
        for head in range(4):
            found = at(anatomy.heads, position=7, layer=layer, head=head)
            for column, vector in (("v_ratio", v[head]), ("ov_ratio", u[head])):
                norms = vector.norm(dim=-1)
                assert found[column] == pytest.approx(float(norms[7] / norms[others].median()), rel=1e-4), (
                    name,
                    column,
                )


def test_no_sink_means_no_sink_of_the_whole_map_also_after_filtering(case) -> None:
    _, _, model, ids, anatomy = case
    sinks = declared_sinks(model, ids)
    only = [sink for sink in sinks if sink.position == 7]
    filtered = sl.sink_anatomy(model, dataclasses.replace(sinks, sinks=tuple(only)))
    whole = anatomy.layers[anatomy.layers.position == 7].reset_index(drop=True)
    assert filtered.layers.equals(whole)


def value_parameters(name: str, reference: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """b_V [head, d_head] and W_O [head, d_head, d_model] straight from the Hugging Face module."""
    if name == "gpt2":
        block = reference.transformer.h[layer].attn
        return block.c_attn.bias[64:].view(4, 8).double(), block.c_proj.weight.view(4, 8, 32).double()
    if name == "bert":
        block = reference.bert.encoder.layer[layer].attention
        return block.self.value.bias.view(4, 8).double(), block.output.dense.weight.T.reshape(4, 8, 32).double()
    if name == "opt":
        block = reference.model.decoder.layers[layer].self_attn
        return block.v_proj.bias.view(4, 8).double(), block.out_proj.weight.T.reshape(4, 8, 32).double()
    block = reference.model.layers[layer].self_attn
    bias = torch.zeros(2, 8) if block.v_proj.bias is None else block.v_proj.bias.view(2, 8)
    return bias.repeat_interleave(2, 0).double(), block.o_proj.weight.T.reshape(4, 8, 32).double()


def test_qk_is_the_score_before_scaling_and_splits_into_norms_and_cosine(case) -> None:
    name, _, model, ids, anatomy = case
    if not sl.models.capabilities(model).scores_are_logits:
        pytest.raises(sl.UnsupportedModelError, sl.attention_map, model, ids, layer=0, head=0, kind="logits")
        return
    scores: dict[int, torch.Tensor] = {}

    def keep(layer):
        def hook(s, hook):
            scores[layer] = s[0].double()

        return hook

    with torch.no_grad():
        model.run_with_hooks(ids[None], fwd_hooks=[(f"blocks.{i}.attn.hook_attn_scores", keep(i)) for i in range(2)])
    window = sl.models.capabilities(model).windows
    for layer in range(2):
        queries = [i for i in range(23, LENGTH) if window[layer] is None or i - 7 < (window[layer] or 0)]
        for head in range(4):
            found = at(anatomy.heads, position=7, layer=layer, head=head)
            expected = math.sqrt(8) * float(scores[layer][head, queries, 7].mean())
            assert found.qk == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, layer, head)
            assert -1 <= found.cosine <= 1
            far = [(i, j) for i in range(LENGTH) for j in range(i - 15) if j not in PLACES]
            far = [(i, j) for i, j in far if window[layer] is None or i - j < (window[layer] or 0)]
            others = sum(float(scores[layer][head, i, j]) for i, j in far) / len(far)
            assert found.other_qk == pytest.approx(math.sqrt(8) * others, rel=1e-3, abs=1e-4), (name, layer, head)


def test_stable_rank_equals_the_singular_values_of_the_whole_output() -> None:
    generator = torch.Generator().manual_seed(0)
    output, w_o = torch.randn(3, 40, 8, generator=generator), torch.randn(3, 8, 32, generator=generator)
    output[0] = output[0, :1]  # every query gets the same vector: a perfect broadcast
    expected = []
    for head in range(3):
        values = torch.linalg.svdvals(output[head].double() @ w_o[head].double())
        expected.append(float((values**2).sum() / values[0] ** 2))
    assert stable_rank(output, w_o).tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("share", "ratio", "rank", "expected"),
    [
        (0.89, 0.1, 1.0, "none"),
        (0.90, 0.2, 9.0, "nop"),
        (0.90, 0.21, 1.0, "mixed"),
        (0.90, 0.49, 1.0, "mixed"),
        (0.90, 0.5, 1.5, "broadcast"),
        (0.90, 0.5, 1.51, "mixed"),
    ],
)
def test_head_classes_on_either_side_of_each_threshold(share: float, ratio: float, rank: float, expected: str) -> None:
    assert head_class(share, ratio, rank) == expected


def test_margin_of_a_saturated_sink_is_infinite_not_wrong() -> None:
    pattern = torch.zeros(1, 20, 20)
    pattern[..., 0] = 1
    no_sink = torch.arange(20) > 0
    assert float(competitor_free_margin(pattern, 0, no_sink, torch.arange(20) >= 16)) == math.inf


def test_heads_of_a_planted_model_use_the_sink_where_it_was_planted() -> None:
    model = planted_model(10, {X: 9.0}, {X: range(4, 10)}, heads=[1])
    anatomy = sl.sink_anatomy(model, sl.find_sinks(model, row(100, {0: X})))
    used = anatomy.use[anatomy.use.kind == "primary"]
    assert set(zip(used.layer, used["head"], strict=True)) == {(layer, 1) for layer in range(4, 10)}
    assert (used.event_share == 1).all()
    classes = anatomy.head_classes()
    assert len(classes) == 20
    assert set(classes[classes.kind == "none"]["class"]) == {"none"}


def test_anatomy_of_nothing_is_empty_and_of_another_model_refused() -> None:
    model = planted_model(6, {}, {})
    sinks = sl.find_sinks(model, row(60, {}))
    anatomy = sl.sink_anatomy(model, sinks)
    assert anatomy.layers.empty
    assert set(anatomy.use["class"]) == {"none"}
    with pytest.raises(sl.BadInputError, match="no sinks to draw"):
        anatomy.plot()
    with pytest.raises(sl.BadInputError, match="found in another model"):
        sl.sink_anatomy(planted_model(4, {}, {}), sinks)


def test_what_an_architecture_hides_is_said(tmp_path: Path) -> None:
    _, model = build_pair("neox")
    anatomy = sl.sink_anatomy(model, declared_sinks(model, random_rows((LENGTH,))[0]))
    assert "only before RoPE" in anatomy.notes[0]
    assert "cosine" not in anatomy.heads or anatomy.heads.cosine.isna().all()
    assert {p.name for p in anatomy.save(tmp_path).iterdir()} == {"layers.parquet", "heads.parquet", "use.parquet"}
    assert pd.read_parquet(tmp_path / "layers.parquet").equals(anatomy.layers)


def test_head_importance_is_undefined_with_fewer_than_32_far_queries() -> None:
    _, model = build_pair("gemma3")  # window 50: 34 far queries in the two sliding layers, once the text is long enough
    anatomy = sl.sink_anatomy(model, declared_sinks(model, random_rows((LENGTH,))[0]))
    for position, defined in ((0, True), (7, True)):
        rows = anatomy.heads[(anatomy.heads.position == position) & (anatomy.heads.layer == 2)]
        assert rows.beta.notna().all() == defined
    short = sl.sink_anatomy(model, declared_sinks(model, random_rows((40,))[0]))
    assert short.heads.beta.isna().all()
    assert short.use.beta.isna().all()


def test_the_stable_rank_is_of_the_output_without_the_value_bias(case) -> None:
    name, reference, model, ids, anatomy = case
    values: list[torch.Tensor] = []
    with torch.no_grad():
        hooks: list[Any] = [(f"blocks.{i}.attn.hook_v", lambda v, hook: values.append(v[0].double())) for i in range(2)]
        model.run_with_hooks(ids[None], fwd_hooks=hooks)
    for layer, pattern in enumerate(eager_patterns(reference, ids)):
        bias, w_o = value_parameters(name, reference, layer)
        v = values[layer].transpose(0, 1).repeat_interleave(4 // values[layer].shape[1], dim=0)
        output = (pattern @ (v - bias.detach()[:, None]) @ w_o.detach())[:, 1:]
        for head in range(4):
            singular = torch.linalg.svdvals(output[head])
            expected = float((singular**2).sum() / singular[0] ** 2)
            found = at(anatomy.use, layer=layer, head=head)
            assert found.stable_rank == pytest.approx(expected, rel=1e-3), (name, layer, head)
