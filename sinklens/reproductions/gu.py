"""Gu et al. 2025 (2410.10781): sink rates, position vectors swapped, norms and angles of the first token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinklens.attention.run import collect
from sinklens.bridge.adapters import attention_hook, block_output, by_head, scored_points
from sinklens.bridge.capabilities import capabilities
from sinklens.find.anatomy import sink_anatomy
from sinklens.find.scores import SinkScores, sink_scores
from sinklens.find.sinks import find_sinks
from sinklens.inputs.load import load_tokens
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
    measured,
    missing,
    torch_ratio,
)
from sinklens.reproductions.originals import Subject

PAPER = "Gu et al. 2025, When Attention Sink Emerges in Language Models (2410.10781)"
EPSILON, LENGTH, SEQUENCES = 0.3, 64, 100
FEW_QUERIES = 16  # positions seen by fewer queries have an alpha that is mostly their own
ANGLE = "cosine of query and key, above the others'"
SIZE = "norm product of query and key, above the others', as a share"
PLACES = (5, 10, 15, 20, 25, 30)  # 1-based, as printed


def per_sequence(scores: SinkScores, position: int, epsilon: float) -> Tensor:
    """Each sequence's share of heads with a sink at the position."""
    return (scores.alpha[..., position] > epsilon).double().mean((1, 2))


def _sink_rates(model: Any, setting: Setting) -> list[Quantity]:
    natural = setting.text(model, SEQUENCES, LENGTH)
    options: dict[str, Any] = {"n_seqs": len(natural), "seq_len": LENGTH, "seed": setting.seed, "prepend_bos": False}
    rates: dict[str, Tensor] = {}
    found: list[Quantity] = []
    for context, tokens in (
        ("natural", natural),
        ("random", load_tokens(model, "random", **options)),
        ("repeat", load_tokens(model, "repeat", **options)),
    ):
        scores = sink_scores(model, tokens)
        rates[context] = per_sequence(scores, 0, EPSILON)
        found.append(measured(f"sink rate, {context}", rates[context], tokens.documents))
        if context == "natural":
            others = (scores.alpha[..., 1 : LENGTH - FEW_QUERIES] > EPSILON).double().mean((1, 2))
            second = others[:, int(others.mean(0).argmax())]
            found.append(measured("sink rate above the next position's", rates[context] - second, natural.documents))
    half = rates["random"] - rates["natural"] / 2
    return [*found, measured("sink rate, random, above half of natural", half, natural.documents)]


def _relative_positions(subject: Subject) -> str:
    return (
        "the claim is about relative positions and this model adds position vectors" if not subject.facts.rope else ""
    )


def _absolute_positions(subject: Subject) -> str:
    return "" if subject.learned_positions else "the claim is about models that add position vectors"


_TABLE_1 = {
    "natural": {"gpt2-xl": 0.7700, "mistral-7b-v0.1": 0.9749, "llama-2-7b-hf": 0.9247, "meta-llama-3-8b": 0.9902},
    "random": {"gpt2-xl": 0.7029, "mistral-7b-v0.1": 0.7521, "llama-2-7b-hf": 0.9013, "meta-llama-3-8b": 0.9123},
    "repeat": {"gpt2-xl": 0.6228, "mistral-7b-v0.1": 0.0, "llama-2-7b-hf": 0.0, "meta-llama-3-8b": 0.0},
}

SINK_RATES = Entry(
    name="gu-sink-rates",
    title="Sink rates on natural, random and repeated tokens",
    source=f"{PAPER}, table 1",
    protocol="Sink_1 at epsilon 0.3 over 100 sequences of 64 tokens: the share of (sequence, layer, head) whose mean "
    "attention on the first token exceeds 0.3. Random: 64 ids of the vocabulary; repeat: one id 64 times.",
    deviations=(
        "natural text: python-docs in the place of the Pile, so a printed number counts as met within 5 points",
        "natural text begins as the tokenizer has it (BOS where it adds one); random and repeated ids have no BOS",
    ),
    originals=tuple(_TABLE_1["natural"]),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(
        *(
            Claim(f"sink rate, {name}", f"{name}: the printed rate", Equals(values, 0.05), "", "C")
            for name, values in _TABLE_1.items()
        ),
        Claim(
            "sink rate above the next position's",
            "the first token is the sink, no other position is",
            Above(0.0),
            "section 3.2",
            "C",
        ),
        Claim(
            "sink rate, random, above half of natural",
            "sinks need no meaning: most stay on random tokens",
            Above(0.0),
            "0.70 of 0.77, 0.75 of 0.97, 0.90 of 0.92, 0.91 of 0.99",
            "C",
        ),
        Claim(
            "sink rate, repeat",
            "with relative positions repeated tokens have no sink",
            Below(0.01),
            "0.00 in Mistral-7B, LLaMA2-7B, LLaMA3-8B",
            "C",
            _relative_positions,
        ),
        Claim(
            "sink rate, repeat",
            "with learned positions the sink survives repeated tokens",
            Above(0.3),
            "0.6228 in GPT2-XL",
            "C",
            _absolute_positions,
        ),
    ),
    unfit=any_decoder,
    measure=_sink_rates,
)


