"""Measure the fourth part of docs/findings.md: who writes sinks, and the five claims about secondary ones.

    python docs/make_traces.py run MODEL STORE     # about an hour; every finished piece is kept in the folder
    python docs/make_traces.py write STORE         # tables from all finished pieces

64 chunks of 512 tokens of python-docs, two of each of 32 documents; one secondary sink per document is proven by
replacement. Rules are taken from one half of the documents and judged on the other.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.components import component_name
from sinklens.results import write_text
from sinklens.sinks import from_scores

MODELS = ("smollm2-135m", "gemma3-270m")
CHUNKS, LENGTH = 64, 512
DOSES = (0.0, 0.5, 2.0, 4.0)
LONG = (2048, 4096, 8192)
LONG_TEXTS = 4
MARK = "<!-- traces -->"


def run(name: str, store: Path, wanted: list[str]) -> None:
    """One model's pieces; a piece that is there already is left alone."""
    warnings.simplefilter("ignore", sl.SinklensWarning)
    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", n_seqs=CHUNKS, seq_len=LENGTH)

    def path(piece: str) -> Path:
        return store / f"{name}-{piece}.safetensors"

    def due(piece: str) -> bool:
        return (not wanted or piece in wanted) and not path(piece).is_file()

    if not path("scores").is_file():
        sl.sink_scores(model, tokens).save(path("scores"))
    sinks = from_scores(sl.SinkScores.load(path("scores")))
    if due("trace"):
        sl.trace_sinks(model, tokens, sinks, causal=False).save(path("trace"))
    if due("causal"):
        causal(model, tokens, sinks).save(path("causal"))
    if due("neurons"):
        trace = sl.SinkTrace.load(path("trace"))
        neurons(model, trace, store / f"{name}-neurons")
        write_text(path("neurons"), "done")
    if due("subspace"):
        table(sl.writer_subspace(model, sl.SinkTrace.load(path("trace"))), store / f"{name}-subspace")
        write_text(path("subspace"), "done")
    if due("planted"):
        chosen = causal_sequences(sinks)[:16]
        trace = sl.SinkTrace.load(path("trace")).part({tokens.documents[b] for b in chosen})
        first = {(one.sequence, one.kind): one.sink for one in reversed(trace.traced)}
        kept = [o for o in trace.traced if o.sink in first.values() and o.kind == "secondary" and o.sequence in chosen]
        only = sl.SinkTrace(tuple(kept), (), trace.sinks, trace.tokens, (), (), trace.info)
        sl.plant_sinks(model, only, n_positions=1, n_random=2).to_csv(store / f"{name}-planted.csv", index=False)
        write_text(path("planted"), "done")
    if due("long") and name == MODELS[0]:
        long_texts(model).to_csv(store / f"{name}-long.csv", index=False)
        write_text(path("long"), "done")


def causal_sequences(sinks: sl.SinkMap) -> list[int]:
    """The first chunk of every document that holds a secondary sink."""
    found: dict[int, int] = {}
    for sink in sinks.secondary:
        found.setdefault(sinks.tokens.documents[sink.sequence], sink.sequence)
    return sorted(found.values())


def causal(model: TransformerBridge, tokens: sl.Tokens, sinks: sl.SinkMap) -> sl.SinkTrace:
    """One secondary sink per document, replaced and rescaled."""
    chosen = tokens[causal_sequences(sinks)]
    found = sl.find_sinks(model, chosen).where(kind="secondary")
    return sl.trace_sinks(model, chosen, found, replacements=("same_id",), doses=DOSES, most_proven=1)


def neurons(model: TransformerBridge, trace: sl.SinkTrace, stem: Path) -> None:
    """Neurons of one secondary and one primary sink per document."""
    kept: dict[tuple[int, str], int] = {}
    for one in trace.traced:
        kept.setdefault((one.document, one.kind), one.sink)
    traced = tuple(one for one in trace.traced if one.sink in kept.values())
    part = sl.SinkTrace(traced, (), trace.sinks, trace.tokens, (), (), trace.info)
    found = sl.writer_neurons(model, part, top=(1, 5), n_random=1, shown=5, fed=2)
    for name in ("neurons", "writers", "ablations", "feeds"):
        getattr(found, name).to_csv(f"{stem}-{name}.csv", index=False)


def table(verdict: sl.Verdict, stem: Path) -> None:
    """A verdict's two tables."""
    verdict.numbers.to_csv(f"{stem}-numbers.csv", index=False)
    verdict.details.to_csv(f"{stem}-details.csv", index=False)


def long_texts(model: TransformerBridge) -> pd.DataFrame:
    """Secondary sinks of long texts, by where they stand."""
    rows = []
    for length in LONG:
        tokens = sl.load_tokens(model, "python-docs", n_seqs=LONG_TEXTS, seq_len=length)
        for sink in sl.find_sinks(model, tokens):
            rows.append(
                {"length": length, "sequence": sink.sequence, "position": sink.position, "token": sink.token}
                | {"kind": sink.kind, "onset": sink.onset, "end": sink.end, "mass": sink.mass}
            )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("model", choices=MODELS)
    one.add_argument("store", type=Path)
    one.add_argument("--only", nargs="*", default=[])
    two = commands.add_parser("write")
    two.add_argument("store", type=Path)
    given = parser.parse_args()
    given.store.mkdir(parents=True, exist_ok=True)
    if given.command == "run":
        run(given.model, given.store, given.only)
