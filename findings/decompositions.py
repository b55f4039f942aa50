"""Measure docs/findings/decompositions.md: sinks taken apart, key or value, four claims.

    python findings/decompositions.py run MODEL STORE     # about an hour; every finished piece is kept in the folder
    python findings/decompositions.py write STORE         # tables from all finished pieces
    python findings/decompositions.py --smoke

The first 512 tokens of the first 24 documents of python-docs (of at least 256 tokens) that hold a sink of the kind;
layers and heads one by one on the first 16 of them. At most 128 predictions per document are scored.
"""

from __future__ import annotations

import warnings
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tools import TINY, between, command_line, draw, put, shown, shrink, table

import sinklens as sl

MODELS = ("smollm2-135m", "gemma3-270m", "minilm-l6")
KINDS = ("primary", "secondary")
TEXTS: dict[str, Any] = {"seq_len": 512, "min_len": 256}
SCORED = 128
DOCUMENTS = 24
FEW = 16
FEW_SCORED = {"gemma3-270m": 32}  # predictions where layers and heads are taken one by one: its vocabulary is 262,144
NUMBERS = (
    "margin", "gap", "log_rest", "peakedness", "distance", "key_side", "query_distance", "query_specific", "norm",
    "angle", "covariance", "bq_content", "content_bk", "bq_bk", "k_norm", "k_norm_rest", "cosine", "cosine_rest",
    "bias_error", "mass", "written", "written_rest", "value_ratio", "off_manifold", "same_elsewhere", "residual_share",
    "logit_target", "logit_rms",
)  # fmt: skip
DRAWN = ".png"
SMOKE = {
    "MODELS": (TINY,), "TEXTS": {"n_seqs": 2, "seq_len": 72, "min_len": 72}, "SCORED": 4, "DOCUMENTS": 2, "FEW": 2,
    "DRAWN": ".html",
}  # fmt: skip


def run(name: str, store: Path, wanted: list[str]) -> None:
    """One model's pieces; a piece that is there already is left alone."""
    warnings.simplefilter("ignore", sl.SinklensWarning)
    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", **TEXTS)
    sinks = sl.find_sinks(model, tokens)

    def piece_of(kind: Any, most: int, **options: Any) -> sl.decompose.SinkDecomposition:
        holding = [b for b in range(len(tokens)) if any(s.sequence == b for s in sinks.where(kind=kind))][:most]
        chosen = tokens[holding]
        own = sl.find_sinks(model, chosen).where(kind=kind)
        return sl.decompose_sinks(model, chosen, own, **{"most_scored": SCORED, **options})

    pieces: dict[str, Any] = {
        kind: lambda kind=kind: piece_of(kind, DOCUMENTS) for kind in KINDS if len(sinks.where(kind=kind))
    }
    for scope in ("head", "layer"):
        options: dict[str, Any] = {"layers": [0], "effects": (scope,), "most_scored": FEW_SCORED.get(name, SCORED)}
        pieces[f"{scope}s"] = lambda options=options: piece_of("primary", FEW, **options)
    for piece, make in pieces.items():
        path = store / f"{name}-{piece}.safetensors"
        if (not wanted or piece in wanted) and not path.is_file():
            make().save(path)


def numbers(found: sl.decompose.SinkDecomposition, kind: str) -> str:
    """Means over a kind's sinks."""
    rows = {row["number"]: row for row in found.means(kind).to_dict("records")}
    lines = ["| number | mean over sinks |", "|---|---|"]
    lines += [f"| {name} | {between(rows[name])} |" for name in NUMBERS if name in rows and rows[name]["mean"] != 0]
    return "\n".join(lines)


def heads(found: sl.decompose.SinkDecomposition, kind: str) -> str:
    """Bias shares, classes, and the heads that stand out."""
    per_head = found.heads(kind)
    share = per_head.bias_share.dropna()
    quartiles = ", ".join(f"{share.quantile(q):.2f}" for q in (0.25, 0.5, 0.75)) if len(share) else "-"
    classes = ", ".join(f"{count} {name}" for name, count in per_head["class"].value_counts().items())
    rows = sorted(per_head.to_dict("records"), key=lambda r: -r["gap"])[:8]
    names = ["class", "gap", "margin", "key_side", "distance", "query_specific", "bias_share", "mass", "value_ratio"]
    top = pd.DataFrame([{"head": f"{r['layer']}.{r['head']}"} | {n: r[n] for n in names} for r in rows])
    return (
        f"Bias share, median per head: quartiles {quartiles} over {len(share)} of {len(per_head)} heads (the others "
        f"have a mean sigma below 0.05 or a standard deviation below 0.02); above 0.5 in {int((share > 0.5).sum())}, "
        f"below 0 in {int((share < 0).sum())}. Classes: {classes}.\n\nThe heads with the largest gap:\n\n{table(top)}"
    )


