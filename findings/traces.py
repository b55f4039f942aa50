"""Measure docs/findings/traces.md: who writes sinks, and the five claims about secondary ones.

    python findings/traces.py run MODEL STORE     # about an hour; every finished piece is kept in the folder
    python findings/traces.py write STORE         # tables from all finished pieces
    python findings/traces.py --smoke

The first 512 tokens of every document of python-docs that has at least 64; one secondary sink per document is proven by
replacement. Rules are taken from one half of the documents and judged on the other; the halves hold equally many
documents with a secondary sink.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tools import TINY, between, command_line, put, shrink, table
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.core.storage import write_text
from sinklens.find.sinks import from_scores
from sinklens.residual.components import component_name
from sinklens.trace.verdicts import quantity

MODELS = ("smollm2-135m", "gemma3-270m")
LENGTH, SHORTEST = 512, 64
DOCUMENTS: int | None = None  # all there are
DOSES = (0.0, 0.5, 2.0, 4.0)
LONG = {2048: 4, 4096: 4, 8192: 3}  # tokens, texts: python-docs holds no more of the longest
SPLIT = 16
PERMUTATIONS = 4999
STRONG = 0.1  # far importance that a head pays to the sinks alive, on the mean
PIECES = ("trace", "causal", "primaries", "neurons", "subspace", "planted", "long")
SMOKE = {
    "MODELS": (TINY,), "LENGTH": 96, "SHORTEST": 96, "DOCUMENTS": 10, "DOSES": (0.0, 2.0), "LONG": {128: 2}, "SPLIT": 2,
    "PERMUTATIONS": 9,
}  # fmt: skip


def run(name: str, store: Path, wanted: list[str]) -> None:
    """One model's pieces; a piece that is there already is left alone."""
    warnings.simplefilter("ignore", sl.SinklensWarning)
    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", n_seqs=DOCUMENTS, seq_len=LENGTH, min_len=SHORTEST)

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
    if due("primaries"):
        chosen = tokens[causal_sequences(sinks)]
        found = sl.find_sinks(model, chosen).where(kind="secondary")
        sl.trace_sinks(model, chosen, found, most_proven=0).save(path("primaries"))
    if due("neurons"):
        trace = sl.trace.SinkTrace.load(path("trace"))
        neurons(model, trace, store / f"{name}-neurons")
        write_text(path("neurons"), "done")
    if due("subspace"):
        keep(sl.trace.writer_subspace(model, sl.trace.SinkTrace.load(path("trace"))), store / f"{name}-subspace")
        write_text(path("subspace"), "done")
    if due("planted"):
        chosen = causal_sequences(sinks)[:16]
        trace = sl.trace.SinkTrace.load(path("trace")).part(sorted({tokens.documents[b] for b in chosen}))
        first = {(one.sequence, one.kind): one.sink for one in reversed(trace.traced)}
        kept = [o for o in trace.traced if o.sink in first.values() and o.kind == "secondary" and o.sequence in chosen]
        only = sl.trace.SinkTrace(tuple(kept), (), trace.sinks, trace.tokens, (), (), trace.info)
        sl.trace.plant_sinks(model, only, n_positions=1, n_random=2).to_csv(store / f"{name}-planted.csv", index=False)
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


def causal(model: TransformerBridge, tokens: sl.Tokens, sinks: sl.SinkMap) -> sl.trace.SinkTrace:
    """One secondary sink per document, replaced and rescaled."""
    chosen = tokens[causal_sequences(sinks)]
    found = sl.find_sinks(model, chosen).where(kind="secondary")
    return sl.trace_sinks(model, chosen, found, replacements=("same_id",), doses=DOSES, most_proven=1)


def neurons(model: TransformerBridge, trace: sl.trace.SinkTrace, stem: Path) -> None:
    """Neurons of one secondary and one primary sink with a writer of each of 16 documents."""
    kept: dict[tuple[int, str], int] = {}
    for one in trace.traced:
        if one.writers() and sum(kind == one.kind for _, kind in kept) < SPLIT:
            kept.setdefault((one.document, one.kind), one.sink)
    traced = tuple(one for one in trace.traced if one.sink in kept.values())
    part = sl.trace.SinkTrace(traced, (), trace.sinks, trace.tokens, (), (), trace.info)
    found = sl.trace.writer_neurons(model, part, top=(1, 5), n_random=1, shown=5, fed=2)
    for name in ("neurons", "writers", "ablations", "feeds"):
        getattr(found, name).to_csv(f"{stem}-{name}.csv", index=False)


def keep(verdict: sl.trace.Verdict, stem: Path) -> None:
    """A verdict's two tables."""
    verdict.numbers.to_csv(f"{stem}-numbers.csv", index=False)
    verdict.details.to_csv(f"{stem}-details.csv", index=False)


