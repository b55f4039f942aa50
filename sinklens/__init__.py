"""sinklens: find, ablate and trace attention sinks in real models. A TransformerLens plugin.

>>> import sinklens as sl
>>> model = sl.load_model("smollm2-135m")
>>> tokens = sl.load_tokens(model, "python-docs", n_seqs=16, seq_len=512)
>>> scores = sl.sink_scores(model, tokens)
>>> scores.sink_rate(position=0, epsilon=0.3)
>>> scores.plot()

The names here are those of every day; the rest lies in the subpackages, such as ``sl.trace.writer_neurons``. All are
loaded at first use: importing the host takes seconds, importing sinklens must not. Which module holds which name says
``__init__.pyi``, of this package and of each subpackage.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from sinklens.core.errors import BadInputError
from sinklens.core.lazy import attach_stub

__version__ = "0.1.0"

# What the header of a saved file says, and what reads such a file.
_READERS = {
    "AttentionStatistics": "heads.statistics.AttentionStatistics.load",
    "Collapse": "mixing.collapse.Collapse.load",
    "EvictionStudy": "streaming.eviction.EvictionStudy.load",
    "Experiment": "experiment.result.Experiment.load",
    "HeadActivity": "heads.activity.HeadActivity.load",
    "LabModel": "lab.run.load_lab_model",
    "Mixing": "mixing.result.Mixing.load",
    "MixingComparison": "mixing.result.MixingComparison.load",
    "Neurons": "trace.neurons.Neurons.load",
    "Perturbation": "mixing.perturbation_result.Perturbation.load",
    "Registers": "find.registers.Registers.load",
    "Reproductions": "reproductions.result.Reproductions.load",
    "SinkDecomposition": "decompose.result.SinkDecomposition.load",
    "SinkMap": "find.sinkmap.SinkMap.load",
    "SinkScores": "find.scores.SinkScores.load",
    "SinkTrace": "trace.result.SinkTrace.load",
    "StreamingLoss": "streaming.loss.StreamingLoss.load",
    "Sweep": "experiment.ablation_sweep_result.Sweep.load",
    "Tokens": "inputs.tokens.Tokens.load",
}

# Names that stood here in 0.1 and the subpackage that has them now; they go with 0.3.
_MOVED = {
    "Anatomy": "find",
    "AttentionStatistics": "heads",
    "BosVariants": "experiment",
    "Capabilities": "models",
    "Claims": "decompose",
    "Collapse": "mixing",
    "Experiment": "experiment",
    "HeadActivity": "heads",
    "Hooks": "ablate",
    "Images": "inputs",
    "MatchedDamage": "experiment",
    "Mixing": "mixing",
    "MixingComparison": "mixing",
    "MixingConditions": "mixing",
    "NamedTokens": "inputs",
    "Neurons": "trace",
    "PathSums": "mixing",
    "Perturbation": "mixing",
    "PlainCapabilities": "models",
    "PlainModel": "models",
    "Registers": "find",
    "Reproductions": "reproductions",
    "SelfTest": "check",
    "Sink": "find",
    "SinkDecomposition": "decompose",
    "SinkTrace": "trace",
    "Subject": "decompose",
    "Sweep": "experiment",
    "Thresholds": "find",
    "TokenView": "heads",
    "TwoByTwo": "decompose",
    "Verdict": "trace",
    "attention_grid": "heads",
    "attention_statistics": "heads",
    "attention_view": "heads",
    "bos_variants": "experiment",
    "capabilities": "models",
    "compare_contexts": "find",
    "compare_methods": "find",
    "head_activity": "heads",
    "image_map": "find",
    "jacobian_norms": "mixing",
    "matched_damage": "experiment",
    "measure_collapse": "mixing",
    "mixing_by_length": "mixing",
    "mixing_conditions": "mixing",
    "named_tokens": "inputs",
    "norm_and_mass": "trace",
    "path_sums": "mixing",
    "perturbation_spread": "mixing",
    "plant_sinks": "trace",
    "primary_weakening": "trace",
    "reading_heads": "heads",
    "register_tokens": "find",
    "sample_images": "inputs",
    "sink_levels": "trace",
    "untrained_twin": "models",
    "write_decomposition": "decompose",
    "write_experiment": "experiment",
    "write_images": "find",
    "write_mixing": "mixing",
    "write_scan": "find",
    "write_sinks": "find",
    "write_trace": "trace",
    "writer_alignment": "trace",
    "writer_neurons": "trace",
    "writer_subspace": "trace",
}

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__, moved=_MOVED, defined=("load",))


def load(path: str | os.PathLike[str]) -> Any:
    """Open whatever a result's ``save`` wrote, by the kind in its header.

    >>> sl.load("trace.safetensors").plot()  # doctest: +SKIP

    Returns:
        The result: a SinkTrace, an Experiment, Tokens, ... (a model of the lab: as a bridge).

    Raises:
        BadInputError: no such file, half a file, one that sinklens did not write or that holds no result of its own.
    """
    from sinklens.core.storage import kind_of  # torch is slow to load

    kind = kind_of(path)
    if kind not in _READERS:
        raise BadInputError(f"{os.fspath(path)!r} holds a {kind}, which is a part of a longer run and no result")
    room, module, *names = _READERS[kind].split(".")
    reader: Any = import_module(f"sinklens.{room}.{module}")
    for name in names:
        reader = getattr(reader, name)
    return reader(path)
