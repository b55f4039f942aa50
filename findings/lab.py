"""Measure docs/findings/lab.md: sinks that grow, or do not, under different attention.

    python findings/lab.py run STORE       # about half a CPU hour; every finished run is kept in the folder STORE
    python findings/lab.py write STORE     # tables and the figure from all finished runs
    python findings/lab.py --smoke

The studies are those that come with the package, three seeds each (``sinklens lab run operations`` makes the same).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
from tools import DOCS, HELP, draw, put, shrink, table

from sinklens import lab

STUDIES = ("operations", "bos", "race", "locked", "mechanisms")
ANALYSED = ("operations", "bos", "mechanisms")
SEEDS = (0, 1, 2)
TRAINING: dict[str, Any] = {}  # as the studies say
TASK: dict[str, Any] = {}
FIGURE = "lab_emergence.png"
SMOKE = {
    "ANALYSED": ("mechanisms",), "SEEDS": (0,), "FIGURE": "lab_emergence.html",
    "TRAINING": {"steps": 1, "batch_size": 2, "evaluate_every": 1, "evaluation_size": 1}, "TASK": {"seq_len": 32},
}  # fmt: skip


def study_of(name: str) -> lab.Study:
    """A study as it comes with the package, on our seeds."""
    study = lab.read_study(name)
    variants = [
        replace(one, train=replace(one.train, **TRAINING), task=replace(one.task, **TASK)) for one in study.variants
    ]
    return replace(study, variants=tuple(variants), seeds=SEEDS)


def comparison(store: Path, name: str) -> lab.LabComparison | None:
    """A study's runs in its own order, or None where a run is missing."""
    study = study_of(name)
    if not (store / name).is_dir():
        return None
    runs = {(run.config.name, run.seed): run for run in lab.load_runs(store / name)}
    wanted = [(variant.name, seed) for variant in study.variants for seed in study.seeds]
    return lab.compare([runs[key] for key in wanted]) if all(key in runs for key in wanted) else None


def seeds(frame: pd.DataFrame, variant: str, column: str) -> list[float]:
    """One variant's values."""
    return [float(row[column]) for row in frame.to_dict("records") if row["variant"] == variant]


