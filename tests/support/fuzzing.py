"""Inputs that nobody would type, for every public function: what comes out is a correct result or a SinklensError.

Each case takes the working call of ``public_calls.CALLS`` and puts one to three wild values in the place of its
arguments. What is wild for an argument follows from its name. ``oracle`` looks at what is returned.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import jaxtyping
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from public_calls import CALLS, WICKED, World, function_of
from public_methods import METHODS, given_to

import sinklens as sl

CASES = int(os.environ.get("SINKLENS_FUZZ", "500"))
SECONDS = 60  # of the processor; the slowest correct call takes two
WORDS = (
    *("", " ", "\n\t", "\x00", "a\x00b", "\U0001f9e0\U0001fae0", "\u05e9\u05dc\u05d5\u05dd", "\u202eabc"),
    *("\ud800", "e\u0301" * 9, "<bos>", "a<bos>b<eos>", "<pad><pad>", "x" * 100_000, "a", "ab", *WICKED),
)  # empty, blank, null bytes, emoji, right to left, a lone surrogate, combining marks, special tokens, long
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=40))
NUMBERS = st.sampled_from([-(10**12), -7, -1, 0, 1, 2, 3, 5, 7, 60, 10**6, 2**63, 2**70])
FLOATS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 0.5, 1.0, 1e300]), st.floats(), NUMBERS
)
KINDS = st.sampled_from([None, True, "", "x", b"x", 1.5, (), {}, object(), [None], [[]], np.int64(1), {"a": 1}])
INTEGERS = st.one_of(NUMBERS, KINDS)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Ids of odd shapes, dtypes, devices and ranges."""
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 0), (0, 4), (1, 1), (2, 5), (2, 2, 3), (1, 300)]))
    kind = draw(st.sampled_from(["int64", "int32", "int8", "uint8", "float32", "bool", "complex64", "float16"]))
    low, high = draw(st.sampled_from([(0, 100), (-5, 5), (0, 10**6), (260, 300)]))
    wide = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    found = wide.to(getattr(torch, kind))
    return found.to("meta") if draw(st.integers(0, 9)) == 0 else found


def tokens(world: World) -> st.SearchStrategy[Any]:
    """Whatever a user might pass as tokens."""
    batch = world.tokens
    holes = torch.ones_like(batch.mask)
    holes[:, 3] = False
    made = [
        sl.Tokens(batch.ids, holes, batch.labels, batch.sources, batch.documents, batch.special),
        sl.Tokens(batch.ids, ~holes & False, batch.labels, batch.sources, batch.documents, batch.special),
        sl.Tokens(batch.ids + 10**6, batch.mask, batch.labels, batch.sources, batch.documents, batch.special),
        sl.Tokens(batch.ids.float(), batch.mask, batch.labels, batch.sources, batch.documents, batch.special),
        sl.Tokens(batch.ids[:, :9], batch.mask, batch.labels, batch.sources, batch.documents, batch.special),
        batch.pad("left", 3), batch.pad("right", 2), batch.first(1), batch.first(2), world.images,
    ]  # fmt: skip
    return st.one_of(TEXTS, st.lists(TEXTS, max_size=3), tensors(), st.sampled_from(made), KINDS)


def places(world: World) -> st.SearchStrategy[Any]:
    """Sinks: positions, predicates, maps."""
    wrong = [
        lambda ids: ids,
        lambda ids: ids[:, :1] > 0,
        lambda ids: torch.zeros_like(ids, dtype=torch.bool),
        lambda ids: torch.ones_like(ids, dtype=torch.bool),
        lambda ids: None,
        "learned", ["learned"], [0, "learned"], "x", world.sinks, world.sinks.primary, torch.tensor([0]), [0.5],
    ]  # fmt: skip
    return st.one_of(st.sampled_from(wrong), st.lists(NUMBERS, max_size=3), NUMBERS, KINDS)


PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3)
MODES = st.sampled_from(
    ["renormalize", "zero", "value_only", "scale", "mean_value", "fixed_key", "fixed_logit", "null", "move", "uniform",
     "massive_zero", "massive_mean", "project", "rescale", "off-by-one", "learned-logit", "clipped", "attention",
     "wong", "direction", "layer", "head", "dose", "noise", "mlp", "", "Zero", "random", "recent", "primary",
     "secondary", "hooks",
     "flash", "auto", "mean", "bias", "zero_vector", "probabilities", "scores", "any", "same_id", "../x"]
)  # fmt: skip
PATHS = st.sampled_from(["", "/dev/null/x", "../x", "a\x00b", "x" * 5000, "no/such/file", ".", "~"])


