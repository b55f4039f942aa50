"""Results and progress in notebooks: short escaped tables, a bar that leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from architectures import build_pair, random_rows
from nbclient import NotebookClient
from planted import X, Y, planted_model, row
from public_names import CLASSES, named

import sinklens as sl
from sinklens.experiment.ablation_sweep_result import Sweep
from sinklens.show.notebook import SHOWN_ROWS, ShownInJupyter, html_view
from sinklens.streaming import eviction_study, streaming_loss

NASTY = '</script><b onclick="x">$'
ALLOWED = {"div", "strong", "table", "thead", "tbody", "tr", "th", "td", "code"}


class Tags(HTMLParser):
    """The tags of a piece of HTML, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def nasty(tokens: sl.Tokens) -> sl.Tokens:
    """The same ids, every token's text a piece of a page, and every source's too."""
    labels = tuple((NASTY,) * len(row) for row in tokens.labels)
    return replace(tokens, labels=labels, sources=tuple(NASTY for _ in tokens.sources))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """One result of each kind that a planted model gives, over tokens with a nasty text."""
    model = planted_model(8, {X: 6.0, Y: 5.0}, {X: range(8), Y: range(2, 5)}, writes=0.02)
    rows = torch.stack([row(120, {0: X, 30: Y}), row(120, {0: X, 50: Y})])
    tokens = nasty(sl.find_sinks(model, rows).tokens)
    sinks = sl.find_sinks(model, tokens)
    scores, edit = sl.sink_scores(model, tokens), sl.ablate_sinks(model, sinks, "zero")
    parts = sl.decompose_sinks(model, tokens, sinks, effects=("all",), most_scored=8)
    llama = build_pair("llama")[1]
    ids = nasty(sl.sink_scores(llama, torch.stack(random_rows((70, 70)))).tokens)
    few, without = ids[0].first(12), {NASTY: sl.ablate_sinks(llama, [0])}
    rule = pd.DataFrame([{"quantity": NASTY, "mean": 1.0, "low": 0.5, "high": 2.0, "n": 3}])
    assert parts.claims is not None
    found = [
        scores, tokens, sinks, sinks.sinks[0], edit, parts, parts.subjects[0], parts.claims, parts.effects["all"],
        sl.run_experiment(model, tokens, {NASTY: edit}, controls=("random",)), sl.models.capabilities(model),
        sl.find.Thresholds(),
        sl.sweep_ablation(model, tokens, [0], "zero", over="layer"), sl.heads.attention_statistics(model, tokens, [0]),
        sl.sink_anatomy(model, sinks), sl.trace_sinks(model, tokens, sinks, causal=False),
        sl.mixing.perturbation_spread(llama, few, sinks=[0], n_swaps=2),
        sl.compare_mixing(llama, few, without, sinks=[0], probes=2),
        sl.measure_mixing(llama, few, sinks=[0], probes=2), sl.mixing.path_sums(llama, few, sinks=[0]),
        sl.mixing.measure_collapse(llama, few, without, sinks=[0]),
        sl.experiment.bos_variants(llama, ids), streaming_loss(llama, ids, sinks=1, recent=8),
        eviction_study(llama, ids, recent=(8,)), sl.inputs.NamedTokens((1,), (NASTY,)),
        sl.trace.Verdict(NASTY, NASTY, None, rule, pd.DataFrame(), NASTY),
    ]  # fmt: skip
    return {type(one).__name__: one for one in found}


KINDS = [
    "SinkScores", "Tokens", "SinkMap", "Sink", "Hooks", "SinkDecomposition", "Subject", "Claims", "TwoByTwo",
    "Experiment", "Capabilities", "Thresholds", "Sweep", "AttentionStatistics", "Anatomy", "SinkTrace", "Perturbation",
    "MixingComparison", "Mixing", "PathSums", "Collapse", "BosVariants", "StreamingLoss", "EvictionStudy",
    "NamedTokens", "Verdict",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_shows_a_short_table_in_which_everything_is_escaped(results: dict[str, Any], kind: str) -> None:
    html = results[kind]._repr_html_()
    seen = Tags(html)
    assert set(seen.tags) <= ALLOWED, "a token's text became a tag"
    assert seen.tags.count("table") == 1
    assert 2 <= seen.tags.count("tr") <= SHOWN_ROWS + 1
    assert len(html) < 30_000
    assert "mathjax_ignore" in html
    assert len(repr(results[kind])) < 10_000, "and the terminal gets no tensors either"


@pytest.mark.parametrize("kind", ["SinkScores", "Tokens", "SinkMap", "Experiment", "Verdict", "SinkTrace"])
def test_the_text_of_a_token_can_be_read_as_it_is(results: dict[str, Any], kind: str) -> None:
    assert NASTY in Tags(results[kind]._repr_html_()).text


def test_every_public_result_shows_itself() -> None:
    tables = ("to_dataframe", "head_table")
    for one in map(named, CLASSES):
        if any(hasattr(one, table) for table in tables):
            assert issubclass(one, ShownInJupyter), one
            assert callable(getattr(one, one._table)), one
    assert issubclass(Sweep, ShownInJupyter)


def test_a_long_table_says_how_many_rows_are_left_out() -> None:
    html = html_view("a < b", pd.DataFrame({"n": range(25), "empty": [None] * 25}), "to_dataframe", ["x & y"])
    seen = Tags(html)
    assert "and 15 more rows: .to_dataframe() has them all" in seen.text
    assert "a < b" in seen.text
    assert "note: x & y" in seen.text
    assert "empty" not in seen.text


def test_an_empty_table_is_a_line() -> None:
    assert "table" not in Tags(html_view("nothing found", pd.DataFrame({"n": []}))).tags


CELLS = (
    "import time\nfrom sinklens.show.progress import progress_bar",
    "with progress_bar('<layers>', 3) as advance:\n    for _ in range(3):\n        time.sleep(0.3)\n        advance()",
    "try:\n    with progress_bar('again', 2) as advance:\n        raise ValueError\nexcept ValueError:\n    pass",
    "with progress_bar('silent', 2, False) as advance:\n    advance()",
)


def test_a_bar_fills_in_a_notebook_and_leaves_nothing(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    seen: list[dict[str, Any]] = []

    class Watched(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in ("display_data", "update_display_data"):
                seen.append(msg["content"]["data"])
            return super().process_message(msg, cell, cell_index)

    Watched(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    drawn = [data["text/html"] for data in seen]
    assert [html.split("value=")[1].split(" max")[0] for html in drawn if "value=" in html][:4] == [
        '"0"', '"1"', '"2"', '"3"'
    ]  # fmt: skip
    assert "&lt;layers&gt;: 3 of 3" in drawn[3]
    left = [output["data"]["text/html"] for cell in notebook.cells for output in cell.get("outputs", [])]
    assert left == ["", ""], "both bars are gone, the second by an error; the silent one was never there"
