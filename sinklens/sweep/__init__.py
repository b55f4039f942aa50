"""Many jobs: models x texts x interventions x tasks x seeds, resumable, on any executor.

>>> from sinklens.sweep import collect, make_jobs, run_sweep
>>> text = {"source": "python-docs", "n_seqs": 32, "seq_len": 64, "pieces": 4}
>>> edits = ["none", {"build": "ablate_sinks", "sinks": [0], "mode": "zero"}]
>>> jobs = make_jobs("smollm2-135m", text, edits, tasks=["sink_scores", "token_loss"])
>>> run_sweep(jobs, "results", executor="processes", workers=2)
>>> collect("results").summary()

A job is plain data. Its result lies in a file named by the hash of everything that it depends on, so a restart runs
what is missing and nothing else. The executor is borrowed: standard library, Ray, submitit, or the caller's own.

Not to be confused with :func:`sinklens.sweep_ablation` (``sinklens/sweeps.py``), which takes *one* ablation of *one*
loaded model along layers, heads or doses. How to: docs/sweeps.md; beyond one machine: docs/scale.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinklens.sweep.jobs import Job, load_jobs, make_jobs
    from sinklens.sweep.processes import Processes
    from sinklens.sweep.ray_executor import RayExecutor
    from sinklens.sweep.results import SweepResults, collect
    from sinklens.sweep.runner import run_sweep
    from sinklens.sweep.specs import InterventionSpec, ModelSpec, TaskSpec, TextSpec
    from sinklens.sweep.status import SweepStatus, sweep_status
    from sinklens.sweep.submitit_executor import SubmititExecutor

# Loaded at first use: a worker process learns how many threads it may use before it imports torch.
_HOMES = {
    "InterventionSpec": "specs",
    "Job": "jobs",
    "ModelSpec": "specs",
    "Processes": "processes",
    "RayExecutor": "ray_executor",
    "SubmititExecutor": "submitit_executor",
    "SweepResults": "results",
    "SweepStatus": "status",
    "TaskSpec": "specs",
    "TextSpec": "specs",
    "collect": "results",
    "load_jobs": "jobs",
    "make_jobs": "jobs",
    "run_sweep": "runner",
    "sweep_status": "status",
}

__all__ = [
    "InterventionSpec",
    "Job",
    "ModelSpec",
    "Processes",
    "RayExecutor",
    "SubmititExecutor",
    "SweepResults",
    "SweepStatus",
    "TaskSpec",
    "TextSpec",
    "collect",
    "load_jobs",
    "make_jobs",
    "run_sweep",
    "sweep_status",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sinklens.sweep' has no attribute {name!r}")
    value = getattr(import_module(f"sinklens.sweep.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