def wild(name: str, world: World) -> st.SearchStrategy[Any]:
    """What is wild for an argument of this name."""
    if name in ("tokens", "text", "reference"):
        return tokens(world)
    if name in ("sinks",):
        return places(world)
    if name in ("layers", "heads", "positions", "columns", "lengths", "recent", "first", "top", "sizes", "spared"):
        return st.one_of(st.lists(NUMBERS, max_size=3), PAIRS, NUMBERS, KINDS)
    if name in ("pairs", "swaps"):
        return st.one_of(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=3), PAIRS, KINDS)
    if name in ("hooks", "conditions", "interventions"):
        bad = [[("nowhere", lambda x, hook: x)], [1], ["x"], [()],
               [("blocks.0.hook_out", None)], {"a": [("blocks.9.hook_out", lambda x, hook: x)]}, {"": []}, {1: []},
               [("blocks.0.hook_out", lambda x, hook: x * math.nan)], {"base": world.hooks}, world.hooks, {},
               {"a": world.hooks, "b": sl.ablate_sinks(world.model, [50])}]  # fmt: skip
        return st.one_of(st.sampled_from(bad), KINDS)
    if name in ("model",):
        return st.one_of(st.sampled_from([world.vision, world.model.original_model, torch.nn.Linear(2, 2)]), KINDS)
    if name in ("source", "sources", "documents", "models", "texts", "study", "jobs"):
        more = st.sampled_from([["x"], [1], [b"\xff"], {"source": "nowhere"}, {"texts": ["a"]}, "repeat", "random"])
        return st.one_of(TEXTS, st.lists(TEXTS, max_size=3), PATHS, more, KINDS, tensors())
    if name in ("out", "path", "folder", "name", "runs"):
        return st.one_of(PATHS.map(lambda p: p if p in ("", "/dev/null/x", "a\x00b") else str(world.folder / p)), KINDS)
    if name in ("ids", "changes", "index", "values"):
        slices = st.builds(slice, NUMBERS | st.none(), NUMBERS | st.none(), NUMBERS | st.none())
        return st.one_of(tensors(), slices, st.lists(FLOATS, max_size=3), st.lists(NUMBERS, max_size=3), NUMBERS, KINDS)
    if name in ("parts",):
        return st.one_of(st.lists(st.sampled_from([world.scores, world.tokens, world.images, world.short])), KINDS)
    if name in ("trace", "scores", "found", "experiment", "registers", "anatomy", "images", "planted", "neurons",
                "config"):  # fmt: skip
        return st.one_of(st.sampled_from([world.scores, world.sinks, world.trace, world.tokens, world.seen]), KINDS)
    return st.one_of(INTEGERS, FLOATS, MODES, TEXTS, st.lists(MODES, max_size=2), st.lists(FLOATS, max_size=2))


@st.composite
def cases(draw: st.DrawFn, world: World, name: str) -> dict[str, Any]:
    """The arguments of one call: the working ones with up to three wild ones."""
    given = CALLS[name](world)
    left = ("progress", "options", *LEFT.get(name, ()))
    known = [p for p in inspect.signature(function_of(name)).parameters.values() if p.name not in left]
    for parameter in draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True)) if known else []:
        value = draw(wild(parameter.name, world))
        given[parameter.name] = (value,) if parameter.kind is parameter.VAR_POSITIONAL else value
    return given


@st.composite
def method_cases(draw: st.DrawFn, world: World, name: str) -> dict[str, Any]:
    """The arguments of one call of a method: the working ones with up to three wild ones."""
    given, known = given_to(name, world), [p for p in METHODS[name] if p.kind is not p.VAR_KEYWORD]
    for parameter in draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True)) if known else []:
        given[parameter.name] = draw(wild(parameter.name, world))
    return given


# What is not made wild here: arguments that decide how long a correct call takes, or that reach another program.
LEFT: dict[str, tuple[str, ...]] = {
    "sweep.run_sweep": ("executor", "workers", "threads"),
    "lab.write_tokens": ("tokenizer",),
    "find.compare_contexts": ("n_seqs",),
    "mixing.perturbation_spread": ("n_swaps",),
    "compare_mixing": ("probes",),
    "measure_mixing": ("probes",),
    "heads.reading_heads": ("permutations",),
    "load_tokens": ("n_seqs",),
    "trace.plant_sinks": ("n_random",),
    "trace.writer_neurons": ("n_random",),
    "trace.writer_subspace": ("n_random",),
    "load_images": ("size",),
    "load_model": ("device_map", "max_memory", "offload_folder"),
}


def oracle(name: str, given: dict[str, Any], found: Any) -> None:
    """What must hold of any result, whatever went in."""
    if isinstance(found, sl.Tokens):
        lengths = found.lengths
        assert int(lengths.min()) >= 2
        assert [len(row) for row in found.labels] == lengths.tolist()
        assert found.ids.shape == found.mask.shape == found.special.shape
    if isinstance(found, sl.SinkScores):
        known = found.alpha[~found.alpha.isnan()]
        assert known.numel()
        assert float(known.min()) >= 0
        assert float(known.max()) <= 1 + 1e-5
    if isinstance(found, sl.SinkMap):
        assert all(0 <= s.onset <= s.end < found.n_layers and not s.mass < 0 for s in found)  # NaN: no query is far
    if name == "token_loss" and isinstance(found, torch.Tensor):
        assert float(found[~found.isnan()].min()) >= 0 or not isinstance(given.get("hooks"), sl.ablate.Hooks)
    if isinstance(found, sl.ablate.Hooks):
        assert len(found)
    if isinstance(found, dict) and name.rpartition(".")[2].startswith("write_"):
        assert all(Path(p).stat().st_size for p in found.values())


def method_oracle(name: str, given: dict[str, Any], found: Any) -> None:
    """What must hold of whatever a method returns."""
    method = name.rpartition(".")[2]
    if method == "sink_rate":
        assert 0 <= found <= 1 or math.isnan(found)
    if method.endswith("slack"):
        assert found >= 0
    if method in ("where", "cut"):
        assert all(0 <= sink.sequence < len(found.tokens) for sink in found)
    if method == "save":
        assert Path(given["path" if "path" in given else "folder"]).stat().st_size
    if name == "inputs.NamedTokens.__call__":
        assert found.shape == given["ids"].shape
    elif isinstance(found, torch.Tensor):
        assert found.numel()
    if isinstance(found, go.Figure):
        assert len(cast(Any, found.data))
    if isinstance(found, sl.Tokens):
        assert found.ids.shape == found.mask.shape == found.special.shape
        assert [len(row) for row in found.labels] == found.lengths.tolist()
        assert len(found) == len(found.sources) == len(found.documents) > 0
    if method in ("sink_rate_interval", "interval") and isinstance(found, tuple):
        low, high = (torch.as_tensor(end) for end in found)
        assert bool((low <= high).all())


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
