"""Whatever ends a function, normally, by a fault or by Ctrl-C: the model and the process are what they were."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_calls import CALLS, PUBLIC, World, call
from state import Strike, Struck, changed, model_state, process_state

import sinklens as sl

STRIKES = int(
    os.environ.get("SINKLENS_STRIKES", "1")
)  # moments at which each function is stopped; more by make torture


class Fault(Exception):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def everything(world: World) -> dict[str, Any]:
    return process_state() | {f"{name} {k}": v for name in ("model", "vision") for k, v in _of(world, name).items()}


def _of(world: World, name: str) -> dict[str, Any]:
    return model_state(getattr(world, name))


def outputs(world: World) -> list[torch.Tensor]:
    with torch.no_grad():
        return [world.model(world.tokens.ids), world.seen.alpha, sl.sink_scores(world.model, world.tokens).alpha]


def moments(count: int, name: str) -> list[int]:
    """The middle, and random others."""
    chance = random.Random(name)
    return [count // 2, *(chance.randrange(count) for _ in range(STRIKES - 1))] if count else []


def test_every_public_function_has_a_call_here() -> None:
    assert sorted(CALLS) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_function_leaves_model_and_process_as_they_were(world: World, name: str) -> None:
    arguments = CALLS[name](world)
    call(name, world, arguments)  # proofs and caches are made at the first call
    clean = outputs(world)
    before = everything(world)

    def run() -> Any:
        return call(name, world, CALLS[name](world))

    run()
    assert changed(before, everything(world)) == []
    inside = [world.model.blocks[1].mlp, world.vision.original_model.encoder.layer[1].mlp]
    watchers: list[Callable[..., Any]] = [lambda at, error, m=m: Struck(m, at, error) for m in inside]
    for watcher in [*watchers, Strike]:
        counted = watcher(None, Fault)
        counted.around(run)
        for at in moments(counted.count if isinstance(counted, Struck) else len(counted), name):
            for error in (Fault, KeyboardInterrupt):
                stopped = watcher(at, error)
                with pytest.raises((error, sl.SinklensError)) if error is Fault else pytest.raises(error):
                    stopped.around(run)
                where = list(stopped)[-3:] if isinstance(stopped, Strike) else f"forward {at}"
                assert changed(before, everything(world)) == [], f"{error.__name__} in {where}"
    assert all(torch.equal(a, b) for a, b in zip(clean, outputs(world), strict=True))
