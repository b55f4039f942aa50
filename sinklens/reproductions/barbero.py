"""Barbero et al. 2025 (2504.02732): sink rates, what a missing BOS costs, how far the exchange of a word spreads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sinklens.core.errors import BadInputError
from sinklens.experiment.bos_variants import bos_variants
from sinklens.find.scores import sink_scores
from sinklens.inputs.load import load_tokens
from sinklens.inputs.vocabulary import vocabulary
from sinklens.mixing.perturbation import perturbation_spread
from sinklens.mixing.perturbation_result import Perturbation
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
    missing,
)
from sinklens.reproductions.gu import per_sequence
from sinklens.reproductions.originals import Subject

PAPER = "Barbero et al. 2025, Why do LLMs attend to the first token? (2504.02732)"
STRICT, EPSILON, LENGTH = 0.8, 0.3, 64
PARAGRAPH_CLAIM = "paragraph, absolute change: without over with BOS, mean over blocks"
PARAGRAPH = (
    "William Shakespeare was an English playwright, poet and actor. He is widely regarded as the greatest writer in "
    "the English language and the world's pre-eminent dramatist. He is often called England's national poet and the "
    "Bard of Avon. His extant works, including collaborations, consist of some 39 plays, 154 sonnets, and three long "
    "narrative poems."
)


def _sink_rate(model: Any, setting: Setting) -> list[Quantity]:
    tokens = setting.text(model, 170, LENGTH)
    scores = sink_scores(model, tokens, positions=0)
    return [
        measured(f"sink rate, epsilon {epsilon}", per_sequence(scores, 0, epsilon), tokens.documents)
        for epsilon in (STRICT, EPSILON)
    ]


SINK_RATE = Entry(
    name="barbero-sink-rate",
    title="Sink rate at epsilon 0.8",
    source=f"{PAPER}, table 1",
    protocol="LLaMA 3.1 on the first 64 tokens of 170 prompts of many domains: the share of heads whose importance of "
    "the first token exceeds 0.8 (8B 45.97, 70B 73.49, 405B 78.29).",
    deviations=(
        "python-docs in the place of 170 prompts of many domains: a printed number counts as met within 5 points",
        "that the rate grows with the model's size needs the whole family and is not judged",
    ),
    originals=("llama-3.1-8b",),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(Claim("sink rate, epsilon 0.8", "the printed rate", Equals({"llama-3.1-8b": 0.4597}, 0.05), "", "C"),),
    unfit=any_decoder,
    measure=_sink_rate,
)


def _has_bos(subject: Subject) -> str:
    return "" if subject.bos else "the model saw no BOS in training, so another first token takes the sink"


def _no_bos(subject: Subject) -> str:
    return "the model saw a BOS before every text in training" if subject.bos else ""


def _bos(model: Any, setting: Setting) -> list[Quantity]:
    tokens = setting.text(model, 32, LENGTH, prepend_bos=None if vocabulary(model).bos_id is None else True)
    variants = bos_variants(model, tokens)
    losses = {name: torch.stack([row.nanmean() for row in rows]) for name, rows in variants.losses(model).items()}
    rates: dict[str, Tensor] = {}
    found: list[Quantity] = []
    for name, words in (("keep", "with the first token"), ("removed", "without it")):
        rates[name] = per_sequence(sink_scores(model, variants[name], positions=0), 0, EPSILON)
        found.append(measured(f"sink rate {words}", rates[name], tokens.documents))
        found.append(measured(f"loss {words}", losses[name], tokens.documents))
    return [
        *found,
        measured("loss: without minus with", losses["removed"] - losses["keep"], tokens.documents),
        measured("sink rate: without minus half of with", rates["removed"] - rates["keep"] / 2, tokens.documents),
        measured("sink rate: without minus with", rates["removed"] - rates["keep"], tokens.documents),
    ]


# Perplexity on wikitext with and without BOS, from the result files of Owen et al. 2025 (2503.22329).
_PERPLEXITY = {
    "gpt2": (30.42, 30.22),
    "llama-3.2-1b": (9.08, 9.07),
    "gemma-2-2b": (8.05, 57.14),
    "gemma-7b": (6.40, 3.1e8),
}

BOS = Entry(
    name="barbero-bos",
    title="A missing BOS",
    source=f"{PAPER}, tables 2 and 3; perplexities of Owen et al. 2025 (2503.22329), result files",
    protocol="Text with and without its BOS. Table 2 trains models of 120M parameters with and without a BOS fixed at "
    "the first position; table 3 compares Gemma 7B on benchmarks with and without (ARC-E 80.77 to 28.49, HellaSwag "
    "80.61 to 27.35). Both losses are of the same tokens.",
    deviations=(
        "the models of table 2 were not released: its claims are judged as directions on models that were trained "
        "with a BOS, and on models that were not",
        "losses in the place of table 3's benchmarks, which need an evaluation harness; the printed numbers are the "
        "logarithms of the ratio of Owen et al.'s perplexities on wikitext, in windows of 4096 tokens, not 64",
        "the BOS is the tokenizer's; where it has none, the text's own first token",
    ),
    originals=tuple(_PERPLEXITY),
    stand_ins=("gemma3-270m", "smollm2-135m"),
    claims=(
        Claim(
            "sink rate: without minus half of with",
            "trained with a fixed BOS, a model has hardly a sink without it",
            Below(0.0),
            "90.84 % to 0.05 %, 90.56 % to 0.00 % (table 2)",
            "C",
            _has_bos,
        ),
        Claim(
            "loss: without minus with",
            "trained with a fixed BOS, a model needs it",
            Above(0.1),
            "2.69 to 7.56, 2.67 to 7.78 (table 2)",
            "C",
            _has_bos,
        ),
        Claim(
            "loss: without minus with",
            "trained without, a model does not miss it",
            Below(0.1),
            "2.69 to 2.70 (table 2)",
            "C",
            _no_bos,
        ),
        Claim(
            "sink rate: without minus half of with",
            "trained without, the sink forms on any first token",
            Above(0.0),
            "65.10 % to 65.15 % (table 2)",
            "C",
            _no_bos,
        ),
        Claim(
            "loss: without minus with",
            "log of the ratio of perplexities without and with BOS",
            Equals({name: math.log(without / with_) for name, (with_, without) in _PERPLEXITY.items()}, 0.1, 0.25),
            "",
            "A",
        ),
    ),
    unfit=any_decoder,
    measure=_bos,
)


def _one_word(words: Any, prepend: bool) -> tuple[int, int, int]:
    """Where "greatest" stands in the paragraph, and the ids of it and of "best"."""
    prefix, suffix = words.special_tokens(prepend)
    body = words.body(PARAGRAPH, prefix, suffix)
    old, new = (words.encode(word) for word in (" greatest", " best"))
    if len(old) != 1 or len(new) != 1 or body.count(old[0]) != 1:
        raise BadInputError("the tokenizer has no single tokens for ' greatest' and ' best', so lengths would differ")
    return len(prefix) + body.index(old[0]), old[0], new[0]


def _mean_change(found: Perturbation, name: str, shift: int) -> Tensor:
    """Per swap and block the mean change of the tokens behind it; ``shift``: tokens in front that are not counted."""
    changes = getattr(found, name)[0].double()
    rows = []
    for n, (_, position, _, _) in enumerate(found.swaps):
        rows.append(changes[n][:, max(position + 1, shift + 1) :].nanmean(-1))
    return torch.stack(rows)


def _perturbation(model: Any, setting: Setting) -> list[Quantity]:
    words = vocabulary(model)
    found: list[Quantity] = []
    spread: dict[bool, dict[str, Tensor]] = {}
    if words.tokenizer is None:
        found.append(missing(PARAGRAPH_CLAIM, "the model came without a tokenizer, so it cannot read the paragraph"))
    else:
        for bos in (True, False):
            position, _, new = _one_word(words, bos)
            tokens = load_tokens(model, [PARAGRAPH], prepend_bos=bos)
            result = perturbation_spread(model, tokens, sinks=(0,), swaps=[(0, position, new)])
            spread[bos] = {name: _mean_change(result, name, 0)[0] for name in ("absolute", "relative")}
        for name in ("absolute", "relative"):
            ratio = spread[False][name] / spread[True][name]
            found.append(
                exactly(f"paragraph, {name} change: without over with BOS, mean over blocks", float(ratio.mean()))
            )
            found.append(exactly(f"paragraph, {name} change: without over with BOS, last block", float(ratio[-1])))
    return [*found, *_random_swaps(model, setting)]


def _random_swaps(model: Any, setting: Setting) -> list[Quantity]:
    """The same swaps of random tokens in the same texts with and without BOS."""
    options: dict[str, Any] = {"prepend_bos": True} if vocabulary(model).bos_id is not None else {}
    with_bos = setting.text(model, 16, LENGTH + 1, **options)
    without = bos_variants(model, with_bos)["removed"]
    swaps = perturbation_spread(model, without, sinks=(0,), n_swaps=4 * len(without), seed=setting.seed)
    moved = [(b, position + 1, new) for b, position, _, new in swaps.swaps]
    kept = perturbation_spread(model, with_bos, sinks=(0,), swaps=moved)
    ratio = (_mean_change(swaps, "relative", 0) / _mean_change(kept, "relative", 1)).log().mean(1)
    documents = [without.documents[b] for b, _, _, _ in swaps.swaps]
    return [measured("random swaps, relative change: log of without over with BOS", ratio, documents)]


PERTURBATION = Entry(
    name="barbero-perturbation",
    title="The exchange of a word spreads further without the sink",
    source=f"{PAPER}, figure 2",
    protocol="Gemma 7B reads a paragraph on Shakespeare in which 'greatest' becomes 'best', with and without <bos>; "
    "the distance of the hidden states to those of the unchanged text, by block and token.",
    deviations=(
        "the paper shows a picture: what is judged is the mean change of the tokens behind the word, over all blocks",
        "beside the paper's one exchange, 64 of random tokens in 16 texts, with an interval over documents",
        "one text has no interval, so its figures are judged as they are",
    ),
    originals=("gemma-7b",),
    stand_ins=("gemma3-270m", "smollm2-135m"),
    claims=(
        Claim(
            PARAGRAPH_CLAIM,
            "without <bos> the exchange changes the others more",
            Above(1.0),
            "figure 2",
            "C",
            _has_bos,
        ),
        Claim(
            "random swaps, relative change: log of without over with BOS",
            "so it is for any exchange",
            Above(0.0),
            "figure 2, read as a general claim",
            "C",
            _has_bos,
        ),
    ),
    unfit=any_decoder,
    measure=_perturbation,
)

ENTRIES = (SINK_RATE, BOS, PERTURBATION)