def long_texts(model: TransformerBridge) -> pd.DataFrame:
    """Secondary sinks of long texts, by where they stand."""
    rows = []
    for length, texts in LONG.items():
        tokens = sl.load_tokens(model, "python-docs", n_seqs=texts, seq_len=length)
        for sink in sl.find_sinks(model, tokens):
            rows.append(
                {"length": length, "sequence": sink.sequence, "position": sink.position, "token": sink.token}
                | {"kind": sink.kind, "onset": sink.onset, "end": sink.end, "mass": sink.mass}
            )
    return pd.DataFrame(rows)


def write(store: Path, docs: Path) -> None:
    """Write the tables of all finished pieces to docs/findings/traces.md."""
    parts = [
        "# Who writes sinks",
        f"Written by `python findings/traces.py` on {date.today()}, sinklens {sl.__version__}. The first {LENGTH} "
        f"tokens of every document of `python-docs` that has at least {SHORTEST}, one chunk each; intervals: 95 % over "
        "documents. One secondary sink per document was proven by replacement and rescaled; claims 1 and 2 take the "
        "MLP with the largest share. Both halves of the documents are shown (equally many with a secondary sink in "
        "each): what a rule says in one must hold in the other. The models are 4-bit GGUF weights, dequantised.",
    ]
    for name in MODELS:
        if (store / f"{name}-trace.safetensors").is_file():
            parts += model_parts(name, store)
    put("traces", parts, docs)


def model_parts(name: str, store: Path) -> list[str]:
    """One model's tables."""
    trace = sl.trace.SinkTrace.load(store / f"{name}-trace.safetensors")
    sinks = from_scores(sl.SinkScores.load(store / f"{name}-scores.safetensors"))
    documents = sorted(set(trace.tokens.documents))
    holding = sorted({trace.tokens.documents[s.sequence] for s in sinks.secondary})
    rest = [d for d in documents if d not in holding]
    halves = {"discovery": [*holding[::2], *rest[::2]], "test": [*holding[1::2], *rest[1::2]]}
    secondary = list(sinks.secondary)
    tokens = Counter(sink.token for sink in secondary)
    named = ", ".join(f"{token!r} {count}" for token, count in tokens.most_common(10))
    parts = [
        f"## {name}: writers",
        f"{len(sinks.primary)} primary and {len(secondary)} secondary sinks in {len(trace.tokens)} chunks; "
        f"{len({s.sequence for s in secondary})} chunks hold a secondary one. Their tokens: {named}"
        + (f", and {len(tokens) - 10} others." if len(tokens) > 10 else "."),
    ]
    for kind in ("primary", "secondary"):
        writers = trace.by_component(kind).drop(columns=["d_margin", "proven"])
        phases = [one for one in trace.traced if one.kind == kind]
        alone = sum(bool(one.writers()) for one in phases)
        parts.append(
            f"{kind.capitalize()} sinks: {len(phases)} phases (a bridged life has several), {alone} with a writer, a "
            f"layer whose share is at least 0.25:\n\n{table(writers)}\n\nMean shares over all these phases:\n\n"
            + table(trace.shares(kind).head(8))
        )
    erasers = Counter(component_name(c) for one in trace.traced if one.kind == "secondary" for c in one.erasers())
    phases = sum(one.kind == "secondary" for one in trace.traced)
    named = ", ".join(f"{c} in {n}" for c, n in erasers.most_common(6))
    parts.append(f"Erasers of the {phases} phases of secondary sinks: {named or 'none'}.")
    causal_path = store / f"{name}-causal.safetensors"
    proof = sl.trace.SinkTrace.load(causal_path) if causal_path.is_file() else None
    if proof is not None:
        parts.append(causes(proof))
    verdicts: list[tuple[str, sl.trace.Verdict]] = []
    for function in (sl.trace.writer_alignment, sl.trace.norm_and_mass, sl.trace.sink_levels):
        verdicts += tried(function, {"all": trace, **{half: trace.part(d) for half, d in halves.items()}})
    if proof is not None:
        verdicts += [("one per document", sl.trace.norm_and_mass(proof))]
    primaries_path = store / f"{name}-primaries.safetensors"
    if primaries_path.is_file():
        alone = sl.trace.SinkTrace.load(primaries_path)
        verdicts += tried(
            sl.trace.primary_weakening, {"all": alone, **{half: alone.part(d) for half, d in halves.items()}}
        )
    parts.append(f"### {name}: the claims about secondary sinks")
    parts.append(claims(verdicts))
    regained = next((v for part, v in verdicts if (part, v.claim) == ("all", "weakening")), None)
    if regained is not None:
        logit, margin = (regained.number(f"recovered_{n}")["mean"] for n in ("logit", "margin"))
        parts.append(
            f"Claim 3 in words: without the secondary sinks the primary's attention regains {logit:.2f} nats of log "
            f"odds where they were alive, its competitor-free margin {margin:.2f}: {margin / logit:.0%} of the change "
            f"is the primary's own, the rest is competition for the same attention."
        )
    subspace = store / f"{name}-subspace-numbers.csv"
    if subspace.is_file():
        parts.append(
            "The writer's input subspace (claim 5; fitted on one half, judged on the other):\n\n"
            + table(quantities(pd.read_csv(subspace)))
        )
        details = pd.read_csv(store / f"{name}-subspace-details.csv").head(8)
        parts.append("Its principal components, alone and with either sign:\n\n" + table(details))
    scores = sl.SinkScores.load(store / f"{name}-scores.safetensors")
    parts.append(readers(scores, sinks, halves))
    for piece, words in (("planted", planted), ("neurons-writers", neuron_words), ("long", long_words)):
        path = store / f"{name}-{piece}.csv"
        if path.is_file():
            parts.append(words(path))
    return parts


