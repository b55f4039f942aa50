"""Measure docs/findings/streaming.md: which tokens must stay in a rolling cache.

    python findings/streaming.py run MODEL STORE     # one to three hours; every finished piece is kept in the folder
    python findings/streaming.py write STORE         # tables from all finished pieces
    python findings/streaming.py --smoke

Documents of python-docs with at least 1024 tokens, the first 1024 of each; single texts of up to 8192 tokens are all
help topics from the start, joined by blank lines.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tools import TINY, between, command_line, put, shrink, table
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.streaming import EvictionStudy, StreamingLoss, eviction_study, streaming_loss

MODELS = ("smollm2-135m", "gemma3-270m")
PIECES = ("anchors", "documents", "long")
LENGTH, WINDOWS = 1024, (64, 256)
DOCUMENTS: dict[str, int | None] = {"smollm2-135m": None, "gemma3-270m": 16}  # of each length; None: all there are
ANCHORS = {  # tokens: {recent: first tokens that stay}
    "smollm2-135m": {2048: {64: (0, 1)}, 4096: {256: (0, 1, 2, 4)}, 8192: {256: (0, 1, 4)}},
    "gemma3-270m": {4096: {256: (0, 1, 2, 4)}},
}
LONG = (4096, 8192)
SMOKE = {
    "MODELS": (TINY,), "LENGTH": 64, "WINDOWS": (8, 16), "DOCUMENTS": {TINY: 2}, "ANCHORS": {TINY: {48: {8: (0, 1)}}},
    "LONG": (64,),
}  # fmt: skip
PUBLISHED = "Xiao et al. 2024"


def joined(model: TransformerBridge, length: int) -> sl.Tokens:
    """The first tokens of all help topics, joined by blank lines."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return sl.load_tokens(model, [text[: 8 * length]], seq_len=length)


def run(name: str, store: Path, wanted: list[str]) -> None:
    """One model's pieces; a piece that is there already is left alone."""
    torch.set_num_threads(1)
    model = sl.load_model(name)

    def due(piece: str) -> Path | None:
        path = store / f"{name}-{piece}.safetensors"
        return path if (not wanted or piece.partition("@")[0] in wanted) and not path.is_file() else None

    for length, windows in ANCHORS[name].items():
        for recent, keeps in {**windows, None: (0,)}.items():
            for k in keeps:
                if path := due(f"anchors@{length}-{recent or 'full'}-{k}"):
                    streaming_loss(model, joined(model, length), sinks=k, recent=recent).save(path)
    tokens = sl.load_tokens(model, "python-docs", seq_len=LENGTH, min_len=LENGTH)
    for b in range(DOCUMENTS[name] or len(tokens)):
        if path := due(f"documents@{b}"):
            eviction_study(model, tokens[b], WINDOWS, seed=b).save(path)
    for length in LONG:
        if path := due(f"long@{length}"):
            eviction_study(model, joined(model, length), WINDOWS, first=(4,)).save(path)


def write(store: Path, docs: Path) -> None:
    """Write the tables of all finished pieces to docs/findings/streaming.md."""
    parts = [
        "# Sinks in a rolling cache",
        f"Written by `python findings/streaming.py` on {date.today()}, sinklens {sl.__version__}. StreamingLLM's "
        f"cache ({PUBLISHED}): some tokens that stay and the N most recent ones, positions counted in the cache "
        "(docs/definitions.md, section 9), exactly, in one forward. Loss in nats over all predictions; *cost*: above "
        "full attention, *gain*: below the window alone of the same N, both paired by document; intervals: 95 % "
        "bootstrap-t over documents. Sinks are those that `find_sinks` finds under full attention. The models are "
        "4-bit GGUF weights, dequantised.",
    ]
    for name in MODELS:
        if any(store.glob(f"{name}-*")):
            parts += model_parts(name, store)
    put("streaming", parts, docs)


