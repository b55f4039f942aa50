"""Configurations: one run, and a study of variants with seeds, from Python or YAML."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sinklens.bridge.capabilities import PROBE_LENGTH
from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.lab.bigrams import BigramBackcopy, Recall
from sinklens.lab.model import ModelConfig
from sinklens.lab.schedule import TrainConfig
from sinklens.lab.tasks import Backcopy
from sinklens.lab.text import Text

TASKS: dict[str, Any] = {task.__name__: task for task in (Backcopy, BigramBackcopy, Recall, Text)}
AnyTask = Backcopy | BigramBackcopy | Recall | Text


@dataclass(frozen=True)
class LabConfig:
    """One model, one task, one way to train; the model's vocabulary and length are the task's.

    Attributes:
        name: how tables and figures call it.
        model, task, train: see :class:`ModelConfig`, :class:`Backcopy` and its kin, :class:`TrainConfig`.
    """

    name: str = "softmax"
    model: ModelConfig = field(default_factory=ModelConfig)
    task: AnyTask = field(default_factory=Backcopy)
    train: TrainConfig = field(default_factory=TrainConfig)

    def fitted(self) -> ModelConfig:
        """The model's shape with the task's sizes (and room for the proof's probe)."""
        return replace(self.model, n_vocab=self.task.n_vocab, n_ctx=max(self.task.seq_len, PROBE_LENGTH))

    def to_dict(self) -> dict[str, Any]:
        """As YAML holds it."""
        task = {"name": type(self.task).__name__, **asdict(self.task)}
        return {"name": self.name, "model": asdict(self.model), "task": task, "train": asdict(self.train)}


@dataclass(frozen=True)
class Study:
    """Variants that are trained on several seeds each and compared.

    Attributes:
        name: of the study.
        variants: one configuration per variant, of different names.
        seeds: each variant is trained once per seed; a seed shifts data and initial weights.
    """

    name: str
    variants: tuple[LabConfig, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise BadInputError(f"a study needs variants of different names, got {names or 'none'}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise BadInputError(f"a study needs different seeds, got {list(self.seeds) or 'none'}")
        if bad := [name for name in (self.name, *names) if not name or "/" in name or name.startswith(".")]:
            raise BadInputError(f"names become folders, so {bad[0]!r} cannot be one")


@public
def read_study(source: str | os.PathLike[str] | dict[str, Any]) -> Study:
    """A study from a YAML file, one of those that come with the package (:func:`studies`), or a dictionary.

    Its keys are ``name``, ``seeds``, and ``model``, ``task``, ``train``, which all variants share; ``variants`` maps
    names to what differs. Without ``variants`` there is one, of the study's name.

    Raises:
        BadInputError: no such file, no YAML, unknown or unfit fields; the message names them.
    """
    content = source if isinstance(source, dict) else _read(source)
    if unknown := sorted(set(content) - {"name", "seeds", "model", "task", "train", "variants"}):
        raise BadInputError(f"a study has no field {', '.join(map(str, unknown))}")
    name = str(content.get("name", "study"))
    base = {key: content.get(key) or {} for key in ("model", "task", "train")}
    variants = content.get("variants") or {name: {}}
    if not isinstance(variants, dict):
        raise BadInputError("variants must map names to what differs, such as {sigmoid: {model: {attention: sigmoid}}}")
    made = tuple(_variant(str(label), base, differs or {}) for label, differs in variants.items())
    seeds = content.get("seeds", (0, 1, 2))
    seeds = (seeds,) if isinstance(seeds, int) else seeds
    if not isinstance(seeds, (list, tuple)) or not all(isinstance(seed, int) for seed in seeds):
        raise BadInputError(f"seeds must be whole numbers, got {seeds!r}")
    return Study(name, made, tuple(seeds))


@public
def studies() -> list[str]:
    """The names of the studies that come with the package."""
    folder = files("sinklens.lab") / "studies"
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def config_of(content: dict[str, Any]) -> LabConfig:
    """A configuration from what :meth:`LabConfig.to_dict` gave."""
    return _variant(content["name"], {key: content[key] for key in ("model", "task", "train")}, {})


def _read(source: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(source)
    try:
        there = path.is_file()
        text = path.read_text(encoding="utf-8") if there else ""
    except (OSError, ValueError) as error:  # what can be no name of a file, or is no text
        raise BadInputError(f"cannot read a study from {str(source)!r}: {error}") from error
    if not there and str(source) in studies():
        text = (files("sinklens.lab") / "studies" / f"{source}.yaml").read_text(encoding="utf-8")
    elif not there:
        raise BadInputError(f"no study at {str(source)!r}; give a YAML file, or one of {', '.join(studies())}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInputError(f"{str(source)!r} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"{str(source)!r} must hold fields, such as 'name: mine'")
    return content


def _variant(label: str, base: dict[str, Any], differs: Any) -> LabConfig:
    if not isinstance(differs, dict) or set(differs) - set(base):
        raise BadInputError(f"variant {label!r} may differ in model, task and train only, got {differs!r}")
    merged: dict[str, dict[str, Any]] = {}
    for key, values in base.items():
        own = differs.get(key) or {}
        if not isinstance(values, dict) or not isinstance(own, dict):
            raise BadInputError(f"{key} of {label!r} must hold fields, got {own!r}")
        renamed = key == "task" and "name" in own and own["name"] != values.get("name", "Backcopy")
        merged[key] = dict(own) if renamed else {**values, **own}
    task = merged["task"]
    kind = task.pop("name", "Backcopy")
    if kind not in TASKS:
        raise BadInputError(f"task must be one of {', '.join(TASKS)}; got {kind!r}")
    return LabConfig(
        label,
        _made(ModelConfig, merged["model"], label),
        _made(TASKS[kind], task, label),
        _made(TrainConfig, merged["train"], label),
    )


def _made(kind: Any, values: dict[str, Any], label: str) -> Any:
    """A dataclass from fields, refusing unknown names and wrong types."""
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise BadInputError(f"{label}: {kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    for name, value in values.items():
        default = known[name].default
        if default is dataclasses.MISSING or default is None or value is None:
            continue
        wanted = (int, float) if type(default) is float else type(default)
        if not isinstance(value, wanted) or (isinstance(value, bool) and type(default) is not bool):
            raise BadInputError(f"{label}: {name} must be {type(default).__name__}, got {value!r}")
    floats = {name for name, value in known.items() if type(value.default) is float}
    try:
        return kind(**{name: float(value) if name in floats else value for name, value in values.items()})
    except TypeError as error:
        raise BadInputError(f"{label}: {error}") from error
