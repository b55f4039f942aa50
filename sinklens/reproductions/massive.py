"""Sun et al. 2024 (2402.17762) and Owen et al. 2025 (2503.22329): massive activations set to zero and to their mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinklens.ablate.residual import ablate_residual, massive
from sinklens.core.errors import BadInputError
from sinklens.experiment.experiment import run_experiment
from sinklens.forward.states import block_inputs
from sinklens.inputs.tokens import Tokens
from sinklens.reproductions.claims import (
    Above,
    Below,
    Claim,
    Entry,
    Equals,
    Quantity,
    Setting,
    any_decoder,
    exactly,
    measured,
)
from sinklens.reproductions.originals import Subject

PAPER = "Sun et al. 2024, Massive Activations in Large Language Models (2402.17762)"


def first_massive_layer(states: list[Tensor]) -> int | None:
    """The first block (0-based) before which the first token's massive activation stands.

    Massive: above 100 times the median entry; there: at least half as large as it ever becomes.

    Args:
        states: per sequence, the first token's stream before every block, [layer, d_model].
    """
    sizes = torch.stack([s.abs().max(-1).values for s in states]).mean(0)
    for layer in range(len(sizes)):
        everywhere = all(bool(massive(s[layer]).any()) for s in states)
        if everywhere and float(sizes[layer]) >= float(sizes[1:].max()) / 2:
            return layer
    return None


def _measure(model: Any, setting: Setting) -> list[Quantity]:
    tokens: Tokens = setting.text(model, 16, 256)
    states = [block_inputs(model, tokens[b].trim())[:, 0].float().cpu() for b in range(len(tokens))]
    layer = first_massive_layer(states)
    if layer is None:
        raise BadInputError("the first token has no massive activation (an entry above 100 times the median)")
    here = torch.stack([s[layer] for s in states])
    size = here.abs()
    strict = ((size > 100) & (size > 1000 * size.median(1, keepdim=True).values)).any(1).double()
    edits = {
        "zero": ablate_residual(model, [0], "massive_zero", layers=[layer]),
        "mean": ablate_residual(model, [0], "massive_mean", layers=[layer], reference=tokens, allow_identity=True),
    }
    result = run_experiment(model, tokens, edits, controls=(), metrics=("loss",), most_scored=64, seed=setting.seed)
    zero, mean = (result.change("loss", name) for name in ("zero", "mean"))
    return [
        exactly("edited before block", float(layer)),
        measured("largest entry of the first token there", size.max(1).values.double(), tokens.documents),
        measured("share of texts that meet the strict criterion", strict, tokens.documents),
        measured("loss added by zero", zero, tokens.documents),
        measured("loss added by mean", mean, tokens.documents),
        measured("loss added by zero, above that by mean", zero - mean, tokens.documents),
    ]


# wikitext perplexities: original, set to zero, set to mean (result files of Owen et al.; BOS as the model has it).
_OWEN = {
    "gpt2": (30.22, 30.21, 30.21),
    "llama-2-7b-hf": (5.12, 8115.0, 5.13),
    "llama-3.2-1b": (9.08, 6249.0, 9.08),
    "llama-3.2-3b": (7.26, 18441.0, 7.26),
    "gemma-2-2b": (8.05, 101.7, 8.05),
}


def _logs(which: int) -> dict[str, float]:
    return {name: math.log(row[which] / row[0]) for name, row in _OWEN.items()}


def _gated(subject: Subject) -> str:
    """Owen et al.: catastrophic in Llama, Mistral, OLMo, Gemma; harmless in GPT-2, OPT, phi."""
    return "" if subject.facts.rope else "published as harmless in GPT-2, OPT and phi"


def _learned(subject: Subject) -> str:
    return "published as catastrophic in Llama, Mistral and Gemma" if subject.facts.rope else ""


ENTRY = Entry(
    name="massive-activations",
    title="Massive activations set to zero and to their mean",
    source=f"{PAPER}; Owen et al. 2025, A Refined Analysis of Massive Activations in LLMs (2503.22329), result files",
    protocol="Where the massive activation has just been written, its dimensions at its tokens are set to zero, or to "
    "their mean, in that one layer; perplexity on wikitext, c4 and pg19 (10 sequences of 4096 tokens).",
    deviations=(
        "only at the first token; dimensions above 100 times the median entry (the strict criterion, above 100 and "
        "above 1000 times the median, is reported beside it)",
        "means are those of the first token in the other texts; behind a BOS they are what stands there, so that the "
        "edit changes nothing by construction",
        "python-docs, 256 tokens, 64 scored predictions per text; printed numbers are logarithms of ratios of "
        "wikitext perplexities and count as met within 0.1 nats or a quarter",
    ),
    originals=tuple(_OWEN),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(
        Claim("loss added by zero", "log of the ratio of perplexities", Equals(_logs(1), 0.1, 0.25), "", "A"),
        Claim("loss added by mean", "log of the ratio of perplexities", Equals(_logs(2), 0.1), "", "A"),
        Claim("loss added by mean", "their mean does no harm", Below(0.1), "0.00 to 0.01 nats in 17 models", "A"),
        Claim(
            "loss added by zero",
            "zero is catastrophic in Llama, Mistral, Gemma",
            Above(1.0),
            "2.5 (Gemma-2-2B) to 15 (Mistral-7B) nats",
            "A",
            _gated,
        ),
        Claim(
            "loss added by zero",
            "zero is harmless in GPT-2",
            Below(0.1),
            "0.00 nats (GPT-2, OPT-6.7B, phi-2)",
            "A",
            _learned,
        ),
        Claim(
            "loss added by zero, above that by mean",
            "zero does more than mean",
            Above(0.0),
            "all but GPT-2",
            "A",
            _gated,
        ),
    ),
    unfit=any_decoder,
    measure=_measure,
)

ENTRIES = (ENTRY,)
