"""Fuzz: 500 cases here, 10,000 by ``make torture``; each ends in a correct result or a SinklensError, and in time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fuzzing
import jaxtyping
import pytest
from counting import count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_calls import PUBLIC, World, call

import sinklens as sl

CASES = int(os.environ.get("SINKLENS_FUZZ", "500"))
SECONDS = 60  # of the processor; the slowest correct call takes two


class Hang(BaseException):
    """Not an Exception, so that no code under test takes it for a fault."""


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise in the middle of whatever computes longer, or waits ten times as long."""

    def ring(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds} s")

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds)}
    before = {number: signal.signal(number, ring) for number in clocks}
    for clock, most in clocks.values():
        signal.setitimer(clock, most)
    try:
        yield
    finally:
        for clock, _ in clocks.values():
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def fuzz(cases: int) -> Any:
    """So many cases, the same ones in every run of CI; torture draws new ones."""
    return settings(
        max_examples=cases, deadline=None, database=None, derandomize=CASES <= 500,
        suppress_health_check=[*HealthCheck.__members__.values()], print_blob=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """Without the type checks of the other tests, which users do not have: the package must refuse by itself."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


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
