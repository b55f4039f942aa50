"""Wong et al. 2025 (2512.22213): levels of secondary sinks, what writes them, norm against mass and lifetime."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from sinklens.core.errors import BadInputError
from sinklens.core.intervals import MIN_DOCUMENTS
from sinklens.find.sinks import find_sinks
from sinklens.inputs.tokens import Tokens
from sinklens.reproductions.claims import Above, Below, Claim, Entry, Equals, Quantity, Setting, any_decoder, measured
from sinklens.trace.claims import COVER, LEVELS, norm_and_mass, sink_levels, writer_alignment
from sinklens.trace.trace import trace_sinks

PAPER = "Wong et al. 2025, On the Existence and Behaviour of Secondary Attention Sinks (2512.22213)"


def from_row(row: dict[str, Any], name: str = "") -> Quantity:
    """A number of a verdict table as a quantity."""
    return Quantity(name or row["quantity"], row["mean"], row["low"], row["high"], row["documents"])


def _text(model: Any, setting: Setting) -> Tokens:
    return setting.text(model, 24, 256)


def _levels(model: Any, setting: Setting) -> list[Quantity]:
    sinks = find_sinks(model, _text(model, setting))
    verdict = sink_levels(sinks)
    numbers = {row["quantity"]: row for row in verdict.numbers.to_dict("records")}
    documents = [sinks.tokens.documents[s.sequence] for s in sinks.secondary]
    n_layers = sinks.info["capabilities"]["n_layers"]
    onsets = torch.tensor([s.onset / n_layers for s in sinks.secondary], dtype=torch.float64)
    commonest = Counter(s.onset for s in sinks.secondary).most_common(1)[0][0]
    return [
        _count("levels", numbers["levels"]["mean"], documents),
        from_row(numbers["covered"], "share of the secondary sinks in levels"),
        from_row(numbers["same level"], "chance that sinks of two documents share a level"),
        _count("onset of the commonest secondary sink, attention's layer", float(commonest), documents),
        measured("mean relative onset", onsets, documents),
    ]


def _count(name: str, value: float, documents: list[int]) -> Quantity:
    """A count or a mode of all sinks: itself, but only where an interval could stand (16 documents)."""
    seen = len(set(documents))
    return Quantity(name, value, documents=seen, exact=seen >= MIN_DOCUMENTS)


LEVELS_ENTRY = Entry(
    name="wong-levels",
    title="Secondary sinks come in few levels",
    source=f"{PAPER}, abstract and shipped detections",
    protocol="Sinks by the direction of the hidden state (|cos| to BOS above 0.9), on models' own solutions of AIME24; "
    "level = (first layer, lifetime). QwQ-32B has 3 levels, Qwen3-14B 6; Qwen3-4B-Base (16, 18) in 21 of 21.",
    deviations=(
        "sinks by attention (find_sinks), because the published detector flags nearly everything or nothing on small "
        "models; a sink seen by attention in layer l was written in block l - 1",
        "ordinary text in the place of generated solutions of mathematical problems",
        "levels that differ by 1 in both numbers count as one, and a level holds at least 5 % of the sinks",
    ),
    originals=("qwen3-4b-base", "deepseek-r1-distill-qwen-14b"),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(
        Claim("levels", "few levels", Below(LEVELS + 0.5), "3 and 6", "D"),
        Claim("share of the secondary sinks in levels", "levels are deterministic", Above(COVER), "21 of 21", "A"),
        Claim(
            "onset of the commonest secondary sink, attention's layer",
            "the layer after the one that writes",
            Equals({"qwen3-4b-base": 17.0, "deepseek-r1-distill-qwen-14b": 23.0}, 1.0),
            "",
            "A",
        ),
        Claim("mean relative onset", "they arise in middle layers", Above(0.25), "0.44 to 0.46", "A"),
    ),
    unfit=any_decoder,
    measure=_levels,
)


def _writers(model: Any, setting: Setting) -> list[Quantity]:
    tokens = _text(model, setting)
    sinks = find_sinks(model, tokens)
    if not sinks.secondary:
        raise BadInputError("there is no secondary sink in these texts")
    trace = trace_sinks(model, tokens, sinks.where(kind="secondary"), causal=False)
    alignment = writer_alignment(trace)
    norm = norm_and_mass(trace)
    chosen = ("cosine", "same_id_cosine", "difference", "cosines above 0.9")
    return [
        *(from_row(alignment.number(name), f"writer's output: {name}") for name in chosen),
        *(from_row(row) for row in norm.numbers.to_dict("records") if row["quantity"].startswith("Spearman")),
    ]


WRITERS = Entry(
    name="wong-writers",
    title="An MLP writes a secondary sink along the primary's direction; its norm sets mass and lifetime",
    source=f"{PAPER}, abstract, claims 1 and 2; code and printed outputs",
    protocol="The output of the MLP that writes a secondary sink against the primary's direction (DeepSeek-R1-Distill-"
    "Qwen-14B, layer 22: cosine of MLP outputs to BOS above 0.98), and its norm against sink score and lifetime.",
    deviations=(
        "the direction is the primary's in other documents, at the layer where the sink is strongest",
        "the writer is the MLP with the largest share of the sink's stream along it",
        "rank correlations within the writing layer, over sinks only",
    ),
    originals=("deepseek-r1-distill-qwen-14b",),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(
        Claim("writer's output: cosine", "aligned with the primary", Above(0.5), "above 0.98", "A"),
        Claim("writer's output: difference", "the same token elsewhere is not", Above(0.0), "by construction", "A"),
        Claim("Spearman of norm and mass", "the norm sets the sink score", Above(0.0), "abstract", "D"),
        Claim("Spearman of norm and life", "the norm sets the lifetime", Above(0.0), "abstract", "D"),
    ),
    unfit=any_decoder,
    measure=_writers,
)

ENTRIES = (LEVELS_ENTRY, WRITERS)
