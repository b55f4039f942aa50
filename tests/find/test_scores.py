"""sink_scores against loops, under every kind of padding, on eight architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from architectures import SCORED, build_pair, random_rows
from batches import left_padded
from naive import eager_patterns, naive_scores

import sinklens as sl

LENGTHS = (90, 57, 2)


def right_padded(rows: list[torch.Tensor], model) -> sl.Tokens:
    parts = [sl.sink_scores(model, row[None], progress=False).tokens for row in rows]
    return sl.Tokens.concatenate(parts)


@pytest.mark.parametrize("name", SCORED)
def test_scores_equal_a_loop_over_queries_and_keys_whatever_the_padding(name: str) -> None:
    reference, model = build_pair(name)
    facts = sl.models.capabilities(model)
    rows = random_rows(LENGTHS)
    right = right_padded(rows, model)
    batches = {
        "right padding": right,
        "left padding": left_padded(right),
        "both sides": left_padded(right).pad("right", 3).pad("left", 2),
    }
    measured = {label: sl.sink_scores(model, batch) for label, batch in batches.items()}
    measured["single sequences"] = sl.SinkScores.concatenate([sl.sink_scores(model, row[None]) for row in rows])
    for sequence, ids in enumerate(rows):
        for layer, pattern in enumerate(eager_patterns(reference, ids)):
            expected = naive_scores(pattern, facts.causal, facts.windows[layer])
            for label, scores in measured.items():
                where = f"{name}, {label}, sequence {sequence}, layer {layer}"
                found = scores.alpha[sequence, layer], scores.beta[sequence, layer], scores.uniform[sequence, layer]
                for quantity, want in zip(found, expected[:3], strict=True):
                    assert quantity[..., len(ids) :].isnan().all(), where
                    torch.testing.assert_close(
                        quantity[..., : len(ids)].double(), want, atol=1e-6, rtol=0, equal_nan=True, msg=where
                    )
                if scores.learned_sink is not None:
                    torch.testing.assert_close(
                        scores.learned_sink[sequence, layer], expected[3].float(), atol=1e-6, rtol=0, msg=where
                    )


def test_only_a_model_with_learned_sinks_reports_their_mass_and_rows_then_sum_to_one() -> None:
    _, plain = build_pair("llama")
    _, learned = build_pair("gpt-oss")
    ids = random_rows((40,))[0]
    assert sl.sink_scores(plain, ids).learned_sink is None
    scores = sl.sink_scores(learned, ids)
    assert scores.learned_sink is not None
    assert (scores.learned_sink > 0.01).any()
    # mass on tokens, summed over keys with their numbers of queries, and learned mass account for every row
    queries = torch.arange(40, 0, -1)
    full_layer = 1
    tokens_mass = (scores.alpha[0, full_layer] * queries).sum(-1) / 40
    torch.testing.assert_close(tokens_mass + scores.learned_sink[0, full_layer], torch.ones(4), atol=1e-5, rtol=0)


def test_sink_rate_averages_the_strict_indicator_over_sequences_layers_and_heads() -> None:
    _, model = build_pair("llama")
    scores = sl.sink_scores(model, torch.stack(random_rows((30, 30, 30))))
    threshold = float(scores.alpha[1, 0, 2, 0])
    by_hand = sum(
        float(scores.alpha[b, layer, h, 0]) > threshold for b in range(3) for layer in range(2) for h in range(4)
    )
    assert scores.sink_rate(0, threshold) == pytest.approx(by_hand / 24)
    assert scores.sink_rate(0, 0.0) == 1.0
    assert scores.sink_rate_interval() is None, "three documents carry no interval"


def test_sink_rate_ignores_sequences_that_end_before_the_position() -> None:
    _, model = build_pair("llama")
    parts = [sl.sink_scores(model, row) for row in random_rows((30, 10))]
    both = sl.SinkScores.concatenate(parts)
    assert both.sink_rate(20, 0.02) == parts[0].sink_rate(20, 0.02)
    with pytest.raises(sl.BadInputError, match="position 30 is out of range"):
        both.sink_rate(30)
    with pytest.raises(sl.BadInputError, match="position -1 is out of range"):
        both.sink_rate(-1)


def test_scores_survive_saving_and_a_half_file_is_refused(tmp_path: Path) -> None:
    _, model = build_pair("gpt-oss")
    scores = sl.sink_scores(model, torch.stack(random_rows((50, 50))))
    path = scores.save(tmp_path / "scores.safetensors")
    loaded = sl.SinkScores.load(path)
    for name in ("alpha", "beta", "uniform", "learned_sink"):
        assert torch.equal(getattr(loaded, name).nan_to_num(-1), getattr(scores, name).nan_to_num(-1))
    assert loaded.tokens.digest == scores.tokens.digest
    assert loaded.to_dataframe().equals(scores.to_dataframe())
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(sl.BadInputError, match="not a complete safetensors file"):
        sl.SinkScores.load(half)
    with pytest.raises(sl.BadInputError, match="holds a SinkScores, not a Tokens"):
        sl.Tokens.load(path)
    with pytest.raises(sl.BadInputError, match="no result file"):
        sl.SinkScores.load(tmp_path / "absent")


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch) -> None:
    import sinklens.core.storage as results

    _, model = build_pair("llama")
    scores = sl.sink_scores(model, random_rows((20,))[0])
    path = scores.save(tmp_path / "scores.safetensors")
    before = path.read_bytes()

    def interrupted(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scores.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_tables_hold_what_the_tensors_hold() -> None:
    _, model = build_pair("llama")
    scores = sl.sink_scores(model, torch.stack(random_rows((60, 60))))
    table = scores.to_dataframe()
    assert len(table) == scores.alpha.numel()
    row = table.query("sequence == 1 and layer == 1 and head == 3 and position == 17").iloc[0]
    assert row.alpha == pytest.approx(float(scores.alpha[1, 1, 3, 17]))
    assert row.token_id == int(scores.tokens.ids[1, 17])
    heads = scores.head_table(position=2, epsilon=0.05)
    assert heads.query("layer == 1 and head == 2").alpha.item() == pytest.approx(
        float(scores.alpha[:, 1, 2, 2].mean()), abs=1e-6
    )
    layers = scores.layer_table(position=2, epsilon=0.05)
    assert layers.sink_rate.mean() == pytest.approx(scores.sink_rate(2, 0.05))
    positions = scores.position_table()
    assert len(positions) == 120
    assert positions.beta.is_monotonic_decreasing or positions.beta.isna().any()


def test_ctrl_c_leaves_no_hook_behind() -> None:
    _, model = build_pair("llama")
    ids = random_rows((20,))[0][None]
    clean = model(ids)

    def interrupt(pattern, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", interrupt)]):
        sl.sink_scores(model, ids)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert torch.equal(model(ids), clean)
    assert sl.sink_scores(model, ids).alpha.shape == (1, 2, 4, 20)


def test_attention_outside_the_declared_window_is_refused_not_averaged() -> None:
    _, model = build_pair("mistral")

    def look_far(pattern, hook):
        return torch.full_like(pattern, 1 / pattern.shape[-1]).tril()

    hooks = [("blocks.0.attn.hook_pattern", look_far)]
    refused = pytest.raises(sl.UnsupportedModelError, match="outside what its configuration declares")
    with model.hooks(fwd_hooks=hooks), refused:
        sl.sink_scores(model, random_rows((80,))[0])


def test_an_unknown_backend_is_refused() -> None:
    _, model = build_pair("llama")
    with pytest.raises(sl.BadInputError, match="backend must be"):
        sl.sink_scores(model, random_rows((20,))[0], backend=cast(Any, "fast"))


def test_batches_split_by_memory_give_the_same_numbers(monkeypatch) -> None:
    import sinklens.find.scores as module

    _, model = build_pair("llama")
    ids = torch.stack(random_rows((40, 40, 40)))
    together = sl.sink_scores(model, ids)
    monkeypatch.setattr(module, "PATTERN_BYTES", 1)
    apart = sl.sink_scores(model, ids)
    torch.testing.assert_close(together.alpha, apart.alpha, atol=1e-6, rtol=0)
    assert together.tokens.digest == apart.tokens.digest


def test_nan_attention_is_refused_and_never_averaged_into_no_sink() -> None:
    _, model = build_pair("llama")

    def poison(residual, hook):
        residual = residual.clone()
        residual[:, 5] = torch.nan
        return residual

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_in", poison)]),
        pytest.raises(sl.UnsupportedModelError, match="yields NaN"),
    ):
        sl.sink_scores(model, random_rows((80,))[0])


def test_a_window_under_another_name_is_read() -> None:
    reference, model = build_pair("gpt-neo")
    assert sl.models.capabilities(model).windows == (None, 50)
    ids = random_rows((160,))[0]
    scores = sl.sink_scores(model, ids)
    for layer, pattern in enumerate(eager_patterns(reference, ids)):
        alpha, beta, _, _ = naive_scores(pattern, True, (None, 50)[layer])
        torch.testing.assert_close(scores.alpha[0, layer].double(), alpha, atol=1e-6, rtol=0)
        torch.testing.assert_close(scores.beta[0, layer].double(), beta, atol=1e-6, rtol=0, equal_nan=True)


def test_a_window_that_nobody_declares_is_noticed_once_the_input_is_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sinklens.find.scores.busy", lambda _: False)  # the hook below stands for the host's own code
    _, model = build_pair("llama")
    far = torch.ones(80, 80, dtype=torch.bool).tril(-40)

    def mask(scores, hook):
        return scores.masked_fill(far, torch.finfo(scores.dtype).min)

    hooks = [("blocks.1.attn.hook_attn_scores", mask)]
    with (
        model.hooks(fwd_hooks=hooks),
        pytest.raises(sl.UnsupportedModelError, match="layer 1 gives exactly no attention"),
    ):
        sl.sink_scores(model, random_rows((80,))[0])


def test_choosing_sequences_takes_integers_only() -> None:
    _, model = build_pair("llama")
    tokens = sl.sink_scores(model, torch.stack(random_rows((20, 20, 20)))).tokens
    assert tokens[-1].sources == ("ids 2",)
    assert tokens[0:2].sources == ("ids 0", "ids 1")
    for wrong in ([True, False, False], slice(3, 3), [], 3, [0, 5]):
        with pytest.raises(sl.BadInputError, match="does not choose from 3 sequences|must be a whole number"):
            tokens[wrong]


def test_saving_over_a_folder_is_refused(tmp_path: Path) -> None:
    _, model = build_pair("llama")
    scores = sl.sink_scores(model, random_rows((20,))[0])
    with pytest.raises(sl.BadInputError, match="is a folder"):
        scores.save(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(sl.BadInputError, match="cannot write"):
        scores.save(tmp_path / "file" / "scores")


def test_hover_of_the_position_map_escapes_the_token_and_breaks_the_line() -> None:
    from wording import model_with

    scores = sl.sink_scores(model_with(adds_bos=False), "the <eos> cat")
    figure: Any = scores.plot_positions()
    assert figure.data[0].text[0][1].startswith("'&lt;eos&gt;'<br>alpha")
