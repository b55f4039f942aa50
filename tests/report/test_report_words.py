"""What a report says about a number: a direction only where the whole interval lies on one side of zero."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from kaleido.errors import KaleidoError
from reporting import SMALL, planted, texts

import sinklens as sl
from sinklens.experiment.result import Run
from sinklens.report import export as exporting, story
from sinklens.report.content import Plot
from sinklens.report.stages import Material
from sinklens.report.wording import against, between, change, listed, number, sample_only, side, times

NAN = math.nan
SAME = "the loss does not change by an amount that can be told from zero"


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.31, 0.2, 0.4, "the loss rises by 0.310 nats [0.200, 0.400]"),
        (-0.31, -0.4, -0.2, "the loss falls by 0.310 nats [0.200, 0.400]"),
        (0.01, -0.02, 0.04, f"{SAME} (+0.010 nats [-0.020, 0.040])"),
        (0.01, 0.0, 0.04, f"{SAME} (+0.010 nats [0.000, 0.040])"),
        (0.31, NAN, NAN, "the loss is 0.310 nats higher in this sample (no interval)"),
        (-0.31, NAN, NAN, "the loss is 0.310 nats lower in this sample (no interval)"),
        (NAN, NAN, NAN, "the loss was not measured here"),
    ],
)  # fmt: skip
def test_a_change_is_worded_by_its_interval(value: float, low: float, high: float, said: str) -> None:
    assert change("the loss", value, low, high, "nats") == said


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.2, 0.1, 0.3, "0.200 nats [0.100, 0.300] above the control"),
        (-0.2, -0.3, -0.1, "0.200 nats [0.100, 0.300] below the control"),
        (0.2, -0.1, 0.5, "not to be told from the control (difference +0.200 nats [-0.100, 0.500])"),
        (0.2, NAN, NAN, "0.200 nats above the control (no interval)"),
        (NAN, NAN, NAN, "the control could not be tried in these texts"),
    ],
)
def test_a_comparison_is_worded_by_its_interval(value: float, low: float, high: float, said: str) -> None:
    assert against("the control", value, low, high, "nats") == said


def test_a_factor_is_worded_by_the_interval_of_its_logarithm() -> None:
    two = math.log(2)
    assert (
        times(
            "mix",
            two,
            math.log(1.5),
            math.log(3),
        )
        == "mix rises to 2.00 times [1.50, 3.00]"
    )
    assert times("mix", -two, -math.log(3), -math.log(1.5)) == "mix falls to 0.50 times [0.33, 0.67]"
    assert times("mix", 0.1, -0.1, 0.3).startswith("mix does not change by a factor that can be told from 1")
    assert times("mix", two, NAN, NAN) == "mix is 2.00 times as large in this sample (no interval)"
    assert "cannot be compared" in times("mix", NAN, NAN, NAN)


def test_numbers_keep_two_digits_where_they_are_small() -> None:
    assert [number(v) for v in (1.23456, 0.0123, 0.00123, -0.00123, 0.0, NAN)] == [
        "1.235", "0.012", "0.0012", "-0.0012", "0.000", "not defined",
    ]  # fmt: skip
    assert between(NAN, 1.0) == ""
    assert [side(-1.0, 1.0), side(0.1, 1.0), side(-1.0, -0.1), side(0.0, 1.0), side(NAN, NAN)] == [0, 1, -1, 0, None]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert sample_only(16) == ""
    assert "With 3 documents there are no intervals (they need 16)" in sample_only(3)


def effect(model: Any, tokens: sl.Tokens, shift: float, spread: float) -> Material:
    """A finished experiment in which removing the primaries changes a document's loss by shift plus or minus spread."""
    found = sl.find_sinks(model, tokens)
    signs = torch.tensor([1.0, -1.0]).repeat(len(tokens))[: len(tokens)]
    base = torch.full((len(tokens), int(tokens.lengths.max())), 3.0)
    edited = base + (shift + spread * signs)[:, None]
    runs = (Run("base", ""), Run("primary sinks, renormalize", ""), Run("primary sinks, renormalize", "random"))
    experiment = sl.experiment.Experiment(
        runs, {"loss": torch.stack([base, edited, base])}, (), tokens, info=found.info
    )
    return Material(model, tokens, SMALL, 0, False, {"sinks": found, "experiment": experiment})


@pytest.mark.parametrize(
    ("shift", "words"),
    [(0.5, "the loss rises by 0.500"), (-0.5, "the loss falls by 0.500"), (0.0, "cannot be told" )],
)  # fmt: skip
def test_the_story_claims_a_direction_on_either_side_of_zero_and_none_at_zero(shift: float, words: str) -> None:
    model = planted()
    told = story.breaks(effect(model, texts(model, 16), shift, 0.1))
    assert len(told) == 1
    if shift:
        assert words in told[0]
        assert ("above" if shift > 0 else "below") + " the same edit at random ordinary tokens" in told[0]
    else:
        assert "does not change by an amount that can be told from zero" in told[0]
        assert "not to be told from the same edit at random ordinary tokens" in told[0]
        for claim in ("rises", "falls", "raises", "lowers", "above", "below"):
            assert claim not in told[0]


def test_the_story_of_few_documents_claims_nothing() -> None:
    model = planted()
    told = story.breaks(effect(model, texts(model, 3), 0.5, 0.1))
    assert "in this sample (no interval)" in told[0]
    assert "rises" not in told[0]


def test_a_figure_that_kaleido_cannot_draw_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise KaleidoError(525, "plotly.js error")

    monkeypatch.setattr(exporting, "_draw", fails)
    monkeypatch.setattr(exporting, "can_draw", lambda: True)
    monkeypatch.setattr(exporting, "_one_browser", lambda wanted: contextlib.nullcontext())
    files, why = exporting.export([Plot("one", go.Figure(), "", "")], tmp_path, tmp_path / "figures.json")
    assert files == []
    assert "plotly.js error" in why


def test_an_effect_of_exactly_zero_without_an_interval_has_no_direction() -> None:
    nan = math.nan
    assert change("the loss", 0.0, nan, nan, "nats") == "the loss is the same in this sample (no interval)"
    assert against("a control", 0.0, nan, nan, "nats") == "just that of a control (no interval)"
