"""Whatever ends a function, normally, by a fault or by Ctrl-C: the model and the process are what they were."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import count
from jaxtyping import TypeCheckError
from public_calls import CALLS, PUBLIC, World, call
from state import Strike, Struck, changed, model_state, process_state

import sinklens as sl
from sinklens import streaming
from sinklens.attention.unbridged import watching
from sinklens.bridge.torch_globals import own_generator

STRIKES = int(
    os.environ.get("SINKLENS_STRIKES", "1")
)  # moments at which each function is stopped; more by make torture


class Fault(Exception):
    pass


OURS = (sl.SinklensError, TypeCheckError)  # a fault may fall into the type checks of these tests


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
                with pytest.raises((error, *OURS)) if error is Fault else pytest.raises(error):
                    stopped.around(run)
                count("interruptions survived", 1)
                where = list(stopped)[-3:] if isinstance(stopped, Strike) else f"forward {at}"
                assert changed(before, everything(world)) == [], f"{error.__name__} in {where}"
    assert all(torch.equal(a, b) for a, b in zip(clean, outputs(world), strict=True))


def test_two_models_in_two_threads_give_what_each_gives_alone(world: World, tmp_path: Path) -> None:
    other = World(tmp_path, seed=1)
    worlds = [world, other]
    alone = [numbers(w) for w in worlds]
    before = process_state()
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(numbers, worlds * 3))
    assert all(equal(found, alone[i % 2]) for i, found in enumerate(together))
    assert changed(before, process_state()) == []


def test_threads_take_turns_on_one_model(world: World) -> None:
    alone, before = numbers(world), everything(world)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(numbers, [world] * 6))
    assert all(equal(found, alone) for found in together)
    assert changed(before, everything(world)) == []


def test_a_function_waits_while_another_thread_holds_a_context_of_its_model(world: World) -> None:
    clean = sl.token_loss(world.model, world.tokens)
    with ThreadPoolExecutor(1) as pool:
        with streaming.streaming_attention(world.model, sinks=1, recent=4):
            waiting = pool.submit(sl.token_loss, world.model, world.tokens)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
        assert torch.equal(waiting.result(timeout=60).nan_to_num(), clean.nan_to_num())


@pytest.mark.parametrize("what", ["flash", "plain flash", "streaming", "watching"])
def test_a_context_may_be_stopped_at_any_call_of_its_beginning_and_end(world: World, what: str) -> None:
    def run() -> None:
        context: Any = {
            "flash": lambda: sl.flash(world.model),
            "plain flash": lambda: sl.flash(world.vision),
            "streaming": lambda: streaming.streaming_attention(world.model, sinks=1, recent=4),
            "watching": lambda: watching(world.vision.layers, lambda *_: None),
        }[what]()
        with context:
            pass

    assert everything(world)  # makes both models, which draws weights
    run()  # proven at the first time
    before, counted = everything(world), Strike()
    counted.around(run)
    assert counted
    for at in range(len(counted)):
        for error in (Fault, KeyboardInterrupt):
            stopped = Strike(at, error)
            with pytest.raises((error, *OURS) if error is Fault else error):
                stopped.around(run)
            assert changed(before, everything(world)) == [], f"{error.__name__} in {stopped[-3:]}"


def test_threads_take_turns_at_the_global_generator() -> None:
    def drawn() -> torch.Tensor:
        with own_generator(2):
            return torch.randn(3)

    alone, before = drawn(), torch.get_rng_state()
    with ThreadPoolExecutor(1) as pool:
        with own_generator(1):
            waiting = pool.submit(drawn)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert torch.equal(waiting.result(timeout=60), alone)
    assert torch.equal(torch.get_rng_state(), before)


def test_nested_contexts_end_in_any_depth(world: World) -> None:
    before = everything(world)
    with sl.flash(world.model):
        with pytest.raises(Fault), sl.flash(world.model), sl.flash(world.model):
            raise Fault
        with sl.flash(world.vision):
            sl.sink_scores(world.model, world.tokens)
    assert changed(before, everything(world)) == []


def numbers(world: World) -> list[torch.Tensor]:
    """Scores by both backends, an edit's losses, Jacobians of both modes with an untrained twin, a bound's gains."""
    model, tokens = world.model, world.tokens
    found = [sl.sink_scores(model, tokens, backend=backend).alpha for backend in ("hooks", "flash")]
    edit = sl.ablate_sinks(model, [0])
    found.append(sl.token_loss(model, tokens, hooks=edit))
    few, options = tokens.ids[:1, :6], {"sinks": [0], "progress": False}
    mixing = sl.compare_mixing(model, few, {"edit": edit}, probes=2, twin=True, **options)
    found += [one.maps[0] for one in mixing.conditions.values()]
    found.append(sl.measure_mixing(model, few, probes=2, route="reverse", **options).maps[0])
    found += sl.mixing.path_sums(model, few, **options).bounds
    return found


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, theirs, strict=True))