def readers(scores: sl.SinkScores, sinks: sl.SinkMap, halves: dict[str, list[int]]) -> str:
    """Which heads read secondary sinks, against both nulls."""
    words: dict[Any, str] = {
        "any": "tokens drawn from the same sequence",
        "same_id": "tokens of the same id that are no sink",
    }
    lines = []
    for null, told in words.items():
        found = sl.heads.reading_heads(scores, sinks, null=null, permutations=PERMUTATIONS)
        strong = found[found.beta >= STRONG]
        by_layer = ", ".join(f"{layer}: {share:.2f}" for layer, share in found.groupby("layer").reads.mean().items())
        lines.append(
            f"- against {told}: {found.reads.mean():.3f} of the {len(found)} (layer, head) pairs in layers where any "
            f"is alive; {int(strong.reads.sum())} of them pay {STRONG} or more. By layer: {by_layer}."
        )
    apart = {}
    for half, documents in halves.items():
        mine = tuple(s for s in sinks if sinks.tokens.documents[s.sequence] in documents)
        apart[half] = sl.heads.reading_heads(
            scores, replace(sinks, sinks=mine), null="same_id", permutations=PERMUTATIONS
        )
    joined = apart["discovery"].merge(apart["test"], on=["layer", "head"], suffixes=("", "_test"))
    chosen = joined[joined.reads & (joined.beta >= STRONG)]
    again = chosen[chosen.reads_test & (chosen.beta_test >= STRONG)]
    lines.append(
        f"- found in one half of the documents (reading, and paying {STRONG} or more): {len(chosen)} heads; in the "
        f"other half {len(again)} of them again; rank correlation of what all heads pay in the two halves: "
        f"{joined.beta.corr(joined.beta_test, method='spearman'):.3f}."
    )
    return (
        "Heads that read secondary sinks more than others do (false discovery rate 0.05, "
        f"{PERMUTATIONS} permutations):\n\n" + "\n".join(lines)
    )


def tried(function: Any, traces: dict[str, sl.trace.SinkTrace]) -> list[tuple[str, sl.trace.Verdict]]:
    """A claim on several parts of the documents; left out where there is nothing to test."""
    found = []
    for words, trace in traces.items():
        try:
            found.append((words, function(trace)))
        except sl.BadInputError:
            continue
    return found


def claims(verdicts: list[tuple[str, sl.trace.Verdict]]) -> str:
    """What each claim comes to, and its numbers in all documents and in both halves."""
    words = {True: "holds", False: "does not hold", None: "is not decided"}
    lines = []
    for claim in dict.fromkeys(verdict.claim for _, verdict in verdicts):
        mine = [(part, verdict) for part, verdict in verdicts if verdict.claim == claim]
        told = ", ".join(f"{words[verdict.holds]} ({part})" for part, verdict in mine)
        lines.append(f"- **{claim}**: {mine[0][1].statement}: {told}. Rule: {mine[0][1].rule}.")
    parts = list(dict.fromkeys(part for part, _ in verdicts))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for part, verdict in verdicts:
        for row in verdict.numbers.to_dict("records"):
            if row["mean"] == row["mean"]:
                cells.setdefault((verdict.claim, row["quantity"]), {})[part] = f"{between(row)} (n {row['n']})"
    lines += ["", "| claim | quantity | " + " | ".join(parts) + " |", "|---|---|" + "---|" * len(parts)]
    for (claim, name), row in cells.items():
        lines.append(f"| {claim} | {name} | " + " | ".join(row.get(part, "-") for part in parts) + " |")
    return "\n".join(lines)


def quantities(numbers: pd.DataFrame) -> pd.DataFrame:
    """A verdict's numbers with their intervals in one cell."""
    rows = numbers.to_dict("records")
    return pd.DataFrame([{"quantity": r["quantity"], "mean": between(r), "n": r["n"]} for r in rows])


