"""Pictures of attention: the right numbers, in the right cells, escaped, offline, refused where there is nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build_pair, random_rows
from naive import eager_patterns
from planted import X, planted_model, row
from wording import model_with

import sinklens as sl


def cells(figure: Any, trace: int = 0) -> torch.Tensor:
    rows = figure.data[trace].z
    return torch.tensor([[float("nan") if v is None else v for v in line] for line in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_the_map_shows_the_head_that_it_names_and_blanks_what_a_query_may_not_see(name: str) -> None:
    reference, model = build_pair(name)
    ids = random_rows((60,))[0]
    figure = sl.attention_map(model, ids, layer=1, head=2)
    shown = cells(figure)
    expected = eager_patterns(reference, ids)[1][2]
    facts = sl.models.capabilities(model)
    for i in range(60):
        for k in range(60):
            window = facts.windows[1]
            visible = (k <= i or not facts.causal) and (window is None or i - k < window)
            assert shown[i, k].isnan() != visible
    torch.testing.assert_close(shown.nan_to_num(0), expected, atol=1e-6, rtol=0)
    title = figure.layout.title.text
    assert "layer 1, head 2" in title
    assert "attention probabilities" in title


def test_logits_are_the_scores_whose_softmax_is_the_pattern() -> None:
    _, model = build_pair("llama")
    ids = random_rows((20,))[0]
    logits = cells(sl.attention_map(model, ids, layer=0, head=1, kind="logits"))
    probabilities = cells(sl.attention_map(model, ids, layer=0, head=1))
    torch.testing.assert_close(
        logits.nan_to_num(-torch.inf).softmax(-1), probabilities.nan_to_num(0), atol=1e-6, rtol=0
    )
    assert "attention logits" in sl.attention_map(model, ids, layer=0, head=1, kind="logits").layout.title.text


def test_the_grid_has_a_map_per_layer_in_order() -> None:
    _, model = build_pair("gemma3")
    ids = random_rows((20,))[0]
    grid = sl.heads.attention_grid(model, ids, head=3)
    assert [a.text for a in grid.layout.annotations] == ["layer 0", "layer 1", "layer 2"]
    for layer in range(3):
        single = sl.attention_map(model, ids, layer=layer, head=3)
        assert torch.equal(cells(grid, layer).nan_to_num(-1), cells(single).nan_to_num(-1))
    single_layer: Any = sl.heads.attention_grid(model, ids, layers=[2])
    assert len(single_layer.data) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2, "head": 0}, "has layers 0 to 1"),
        ({"layer": 0, "head": 4}, "head 4 is out of range"),
        ({"layer": 0, "head": -1}, "head -1 is out of range"),
        ({"layer": 0, "head": 0, "kind": "raw"}, "kind must be one of"),
        ({"layer": 0, "head": 0, "sequence": 1}, "sequence 1 is out of range"),
    ],
)
def test_wrong_choices_are_refused(options: dict[str, Any], message: str) -> None:
    _, model = build_pair("llama")
    with pytest.raises(sl.BadInputError, match=message):
        sl.attention_map(model, random_rows((20,))[0], **options)


def test_long_texts_are_refused_rather_than_drawn_for_minutes() -> None:
    _, model = build_pair("llama")
    with pytest.raises(sl.BadInputError, match="draws up to 64 tokens"):
        sl.heads.attention_grid(model, random_rows((65,))[0])
    with pytest.raises(sl.BadInputError, match="draws up to 128 tokens"):
        sl.attention_map(model, random_rows((129,))[0], layer=0, head=0)
    sinks = sl.find_sinks(planted_model(6, {X: 8.0}, {X: range(6)}), row(129, {0: X}))
    with pytest.raises(sl.BadInputError, match="draws up to 128 tokens"):
        sinks.token_view()


def test_token_labels_are_escaped_in_figures() -> None:
    model = model_with(adds_bos=False)
    figure = sl.attention_map(model, "the <eos> cat", layer=0, head=0)
    assert list(figure.layout.xaxis.ticktext) == ["the", "&lt;eos&gt;", "cat"]


def test_the_token_view_is_offline_and_escapes_markup(tmp_path: Path) -> None:
    from dataclasses import replace

    sinks = sl.find_sinks(planted_model(6, {X: 8.0}, {X: range(6)}), row(60, {0: X}))
    labels = list(sinks.tokens.labels[0])
    labels[5] = "</script><script>alert(1)"
    labels[6] = "\n"
    view = replace(sinks, tokens=replace(sinks.tokens, labels=(tuple(labels),))).token_view()
    page = view.save(tmp_path / "view.html").read_text()
    assert page.count("</script>") == 1, "the view's own script ends once"
    assert "alert(1)" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="', page)
    assert "NaN" not in page.rsplit("CircuitsVis.render(", 1)[1]
    assert page.rsplit("CircuitsVis.render(", 1)[1].count('"layer ') == 6
    assert view._repr_html_() in page


def test_the_timeline_has_a_row_per_sink_and_colours_only_its_life() -> None:
    model = planted_model(20, {X: 8.0}, {X: [*range(2, 6), *range(10, 20)]})
    sinks = sl.find_sinks(model, row(120, {0: X}))
    figure: Any = sinks.plot()
    drawn = cells(figure)[0]
    assert drawn.isnan().tolist() == [not (2 <= i < 6 or i >= 10) for i in range(20)]
    assert float(drawn[12]) == pytest.approx(sinks.sinks[0].masses[12])
    assert "primary" in figure.data[0].text[0][12]
    curves: Any = sinks.plot_sweep()
    assert [trace.name for trace in curves.data] == ["sinks", "primary", "secondary"]
    anatomy: Any = sl.sink_anatomy(model, sinks).plot()
    assert len(anatomy.data) == 4
