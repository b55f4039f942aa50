"""Small models trained from scratch, with any kind of attention, in which sinks can be watched as they grow.

>>> from sinklens import lab
>>> runs = lab.run_study("operations", "lab-out")        # nine kinds of attention x three seeds, minutes on a laptop
>>> comparison = lab.compare(runs)
>>> comparison.operations_table()
>>> comparison.plot()
>>> model = runs[0].model()                              # an ordinary bridge for every function of sinklens
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinklens.lab.attention import LabAttention
    from sinklens.lab.bigrams import BigramBackcopy, Recall
    from sinklens.lab.comparison import LabComparison, compare
    from sinklens.lab.kinds import KINDS, AttentionKind
    from sinklens.lab.model import LabModel, ModelConfig
    from sinklens.lab.run import LabRun, load_lab_model, load_runs, run_study, save_lab_model
    from sinklens.lab.schedule import TrainConfig
    from sinklens.lab.study import LabConfig, Study, read_study, studies
    from sinklens.lab.tasks import Backcopy, Batch
    from sinklens.lab.text import Text, write_tokens
    from sinklens.lab.training import Training, train

_HOMES = {
    "AttentionKind": "kinds",
    "Backcopy": "tasks",
    "Batch": "tasks",
    "BigramBackcopy": "bigrams",
    "KINDS": "kinds",
    "LabAttention": "attention",
    "LabComparison": "comparison",
    "LabConfig": "study",
    "LabModel": "model",
    "LabRun": "run",
    "ModelConfig": "model",
    "Recall": "bigrams",
    "Study": "study",
    "Text": "text",
    "TrainConfig": "schedule",
    "Training": "training",
    "compare": "comparison",
    "load_lab_model": "run",
    "load_runs": "run",
    "read_study": "study",
    "run_study": "run",
    "save_lab_model": "run",
    "studies": "study",
    "train": "training",
    "write_tokens": "text",
}

__all__ = [
    "KINDS",
    "AttentionKind",
    "Backcopy",
    "Batch",
    "BigramBackcopy",
    "LabAttention",
    "LabComparison",
    "LabConfig",
    "LabModel",
    "LabRun",
    "ModelConfig",
    "Recall",
    "Study",
    "Text",
    "TrainConfig",
    "Training",
    "compare",
    "load_lab_model",
    "load_runs",
    "read_study",
    "run_study",
    "save_lab_model",
    "studies",
    "train",
    "write_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sinklens.lab' has no attribute {name!r}")
    value = getattr(import_module(f"sinklens.lab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
