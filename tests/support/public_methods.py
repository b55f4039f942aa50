"""One call of every method with arguments of the public classes: what the fuzz of methods makes wild.

``OBJECTS[class]`` gives an object of the tiny world, ``GIVEN["Class.method"]`` the arguments that a method needs; a
new method is found by :data:`METHODS` and fails ``tests/robustness/test_fuzz_methods.py`` until its arguments are here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from public_calls import Arguments, World

import sinklens as sl
from sinklens import lab, streaming, sweep

OBJECTS: dict[str, Callable[[World], Any]] = {
    "Anatomy": lambda w: w.result("sink_anatomy"),
    "AttentionStatistics": lambda w: w.result("attention_statistics"),
    "BosVariants": lambda w: w.result("bos_variants"),
    "Collapse": lambda w: w.result("measure_collapse"),
    "Experiment": lambda w: w.result("run_experiment"),
    "HeadActivity": lambda w: w.result("head_activity"),
    "Hooks": lambda w: w.hooks,
    "Images": lambda w: w.images,
    "Mixing": lambda w: w.result("measure_mixing"),
    "MixingComparison": lambda w: w.result("compare_mixing"),
    "NamedTokens": lambda w: w.result("named_tokens"),
    "Neurons": lambda w: w.result("writer_neurons"),
    "PathSums": lambda w: w.result("path_sums"),
    "Perturbation": lambda w: w.result("perturbation_spread"),
    "Registers": lambda w: w.result("register_tokens"),
    "Reproductions": lambda w: w.result("reproduce"),
    "SelfTest": lambda w: w.result("check_model"),
    "SinkDecomposition": lambda w: w.result("decompose_sinks"),
    "SinkMap": lambda w: w.sinks,
    "SinkScores": lambda w: w.scores,
    "SinkTrace": lambda w: w.made,
    "Sweep": lambda w: w.result("sweep_ablation"),
    "Thresholds": lambda w: sl.find.Thresholds(),
    "TokenView": lambda w: w.result("attention_view"),
    "Tokens": lambda w: w.tokens,
    "TwoByTwo": lambda w: next(iter(w.result("decompose_sinks").effects.values())),
    "Verdict": lambda w: w.result("norm_and_mass"),
    "streaming.EvictionStudy": lambda w: w.result("streaming.eviction_study"),
    "streaming.StreamingLoss": lambda w: w.result("streaming.streaming_loss"),
    "lab.LabComparison": lambda w: w.result("lab.compare"),
    "sweep.SweepResults": lambda w: w.result("sweep.collect"),
}

# Public classes that are no results: parts of a running model, tasks, specifications, executors.
NO_RESULTS = {
    "Claims", "Flash", "PlainModel", "lab.Backcopy", "lab.Batch", "lab.BigramBackcopy", "lab.LabAttention",
    "lab.LabModel", "lab.Recall", "lab.Text", "lab.TrainConfig", "lab.Training", "sweep.Job", "sweep.RayExecutor",
    "sweep.SubmititExecutor", "sweep.TextSpec",
}  # fmt: skip
INNER = ("from_parts",)  # takes what the same version's ``parts`` gave

GIVEN: dict[str, Callable[[World], Arguments]] = {
    "BosVariants.losses": lambda w: {"model": w.model},
    "BosVariants.to_dataframe": lambda w: {"model": w.model},
    "Experiment.change": lambda w: {"metric": "loss", "label": "gone"},
    "Experiment.index": lambda w: {"label": "gone"},
    "Hooks.at": lambda w: {"positions": [1]},
    "Hooks.note": lambda w: {"text": "a note"},
    "Images.__getitem__": lambda w: {"index": 0},
    "Images.aligned": lambda w: {"columns": w.images.ids.shape[1]},
    "Images.concatenate": lambda w: {"parts": [w.images, w.images]},
    "Images.first": lambda w: {"columns": w.images.ids.shape[1]},
    "Images.pad": lambda w: {"side": "left", "columns": 0},
    "Images.patches": lambda w: {"values": w.seen.alpha},
    "Images.row": lambda w: {"sequence": 0},
    "Images.to": lambda w: {"device": "cpu"},
    "MixingComparison.__getitem__": lambda w: {"label": "gone"},
    "NamedTokens.__call__": lambda w: {"ids": w.tokens.ids},
    "Perturbation.by_swap": lambda w: {"changes": w.result("perturbation_spread").relative},
    "SelfTest.__getitem__": lambda w: {"function": "sink_scores"},
    "SinkDecomposition.number": lambda w: {"name": "mass"},
    "SinkMap.cut": lambda w: {"sequences": [0], "columns": 50},
    "SinkScores.concatenate": lambda w: {"parts": [w.scores, w.scores]},
    "SinkTrace.part": lambda w: {"documents": [0]},
    "Thresholds.end_slack": lambda w: {"n_layers": 2},
    "Thresholds.onset_slack": lambda w: {"n_layers": 2},
    "Thresholds.shortest_life": lambda w: {"n_layers": 2},
    "Tokens.__getitem__": lambda w: {"index": 0},
    "Tokens.aligned": lambda w: {"columns": 60},
    "Tokens.concatenate": lambda w: {"parts": [w.tokens, w.tokens]},
    "Tokens.first": lambda w: {"columns": 9},
    "Tokens.pad": lambda w: {"side": "left", "columns": 3},
    "Tokens.row": lambda w: {"sequence": 0},
    "Tokens.to": lambda w: {"device": "cpu"},
    "TwoByTwo.part": lambda w: {"metric": "loss", "name": "mass_part"},
    "Verdict.number": lambda w: {"quantity": w.result("norm_and_mass").numbers.quantity[0]},
    "streaming.EvictionStudy.concatenate": lambda w: {"parts": [w.result("streaming.eviction_study")] * 2},
    "sweep.SweepResults.plot": lambda w: {"value": "loss"},
    "sweep.SweepResults.save": lambda w: {"path": w.new(".csv")},
}


def class_of(name: str) -> type:
    """The public class of a name with its module."""
    module, _, last = name.rpartition(".")
    return getattr({"": sl, "streaming": streaming, "lab": lab, "sweep": sweep}[module], last)


def _names() -> list[str]:
    modules = (("", sl), ("streaming.", streaming), ("lab.", lab), ("sweep.", sweep))
    return [f"{at}{n}" for at, module in modules for n in module.__all__ if inspect.isclass(getattr(module, n))]


def _arguments(kind: type, name: str) -> list[inspect.Parameter]:
    """The arguments of a class's own method; none for what is no method or comes from elsewhere."""
    owner = next(base for base in kind.__mro__ if name in vars(base))
    method = vars(owner)[name]
    method = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
    if not owner.__module__.startswith("sinklens") or not inspect.isfunction(method) or name in INNER:
        return []
    return list(inspect.signature(method).parameters.values())[1:]


METHODS = {
    f"{name}.{method}": _arguments(class_of(name), method)
    for name in _names()
    if name not in NO_RESULTS
    for method in dir(class_of(name))
    if (not method.startswith("_") or method in ("__getitem__", "__call__")) and _arguments(class_of(name), method)
}


def given_to(name: str, world: World) -> Arguments:
    """Arguments of a call that works: those that have no default."""
    first = METHODS[name][0].name
    if name in GIVEN:
        return GIVEN[name](world)
    if first in ("path", "folder"):
        path = world.new()
        if name.endswith(".load"):
            OBJECTS[name.rpartition(".")[0]](world).save(path)
        return {first: path}
    return {}


def call_method(name: str, world: World, arguments: Arguments) -> Any:
    """Call a method of the world's object with these arguments."""
    owner, _, method = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        return getattr(OBJECTS[owner](world), method)(**arguments)
