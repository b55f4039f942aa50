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
from public_names import CLASSES, named

import sinklens as sl

OBJECTS: dict[str, Callable[[World], Any]] = {
    "find.Anatomy": lambda w: w.result("sink_anatomy"),
    "heads.AttentionStatistics": lambda w: w.result("heads.attention_statistics"),
    "experiment.BosVariants": lambda w: w.result("experiment.bos_variants"),
    "mixing.Collapse": lambda w: w.result("mixing.measure_collapse"),
    "experiment.Experiment": lambda w: w.result("run_experiment"),
    "heads.HeadActivity": lambda w: w.result("heads.head_activity"),
    "ablate.Hooks": lambda w: w.hooks,
    "inputs.Images": lambda w: w.images,
    "mixing.Mixing": lambda w: w.result("measure_mixing"),
    "mixing.MixingComparison": lambda w: w.result("compare_mixing"),
    "inputs.NamedTokens": lambda w: w.result("inputs.named_tokens"),
    "trace.Neurons": lambda w: w.result("trace.writer_neurons"),
    "mixing.PathSums": lambda w: w.result("mixing.path_sums"),
    "mixing.Perturbation": lambda w: w.result("mixing.perturbation_spread"),
    "find.Registers": lambda w: w.result("find.register_tokens"),
    "reproductions.Reproductions": lambda w: w.result("reproduce"),
    "check.SelfTest": lambda w: w.result("check_model"),
    "decompose.SinkDecomposition": lambda w: w.result("decompose_sinks"),
    "SinkMap": lambda w: w.sinks,
    "SinkScores": lambda w: w.scores,
    "trace.SinkTrace": lambda w: w.made,
    "experiment.Sweep": lambda w: w.result("sweep_ablation"),
    "find.Thresholds": lambda w: sl.find.Thresholds(),
    "heads.TokenView": lambda w: w.result("heads.attention_view"),
    "Tokens": lambda w: w.tokens,
    "decompose.TwoByTwo": lambda w: next(iter(w.result("decompose_sinks").effects.values())),
    "trace.Verdict": lambda w: w.result("trace.norm_and_mass"),
    "streaming.EvictionStudy": lambda w: w.result("streaming.eviction_study"),
    "streaming.StreamingLoss": lambda w: w.result("streaming.streaming_loss"),
    "lab.LabComparison": lambda w: w.result("lab.compare"),
    "sweep.SweepResults": lambda w: w.result("sweep.collect"),
}

# Public classes that are no results: parts of a running model, tasks, specifications, executors.
NO_RESULTS = {
    "decompose.Claims", "Flash", "models.PlainModel", "lab.Backcopy", "lab.Batch", "lab.BigramBackcopy",
    "lab.LabAttention", "lab.LabModel",
    "lab.Recall", "lab.Text", "lab.TrainConfig", "lab.Training", "sweep.Job", "sweep.RayExecutor",
    "sweep.SubmititExecutor", "sweep.TextSpec",
}  # fmt: skip
INNER = ("from_parts",)  # takes what the same version's ``parts`` gave

GIVEN: dict[str, Callable[[World], Arguments]] = {
    "experiment.BosVariants.losses": lambda w: {"model": w.model},
    "experiment.BosVariants.to_dataframe": lambda w: {"model": w.model},
    "experiment.Experiment.change": lambda w: {"metric": "loss", "label": "gone"},
    "experiment.Experiment.index": lambda w: {"label": "gone"},
    "ablate.Hooks.at": lambda w: {"positions": [1]},
    "ablate.Hooks.note": lambda w: {"text": "a note"},
    "inputs.Images.__getitem__": lambda w: {"index": 0},
    "inputs.Images.aligned": lambda w: {"columns": w.images.ids.shape[1]},
    "inputs.Images.concatenate": lambda w: {"parts": [w.images, w.images]},
    "inputs.Images.first": lambda w: {"columns": w.images.ids.shape[1]},
    "inputs.Images.pad": lambda w: {"side": "left", "columns": 0},
    "inputs.Images.patches": lambda w: {"values": w.seen.alpha},
    "inputs.Images.row": lambda w: {"sequence": 0},
    "inputs.Images.to": lambda w: {"device": "cpu"},
    "mixing.MixingComparison.__getitem__": lambda w: {"label": "gone"},
    "inputs.NamedTokens.__call__": lambda w: {"ids": w.tokens.ids},
    "mixing.Perturbation.by_swap": lambda w: {"changes": w.result("mixing.perturbation_spread").relative},
    "check.SelfTest.__getitem__": lambda w: {"function": "sink_scores"},
    "decompose.SinkDecomposition.number": lambda w: {"name": "mass"},
    "SinkMap.cut": lambda w: {"sequences": [0], "columns": 50},
    "SinkScores.concatenate": lambda w: {"parts": [w.scores, w.scores]},
    "trace.SinkTrace.part": lambda w: {"documents": [0]},
    "find.Thresholds.end_slack": lambda w: {"n_layers": 2},
    "find.Thresholds.onset_slack": lambda w: {"n_layers": 2},
    "find.Thresholds.shortest_life": lambda w: {"n_layers": 2},
    "Tokens.__getitem__": lambda w: {"index": 0},
    "Tokens.aligned": lambda w: {"columns": 60},
    "Tokens.concatenate": lambda w: {"parts": [w.tokens, w.tokens]},
    "Tokens.first": lambda w: {"columns": 9},
    "Tokens.pad": lambda w: {"side": "left", "columns": 3},
    "Tokens.row": lambda w: {"sequence": 0},
    "Tokens.to": lambda w: {"device": "cpu"},
    "decompose.TwoByTwo.part": lambda w: {"metric": "loss", "name": "mass_part"},
    "trace.Verdict.number": lambda w: {"quantity": w.result("trace.norm_and_mass").numbers.quantity[0]},
    "streaming.EvictionStudy.concatenate": lambda w: {"parts": [w.result("streaming.eviction_study")] * 2},
    "sweep.SweepResults.plot": lambda w: {"value": "loss"},
    "sweep.SweepResults.save": lambda w: {"path": w.new(".csv")},
}


def class_of(name: str) -> type:
    """The public class of a name with its module."""
    return named(name)


def _names() -> list[str]:
    return [name for name in CLASSES if not name.startswith("reproductions.") or name in OBJECTS]


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