def model_parts(name: str, store: Path) -> list[str]:
    """One model's tables."""
    parts = [f"## {name}: which tokens must stay"]
    files = sorted(store.glob(f"{name}-documents@*"), key=lambda path: int(path.stem.partition("@")[2]))
    if files:
        parts += document_words(EvictionStudy.concatenate([EvictionStudy.load(path) for path in files]))
    for length in LONG:
        path = store / f"{name}-long@{length}.safetensors"
        if path.is_file():
            parts.append(
                f"One text of {length} tokens (all help topics from the start, joined; values only):\n\n"
                f"{table(cache_table(EvictionStudy.load(path)))}"
            )
    parts += anchor_words(name, store)
    return parts


def cache_table(study: EvictionStudy) -> pd.DataFrame:
    """One row per condition."""
    lines = []
    for row in study.to_dataframe().to_dict("records"):
        full = row["recent"] != row["recent"]
        line: dict[str, Any] = {"N": "all" if full else f"{row['recent']:.0f}", "stays": row["keeps"]}
        line |= {"tokens kept": "-" if full else f"{row['kept']:.3g}", "perplexity": f"{row['perplexity']:.2f}"}
        low, high = row["loss_low"], row["loss_high"]
        line["loss"] = f"{row['loss']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low == low else "")
        lines.append(line | {"cost": between(row, "cost"), "gain": between(row, "gain")})
    return pd.DataFrame(lines)


def document_words(study: EvictionStudy) -> list[str]:
    """The table over documents, and the loss by position."""
    count = len(study.tokens)
    few = "" if count >= 16 else " (fewer than 16: values only)"
    parts = [f"{count} documents, {LENGTH} tokens each{few}:\n\n{table(cache_table(study))}"]
    shares = study.to_dataframe().to_dict("records")
    told = []
    for size in WINDOWS:
        by = {row["keeps"]: row for row in shares if row["recent"] == size}
        alone, first, everything = by["window only"], by["first 1"], by["all sinks"]
        if alone["cost_low"] > 0:
            told.append(
                f"at N = {size} one first token takes away {first['gain'] / alone['cost']:.0%} of what the window "
                f"alone costs, all {everything['kept']:.3g} sinks {everything['gain'] / alone['cost']:.0%}"
            )
    if told:
        parts.append(f"As ratios of means: {'; '.join(told)}.")
    rows = study.positions().to_dict("records")
    spans = list(dict.fromkeys((row["first"], row["last"]) for row in rows))
    lines = []
    for size in WINDOWS:
        for keeps in dict.fromkeys(c.keeps for c in study.caches):
            mine = [r for r in rows if r["keeps"] == keeps and (r["recent"] == size or r["recent"] != r["recent"])]
            if mine:
                values = {f"{a} to {b}": f"{r['loss']:.3f}" for (a, b), r in zip(spans, mine, strict=True)}
                lines.append({"N": size, "stays": keeps} | values)
    parts.append(f"Loss by the position of the prediction:\n\n{table(pd.DataFrame(lines))}")
    return parts


def anchor_words(name: str, store: Path) -> list[str]:
    """Perplexity of one text by how many first tokens stay."""
    lines = []
    for length, windows in ANCHORS[name].items():
        for recent in windows:
            line: dict[str, Any] = {"tokens": length, "N": recent}
            columns = {"full attention": ("full", 0), "window only": (recent, 0)}
            columns |= {f"first {k}": (recent, k) for k in (1, 2, 4)}
            for label, (size, k) in columns.items():
                path = store / f"{name}-anchors@{length}-{size}-{k}.safetensors"
                line[label] = f"{StreamingLoss.load(path).perplexity:.2f}" if path.is_file() else "-"
            lines.append(line)
    if all(value == "-" for line in lines for key, value in line.items() if key not in ("tokens", "N")):
        return []
    words = "Perplexity of one text (all help topics from the start, joined), no interval:"
    return [f"{words}\n\n{table(pd.DataFrame(lines))}"]


if __name__ == "__main__":
    command_line(__doc__, MODELS, PIECES, run, write, lambda: shrink(globals(), SMOKE))