def causes(trace: sl.trace.SinkTrace) -> str:
    """What replacing each component at a secondary sink does, and its controls."""
    table_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in trace.effects().to_dict("records"):
        if row["replacement"].startswith("x "):
            continue
        name = component_name((row["component"], row["layer"])) if "random" not in row["at"] else "-"
        table_of.setdefault((name, row["at"]), []).append(row)
    rows = []
    for (name, at), group in table_of.items():
        if len(group) >= 3:
            documents = [trace.tokens.documents[r["sequence"]] for r in group]
            row: dict[str, Any] = {"component": name, "replaced at": at, "sinks": len(group)}
            for key in ("d_margin", "d_alpha", "d_life", "d_margin_after"):
                row[key] = between(quantity(key, [float(r[key]) for r in group], documents))
            rows.append(row)
    writers = trace.writers().dropna(subset=["d_margin"])
    proven = [p is True for p in writers.proven.tolist()]
    fall = [f <= -1 for f in writers.d_margin.tolist()]
    return (
        f"Replacing what a component adds at the sink by its mean over tokens of the same id that are no sink "
        f"({len(writers)} phases; the margin falls by 1 nat or more in {sum(fall)}, and with both "
        f"controls below 0.1 nat in {sum(proven)}). `d_margin`: in the layers of the phase behind the component, "
        f"`d_margin_after`: in the three behind the phase, where an eraser shows. Components before the writer hardly "
        f"write along u themselves; what they move is their total effect, nearly all of it through the writer's "
        f"neurons (below):\n\n{table(pd.DataFrame(rows))}"
    )


def planted(path: Path) -> str:
    """Sufficiency."""
    frame: Any = pd.read_csv(path)
    rows = []
    for (writer, added), group in frame.groupby(["writer", "added"]):
        rows.append(
            {"writer": writer, "added": added, "n": len(group), "alpha": float(group.alpha.mean())}
            | {"change": float(group.d_alpha.mean()), "d_margin": float(group.d_margin.mean())}
        )
    return "What the writer adds, added at an ordinary token of the same text:\n\n" + table(pd.DataFrame(rows))


def neuron_words(path: Path) -> str:
    """How few neurons carry a writer."""
    tables: list[Any] = [
        pd.read_csv(str(path).replace("writers", name)) for name in ("writers", "neurons", "feeds", "ablations")
    ]
    writers, listed, feeds, ablations = tables
    rows = []
    for (kind, writer), group in writers.groupby(["kind", "writer"]):
        mine = listed[(listed.kind == kind) & (listed.writer == writer) & (listed.share > 0.1)]
        named = ", ".join(f"{n} in {c}" for n, c in Counter(mine.neuron.tolist()).most_common(4))
        own = ablations[(ablations.kind == kind) & (ablations.writer == writer) & (ablations.k == 5)]
        falls = {which: float(own[own.neurons == which].d_margin.mean()) for which in ("top", "random")}
        fed = feeds[(feeds.kind == kind) & (feeds.writer == writer)]
        fed = fed.groupby(["matrix", "component"]).difference.mean()
        fed = fed.loc[fed.abs().sort_values(ascending=False).index][:4]
        told = ", ".join(f"{component} ({matrix}) {value:+.2f}" for (matrix, component), value in fed.items())
        rows.append(
            {"kind": kind, "writer": writer, "phases": len(group), "neurons for 90 %": group.neurons_for_90.median()}
            | {"of": int(group.neurons.iloc[0]), "above 10 %": named, "d_margin, top 5": falls["top"]}
            | {"random 5": falls["random"], "what tells them (difference to the same id elsewhere)": told}
        )
    words = f"Neurons of the writers (one sink of each kind in each of {SPLIT} documents):\n\n"
    return words + table(pd.DataFrame(rows))


def long_words(path: Path) -> str:
    """Secondary sinks in long texts."""
    frame = pd.read_csv(path)
    rows = []
    for length, group in frame.groupby("length"):
        secondary = group[group.kind == "secondary"]
        texts = LONG[int(str(length))]
        row: dict[str, Any] = {"tokens": length, "texts": texts, "primary": int((group.kind == "primary").sum())}
        row |= {"secondary": len(secondary), "per 1000 tokens": 1000 * len(secondary) / (int(str(length)) * texts)}
        for n in range(4):
            here = (secondary.position * 4 // int(str(length))) == n
            row[f"quarter {n + 1}"] = int(here.sum())
        row["last at"] = int(secondary.position.max()) if len(secondary) else "-"
        rows.append(row | {"mass": float(secondary.mass.mean())})
    return "Long texts (flash backend), by the quarter in which a secondary sink stands:\n\n" + table(
        pd.DataFrame(rows)
    )


if __name__ == "__main__":
    command_line(__doc__, MODELS, PIECES, run, write, lambda: shrink(globals(), SMOKE))
