"""``Job``: one model, text, intervention, task and seed; and lists of them from Python or YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sinklens.core.errors import BadInputError
from sinklens.core.validation import public
from sinklens.sweep.specs import InterventionSpec, ModelSpec, Spec, TaskSpec, TextSpec, spec_of

AXES = ("models", "texts", "interventions", "tasks", "seeds")


@dataclass(frozen=True)
class Job:
    """One measurement: plain data, written and read as JSON.

    Attributes:
        model, text, intervention, task: what is measured on what.
        seed: of the choice of documents (unless the text has its own), of controls, of scored positions.
    """

    model: ModelSpec
    text: TextSpec
    intervention: InterventionSpec
    task: TaskSpec
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task.task == "experiment" and self.intervention.build == "none":
            raise BadInputError("the task 'experiment' compares an intervention with base; 'none' is no intervention")

    @property
    def text_seed(self) -> int:
        """The seed by which documents are chosen."""
        return self.seed if self.text.seed is None else self.text.seed

    def labels(self) -> dict[str, Any]:
        """What tables call it: the columns that tell jobs apart."""
        return {
            "model": self.model.label,
            "text": self.text.label,
            "intervention": self.intervention.label,
            "task": self.task.label,
            "seed": self.seed,
        }

    def to_json(self) -> dict[str, Any]:
        """The job as JSON holds it."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Job:
        """The inverse of :meth:`to_json`."""
        return cls(
            spec_of(ModelSpec, content["model"]),
            spec_of(TextSpec, content["text"]),
            spec_of(InterventionSpec, content["intervention"]),
            spec_of(TaskSpec, content["task"]),
            content["seed"],
        )


@public
def make_jobs(
    models: Any,
    texts: Any,
    interventions: Any = ("none",),
    tasks: Any = ("sink_scores",),
    seeds: Any = (0,),
) -> list[Job]:
    """Every combination as a list of jobs, those of one model together.

    Args:
        models, texts, interventions, tasks: each a name, a mapping of the fields of :class:`ModelSpec`,
            :class:`TextSpec`, :class:`InterventionSpec`, :class:`TaskSpec`, such a spec, or a list of any of these. A
            text may have ``pieces``: its sequences are split over so many jobs, and the results put together are
            exactly those of one job.
        seeds: a whole number, or a list of these.

    The task ``experiment`` measures its own base; no job of it is made with the intervention ``none``.

    Raises:
        BadInputError: an empty list, unknown fields, two different things of one label, nothing to run.
    """
    chosen = [spec_of(ModelSpec, m) for m in _listed(models, "models")]
    pieces = [piece for t in _listed(texts, "texts") for piece in _pieces(t)]
    edits = [spec_of(InterventionSpec, i) for i in _listed(interventions, "interventions")]
    measures = [spec_of(TaskSpec, t) for t in _listed(tasks, "tasks")]
    numbers = _listed(seeds, "seeds")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in numbers):
        raise BadInputError(f"seeds must be whole numbers, got {numbers}")
    _check_labels("models", chosen)
    _check_labels("texts", [piece.whole for piece in pieces])
    _check_labels("interventions", edits)
    _check_labels("tasks", measures)
    whole = list(dict.fromkeys(piece.label for piece in pieces))
    jobs = [
        Job(model, piece, edit, task, seed)
        for model, label, edit, task, seed in product(chosen, whole, edits, measures, numbers)
        if not (task.task == "experiment" and edit.build == "none")
        for piece in pieces
        if piece.label == label
    ]
    if not jobs:
        raise BadInputError("there is no job: the task 'experiment' needs an intervention other than 'none'")
    return jobs


@public
def load_jobs(path: str | os.PathLike[str]) -> list[Job]:
    """The jobs of a YAML file with the keys ``models``, ``texts``, ``interventions``, ``tasks``, ``seeds``.

    Raises:
        BadInputError: no such file, no YAML, unknown keys, and what :func:`make_jobs` raises.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInputError(f"cannot read the sweep {os.fspath(path)!r}: {error}") from error
    if not isinstance(content, dict) or not {"models", "texts"} <= set(content) <= set(AXES):
        got = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise BadInputError(
            f"{os.fspath(path)!r} must have the keys models and texts, and may have interventions, tasks and seeds; "
            f"got {got}"
        )
    return make_jobs(**content)


def _listed(given: Any, what: str) -> list[Any]:
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    if not found:
        raise BadInputError(f"{what} is empty")
    return found


def _pieces(given: Any) -> tuple[TextSpec, ...]:
    if isinstance(given, Mapping) and "pieces" in given:
        rest = {name: value for name, value in given.items() if name != "pieces"}
        return spec_of(TextSpec, rest).split(given["pieces"])
    return (spec_of(TextSpec, given),)


def _check_labels(what: str, specs: Sequence[Spec]) -> None:
    """Two different things of one label could not be told apart in a table."""
    seen: dict[str, str] = {}
    for spec in specs:
        content = json.dumps(asdict(spec), sort_keys=True)
        if seen.setdefault(spec.label, content) != content:
            raise BadInputError(f"two {what} are both called {spec.label!r}; give one of them a label of its own")
