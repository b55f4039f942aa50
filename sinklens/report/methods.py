"""What a report says about itself: methods with formulas, limits, references, how to repeat it."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from sinklens.bridge.capabilities import record
from sinklens.core.intervals import MIN_DOCUMENTS
from sinklens.models.catalogue import CATALOGUE
from sinklens.report.stages import STAGES, Material

FORMULAS = (
    ("Importance", "alpha_k = mean of A_ik over the queries i that may see k", "gu2025"),
    ("Sink rate", "share of (sequence, layer, head) with alpha_0 > 0.3", "gu2025"),
    ("Far importance", "beta_k = the same mean over queries with |i - k| >= 16, where there are 32 of them", ""),
    ("Active", "mean of beta over heads >= max(0.05, 3 x uniform share); a life is a run of active layers", ""),
    (
        "Kinds",
        "primary: shares the strongest lasting sink's life; secondary: begins or ends elsewhere",
        "wong2025",
    ),
    ("Partition", "o = sigma o_S + (1 - sigma) o_R, sigma = sigmoid(lse_S - lse_R), S the sinks, R the rest", ""),
    ("Ablation", "renormalize: o = o_R, the sink never was; zero: o = (1 - sigma) o_R, it writes nothing", "xiao2024"),
    ("Controls", "the same edit at as many ordinary tokens: random ones, or those of the most similar attention", ""),
    (
        "2x2",
        "o(K, V) = (1 - sigma K) o_R + sigma V o_S; mass part = ((f10 - f00) + (f11 - f01)) / 2, value part = "
        "((f01 - f00) + (f11 - f10)) / 2",
        "",
    ),
    ("Margin", "m = gap - log |R| - peakedness; gap = s_S - mean over R of s, by mean and own queries and keys", ""),
    (
        "Writers",
        "share = <out, u> / <x_ref, u>, u the primary's direction in other documents; proven where replacing the "
        "output moves the competitor-free margin by 1 nat and no control by 0.1",
        "wong2025",
    ),
    (
        "Mixing",
        "mix = sum over j < i not in S of |J_ij|^2, over the same sum with j = i; J = d block output / d embedding, by "
        "random probes",
        "barbero2025",
    ),
    (
        "Intervals",
        f"95 %, bootstrap-t over documents, 4999 resamples, from {MIN_DOCUMENTS} documents on",
        "hall1988",
    ),
)

BIBLIOGRAPHY = (files("sinklens.report") / "references.bib").read_text(encoding="utf-8")

NAMES = {
    "gu2025": "Gu et al. 2025",
    "xiao2024": "Xiao et al. 2024",
    "wong2025": "Wong et al. 2025",
    "barbero2025": "Barbero et al. 2025",
    "hall1988": "Hall 1988",
}


def formulas() -> list[dict[str, str]]:
    """Name, formula and source of what is measured."""
    return [{"name": name, "formula": formula, "source": NAMES.get(key, "")} for name, formula, key in FORMULAS]


def limits(m: Material) -> list[str]:
    """What the reader must not conclude."""
    facts: Any = record(m.model)
    told = [
        "Scan and kinds are correlational: they say where attention goes. What sinks do is said by the ablations and "
        "the 2x2 only, and each effect stands beside its control.",
        "Counts of sinks depend on a threshold and have no plateau; masses and the curve over thresholds belong to "
        "every count.",
        "A token is judged only where at least 32 queries see it from 16 or more tokens away, so the last 47 tokens of "
        "a causal text are not.",
    ]
    documents = len(set(m.tokens.documents))
    if documents < MIN_DOCUMENTS:
        told.insert(
            0,
            f"There are {documents} document(s), and intervals need {MIN_DOCUMENTS}: nothing here is told from chance.",
        )
    else:
        told.append(
            f"{documents} documents of one source, up to {int(m.tokens.lengths.max())} tokens each: other texts and "
            "longer contexts may differ."
        )
    if m["sinks"] is not None and m["sinks"].where(kind="undetermined") and facts.n_layers < 6:
        told.append(f"With {facts.n_layers} layers the kinds of sinks are not determined.")
    if facts.model in CATALOGUE and "4-bit" in CATALOGUE[facts.model].summary:
        told.append(
            "The weights are a 4-bit GGUF file, dequantised: numbers are those of these weights, not of the original "
            "checkpoint."
        )
    if m["decomposition"] is not None:
        told.append("The cell (0, 1) of the 2x2 is off the manifold: its weights sum to 1 + sigma.")
    if m["mixing"] is not None:
        measured = next(iter(m["mixing"].conditions.values())).tokens
        told.append(
            f"Jacobians are measured on {len(measured)} of the {len(m.tokens)} sequences, up to "
            f"{int(measured.lengths.max())} tokens of each, with {m.sizes.probes} probes per token."
        )
    return told


def preamble(name: str) -> str:
    """The lines before all others: the model and the text of this report."""
    return (
        "import sinklens as sl\n"
        "from sinklens.find.score_figures import layer_profile\n"
        "from sinklens.trace.figures import share_bars\n"
        "\n"
        f"model = sl.load_model({name!r})\n"
        'tokens = sl.Tokens.load("stages/tokens.safetensors")'
    )


def script(m: Material, name: str, calls: list[str]) -> str:
    """``reproduce.py``: everything again, from the model and the saved text, in the report's folder."""
    lines = [
        '"""Repeat this report\'s numbers and figures; run it in the report\'s folder."""',
        "",
        preamble(name),
        "",
        "# Each result may be read instead of computed, such as",
        '# scores = sl.SinkScores.load("stages/scores.safetensors")',
    ]
    for stage in STAGES:
        if stage.name in m.results:
            lines.append(stage.code(m))
    lines += ["", "figures = {"]
    lines += [f"    {call}," for call in calls]
    lines += ["}", "for name, figure in figures.items():", '    figure.write_html(f"{name}.html")', ""]
    return "\n".join(lines)
