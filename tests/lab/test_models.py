"""Lab models: each kind of attention against its formula, and as an ordinary model of the package."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens.check.check import CHECKS, check_model
from sinklens.lab import KINDS, LabModel, ModelConfig
from sinklens.lab.kinds import weights
from sinklens.lab.measure import Watcher, evaluate, head_figures, watched, without_first
from sinklens.lab.study import LabConfig
from sinklens.lab.training import evaluation_batch

SLOTS = [name for name, kind in KINDS.items() if kind.slot != "none"]
NO_SOFTMAX = ["sigmoid", "sigmoid_normalised", "relu", "k_bias", "kv_bias"]


def lab_model(kind: str, **options: object) -> LabModel:
    """A model with weights large enough that every part of it matters."""
    shape = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "position": "rope", "n_vocab": 96, "n_ctx": 128} | options
    model = LabModel(ModelConfig(attention=kind, **shape), seed=1)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in model.layers:
            for parameter in block.attn.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def naive_row(kind: str, scores: list[float], slot: float) -> list[float]:
    """One row of weights, as the table of formulas says."""
    e = [math.exp(s) for s in scores]
    sigmoids = [1 / (1 + math.exp(-s)) for s in scores]
    if kind == "sigmoid":
        return sigmoids
    if kind == "sigmoid_normalised":
        return [s / sum(sigmoids) for s in sigmoids]
    if kind == "relu":
        return [max(s, 0.0) for s in scores]
    extra = math.exp(slot) if kind in SLOTS else 0.0
    return [x / (extra + sum(e)) for x in e]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_the_formula(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64) * 3
    slot = torch.zeros(2, 3, 5, dtype=torch.float64)
    if kind != "off_by_one":
        slot = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    found, rest = weights(KINDS[kind], scores, visible, slot if kind in SLOTS else None)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                row = naive_row(kind, scores[b, h, i, : i + 1].tolist(), float(slot[b, h, i]))
                assert found[b, h, i, : i + 1].tolist() == pytest.approx(row, abs=1e-12)
                assert (found[b, h, i, i + 1 :] == 0).all()
                if rest is not None:
                    assert float(rest[b, h, i]) == pytest.approx(1 - sum(row), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores_stay_finite_and_blind_rows_are_zero(kind: str) -> None:
    scores = torch.tensor([[[[1e4, -1e4], [3e4, 2.9e4]]]])
    visible = torch.tensor([[[[False, False], [True, True]]]])
    found, rest = weights(KINDS[kind], scores, visible, torch.tensor([[[-1e4, 2e4]]]) if kind in SLOTS else None)
    assert found.isfinite().all()
    assert (found[0, 0, 0] == 0).all()
    assert rest is None or rest.isfinite().all()


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_attention_equals_the_written_one_with_padding_and_documents(kind: str, position: str) -> None:
    model = lab_model(kind, position=position)
    ids = torch.randint(1, 96, (3, 20), generator=torch.Generator().manual_seed(3))
    padding = torch.ones_like(ids)
    padding[1, 15:] = 0
    documents = (torch.arange(20) // 7)[None].expand(3, -1)
    other = (documents[:, :, None] != documents[:, None, :])[:, None]
    left = torch.ones_like(ids)
    left[2, :6] = 0
    for mask in (None, padding, other, left):
        with torch.no_grad():
            fused = model(ids, attention_mask=mask)
            with watched(model) as seen:
                written = model(ids, attention_mask=mask)
        assert torch.allclose(fused, written, atol=2e-5)
        pattern = seen[0]["pattern"]
        assert (pattern.triu(1) == 0).all()
        if mask is other:
            assert (pattern.masked_select(other) == 0).all()


def test_a_slot_writes_its_value_and_nothing_else() -> None:
    model = lab_model("kv_bias", n_layers=1)
    attention = model.layers[0].attn
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        attention.key_bias.fill_(50)  # type: ignore[operator]
        attention.q.weight.zero_()
        attention.q.bias.fill_(50)  # every query meets the slot's key, and takes nothing from tokens
        out, pattern = attention(x, hooks=Watcher())
        value = 20 * attention.value_bias.repeat_interleave(2, 0).flatten()  # type: ignore[operator, union-attr]
        expected = attention.o(value)
    assert pattern is not None
    assert float(pattern.abs().max()) < 1e-6
    assert torch.allclose(out, expected.expand_as(out), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lab_model_is_an_ordinary_bridge(kind: str) -> None:
    model = lab_model(kind)
    ids = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(5))
    raw = model(ids)
    raw.square().mean().backward()
    own = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    fresh = lab_model(kind)
    fresh.load_state_dict(model.state_dict())
    bridge = sl.load_model(fresh)
    assert torch.allclose(bridge(ids), raw, atol=2e-5)
    for parameter in bridge.parameters():
        parameter.requires_grad_(True)
    bridge(ids).square().mean().backward()
    through = {
        name.replace("_original_component.", "").replace("original_component.", ""): parameter.grad
        for name, parameter in bridge.original_model.named_parameters()
        if parameter.grad is not None
    }
    assert set(own) == set(through)
    for name, gradient in own.items():
        assert torch.allclose(gradient, through[name], atol=1e-5 + 1e-3 * float(gradient.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_the_pattern_moves_the_logits(kind: str) -> None:
    bridge = sl.load_model(lab_model(kind))
    ids = torch.randint(1, 96, (1, 12), generator=torch.Generator().manual_seed(5))

    def cut(pattern: Tensor, hook: object) -> Tensor:
        return pattern * (torch.arange(12) > 0)

    with torch.no_grad():
        edited = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.attn.hook_pattern", cut)])
        assert not torch.allclose(edited, bridge(ids), atol=1e-4)


def test_the_proof_says_what_is_a_softmax() -> None:
    for kind in KINDS:
        facts = sl.models.capabilities(sl.load_model(lab_model(kind)))
        assert facts.softmax == (kind not in NO_SOFTMAX)
        assert facts.shares == (kind not in ("sigmoid", "relu"))
        assert facts.learned_sinks == (kind in ("off_by_one", "sink_logit"))
        assert facts.z_is_pattern_v == (kind not in ("gated", "kv_bias"))
        assert facts.pattern_edit
        assert facts.scores_are_logits


def test_every_function_is_exact_or_refused_on_a_lab_model() -> None:
    text = [name for name in CHECKS if name != "register_tokens"]  # refuses text by its type
    found = check_model(sl.load_model(lab_model("softmax")), functions=text, progress=False)
    refused = {row.function for row in found.rows if row.outcome == "refused"}
    assert found.ok, repr(found)
    assert refused == {"load_images", "flash"}


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "softmax"])
def test_every_kind_is_exact_or_refused_with_the_reason(kind: str) -> None:
    functions = ["capabilities", "sink_scores", "find_sinks", "token_loss", "ablate_sinks", "attention_statistics"]
    functions += ["measure_mixing", "patch_bos", "trace_sinks"] if kind in ("sigmoid", "kv_bias") else []
    found = check_model(sl.load_model(lab_model(kind)), functions=functions, progress=False)
    assert found.ok, repr(found)
    refused = {row.function for row in found.rows if row.outcome == "refused"}
    expected = {"ablate_sinks", "attention_statistics"} if kind in NO_SOFTMAX else set()
    if kind in ("sigmoid", "relu"):
        expected |= {"find_sinks"}
    if kind == "sigmoid":
        expected |= {"trace_sinks"}
    assert refused == expected
    if kind in NO_SOFTMAX:
        assert "not a softmax" in found["ablate_sinks"].reason


def test_attention_only_models_are_measured_and_what_is_about_mlps_refuses() -> None:
    bridge = sl.load_model(lab_model("softmax", mlp="none", n_kv_heads=4))
    functions = ["capabilities", "decompose_sinks", "trace_sinks", "writer_neurons", "plant_sinks", "path_sums"]
    found = check_model(bridge, functions=functions, progress=False)
    assert found.ok, repr(found)
    assert {row.function for row in found.rows if row.outcome == "refused"} == {
        "writer_neurons",
        "plant_sinks",
        "path_sums",
    }


def test_the_hosts_own_native_models_load() -> None:
    from transformer_lens.model_bridge.sources.native import boot

    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_head": 16, "n_ctx": 64, "d_vocab": 50, "act_fn": "gelu"}
    bridge = sl.load_model(boot(shape))
    scores = sl.sink_scores(bridge, torch.randint(0, 50, (2, 60)), progress=False)
    assert float(scores.alpha[:, :, :, 0].min()) > 0
    with pytest.raises(sl.UnsupportedModelError, match="longer context"):
        sl.load_model(boot(shape | {"n_ctx": 20}))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "kv_bias"])
def test_figures_of_heads_follow_their_definitions(kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(4, 2, 12, 12, generator=generator, dtype=torch.float64) * 2
    scores[..., 0] += 2
    visible = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    slot = torch.randn(4, 2, 12, generator=generator, dtype=torch.float64) if kind == "kv_bias" else None
    pattern, _ = weights(KINDS[kind], scores, visible, slot)
    written = torch.rand(4, 2, 12, generator=generator, dtype=torch.float64)
    found = head_figures(pattern, visible, written, slot=slot is not None)
    for h in range(2):
        alpha, relative, anywhere, own, rest = [], [], [], [], []
        for b in range(4):
            rows = pattern[b, h]
            shares = [[float(rows[i, k] / rows[i, : i + 1].sum()) for k in range(i + 1)] for i in range(12)]
            alpha.append(sum(float(rows[i, 0]) for i in range(12)) / 12)
            relative.append(sum(row[0] for row in shares) / 12)
            columns = [sum(shares[i][k] for i in range(k, 12)) / (12 - k) for k in range(12) if 12 - k >= 3]
            anywhere.append(max(columns) > 0.3)
            own.append(sum(shares[i][i] for i in range(1, 12)) / 11)
            rest.append(sum(1 - float(rows[i].sum()) for i in range(12)) / 12)
        assert float(found["alpha"][h]) == pytest.approx(sum(alpha) / 4)
        assert float(found["sink"][h]) == pytest.approx(sum(a > 0.3 for a in alpha) / 4)
        assert float(found["relative_alpha"][h]) == pytest.approx(sum(relative) / 4)
        assert float(found["relative_sink"][h]) == pytest.approx(sum(a > 0.3 for a in relative) / 4)
        assert float(found["anywhere"][h]) == pytest.approx(sum(anywhere) / 4)
        assert float(found["self"][h]) == pytest.approx(sum(own) / 4)
        assert float(found["slot_mass"][h]) == pytest.approx(sum(rest) / 4 if slot is not None else 0)
        ratio = [float(written[b, h, 0] / written[b, h, 1:].mean()) for b in range(4)]
        assert float(found["value_ratio"][h]) == pytest.approx(sum(ratio) / 4)


def test_leaving_the_first_token_out_compares_the_same_targets() -> None:
    config = LabConfig()
    model = LabModel(config.fitted(), seed=3)
    batch = evaluation_batch(config)
    found = without_first(model, config.task, batch)
    with torch.no_grad():
        inputs = {"with": batch.ids, "without": batch.ids[:, 1:]}
        for name, ids in inputs.items():
            logs = model(ids).double().log_softmax(-1)
            offset = 64 - ids.shape[1]
            losses = [
                -float(logs[b, t - offset - 1, batch.ids[b, t]])
                for b in range(len(ids))
                for t in range(2, 64)
                if not (t == 2 and batch.classes[b, t] == 1)  # its source is the token that is left out
            ]
            assert found[f"loss_{name}"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_figures_agree_with_the_packages_own_scores() -> None:
    config = LabConfig(model=ModelConfig(n_layers=2, n_heads=2))
    model = LabModel(config.fitted(), seed=3)
    batch = evaluation_batch(config)
    rows = evaluate(model, config.task, batch)
    bridge = sl.load_model(model)
    scores = sl.sink_scores(bridge, batch.ids, progress=False)
    losses = sl.token_loss(bridge, batch.ids)
    for row in rows[1:]:
        mine = scores.alpha[:, int(row["layer"]), int(row["head"]), 0]
        assert row["alpha"] == pytest.approx(float(mine.mean()), abs=1e-6)
        assert row["sink"] == pytest.approx(float((mine > 0.3).double().mean()))
    assert rows[0]["loss"] == pytest.approx(float(losses.nanmean()), abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"attention": "linear"}, "attention must be"), ({"norm": "batch"}, "norm must be"), ({"n_heads": 3}, "multiple"),
     ({"position": "rope", "d_head": 7}, "even"), ({"n_layers": 0}, "at least 1"), ({"n_kv_heads": 2}, "n_kv_heads")],
)  # fmt: skip
def test_impossible_models_are_refused(wrong: dict[str, object], word: str) -> None:
    with pytest.raises(sl.BadInputError, match=word):
        ModelConfig(**wrong)  # type: ignore[arg-type]