def span(values: list[float]) -> str:
    """Least to largest."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def operations_words(found: lab.LabComparison) -> list[str]:
    """Gu et al., Tables 4 and 6."""
    frame = found.to_dataframe()
    base = sum(seeds(frame, "softmax", "loss")) / len(SEEDS)
    lines = []
    for variant in dict.fromkeys(run.config.name for run in found.runs):
        gone = sum(value < 0.1 for value in seeds(frame, variant, "sink"))
        gap = sum(seeds(frame, variant, "loss")) / len(SEEDS) - base
        slot = sum(value > 0.9 for value in seeds(frame, variant, "slot_sink"))
        elsewhere = sum(
            first < 0.1 < 0.5 < anywhere and slot_sink < 0.5
            for first, anywhere, slot_sink in zip(
                *(seeds(frame, variant, name) for name in ("sink", "anywhere", "slot_sink")), strict=True
            )
        )
        counts = {"no sink on the first token": gone, "sink on the slot": slot, "sink on another token": elsewhere}
        told = {name: f"{count} of {len(SEEDS)}" for name, count in counts.items()}
        lines.append({"attention": variant, **told, "loss minus softmax": f"{gap:+.3f}"})
    return [
        "## Kinds of attention (Gu et al., Tables 4 and 6, at toy scale)",
        "Setting P: no BOS, learned positions, one layer, one head. Every cell holds seeds 0 / 1 / 2. Sink: share of "
        "128 "
        "sequences in which the first token's alpha exceeds 0.3; on relative weights for sigmoid and ReLU, whose "
        "rows sum to "
        "anything, on the weights as they are elsewhere. About 5 % of the sequences are locked (nothing but copies), "
        "and "
        "those have no sink: 0.953 is all the others.",
        table(found.operations_table()),
        table(pd.DataFrame(lines)),
        "Against the papers: sigmoid and a KV bias remove the sink at no worse loss, as published. A K bias does so "
        "too, "
        "on these seeds. Softmax off by one and a learned sink logit do not remove it: their slot takes next to "
        "nothing, "
        "and the loss stays that of softmax. Normalised sigmoid has no sink here, where Gu et al. find 30 %. Gating "
        "thins the sink out, and not on every seed. ReLU depends on the seed.",
    ]


def bos_words(found: lab.LabComparison) -> list[str]:
    """Barbero et al., Table 2."""
    frame = found.to_dataframe()
    fixed, free = (seeds(frame, name, "cost of dropping") for name in ("fixed BOS", "no BOS"))
    return [
        "## BOS (Barbero et al., Table 2, at toy scale)",
        f"Losses over the same targets with and without the first token. With BOS always first, leaving it out costs "
        f"{span(fixed)} nats; without BOS, leaving the first token out costs {span(free)}.",
        table(found.bos_table()),
    ]


def mechanism_words(found: lab.LabComparison) -> list[str]:
    """Broadcast, value drain, dormant heads."""
    frame = found.to_dataframe()
    if "ov_ratio" not in frame:
        frame["ov_ratio"] = float("nan")  # models without a sink have nothing that it writes
    parts = ("without its write", "without its share", "without both")
    broadcast, drain = ([span(seeds(frame, name, part)) for part in parts] for name in ("broadcast", "value drain"))
    heads = pd.concat(
        [run.heads().assign(seed=run.seed) for run in found.runs if run.config.name == "two layers of two heads"]
    )
    columns = ["seed", "layer", "head", "sink", "alpha", "self", "value_ratio"]
    return [
        "## What a sink does: write, or take",
        "The 2x2 of the first token on 16 sequences: loss in nats added without what it writes, without the share of "
        "attention that it takes from the others, and without both; then mixing at the last layer without its "
        "attention "
        "over mixing with it.",
        table(found.mechanisms_table()),
        f"On iid Backcopy (setting P) the sink would write {span(seeds(frame, 'broadcast', 'ov_ratio'))} times what "
        "others "
        f"would. Its write alone is enough (without its share: {broadcast[1]} nats), its share nearly so (without its "
        f"write: {broadcast[0]}); only without both does the model break ({broadcast[2]}). So the sink does broadcast, "
        f"and it need not: either half of it does the work. On Recall, without an MLP and with 8 dimensions per "
        "head, it "
        f"writes next to nothing ({span(seeds(frame, 'value drain', 'ov_ratio'))} of the others): value drain. There "
        "what it "
        f"takes is everything ({drain[1]} nats without its share, {drain[0]} without its write). With an MLP the "
        "same task "
        f"has the drained sink on no more than one of three seeds.",
        "Two layers of two heads: which heads are dormant.",
        table(heads[columns].reset_index(drop=True)),
    ]


def race_words(found: lab.LabComparison) -> list[str]:
    """The hypothesis that slots win only where they can write."""
    frame = found.to_dataframe()
    rows = [
        {"slot": variant, "sink on the slot": span(seeds(frame, variant, "slot_sink")),
         "sink on the first token": span(seeds(frame, variant, "sink")),
         "mass on the slot": " / ".join(f"{value:.3f}" for value in seeds(frame, variant, "slot_mass")),
         "loss": " / ".join(f"{value:.3f}" for value in seeds(frame, variant, "loss"))}
        for variant in dict.fromkeys(run.config.name for run in found.runs)
    ]  # fmt: skip
    won = [row["slot"] for row in rows if min(seeds(frame, str(row["slot"]), "slot_sink")) > 0.9]
    return [
        "## Why some slots win and others do not",
        "If the sink must write, a slot with v* = 0 should lose. Setting P, with the slot's parameters learned 1, 5, "
        "20 "
        "and 60 times as fast:",
        table(pd.DataFrame(rows)),
        f"The slot takes the sink on all seeds in: {', '.join(won)}. So it is a race that the faster wins, whether "
        "its value is learned or zero, and the hypothesis that it must write is not borne out. A learned logit, as "
        "fast as "
        "the keys that win (above), does not win: it is the same for every query, also for those that must copy.",
    ]


def locked_words(found: lab.LabComparison) -> list[str]:
    """Which token becomes the sink."""
    frame = found.to_dataframe()
    shown = {name: span(seeds(frame, name, "sink")) for name in dict.fromkeys(frame["variant"])}
    anywhere = span([value for name in list(shown)[1:] for value in seeds(frame, name, "anywhere")])
    return [
        "## Why the first token",
        "In about 5 % of the sequences of Backcopy two triggers come first, and every later token is a copy. Without "
        "a loss "
        "on those, or without them, the first token is a sink in few sequences ("
        + "; ".join(f"{name}: {value}" for name, value in shown.items())
        + f"), and another token is in {anywhere}. So it is the softmax that makes a sink, and a few sequences "
        "that put it on the first token: the advice to draw the first two tokens from the others, which sounds like "
        "a mere "
        "improvement of the task, removes the first-token sink.",
        table(found.operations_table()),
    ]


def write(store: Path, docs: Path) -> None:
    """The section and its figure."""
    words = {
        "operations": operations_words,
        "bos": bos_words,
        "race": race_words,
        "locked": locked_words,
        "mechanisms": mechanism_words,
    }
    parts = [
        "# Sinks that grow in the lab",
        f"Models of 50,000 parameters trained from scratch on synthetic tasks with exact floors, three seeds each "
        f"(`python findings/lab.py`, {date.today().isoformat()}). AdamW, 300 steps (value drain: 500) of 32 "
        "sequences of 64 "
        f"tokens, on one CPU thread.",
    ]
    for name in STUDIES:
        found = comparison(store, name)
        if found is None:
            continue
        parts += words[name](found)
        if name == "operations":
            shown = ("softmax", "sigmoid", "kv_bias", "off_by_one", "gated")
            figure = lab.compare([run for run in found.runs if run.config.name in shown]).plot()
            draw(figure, docs / "images" / FIGURE, width=1100, height=460, scale=2)
            parts.append(f"![Loss above the floor and sink rate against training steps](../images/{FIGURE})")
    put("lab", parts, docs)


def run(store: Path) -> None:
    """Train every study; what is finished is not done again."""
    for name in STUDIES:
        lab.run_study(study_of(name), store, analysis=name in ANALYSED)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=HELP)
    parser.add_argument("what", choices=("run", "write"), nargs="?")
    parser.add_argument("store", type=Path, nargs="?")
    given = parser.parse_args()
    if given.smoke:
        shrink(globals(), SMOKE)
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder) / "store")
            write(Path(folder) / "store", Path(folder) / "docs")
    elif given.store is None:
        parser.error("what is to be done, and in which folder: run STORE or write STORE?")
    elif given.what == "write":
        write(given.store, DOCS)
    else:
        run(given.store)


if __name__ == "__main__":
    main()
