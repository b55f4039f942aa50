"""Lives and kinds on either side of each threshold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sinklens.core.errors import BadInputError
from sinklens.find.lifetimes import Life, Thresholds, activity, kind_of, lives, main_life, strongest

T = Thresholds()


def at(pattern: str, mass: float = 0.2) -> list[Life]:
    """Lives of a position given as a string: # active, . inactive, ? undefined."""
    active = [c == "#" for c in pattern]
    masses = [math.nan if c == "?" else mass if c == "#" else 0.01 for c in pattern]
    return lives(active, masses, T)


@pytest.mark.parametrize(
    ("mass", "uniform", "expected"),
    [(0.05, 0.0, True), (0.0499, 0.0, False), (0.06, 0.02, True), (0.059, 0.02, False), (math.nan, 0.0, False)],
)
def test_activity_needs_both_the_floor_and_three_times_the_uniform_share(
    mass: float, uniform: float, expected: bool
) -> None:
    found = activity(torch.tensor([[[mass]]]), torch.tensor([[[uniform]]]), T)
    assert bool(found) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("###.......", [(0, 2, 0)]),
        ("##..##....", [(0, 5, 2)]),
        ("##...##...", [(0, 1, 0), (5, 6, 0)]),
        ("#.#.#.#.#.", [(0, 8, 4)]),
        ("..........", []),
        (".........#", [(9, 9, 0)]),
        ("##???##...", [(0, 6, 3)]),
        ("##.?.?##..", [(0, 7, 4)]),
        ("##.?..##..", [(0, 1, 0), (6, 7, 0)]),
    ],
)
def test_gaps_of_two_are_bridged_and_of_three_are_not(pattern: str, expected: list[tuple[int, int, int]]) -> None:
    assert [(life.onset, life.end, life.bridged) for life in at(pattern)] == expected


@pytest.mark.parametrize(
    ("layers", "shortest"), [(2, 1), (6, 1), (10, 1), (11, 2), (12, 2), (20, 2), (21, 3), (30, 3), (60, 6)]
)
def test_the_shortest_life_is_a_tenth_of_the_layers_rounded_up(layers: int, shortest: int) -> None:
    assert T.shortest_life(layers) == shortest
    long_enough = [i < shortest for i in range(layers)]
    too_short = [i < shortest - 1 for i in range(layers)]
    assert len(lives(long_enough, [0.2] * layers, T)) == 1
    assert lives(too_short, [0.2] * layers, T) == []


def test_mass_is_the_mean_over_the_life_with_its_bridged_layers() -> None:
    life = lives([True, False, True, False], [0.3, 0.0, 0.6, 0.9], T)[0]
    assert (life.mass_sum, life.mass) == (pytest.approx(0.9), pytest.approx(0.3))
    unknown = lives([True, False, True, False], [0.3, math.nan, 0.6, 0.9], T)[0]
    assert unknown.mass == pytest.approx(0.45)


def test_the_main_life_has_the_largest_summed_mass_not_the_longest_run() -> None:
    found = lives([True] * 4 + [False] * 3 + [True] * 2, [0.06] * 4 + [0.0] * 3 + [0.5] * 2, T)
    assert [(life.onset, life.end) for life in found] == [(0, 3), (7, 8)]
    assert main_life(found).onset == 7


@pytest.mark.parametrize(
    ("mass", "last", "expected"), [(0.1, 15, 4), (0.0999, 15, None), (0.1, 14, None), (0.5, 19, 4)]
)
def test_p_is_strong_and_active_in_the_last_quarter(mass: float, last: int, expected: int | None) -> None:
    life = Life(0, 9, 0, 10 * mass, mass)
    weaker = Life(0, 9, 0, 0.5, 0.05)
    assert strongest({4: [life], 7: [weaker]}, {4: last, 7: 19}, 20, T) == expected


def test_nothing_alive_has_no_p() -> None:
    assert strongest({}, {}, 20, T) is None


PRIMARY = Life(10, 30, 0, 5.0, 0.25)


@pytest.mark.parametrize(
    ("onset", "end", "expected"),
    [
        (12, 30, ("primary", "")),
        (13, 30, ("secondary", "late_onset")),
        (8, 30, ("primary", "")),
        (7, 30, ("secondary", "early_onset")),
        (10, 26, ("primary", "")),
        (10, 25, ("secondary", "early_end")),
        (10, 34, ("primary", "")),
        (10, 35, ("secondary", "late_end")),
        (13, 25, ("secondary", "both")),
        (7, 25, ("secondary", "early_onset+early_end")),
    ],
)
def test_a_primary_lies_within_a_twentieth_and_a_tenth_of_the_layers(onset: int, end: int, expected) -> None:
    assert kind_of(Life(onset, end, 0, 1.0, 0.1), PRIMARY, 40, T) == expected


def test_slack_is_at_least_one_layer_and_rounds_halves_up() -> None:
    assert [T.onset_slack(n) for n in (2, 6, 18, 29, 30, 50)] == [1, 1, 1, 1, 2, 3]
    assert [T.end_slack(n) for n in (2, 6, 18, 30)] == [1, 1, 2, 3]


def test_kinds_without_a_primary_and_in_shallow_models() -> None:
    assert kind_of(PRIMARY, None, 40, T) == ("secondary", "no_primary")
    assert kind_of(PRIMARY, PRIMARY, 5, T) == ("undetermined", "few_layers")
    assert kind_of(PRIMARY, PRIMARY, 6, T) == ("primary", "")


def test_where_activity_is_known_a_missing_mass_opens_a_gap() -> None:
    """The direction method judges every layer, also where far importance is undefined."""
    active, unknown = [True] + [False] * 8 + [True], [math.nan] * 10
    assert [(life.onset, life.end) for life in lives(active, unknown, T)] == [(0, 9)]
    assert [(life.onset, life.end) for life in lives(active, unknown, T, [True] * 10)] == [(0, 0), (9, 9)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("activity", math.nan), ("activity", -1.0), ("gap", -1), ("min_life", 3.0), ("late", -2.0), ("cosine", 1.5)],
)
def test_impossible_thresholds_are_refused(name: str, value: float) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(BadInputError, match=f"{name} must be"):
        Thresholds(**options)
