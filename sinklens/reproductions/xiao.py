"""Xiao et al. 2024, StreamingLLM (2309.17453): BERT attends to [SEP]; a rolling cache needs the first tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinklens.find.scores import sink_scores
from sinklens.inputs.load import load_tokens
from sinklens.inputs.tokens import Tokens
from sinklens.inputs.vocabulary import vocabulary
from sinklens.reproductions.claims import Above, Claim, Entry, Quantity, Setting, exactly, measured, missing
from sinklens.reproductions.originals import Subject
from sinklens.streaming.loss import streaming_loss

PAPER = "Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks (2309.17453)"
SENTENCE = "StreamingLLM can work on infinite-length texts without compromising efficiency and performance."
CACHE, FIRST = 64, 4


def last_token_attention(model: Any, tokens: Tokens) -> Tensor:
    """Mean attention on each sequence's last token, [sequence, layer, head]."""
    alpha = sink_scores(model, tokens).alpha
    return torch.stack([alpha[b, ..., int(n) - 1] for b, n in enumerate(tokens.lengths.tolist())]).double()


def _halves(attention: Tensor) -> Tensor:
    """The deeper half of the layers minus the other half, [...] from [..., layer]."""
    middle = attention.shape[-1] // 2
    return attention[..., middle:].mean(-1) - attention[..., :middle].mean(-1)


def _bert(model: Any, setting: Setting) -> list[Quantity]:
    found: list[Quantity] = []
    if vocabulary(model).tokenizer is None:
        why = "the model came without a tokenizer, so it cannot read the sentence"
        found += [missing(f"sentence, {which}: deeper half minus the other", why) for which in ("head 0", "all heads")]
    else:
        attention = last_token_attention(model, load_tokens(model, [SENTENCE]))[0]
        by_layer = attention[:, 0]
        found += [exactly(f"sentence, head 0: attention on [SEP], layer {n}", float(v)) for n, v in enumerate(by_layer)]
        found.append(exactly("sentence, head 0: deeper half minus the other", float(_halves(by_layer))))
        found.append(exactly("sentence, all heads: deeper half minus the other", float(_halves(attention.mean(-1)))))
    text = setting.text(model, 24, 64)
    attention = last_token_attention(model, text).mean(-1)
    return [
        *found,
        measured("texts, all heads: deeper half minus the other", _halves(attention), text.documents),
        measured("texts, all heads: largest layer's attention on [SEP]", attention.max(1).values, text.documents),
    ]


def _is_bert(subject: Subject) -> str:
    if subject.facts.causal:
        return "the model is a decoder: the claim is about [SEP] at the end of an encoder's text"
    if not subject.facts.architecture.startswith("Bert"):
        return f"the model is no BERT ({subject.facts.architecture})"
    return ""


BERT = Entry(
    name="xiao-bert-sep",
    title="BERT: [SEP] is a sink in the deeper layers",
    source=f"{PAPER}, appendix H",
    protocol=f"BERT-base-uncased reads '{SENTENCE}'; attention of head 0 in the 12 layers: [SEP] draws it, more so in "
    "deeper layers.",
    deviations=(
        "the paper shows a picture: what is judged is the mean attention on [SEP] in the deeper half of the layers "
        "minus the other half",
        "head 0 of another BERT is another head, so there all heads are judged, on the sentence and on 24 texts",
    ),
    originals=("bert-base-uncased",),
    stand_ins=("minilm-l6",),
    claims=(
        Claim(
            "sentence, head 0: deeper half minus the other",
            "head 0: more attention on [SEP] in deeper layers",
            Above(0.0),
            "appendix H, picture",
            "C",
            lambda subject: (
                ""
                if subject.original == "bert-base-uncased"
                else f"head 0 of {subject.name} is not head 0 of bert-base-uncased"
            ),
        ),
        Claim(
            "sentence, all heads: deeper half minus the other",
            "more attention on [SEP] in deeper layers",
            Above(0.0),
            "appendix H, picture",
            "C",
        ),
        Claim(
            "texts, all heads: deeper half minus the other",
            "so it is in other texts",
            Above(0.0),
            "appendix H, read as a general claim",
            "C",
        ),
    ),
    unfit=_is_bert,
    measure=_bert,
)


def _windows(model: Any, setting: Setting) -> list[Quantity]:
    tokens = setting.text(model, 16, 4 * CACHE)
    evicted = slice(CACHE, None)  # before the cache is full nothing is evicted
    caches = {"full": (0, None), "window": (0, CACHE), "one": (1, CACHE - 1), "first": (FIRST, CACHE - FIRST)}
    loss = {}
    for name, (sinks, recent) in caches.items():
        losses = streaming_loss(model, tokens, sinks=sinks, recent=recent).losses
        loss[name] = losses[:, evicted].double().nanmean(1)
    words = {"window": f"0 + {CACHE}", "one": f"1 + {CACHE - 1}", "first": f"{FIRST} + {CACHE - FIRST}"}
    found = [measured("loss, full attention", loss["full"], tokens.documents)]
    found += [
        measured(f"loss above full attention, cache {words[n]}", loss[n] - loss["full"], tokens.documents)
        for n in words
    ]
    saved = (loss["window"] - loss["first"]) - 0.5 * (loss["window"] - loss["full"])
    return [
        *found,
        measured("loss saved by 4 first tokens", loss["window"] - loss["first"], tokens.documents),
        measured("loss saved by 4 first tokens, above half of the window's cost", saved, tokens.documents),
    ]


def _rotary(subject: Subject) -> str:
    if not subject.facts.causal:
        return "the model is no decoder"
    return "" if subject.facts.rope else "positions in the cache need rotary embeddings"


WINDOWS = Entry(
    name="xiao-windows",
    title="A window alone fails; four first tokens repair it",
    source=f"{PAPER}, tables 1 and 2",
    protocol="Perplexity with a rolling cache of the same size, of recent tokens alone and with 1, 2, 4 or 8 first "
    "tokens; positions are counted in the cache. Llama-2-7B, 4096 tokens: 3359.95 / 11.88 / 10.51 / 9.59 / 9.54; "
    "Pythia-12B, 2048: 21.62 / 11.95 / 12.09 / 12.09 / 12.02.",
    deviations=(
        "a cache of 64 tokens and texts of 256, in the place of 2048 or 4096 and 400,000 tokens of PG19; so the "
        "printed perplexities are no target and directions are judged",
        "losses at positions before the cache is full are left out",
    ),
    originals=("llama-2-7b-hf", "pythia-12b"),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(
        Claim(
            f"loss above full attention, cache 0 + {CACHE}",
            "a window alone loses much",
            Above(0.5),
            "log(3359.95 / 9.54) = 5.9 nats; log(21.62 / 12.02) = 0.59 nats",
            "C",
        ),
        Claim("loss saved by 4 first tokens", "first tokens help", Above(0.0), "3359.95 to 9.59", "C"),
        Claim(
            "loss saved by 4 first tokens, above half of the window's cost",
            "four first tokens repair most of it",
            Above(0.0),
            "3359.95 to 9.59",
            "C",
        ),
    ),
    unfit=_rotary,
    measure=_windows,
)

ENTRIES = (BERT, WINDOWS)
