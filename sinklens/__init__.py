"""sinklens: find, ablate and trace attention sinks in real models. A TransformerLens plugin.

>>> import sinklens as sl
>>> model = sl.load_model("smollm2-135m")
>>> tokens = sl.load_tokens(model, "python-docs", n_seqs=16, seq_len=512)
>>> scores = sl.sink_scores(model, tokens)
>>> scores.sink_rate(position=0, epsilon=0.3)
>>> scores.plot()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinklens.ablate.ablate import ablate_sinks
    from sinklens.ablate.hooks import Hooks
    from sinklens.ablate.patch_bos import patch_bos
    from sinklens.ablate.residual import ablate_residual
    from sinklens.ablate.swap import restrict_attention, swap_attention
    from sinklens.attention.backend import Flash
    from sinklens.attention.flash import flash
    from sinklens.bridge.capabilities import Capabilities, capabilities
    from sinklens.bridge.unbridged import PlainCapabilities, PlainModel
    from sinklens.check.check import SelfTest, check_model
    from sinklens.core.errors import BadInputError, SinklensError, SinklensWarning, UnsupportedModelError
    from sinklens.decompose.decompose import decompose_sinks
    from sinklens.decompose.page import write_decomposition
    from sinklens.decompose.result import SinkDecomposition, Subject
    from sinklens.decompose.two_by_two import Claims, TwoByTwo
    from sinklens.experiment.ablation_sweep import sweep_ablation
    from sinklens.experiment.ablation_sweep_result import Sweep
    from sinklens.experiment.bos_variants import BosVariants, bos_variants
    from sinklens.experiment.experiment import run_experiment
    from sinklens.experiment.matched_damage import MatchedDamage, matched_damage
    from sinklens.experiment.page import write_experiment
    from sinklens.experiment.result import Experiment
    from sinklens.find.anatomy import Anatomy, sink_anatomy
    from sinklens.find.contexts import compare_contexts
    from sinklens.find.image_figures import image_map
    from sinklens.find.images_page import write_images
    from sinklens.find.lifetimes import Thresholds
    from sinklens.find.registers import Registers, register_tokens
    from sinklens.find.scan_page import write_scan
    from sinklens.find.scores import SinkScores, sink_scores
    from sinklens.find.sinkmap import Sink, SinkMap
    from sinklens.find.sinks import compare_methods, find_sinks
    from sinklens.find.sinks_page import write_sinks
    from sinklens.forward.metrics import token_loss
    from sinklens.heads.activity import HeadActivity, head_activity
    from sinklens.heads.maps import attention_grid, attention_map, attention_view
    from sinklens.heads.readers import reading_heads
    from sinklens.heads.statistics import AttentionStatistics, attention_statistics
    from sinklens.inputs.images import Images, load_images
    from sinklens.inputs.load import load_tokens
    from sinklens.inputs.sample_images import sample_images
    from sinklens.inputs.tokens import Tokens
    from sinklens.inputs.vocabulary import NamedTokens, named_tokens
    from sinklens.mixing.by_length import mixing_by_length
    from sinklens.mixing.collapse import Collapse, measure_collapse
    from sinklens.mixing.conditions import MixingConditions, mixing_conditions
    from sinklens.mixing.mixing import compare_mixing, measure_mixing
    from sinklens.mixing.page import write_mixing
    from sinklens.mixing.pair_norms import jacobian_norms
    from sinklens.mixing.path_sum import PathSums, path_sums
    from sinklens.mixing.perturbation import perturbation_spread
    from sinklens.mixing.perturbation_result import Perturbation
    from sinklens.mixing.result import Mixing, MixingComparison
    from sinklens.models.load import load_model
    from sinklens.report.write import write_report
    from sinklens.reproductions import Reproductions, reproduce
    from sinklens.show.circuitsvis import TokenView
    from sinklens.trace.claims import norm_and_mass, primary_weakening, sink_levels, writer_alignment
    from sinklens.trace.neurons import Neurons, writer_neurons
    from sinklens.trace.page import write_trace
    from sinklens.trace.planting import plant_sinks
    from sinklens.trace.result import SinkTrace
    from sinklens.trace.subspace import writer_subspace
    from sinklens.trace.trace import trace_sinks
    from sinklens.trace.verdicts import Verdict

__version__ = "0.1.0"

# Where each public name lives. Loaded at first use: importing the host takes seconds, importing sinklens must not.
_HOMES = {
    "Anatomy": "find.anatomy",
    "AttentionStatistics": "heads.statistics",
    "BadInputError": "core.errors",
    "BosVariants": "experiment.bos_variants",
    "Capabilities": "bridge.capabilities",
    "Claims": "decompose.two_by_two",
    "Collapse": "mixing.collapse",
    "Experiment": "experiment.result",
    "Flash": "attention.backend",
    "HeadActivity": "heads.activity",
    "Hooks": "ablate.hooks",
    "Images": "inputs.images",
    "MatchedDamage": "experiment.matched_damage",
    "Mixing": "mixing.result",
    "MixingComparison": "mixing.result",
    "MixingConditions": "mixing.conditions",
    "NamedTokens": "inputs.vocabulary",
    "Neurons": "trace.neurons",
    "PathSums": "mixing.path_sum",
    "Perturbation": "mixing.perturbation_result",
    "PlainCapabilities": "bridge.unbridged",
    "PlainModel": "bridge.unbridged",
    "Registers": "find.registers",
    "Reproductions": "reproductions",
    "SelfTest": "check.check",
    "Sink": "find.sinkmap",
    "SinkDecomposition": "decompose.result",
    "SinkMap": "find.sinkmap",
    "SinkScores": "find.scores",
    "SinkTrace": "trace.result",
    "SinklensError": "core.errors",
    "SinklensWarning": "core.errors",
    "Subject": "decompose.result",
    "Sweep": "experiment.ablation_sweep_result",
    "Thresholds": "find.lifetimes",
    "TokenView": "show.circuitsvis",
    "Tokens": "inputs.load",
    "TwoByTwo": "decompose.two_by_two",
    "UnsupportedModelError": "core.errors",
    "Verdict": "trace.verdicts",
    "ablate_residual": "ablate.residual",
    "ablate_sinks": "ablate.ablate",
    "attention_grid": "heads.maps",
    "attention_map": "heads.maps",
    "attention_view": "heads.maps",
    "attention_statistics": "heads.statistics",
    "bos_variants": "experiment.bos_variants",
    "capabilities": "bridge.capabilities",
    "check_model": "check.check",
    "compare_contexts": "find.contexts",
    "compare_methods": "find.sinks",
    "compare_mixing": "mixing.mixing",
    "decompose_sinks": "decompose.decompose",
    "find_sinks": "find.sinks",
    "flash": "attention.flash",
    "head_activity": "heads.activity",
    "image_map": "find.image_figures",
    "jacobian_norms": "mixing.pair_norms",
    "load_images": "inputs.images",
    "load_model": "models.load",
    "load_tokens": "inputs.load",
    "matched_damage": "experiment.matched_damage",
    "measure_collapse": "mixing.collapse",
    "measure_mixing": "mixing.mixing",
    "mixing_by_length": "mixing.by_length",
    "mixing_conditions": "mixing.conditions",
    "named_tokens": "inputs.vocabulary",
    "norm_and_mass": "trace.claims",
    "patch_bos": "ablate.patch_bos",
    "path_sums": "mixing.path_sum",
    "perturbation_spread": "mixing.perturbation",
    "plant_sinks": "trace.planting",
    "primary_weakening": "trace.claims",
    "reading_heads": "heads.readers",
    "register_tokens": "find.registers",
    "reproduce": "reproductions",
    "restrict_attention": "ablate.swap",
    "run_experiment": "experiment.experiment",
    "sample_images": "inputs.sample_images",
    "sink_anatomy": "find.anatomy",
    "sink_levels": "trace.claims",
    "sink_scores": "find.scores",
    "swap_attention": "ablate.swap",
    "sweep_ablation": "experiment.ablation_sweep",
    "token_loss": "forward.metrics",
    "trace_sinks": "trace.trace",
    "write_decomposition": "decompose.page",
    "write_experiment": "experiment.page",
    "write_images": "find.images_page",
    "write_mixing": "mixing.page",
    "write_report": "report.write",
    "write_scan": "find.scan_page",
    "write_sinks": "find.sinks_page",
    "write_trace": "trace.page",
    "writer_alignment": "trace.claims",
    "writer_neurons": "trace.neurons",
    "writer_subspace": "trace.subspace",
}

__all__ = [
    "Anatomy",
    "AttentionStatistics",
    "BadInputError",
    "BosVariants",
    "Capabilities",
    "Claims",
    "Collapse",
    "Experiment",
    "Flash",
    "HeadActivity",
    "Hooks",
    "Images",
    "MatchedDamage",
    "Mixing",
    "MixingComparison",
    "MixingConditions",
    "NamedTokens",
    "Neurons",
    "PathSums",
    "Perturbation",
    "PlainCapabilities",
    "PlainModel",
    "Registers",
    "Reproductions",
    "SelfTest",
    "Sink",
    "SinkDecomposition",
    "SinkMap",
    "SinkScores",
    "SinkTrace",
    "SinklensError",
    "SinklensWarning",
    "Subject",
    "Sweep",
    "Thresholds",
    "TokenView",
    "Tokens",
    "TwoByTwo",
    "UnsupportedModelError",
    "Verdict",
    "ablate_residual",
    "ablate_sinks",
    "attention_grid",
    "attention_map",
    "attention_statistics",
    "attention_view",
    "bos_variants",
    "capabilities",
    "check_model",
    "compare_contexts",
    "compare_methods",
    "compare_mixing",
    "decompose_sinks",
    "find_sinks",
    "flash",
    "head_activity",
    "image_map",
    "jacobian_norms",
    "load_images",
    "load_model",
    "load_tokens",
    "matched_damage",
    "measure_collapse",
    "measure_mixing",
    "mixing_by_length",
    "mixing_conditions",
    "named_tokens",
    "norm_and_mass",
    "patch_bos",
    "path_sums",
    "perturbation_spread",
    "plant_sinks",
    "primary_weakening",
    "reading_heads",
    "register_tokens",
    "reproduce",
    "restrict_attention",
    "run_experiment",
    "sample_images",
    "sink_anatomy",
    "sink_levels",
    "sink_scores",
    "swap_attention",
    "sweep_ablation",
    "token_loss",
    "trace_sinks",
    "write_decomposition",
    "write_experiment",
    "write_images",
    "write_mixing",
    "write_report",
    "write_scan",
    "write_sinks",
    "write_trace",
    "writer_alignment",
    "writer_neurons",
    "writer_subspace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sinklens' has no attribute {name!r}")
    value = getattr(import_module(f"sinklens.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