def moved_positions(t: int, swap: bool) -> Any:
    """The hook that puts p_t (1-based) in the place of p_1 and, with ``swap``, p_1 in the place of p_t."""

    def hook(vectors: Tensor, hook: Any) -> Tensor:
        new = vectors.clone()
        new[:, 0] = vectors[:, t - 1]
        if swap:
            new[:, t - 1] = vectors[:, 0]
        return new

    return hook


def _position_swap(model: Any, setting: Setting) -> list[Quantity]:
    n_seqs = setting.n_seqs or SEQUENCES
    tokens = load_tokens(model, "repeat", n_seqs=n_seqs, seq_len=LENGTH, seed=setting.seed, prepend_bos=False)
    none = per_sequence(sink_scores(model, tokens), 0, EPSILON)
    found = [measured("Sink_1, unedited", none, tokens.documents)]
    for swap, name in ((False, "replace"), (True, "swap")):
        for t in PLACES:
            with model.hooks(fwd_hooks=[("pos_embed.hook_out", moved_positions(t, swap))]):
                scores = sink_scores(model, tokens, backend="hooks")
            first, there = (per_sequence(scores, p, EPSILON) for p in (0, t - 1))
            found += [
                measured(f"Sink_1, {name} t={t}", first, tokens.documents),
                measured(f"Sink_t, {name} t={t}", there, tokens.documents),
                measured(f"Sink_1 below half of unedited, {name} t={t}", none / 2 - first, tokens.documents),
            ]
            if swap:
                found.append(measured(f"Sink_t above Sink_1, swap t={t}", there - first, tokens.documents))
    return found


_REPLACE = {5: 0.0020, 10: 0.0236, 15: 0.0773, 20: 0.1063, 25: 0.1097, 30: 0.1021}
_SWAP = {
    5: (0.0144, 0.5763),
    10: (0.0373, 0.5448),
    15: (0.0678, 0.5281),
    20: (0.0895, 0.5170),
    25: (0.0942, 0.5113),
    30: (0.0973, 0.5022),
}


def _printed(quantity: str, value: float) -> Claim:
    return Claim(quantity, "the printed rate", Equals({"gpt2-xl": value}, 0.05), "", "C")


POSITION_SWAP = Entry(
    name="gu-position-swap",
    title="GPT-2: the sink follows the first position vector",
    source=f"{PAPER}, table 7",
    protocol="GPT2-XL, one token repeated: the position vector p_1 is replaced by p_t, or p_1 and p_t are swapped; "
    "Sink_1 and Sink_t at epsilon 0.3, T = 64.",
    deviations=("the last column's header is read as t = 30: the transcription at hand prints 25 twice",),
    originals=("gpt2-xl",),
    stand_ins=("smollm2-135m",),
    claims=(
        _printed("Sink_1, unedited", 0.6228),
        *(_printed(f"Sink_1, replace t={t}", value) for t, value in _REPLACE.items()),
        *(_printed(f"Sink_t, replace t={t}", 0.0) for t in PLACES),
        *(_printed(f"Sink_1, swap t={t}", first) for t, (first, _) in _SWAP.items()),
        *(_printed(f"Sink_t, swap t={t}", there) for t, (_, there) in _SWAP.items()),
        *(
            Claim(
                f"Sink_1 below half of unedited, replace t={t}",
                "without p_1 most of the sink is gone",
                Above(0.0),
                f"{_REPLACE[t]:.4f} against 0.6228",
                "C",
            )
            for t in PLACES
        ),
        *(
            Claim(
                f"Sink_t above Sink_1, swap t={t}",
                "the sink goes where p_1 goes",
                Above(0.0),
                f"{_SWAP[t][1]:.4f} against {_SWAP[t][0]:.4f}",
                "C",
            )
            for t in PLACES
        ),
    ),
    unfit=lambda subject: (
        any_decoder(subject)
        or ("" if subject.learned_positions else "the model adds no position vectors that could be swapped")
    ),
    measure=_position_swap,
)