def components(found: sl.decompose.SinkDecomposition, kind: str) -> str:
    """The components that stand in the sink's key: per layer the two with the largest parts."""
    rows = found.component_table("key", kind).to_dict("records")
    lines = ["| layer | raises the score | lowers it |", "|---|---|---|"]
    for layer in sorted({r["layer"] for r in rows}):
        mine = sorted((r for r in rows if r["layer"] == layer), key=lambda r: -r["nats"])
        up, down = mine[:2], [r for r in mine[::-1][:1] if r["nats"] < 0]
        cells = ["; ".join(f"{r['component']} {r['nats']:+.2f}" for r in part) for part in (up, down)]
        lines.append(f"| {layer} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def square(effect: sl.decompose.TwoByTwo) -> str:
    """The 2x2 of all heads at once."""
    lines = ["| metric | mass part | value part | interaction | together | mass share |", "|---|---|---|---|---|---|"]
    for row in effect.to_dataframe().to_dict("records"):
        cells = [between(row, part) for part in ("mass_part", "value_part", "interaction", "total")]
        lines.append(f"| {row['metric']} | {' | '.join(cells)} | {shown(row['mass_share'])} |")
    return "\n".join(lines)


def claims(found: sl.decompose.SinkDecomposition) -> str:
    """The four claims."""
    assert found.claims is not None
    lines = ["| claim | test | effect | of | verdict |", "|---|---|---|---|---|"]
    for row in found.claims.to_dataframe().to_dict("records"):
        effect = between({"mean": row["effect"], "low": row["low"], "high": row["high"]})
        lines.append(f"| {row['claim']} | {row['test']} | {effect} | {between(row, 'removal')} | {row['verdict']} |")
    return "\n".join(lines)


def one_by_one(found: sl.decompose.SinkDecomposition) -> str:
    """Layers or heads: the largest mass and value parts, and how far the sums are from the whole."""
    lines = []
    for scope in (s for s in ("layer", "head") if s in found.effects):
        effect = found.effects[scope]
        metric = next(iter(effect.values))
        rows = [r for r in effect.to_dataframe().to_dict("records") if r["metric"] == metric and r["exact"]]
        for part in ("mass_part", "value_part"):
            certain = [r for r in rows if r[f"{part}_low"] > 0 or r[f"{part}_high"] < 0]
            top = sorted(certain, key=lambda r: -abs(r[part]))[:5]
            where = (lambda r: f"{r['layer']}.{r['head']}") if scope == "head" else (lambda r: f"{r['layer']}")
            named = "; ".join(f"{where(r)} {between(r, part)}" for r in top)
            words = f"{part.replace('_', ' ')} per {scope} ({metric})"
            told = f"{len(certain)} of {len(rows)} measured differ from 0" + (
                f"; the largest: {named}" if named else ""
            )
            lines.append(f"- {words}: {told}")
        if bool(effect.exact.all()):
            for row in effect.additive_gap().to_dict("records"):
                if row["metric"] == metric and row["part"] in ("mass_part", "value_part"):
                    words = (
                        f"- summed over {scope}s the {row['part'].replace('_', ' ')} is {row['summed']:+.4f}, all at"
                    )
                    lines.append(f"{words} once {row['all_at_once']:+.4f}: not additive by {between(row, 'gap')}")
    return "\n".join(lines)


def write(store: Path, docs: Path) -> None:
    """Write the tables of all finished pieces to docs/findings/decompositions.md."""
    parts = [
        "# Sinks taken apart",
        f"Written by `python findings/decompositions.py` on {date.today()}, sinklens {sl.__version__}. The first 512 "
        "tokens of documents of `python-docs` of at least 256 tokens: all of them for primary sinks of decoders, the "
        f"first {DOCUMENTS} that hold a sink of the kind otherwise; at most {SCORED} predictions per document are "
        f"scored; layers and heads one by one on the first {FEW} of them (heads: 128 tokens; Gemma: 32 predictions). "
        "Numbers are means "
        "over the queries at least 16 tokens away, heads and layers of each sink's life, then over sinks; intervals: "
        "95 % bootstrap-t over documents. Parts of the loss are Shapley values: negative, the model is better for "
        "having it. The models are 4-bit GGUF weights, dequantised (MiniLM: safetensors).",
    ]
    for name in MODELS:
        for kind in KINDS:
            path = store / f"{name}-{kind}.safetensors"
            if not path.is_file():
                continue
            found = sl.decompose.SinkDecomposition.load(path)
            documents = len({s.document for s in found.subjects})
            parts += [
                f"## {name}: {len(found.subjects)} {kind} sinks in {documents} documents",
                numbers(found, kind),
                heads(found, kind),
                "What stands in the sink's own key (nats of its score, mean over heads):\n\n" + components(found, kind),
                "All heads at once:\n\n" + square(found.effects["all"]),
                claims(found),
            ]
            parts += ["\n".join(f"- {note}" for note in found.notes)] if found.notes else []
        for scope in ("layers", "heads"):
            path = store / f"{name}-{scope}.safetensors"
            if path.is_file():
                found = sl.decompose.SinkDecomposition.load(path)
                parts += [f"### {name}: {scope} one by one", one_by_one(found)]
                if scope == "heads" and "loss" in found.effects["head"].values:
                    image = f"images/plane-{name}{DRAWN}"
                    draw(found.plot("plane"), docs / image, width=900, height=560)
                    parts.append(f"![Mass part against value part of every head of {name}](../{image})")
    put("decompositions", parts, docs)


if __name__ == "__main__":
    command_line(__doc__, MODELS, [*KINDS, "heads", "layers"], run, write, lambda: shrink(globals(), SMOKE))
