"""The stages of a report: each is one call of a public function, with the line that repeats it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sinklens as sl
from sinklens.ablate.partition import Mode
from sinklens.bridge.capabilities import record
from sinklens.find.lifetimes import KINDS
from sinklens.inputs.tokens import Tokens
from sinklens.report.budget import Sizes

MODES: tuple[Mode, ...] = ("zero", "renormalize")
REPLACEMENTS = ("same_id",)  # what the verdict on a writer needs


@dataclass(eq=False)
class Material:
    """What stages work on: the model, the text, what earlier stages found.

    Attributes:
        results: by stage; a stage that could not be done is absent.
        refused: by stage, why it could not be done.
        facts: by stage, numbers that stand in no result.
        parts: by stage, where it may keep finished parts.
    """

    model: Any
    tokens: Tokens
    sizes: Sizes
    seed: int
    progress: bool | None
    results: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, Path] = field(default_factory=dict)

    def __getitem__(self, stage: str) -> Any:
        return self.results.get(stage)


@dataclass(frozen=True)
class Stage:
    """One step.

    Attributes:
        name: also the name of its result in ``stages/`` and of the variable in the code.
        doing: what it does, for the line that says so.
        needs: the stages whose results it takes.
        run: does it; returns the result and facts.
        result: the result's class, which has ``save`` and ``load``.
        code: the lines that repeat it.
        forwards: about how many forwards of the whole text it costs.
    """

    name: str
    doing: str
    needs: tuple[str, ...]
    run: Callable[[Material], tuple[Any, dict[str, Any]]]
    result: Any
    code: Callable[[Material], str]
    forwards: Callable[[Material], float]


def _scores(m: Material) -> tuple[Any, dict[str, Any]]:
    return sl.sink_scores(m.model, m.tokens, progress=m.progress), {}


def _sinks(m: Material) -> tuple[Any, dict[str, Any]]:
    return sl.find_sinks(m.model, m.tokens, scores=m["scores"], progress=m.progress), {}


def _experiment(m: Material) -> tuple[Any, dict[str, Any]]:
    found = m["sinks"]
    if not len(found):
        raise sl.BadInputError("no sink was found, so there is nothing to ablate")
    edits = {
        f"{kind} sinks, {mode}": sl.ablate_sinks(m.model, found.where(kind=kind), mode)
        for kind in KINDS
        for mode in MODES
        if len(found.where(kind=kind))
    }
    return sl.run_experiment(
        m.model, m.tokens, edits, controls=m.sizes.controls, sinks=found, seed=m.seed, metrics=("loss", "kl"),
        resume=m.parts["experiment"], progress=m.progress,
    ), {}  # fmt: skip


def _decomposition(m: Material) -> tuple[Any, dict[str, Any]]:
    if not len(m["sinks"]):
        raise sl.BadInputError("no sink was found, so there is nothing to take apart")
    return sl.decompose_sinks(m.model, m.tokens, m["sinks"], seed=m.seed, progress=m.progress), {}


def _trace(m: Material) -> tuple[Any, dict[str, Any]]:
    if not len(m["sinks"]):
        raise sl.BadInputError("no sink was found, so there is no writer to look for")
    count = m.sizes.reference[0]
    try:
        reference = sl.load_tokens(m.model, "python-docs", n_seqs=count, seq_len=_reference_length(m))
    except sl.BadInputError:  # a model without a tokenizer
        reference = None
    found = sl.trace_sinks(
        m.model, m.tokens, m["sinks"], reference=reference, replacements=REPLACEMENTS, causal=m.sizes.causal,
        most_proven=m.sizes.most_proven, seed=m.seed, progress=m.progress,
    )  # fmt: skip
    return found, {"reference": reference is not None}


def _reference_length(m: Material) -> int:
    return min(m.sizes.reference[1], record(m.model).context or m.sizes.reference[1])


def _neurons(m: Material) -> tuple[Any, dict[str, Any]]:
    return sl.trace.writer_neurons(m.model, m["trace"].part(_first_documents(m)), seed=m.seed, progress=m.progress), {}


def _first_documents(m: Material) -> list[int]:
    """The documents of the sequences whose writers are split into neurons."""
    return sorted(set(m.tokens.documents[: m.sizes.split_seqs]))


def _mixing(m: Material) -> tuple[Any, dict[str, Any]]:
    few = m["sinks"].cut(_mixed(m), _mixed_columns(m))
    conditions = sl.mixing.mixing_conditions(m.model, few, seed=m.seed)
    found = sl.compare_mixing(
        m.model, few.tokens, conditions.edits, sinks=few if len(few) else None, probes=m.sizes.probes,
        most=m.sizes.mixing_tokens, seed=m.seed, progress=m.progress,
    )  # fmt: skip
    return found, {"losses": conditions.losses}


def _mixed(m: Material) -> range:
    """The sequences whose Jacobians are measured."""
    return range(min(m.sizes.mixing_seqs, len(m.tokens)))


def _mixed_columns(m: Material) -> int:
    """So many of their tokens; in an encoder a text that is cut is another text, so some are drawn from the whole."""
    longest = int(m.tokens.lengths.max())
    return min(m.sizes.mixing_tokens, longest) if record(m.model).causal else longest


def _experiment_code(m: Material) -> str:
    return (
        "edits = {\n"
        '    f"{kind} sinks, {mode}": sl.ablate_sinks(model, sinks.where(kind=kind), mode)\n'
        f"    for kind in {KINDS!r}\n"
        f"    for mode in {MODES!r}\n"
        "    if len(sinks.where(kind=kind))\n"
        "}\n"
        f"experiment = sl.run_experiment(\n    model, tokens, edits, controls={m.sizes.controls!r}, sinks=sinks, "
        f'seed={m.seed}, metrics=("loss", "kl")\n)'
    )


def _trace_code(m: Material) -> str:
    count, length = m.sizes.reference[0], _reference_length(m)
    given = f'sl.load_tokens(model, "python-docs", n_seqs={count}, seq_len={length})'
    return (
        f"reference = {given if m.facts['trace']['reference'] else None}\n"
        f"trace = sl.trace_sinks(\n    model, tokens, sinks, reference=reference, replacements={REPLACEMENTS!r}, "
        f"causal={m.sizes.causal},\n    most_proven={m.sizes.most_proven}, seed={m.seed}\n)"
    )


def _mixing_code(m: Material) -> str:
    return (
        f"few = sinks.cut({_mixed(m)!r}, {_mixed_columns(m)})\n"
        f"conditions = sl.mixing.mixing_conditions(model, few, seed={m.seed})\n"
        "mixing = sl.compare_mixing(\n    model, few.tokens, conditions.edits, sinks=few if len(few) else None, "
        f"probes={m.sizes.probes},\n    most={m.sizes.mixing_tokens}, seed={m.seed}\n)"
    )


def _same(value: Any) -> Callable[[Material], Any]:
    """What does not depend on the model or the text."""
    return lambda _: value


STAGES = (
    Stage(
        "scores", "scan: attention of every head on every token", (), _scores, sl.SinkScores,
        _same("scores = sl.sink_scores(model, tokens)"), _same(1.0),
    ),
    Stage(
        "sinks", "find: which tokens are sinks, of which kind", ("scores",), _sinks, sl.SinkMap,
        _same("sinks = sl.find_sinks(model, tokens, scores=scores)"), _same(0.0),
    ),
    Stage(
        "experiment", "ablate: the sinks taken away, beside controls", ("sinks",), _experiment,
        sl.experiment.Experiment,
        _experiment_code, lambda m: 1.6 * (1 + len(MODES) * _n_kinds(m) * (1 + len(m.sizes.controls))),
    ),
    Stage(
        "decomposition", "decompose: why the heads look there, key or value", ("sinks",), _decomposition,
        sl.decompose.SinkDecomposition,
        lambda m: f"decomposition = sl.decompose_sinks(model, tokens, sinks, seed={m.seed})",
        _same(12.0),
    ),
    Stage(
        "trace", "trace: who writes and who erases them", ("sinks",), _trace, sl.trace.SinkTrace,
_trace_code,
        _same(20.0),
    ),
    Stage(
        "neurons", "trace: through which neurons", ("trace",), _neurons, sl.trace.Neurons,
        lambda m: f"neurons = sl.trace.writer_neurons(model, trace.part({_first_documents(m)}), seed={m.seed})",
        _same(6.0),
    ),
    Stage(
        "mixing", "mix: how far tokens bleed into each other", ("sinks",), _mixing, sl.mixing.MixingComparison,
        _mixing_code, _same(30.0),
    ),
)  # fmt: skip


def _n_kinds(m: Material) -> int:
    return sum(len(m["sinks"].where(kind=kind)) > 0 for kind in KINDS) if m["sinks"] is not None else 1
