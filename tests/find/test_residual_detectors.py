"""The residual methods: the direction criterion by loops, the published detector by its description."""

from __future__ import annotations

import math

import pytest
import torch
from architectures import build_pair, random_rows

import sinklens as sl
from sinklens.find.lifetimes import Thresholds
from sinklens.find.residual_detectors import direction_criterion, wong_detect, wong_label, wong_level, wong_sequences
from sinklens.inputs.load import as_tokens


def states_with_sinks(layers: int = 40, length: int = 30, d: int = 16) -> torch.Tensor:
    """Ordinary tokens around a common mean; token 0 massive in layers 5 to 34, token 12 along it in 10 to 19."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(layers, length, d, generator=generator) + 0.2
    direction = torch.randn(d, generator=generator)
    states[5:35, 0] = 40 * direction
    states[10:20, 12] = 20 * direction + 0.1
    return states


def test_the_direction_criterion_equals_a_loop_over_tokens() -> None:
    states = states_with_sinks()
    reference, found = direction_criterion(states, 0, Thresholds())
    assert reference == 0
    for layer in range(40):
        x = states[layer].double()
        norms = [math.sqrt(sum(v * v for v in row.tolist())) for row in x]
        median = sorted(norms)[(len(norms) - 1) // 2]
        mu = x[[n < 3 * median for n in norms]].mean(0)
        for k in range(30):
            a, b = x[k] - mu, x[0] - mu
            cosine = float(a @ b / (a.norm() * b.norm()))
            assert bool(found[layer, k]) == (norms[k] >= 3 * median and abs(cosine) >= 0.9), (layer, k)
    assert found[:, 12].nonzero().flatten().tolist() == list(range(10, 20))
    assert found.sum() == 30 + 10


def test_without_a_primary_the_most_massive_token_gives_the_direction() -> None:
    assert direction_criterion(states_with_sinks(), None, Thresholds())[0] == 0
    flat = torch.randn(4, 30, 16, generator=torch.Generator().manual_seed(0))
    reference, found = direction_criterion(flat, None, Thresholds())
    assert reference is None
    assert not found.any()


def published_detector(states: torch.Tensor) -> dict[int, list[int]]:
    """From the description in the paper's code, with loops and plain numbers."""
    n_layers = states.shape[0]
    norm = [[float(states[layer, p].norm()) for p in (0, 1)] for layer in range(n_layers)]
    bos = 0 if sum(row[0] for row in norm) >= sum(row[1] for row in norm) else 1
    jump = [norm[i + 1][bos] - norm[i][bos] for i in range(n_layers - 1)]
    start = jump.index(max(jump)) + 1
    rest = jump[start:]
    end = rest.index(min(rest)) + start + 1
    found: dict[int, list[int]] = {bos: list(range(start, end))}
    for layer in range(start, end):
        b = states[layer, bos].double()
        for t in range(bos + 1, states.shape[1]):
            h = states[layer, t].double()
            if abs(float(h @ b / (h.norm() * b.norm()))) > 0.9:
                found.setdefault(t, []).append(layer)
    return found


def test_wong_s_detector_equals_its_description() -> None:
    states = states_with_sinks()
    found = wong_detect(states)
    assert {w.position: list(w.layers) for w in found} == published_detector(states)
    assert [(w.position, w.level, w.label) for w in found] == [(0, (5, 30), "bos_sink"), (12, (10, 10), "secondary")]
    swapped = states.clone()
    swapped[:, [0, 1]] = states[:, [1, 0]]
    assert [w.position for w in wong_detect(swapped)] == [1, 12], "the larger mean norm of positions 0 and 1 is BOS"


@pytest.mark.parametrize(
    ("lifetime", "layers", "label"),
    [(4, 36, "noise"), (5, 36, "secondary"), (20, 36, "secondary"), (21, 36, "bos_sink"), (1, 12, "bos_sink")],
)
def test_labels_follow_the_published_constants(lifetime: int, layers: int, label: str) -> None:
    assert wong_label(lifetime, layers) == label


def test_a_level_is_the_first_layer_and_the_number_of_layers_contiguous_or_not() -> None:
    assert wong_level([16, 17, 19, 30]) == (16, 4)


def test_the_last_state_is_taken_after_the_final_norm_as_transformers_returns_it() -> None:
    reference, model = build_pair("llama")
    ids = random_rows((40,))[0]
    with torch.no_grad():
        states = torch.stack([h[0] for h in reference(ids[None], output_hidden_states=True).hidden_states[1:]])
    by_hand = [(w.position, w.layers) for w in wong_detect(states)]
    assert [(w.position, w.layers) for w in wong_sequences(model, as_tokens(model, ids))[0]] == by_hand


def test_massive_tokens_that_nobody_attends_to_are_a_class_of_their_own() -> None:
    from planted import X, Y, planted_model, row

    model = planted_model(10, {X: 8.0}, {X: range(10)})

    def make_massive(residual, hook):
        direction = residual[:, 0:1].clone()
        residual[:, 0:1] += 100 * direction
        residual[:, 50:51] -= 200 * direction  # along the same line, but its key points away
        return residual

    ids = row(120, {0: X, 50: Y})
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_in", make_massive) for layer in range(10)]):
        sinks = sl.find_sinks(model, ids, method="direction")
    assert [s.position for s in sinks] == [0]
    assert [(s.position, s.attended) for s in sinks.unattended] == [(50, False)]


def test_wong_warns_where_raw_cosines_say_nothing() -> None:
    _, model = build_pair("llama")

    def anisotropic(residual, hook):
        return residual + 50

    warned = pytest.warns(sl.SinklensWarning, match="flags .* of 60 tokens")
    with model.hooks(fwd_hooks=[("blocks.0.hook_in", anisotropic)]), warned:
        sinks = sl.find_sinks(model, random_rows((60,))[0], method="wong")
    assert "these are not sinks" in sinks.notes[-1]


def test_one_call_compares_the_methods() -> None:
    from planted import X, planted_model, row

    model = planted_model(10, {X: 8.0}, {X: range(10)})
    table = sl.find.compare_methods(model, row(120, {0: X}), methods=("attention", "direction")).set_index("method")
    assert table.loc["attention", "sinks"] == 1
    assert table.loc["direction", "sinks"] == 0, "nothing is massive here"
    assert table.loc["attention", "also_by_direction"] == 0


def test_wong_sinks_are_stored_by_attention_layer_and_counted_by_block_output(monkeypatch) -> None:
    """Writer block w is read by attention in w + 1: the onset is attention's, the level the published one."""
    from planted import X, planted_model, row

    from sinklens.find.residual_detectors import WongSink

    model = planted_model(20, {X: 8.0}, {X: range(20)})
    layers = tuple(range(4, 12))
    found = [[WongSink(0, tuple(range(2, 20)), (2, 18), "bos_sink"), WongSink(30, layers, (4, 8), "secondary")]]
    monkeypatch.setattr("sinklens.find.sinks.wong_sequences", lambda *arguments: found)
    sinks = sl.find_sinks(model, row(120, {0: X}), method="wong")
    first, second = sinks
    assert (second.onset, second.end, second.residual_onset, second.lifetime) == (5, 12, 4, 8)
    assert (first.onset, first.end) == (3, 19), "the last block's output is read by no block"
    assert sinks.levels()[["onset", "lifetime"]].to_numpy().tolist() == [[2, 18], [4, 8]]


def test_one_layer_has_no_rise_and_no_fall() -> None:
    assert wong_detect(torch.ones(1, 5, 4)) == []
