"""Methods of the results: wild arguments end in a correct result or a SinklensError, and in time."""

from __future__ import annotations

import os

import fuzzing
import jaxtyping
import pytest
from counting import count
from fuzzing import CASES, SECONDS, as_users_run_it, deadline, fuzz  # noqa: F401  (a fixture)
from hypothesis import given, strategies as st
from public_calls import World
from public_methods import GIVEN, METHODS, OBJECTS, call_method, given_to

import sinklens as sl

SHARE = max(3, CASES * 3 // 10 // len(METHODS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    before = jaxtyping.config.jaxtyping_disable
    os.chdir(tmp_path_factory.mktemp("here"))  # relative paths are among the wild values
    made = World(tmp_path_factory.mktemp("world"))
    for owner in OBJECTS:
        OBJECTS[owner](made)
    jaxtyping.config.update("jaxtyping_disable", before)
    return made


@pytest.mark.parametrize("name", METHODS)
def test_wild_arguments_of_a_method_give_a_result_or_a_sinklens_error(world: World, name: str) -> None:
    @fuzz(SHARE)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        arguments = data.draw(fuzzing.method_cases(world, name))
        count("cases fuzzed", 1)
        with deadline(SECONDS):
            try:
                found = call_method(name, world, arguments)
            except sl.SinklensError:
                return
        fuzzing.method_oracle(name, arguments, found)

    run()


@pytest.mark.parametrize("name", METHODS)
def test_the_call_that_is_made_wild_works(world: World, name: str) -> None:
    if name in ("SinkScores.plot_image", "trace.SinkTrace.plot_doses"):
        with pytest.raises(sl.BadInputError, match="these scores are of texts|this trace holds no doses"):
            call_method(name, world, given_to(name, world))
    else:
        given = given_to(name, world)
        fuzzing.method_oracle(name, given, call_method(name, world, given))


def test_every_class_with_such_methods_has_an_object_here() -> None:
    assert {name.rpartition(".")[0] for name in METHODS} == set(OBJECTS)
    assert set(GIVEN) <= set(METHODS)
