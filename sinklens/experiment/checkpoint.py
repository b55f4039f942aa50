"""Finished sequences of an experiment: in memory, and in a folder where one is given, so that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.ablate.hooks import Hooks
from sinklens.core.errors import BadInputError
from sinklens.core.storage import load_tensors, save_tensors, write_text
from sinklens.experiment.plan import Plan
from sinklens.experiment.result import UNTRAINED, Experiment, Run
from sinklens.inputs.tokens import Tokens


def _what(hooks: Sequence[Any]) -> str | int:
    """An edit's name and layers, as far as a list of hooks tells."""
    return f"{hooks.name} {list(hooks.layers)}" if isinstance(hooks, Hooks) else len(hooks)


class Store:
    """Finished sequences: in memory, and in a folder where one is given."""

    def __init__(
        self, folder: str | Path | None, plan: Plan, metrics: list[str], twin: bool, backend: str = "hooks"
    ) -> None:
        self.plan, self.metrics, self.backend = plan, metrics, backend
        self.runs = [Run(r.label, r.control) for r in plan.runs]
        if twin:
            self.runs += [Run(r.label, UNTRAINED) for r in plan.runs if not r.control]
        self.done: dict[int, tuple[Tensor, list[dict[str, Any]]]] = {}
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self._open(self.folder)

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "tokens": self.plan.tokens.digest,
            "model": self.plan.found.info["capabilities"]["model"],
            "runs": [[r.label, r.control] for r in self.runs],
            "edits": [
                [_what(r.hooks), [[[e.position, e.group] for e in row] for row in r.places]] for r in self.plan.runs
            ],
            "metrics": self.metrics,
            "scored": [len(s) for s in self.plan.scored],
            "seed": self.plan.seed,
            "mask_id": self.plan.read.mask_id,
        }

    def _open(self, folder: Path) -> None:
        own, path = self._fingerprint(), folder / "experiment.json"
        if path.is_file():
            try:
                there = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise BadInputError(f"{str(path)!r} is damaged ({error}); resume into a new folder") from error
            different = [key for key in own if there.get(key) != own[key]]
            if different:
                raise BadInputError(
                    f"resume={str(folder)!r} holds another experiment (it differs in {', '.join(different)}); give a "
                    f"new folder, or the same arguments"
                )
        elif folder.exists() and (not folder.is_dir() or any(_foreign(p) for p in folder.iterdir())):
            raise BadInputError(f"resume={str(folder)!r} is no empty folder and holds no experiment; give a new one")
        else:
            write_text(path, json.dumps(own))
        for b in range(len(self.plan.tokens)):
            if self._path(b).is_file():
                tensors, meta = load_tensors(self._path(b), "ExperimentSequence")
                self.done[b] = (tensors["values"], meta["side"])

    def _path(self, b: int) -> Path:
        return (self.folder or Path()) / f"sequence-{b:05d}.safetensors"

    def has(self, b: int) -> bool:
        """Whether a sequence is finished."""
        return b in self.done

    def keep(self, b: int, values: Float[Tensor, "run metric pos"], side: list[dict[str, Any]]) -> None:
        """Keep a finished sequence."""
        self.done[b] = (values, side)
        if self.folder is not None:
            save_tensors(self._path(b), "ExperimentSequence", {"values": values}, {"side": side})

    def collect(self, discovery: Tokens | None) -> Experiment:
        """All finished sequences as one result."""
        plan = self.plan
        longest = int(plan.tokens.lengths.max())
        values = torch.full((len(self.runs), len(self.metrics), len(plan.tokens), longest), torch.nan)
        side: list[dict[str, Any]] = []
        for b, (found, rows) in sorted(self.done.items()):
            values[:, :, b, : found.shape[-1]] = found
            side += rows
        ran = {"backend": self.backend, "seed": plan.seed, "thresholds": asdict(plan.found.thresholds)}
        ran |= {"loss": plan.read.words, "mask_id": plan.read.mask_id}
        hooks_notes = [f"{r.label}: {note}" for r in plan.runs if isinstance(r.hooks, Hooks) for note in r.hooks.notes]
        return Experiment(
            runs=tuple(self.runs),
            metrics={name: values[:, m] for m, name in enumerate(self.metrics)},
            side=tuple(side),
            tokens=plan.tokens,
            discovery=None if discovery is None else discovery.sources,
            notes=tuple(dict.fromkeys([*plan.notes, *hooks_notes])),
            info={**plan.found.info, **ran},
        )


def _foreign(path: Path) -> bool:
    """Whether a file is none of an experiment that was killed while it wrote its first file."""
    return not path.name.startswith(".experiment.json.")
