"""``run_study``: train every variant on every seed, measure what is left to measure, keep it all in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from transformer_lens.model_bridge import TransformerBridge

from sinklens.core.errors import BadInputError
from sinklens.core.storage import load_tensors, save_tensors, write_text
from sinklens.core.validation import public
from sinklens.lab.analysis import analyse
from sinklens.lab.measure import without_first
from sinklens.lab.model import LabModel
from sinklens.lab.study import LabConfig, Study, config_of, read_study
from sinklens.lab.tasks import Batch
from sinklens.lab.training import CHECKPOINT, evaluation_batch, moved, train
from sinklens.models.load import load_model
from sinklens.show.notebook import ShownInJupyter

MODEL = "model.safetensors"


@dataclass(frozen=True, eq=False)
class LabRun(ShownInJupyter, table="heads"):
    """One trained model and everything that was measured of it.

    Attributes:
        config, seed: what was trained.
        metrics: one row per evaluated step for the model (``layer`` and ``head`` -1: losses) and one per head.
        dropped: loss and sinks with and without the first token, at the end of training.
        analysis: what the rest of the package says of it: 2x2, head classes, mixing; reasons where it refuses.
        folder: where it lies.
    """

    config: LabConfig
    seed: int
    metrics: pd.DataFrame
    dropped: dict[str, float]
    analysis: dict[str, Any]
    folder: Path

    def __repr__(self) -> str:
        losses = ", ".join(f"{name} {value:.4g}" for name, value in self.last.items() if name.startswith("loss"))
        return f"LabRun of {self.config.name!r}, seed {self.seed}: {losses} at the end of training"

    @property
    def last(self) -> dict[str, float]:
        """The figures at the last step: losses, and the heads' means."""
        final = self._final("head < 0"), self._final("head >= 0")
        losses = {str(k): float(v) for k, v in final[0].iloc[0].items() if str(k).startswith(("loss", "floor"))}
        return losses | {str(k): float(v) for k, v in final[1].drop(columns=["step", "layer", "head"]).mean().items()}

    def heads(self) -> pd.DataFrame:
        """The figures of each head at the last step."""
        return self._final("head >= 0").reset_index(drop=True)

    def _final(self, rows: str) -> pd.DataFrame:
        """Some rows of the last step, without the columns that the others have."""
        return self.metrics.query(f"step == step.max() and {rows}").dropna(axis=1, how="all")

    def batch(self) -> Batch:
        """The sequences on which the figures were taken."""
        return evaluation_batch(self.config)

    def model(self) -> TransformerBridge:
        """The trained model, as a bridge for every function of the package."""
        return load_lab_model(self.folder / MODEL)


@public
def run_study(
    study: Study | str | os.PathLike[str] | dict[str, Any],
    out: str | os.PathLike[str],
    *,
    seeds: tuple[int, ...] | None = None,
    analysis: bool = True,
    progress: bool | None = None,
) -> list[LabRun]:
    """Train and measure every variant of a study on every seed; what is finished is not done again.

    Args:
        study: from :func:`read_study`, or what it takes: a YAML file, a name among :func:`studies`, a dictionary.
        out: a folder; ``out/<study>/<variant>/seed-<n>`` gets configuration, checkpoint, weights, metrics (CSV).
        seeds: other seeds than the study's.
        analysis: also the package's 2x2, head classes and mixing, at the end of each run.
        progress: show a bar per run.

    Cost: about 6 CPU seconds per model of settings P and B, 10 in all with the analysis.

    Raises:
        BadInputError: a study that cannot be read, or a folder that holds another one of this name.
    """
    found = study if isinstance(study, Study) else read_study(study)
    return [
        _one(variant, seed, Path(out) / found.name / variant.name / f"seed-{seed}", analysis, progress)
        for variant in found.variants
        for seed in (found.seeds if seeds is None else seeds)
    ]


@public
def load_runs(folder: str | os.PathLike[str]) -> list[LabRun]:
    """The finished runs in a folder of :func:`run_study`, at any depth.

    Raises:
        BadInputError: there is none.
    """
    try:
        found = sorted(Path(folder).rglob("result.json"))
    except OSError as error:
        raise BadInputError(f"cannot look through {os.fspath(folder)!r}: {error}") from error
    runs = [_load(path.parent) for path in found]
    if not runs:
        raise BadInputError(f"no finished run in {os.fspath(folder)!r}; make some with 'sinklens lab run'")
    return runs


@public
def save_lab_model(model: LabModel, config: LabConfig, seed: int, path: str | os.PathLike[str]) -> Path:
    """Write a lab model's weights and configuration as one safetensors file."""
    return save_tensors(path, "LabModel", dict(model.state_dict()), {"config": config.to_dict(), "seed": seed})


@public
def load_lab_model(path: str | os.PathLike[str]) -> TransformerBridge:
    """A trained lab model as a proven bridge.

    Raises:
        BadInputError: no such file, or half of one.
    """
    tensors, meta = load_tensors(path, "LabModel")
    model = LabModel(config_of(meta["config"]).fitted(), meta["seed"])
    model.load_state_dict(tensors)
    return load_model(model)


def _one(config: LabConfig, seed: int, folder: Path, analysis: bool, progress: bool | None) -> LabRun:
    result = folder / "result.json"
    if result.is_file():
        kept = _load(folder)
        if kept.config != config or kept.seed != seed:
            raise BadInputError(f"{str(folder)!r} holds another configuration of this name; give another folder")
        if kept.analysis or not analysis:
            return kept
    run = train(config, seed, folder, progress=progress)
    write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    write_text(folder / "metrics.csv", pd.DataFrame(run.rows).to_csv(index=False))
    save_lab_model(run.model.cpu(), config, seed, folder / MODEL)
    batch = evaluation_batch(config)
    content: dict[str, Any] = {"config": config.to_dict(), "seed": seed}
    content["dropped"] = without_first(run.model, config.task, moved(batch, "cpu"))
    content["analysis"] = analyse(load_lab_model(folder / MODEL), batch) if analysis else {}
    write_text(result, json.dumps(content, indent=1))
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return _load(folder)


def _load(folder: Path) -> LabRun:
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        metrics = pd.read_csv(folder / "metrics.csv")
        config = config_of(content["config"])
        return LabRun(config, content["seed"], metrics, content["dropped"], content["analysis"], folder)
    except (OSError, ValueError, KeyError) as error:
        raise BadInputError(f"{str(folder)!r} holds no complete run ({error}); remove it and run it again") from error


def by_variant(runs: list[LabRun]) -> Iterator[tuple[str, list[LabRun]]]:
    """Runs grouped by variant, in the order in which variants first come."""
    names = list(dict.fromkeys(run.config.name for run in runs))
    for name in names:
        yield name, sorted((run for run in runs if run.config.name == name), key=lambda run: run.seed)
