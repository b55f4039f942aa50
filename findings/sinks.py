"""Measure docs/findings/sinks.md: the sinks of the embedded decoders on every document of python-docs.

    python findings/sinks.py [--wong FILE.jsonl ...] [--smoke]

``--wong`` takes the layer lists that Wong et al. released (one JSON object per sample, key ``candidate_sinks``), and
adds what the published level and label rules make of them.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from tools import DOCS, HELP, TINY, put, shrink, tiny_model

import sinklens as sl
from sinklens.find.residual_detectors import wong_label, wong_level
from sinklens.find.sinks import from_scores

DECODERS = ("smollm2-135m", "gemma3-270m")
ENCODER = "minilm-l6"
TEXTS: dict[str, Any] = {"seq_len": 512, "min_len": 256}
CONTEXTS: dict[str, Any] = {"lengths": (64, 256)}
WONG_LAYERS = {"deepseek": 48, "qwen3-4b": 36}
SMOKE = {
    "DECODERS": (TINY,), "ENCODER": TINY, "TEXTS": {"n_seqs": 2, "seq_len": 72, "min_len": 72},
    "CONTEXTS": {"lengths": (64,), "n_seqs": 2},
}  # fmt: skip
RELEASED = {"candidate_sinks": {"7": {"layer": [3, 4, 5], "sink_type": "cliff"}}}  # a line as --wong reads it


def table(frame: Any) -> str:  # a DataFrame; to pandas' stubs a selection may be a Series
    """A Markdown table."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "-" if value != value else f"{value:.3f}".rstrip("0").rstrip(".") or "0"
        return str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(cell(v) for v in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)


def counted(sinks: sl.SinkMap, kind: Any, most: int = 8) -> str:
    """The commonest tokens of a kind."""
    tokens = Counter(s.token for s in sinks.where(kind=kind))
    shown = ", ".join(f"`{token!r}` {n}" for token, n in tokens.most_common(most))
    return f"{shown} ({len(tokens)} different tokens)" if tokens else "none"


def decoder(name: str, texts: dict[str, Any], contexts: dict[str, Any]) -> str:
    """The section of one decoder."""
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", **texts)
    scores = sl.sink_scores(model, tokens)
    sinks = from_scores(scores)
    places = sinks.to_dataframe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sl.SinklensWarning)
        methods = sl.find.compare_methods(model, tokens)
    anatomy = sl.sink_anatomy(model, sinks)
    later = places[places.position > 0]
    reasons = later.groupby(["kind", "reason"], as_index=False).agg(
        count=("position", "size"), median_mass=("mass", "median"), median_heads=("heads", "median")
    )
    masses = places.groupby("kind", as_index=False).agg(
        count=("mass", "size"), low=("mass", "min"), median=("mass", "median"), high=("mass", "max")
    )
    levels = sinks.levels().head(10)
    with_secondary = places[places.kind == "secondary"].sequence.nunique()
    low, high = scores.sink_rate_interval() or (float("nan"), float("nan"))
    classes = anatomy.head_classes()
    counts: Any = classes.groupby(["class", "kind"]).size()
    kinds = counts.reset_index(name="heads")
    parts = [
        f"## {name}",
        f"{len(tokens)} documents, {int(tokens.lengths.sum())} tokens. Sink rate at position 0, epsilon 0.3: "
        f"{scores.sink_rate():.3f} [{low:.3f}, {high:.3f}] (95 % bootstrap-t over documents). {len(sinks)} sinks: "
        f"{len(sinks.primary)} primary, {len(sinks.secondary)} secondary; {with_secondary} documents hold a secondary "
        f"sink; {sum(p is None for p in sinks.strongest)} have no primary.",
        "### Mass by kind\n\n" + table(masses),
        "### Sinks after position 0, by reason\n\n" + table(reasons),
        "### Levels: the ten commonest (onset, lifetime)\n\n" + table(levels),
        "### Which tokens\n\n- primary: " + counted(sinks, "primary") + "\n- secondary: " + counted(sinks, "secondary"),
        "### The count depends on the threshold\n\n" + table(sinks.sweep(values=(0.02, 0.03, 0.05, 0.07, 0.1, 0.15))),
        "### Agreement of the methods\n\n" + table(methods),
        "### What the heads do (commonest class over documents)\n\n" + table(kinds),
        "### Token or position?\n\n" + table(sl.find.compare_contexts(model, **contexts)),
    ]
    return "\n\n".join(parts)


def encoder() -> str:
    """MiniLM on the same documents."""
    model = sl.load_model(ENCODER)
    tokens = sl.load_tokens(model, "python-docs", **TEXTS)
    sinks = sl.find_sinks(model, tokens)
    levels = sinks.levels().head(6)
    text = "- primary: " + counted(sinks, "primary") + "\n- secondary: " + counted(sinks, "secondary")
    return f"## {ENCODER}\n\n{len(tokens)} documents, {len(sinks)} sinks.\n\n{text}\n\n{table(levels)}"


def released(path: Path) -> str:
    """The published rules applied to one file of released layer lists."""
    n_layers = next(n for key, n in WONG_LAYERS.items() if key in path.name)
    labels: Counter[str] = Counter()
    levels: Counter[tuple[int, int]] = Counter()
    samples = with_secondary = disagree = 0
    for line in path.read_text().splitlines():
        samples += 1
        found = False
        for sink in json.loads(line)["candidate_sinks"].values():
            level = wong_level(sink["layer"])
            label = wong_label(level[1], n_layers)
            disagree += label != {"cliff": "secondary"}.get(sink["sink_type"], sink["sink_type"])  # their older name
            labels[label] += 1
            if label == "secondary":
                levels[level] += 1
                found = True
        with_secondary += found
    shown = ", ".join(f"{level}: {n}" for level, n in levels.most_common(6))
    numbers = (path.stem, samples, with_secondary, labels["secondary"], labels["noise"], disagree, shown)
    return "| " + " | ".join(map(str, numbers)) + " |"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wong", nargs="*", type=Path, default=[])
    parser.add_argument("--smoke", action="store_true", help=HELP)
    options = parser.parse_args()
    if not options.smoke:
        measure(options.wong, DOCS)
        return
    shrink(globals(), SMOKE)
    with tiny_model():
        wong = Path("deepseek.jsonl")
        wong.write_text(json.dumps(RELEASED))
        measure([wong], Path("docs"))


def measure(wong: list[Path], docs: Path) -> None:
    """Write the page."""
    with ProcessPoolExecutor(len(DECODERS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        measured = list(pool.map(decoder, DECODERS, repeat(TEXTS), repeat(CONTEXTS)))
    parts = [
        "# Findings: which sinks the embedded models have",
        f"Written by `python findings/sinks.py` on {date.today()}, sinklens {sl.__version__}. Every document of "
        "`python-docs` with at least 256 tokens, the first 512 of each. The decoders are 4-bit GGUF weights, "
        "dequantised; the text is technical prose, so counts are this corpus's. Detection is correlational.",
        *measured,
        encoder(),
    ]
    if wong:
        head = (
            "| file | samples | with a secondary | secondary | noise | labels that differ from the released | levels |"
        )
        rows = "\n".join([head, "|---|---|---|---|---|---|---|", *(released(path) for path in wong)])
        parts.append(
            '## The released layer lists of Wong et al. 2025\n\nTheir level and label rules, as `method="wong"` '
            "applies them, on the authors' own detections:\n\n" + rows
        )
    put("sinks", parts, docs)


if __name__ == "__main__":
    main()