def first_token_norms(model: Any, one: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the first token over the mean of the others: hidden states, keys and values, [layer] each.

    Keys are those that are scored (after QK norm and RoPE); means over KV heads.
    """
    facts = capabilities(model)
    points = scored_points(facts.fires, facts.rope) or ("hook_q", "hook_k")
    layers = range(facts.n_layers)
    names = [n for i in layers for n in (block_output(i), *(attention_hook(i, p) for p in (points[1], "hook_v")))]
    kept = collect(model, one.ids, names)

    def ratio(norms: Tensor) -> Tensor:
        return torch_ratio(norms[..., 0], norms[..., 1:].mean(-1))

    def heads(layer: int, point: str) -> Tensor:
        tensor = kept[attention_hook(layer, point)][None]
        return ratio(by_head(tensor, facts.heads_first, facts.n_kv_heads).float().norm(dim=-1).mean(0))

    hidden = torch.stack([ratio(kept[block_output(i)].float().norm(dim=-1)) for i in layers])
    keys, values = (torch.stack([heads(i, p) for i in layers]) for p in (points[1], "hook_v"))
    return hidden.cpu(), keys.cpu(), values.cpu()


def _norms(model: Any, setting: Setting) -> list[Quantity]:
    tokens = setting.text(model, 32, LENGTH)
    rows = [first_token_norms(model, tokens[b].trim()) for b in range(len(tokens))]
    hidden, keys, values = (torch.stack([row[n] for row in rows]) for n in range(3))
    found = [
        measured("hidden state: largest ratio over blocks", hidden.max(1).values, tokens.documents),
        measured("hidden state: first block with a ratio above 3", _first(hidden > 3), tokens.documents),
        measured("key: mean ratio over layers", keys.nanmean(1), tokens.documents),
        measured("value: mean ratio over layers", values.nanmean(1), tokens.documents),
    ]
    return [*found, *_angle(sink_anatomy(model, find_sinks(model, tokens)).heads.to_dict("records"), tokens)]


def _angle(rows: list[dict[Any, Any]], tokens: Tokens) -> list[Quantity]:
    """Angle and length of the first token's key, in the heads in which it is the sink, against the other keys'."""
    mine = [row for row in rows if row["position"] == 0 and row["beta"] > EPSILON]
    if not mine or "cosine" not in mine[0]:
        why = "the host shows no keys after RoPE" if mine else "the first token is no sink of any head"
        return [missing(ANGLE, why), missing(SIZE, why)]
    angle, size, documents = [], [], []
    for b in dict.fromkeys(row["sequence"] for row in mine):
        of = [row for row in mine if row["sequence"] == b]
        angle.append(sum(row["cosine"] - row["other_cosine"] for row in of) / len(of))
        size.append(sum(row["k_norm"] for row in of) / sum(row["other_k_norm"] for row in of) - 1)  # q is the same
        documents.append(tokens.documents[b])
    return [measured(ANGLE, torch.tensor(angle), documents), measured(SIZE, torch.tensor(size), documents)]


def _first(where: Tensor) -> Tensor:
    """The number of the first True of each row (1-based, as in the paper), NaN without one."""
    return torch.where(where.any(1), where.int().argmax(1).double() + 1, torch.nan)


NORMS = Entry(
    name="gu-norms",
    title="The first token: a long hidden state, short key and value, and an angle",
    source=f"{PAPER}, section 3.1 and figure 2",
    protocol="Norms of the first token against the mean of the other tokens: hidden states after every block, keys "
    "after RoPE, values; and q k = |q| |k| cos: which factor singles the first token out. LLaMA3-8B, LLaMA2-7B, "
    "Mistral-7B, GPT2-Large, Pythia-1B.",
    deviations=(
        "the paper shows curves and prints no number, so only directions are judged",
        "the angle is judged in the heads whose far importance of the first token exceeds 0.3",
        "a model whose keys have QK norm cannot have a short key: its key norms are those after that norm",
    ),
    originals=("meta-llama-3-8b", "llama-2-7b-hf", "mistral-7b-v0.1", "gpt2-large", "pythia-1b"),
    stand_ins=("smollm2-135m", "gemma3-270m"),
    claims=(
        Claim("hidden state: largest ratio over blocks", "much longer hidden state", Above(3.0), "figure 2", "C"),
        Claim("key: mean ratio over layers", "shorter key", Below(1.0), "figure 2", "C"),
        Claim("value: mean ratio over layers", "much shorter value", Below(0.5), "figure 2", "C"),
        Claim(
            ANGLE,
            "the angle makes the sink",
            Above(0.0),
            "figure 2, bottom",
            "C",
        ),
        Claim(
            SIZE,
            "the norms do not: their product is small",
            Below(0.0),
            "figure 2, bottom",
            "C",
        ),
    ),
    unfit=any_decoder,
    measure=_norms,
)

ENTRIES = (SINK_RATES, POSITION_SWAP, NORMS)
