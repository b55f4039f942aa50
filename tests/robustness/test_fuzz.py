"""Fuzz: 500 cases here, 10,000 by ``make torture``; each ends in a correct result or a SinklensError, and in time."""

from __future__ import annotations

import os

import fuzzing
import pytest
from counting import count
from fuzzing import CASES, SECONDS, as_users_run_it, deadline, fuzz  # noqa: F401  (a fixture)
from hypothesis import given, strategies as st
from public_calls import PUBLIC, World, call

import sinklens as sl


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    os.chdir(tmp_path_factory.mktemp("here"))  # relative paths are among the wild values
    return World(tmp_path_factory.mktemp("world"))


SHARE = max(1, CASES * 8 // 10 // len(PUBLIC))


@pytest.mark.parametrize("name", PUBLIC)
def test_wild_arguments_give_a_result_or_a_sinklens_error(world: World, name: str) -> None:
    @fuzz(SHARE)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        arguments = data.draw(fuzzing.cases(world, name))
        count("cases fuzzed", 1)
        with deadline(SECONDS):
            try:
                found = call(name, world, arguments)
            except sl.SinklensError:
                return
        fuzzing.oracle(name, arguments, found)

    run()


@pytest.mark.parametrize("bad", ["a" * 300, "a/" * 3000, "x\0y", "~nobodyhere/x", "\ud800"], ids=ascii)
def test_no_name_of_a_model_is_too_wild_for_a_clear_error(bad: str) -> None:
    with pytest.raises(sl.BadInputError, match=r"no model can be called|cannot load"):
        sl.load_model(bad)
