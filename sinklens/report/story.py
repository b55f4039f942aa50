"""What the results say, section by section, in sentences. Every number is read from a result's own table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from sinklens.find.scan_page import ScanSummary, summarize
from sinklens.find.sinkmap import SinkMap
from sinklens.report.stages import KINDS, Material
from sinklens.report.wording import against, between, change, counted, listed, number, sample_only, side, signed, times

CONTROLS = {
    "random": "the same edit at random ordinary tokens",
    "matched": "the same edit at the ordinary tokens that draw the most similar attention",
}
MODES = {
    "zero": "When {kind} sinks keep their attention but write nothing",
    "renormalize": "When {kind} sinks are gone from attention",
}
VERDICTS = {
    "mass effect": "Taking attention matters by itself",
    "key bias": "A context-free key with a neutral value would do as well (a key bias in Gu et al.'s sense)",
    "constant offset": "One constant logit per head would do as well",
    "parameter bias": "The bias parameters b_Q and b_K make the gap",
}


def rows_of(table: pd.DataFrame, **where: Any) -> list[dict[str, Any]]:
    """The rows of a table that hold these values."""
    rows: list[dict[str, Any]] = table.to_dict("records")
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def scan_summary(m: Material) -> ScanSummary:
    """The scan in numbers."""
    return summarize(m["scores"])


def finding(m: Material) -> list[str]:
    """The report in one paragraph."""
    found: SinkMap = m["sinks"]
    told = [sample_only(len(set(m.tokens.documents))), scan_summary(m).sentence(), sink_counts(found)]
    told += writers(m)[: len({one.kind for one in m["trace"].traced})] if m["trace"] is not None else []
    told += _effect_sentences(m, modes=("renormalize",))[:2]
    told += key_or_value(m)[:1]
    told += mixing(m)[:1]
    return [sentence for sentence in told if sentence]


def sink_counts(found: SinkMap) -> str:
    """How many sinks of which kind, and where they live."""
    if not len(found):
        return "No token takes enough attention from afar, for long enough, to count as a sink here."
    parts = []
    for kind in KINDS:
        chosen = found.where(kind=kind)
        if len(chosen):
            table = chosen.to_dataframe()
            first, last = (int(table[name].median()) for name in ("onset", "end"))
            common = table.token.value_counts()
            token = f", most often {common.index[0]!r}" if kind != "primary" else ""
            parts.append(
                f"{counted(len(chosen), f'{kind} sink')} (median layers {first} to {last}, median mass "
                f"{number(float(table.mass.median()))}{token})"
            )
    return f"By far attention there are {listed(parts)} in {counted(len(found.tokens), 'sequence')}."


def where(m: Material) -> list[str]:
    """Where the sinks are."""
    found: SinkMap = m["sinks"]
    told = [scan_summary(m).sentence(), sink_counts(found)]
    told += [f"{note[0].upper()}{note[1:].rstrip('.')}." for note in found.notes]
    return told


def writers(m: Material) -> list[str]:
    """Who writes them, by share and by replacement; who erases them; through how many neurons."""
    trace = m["trace"]
    if trace is None or not trace.traced:
        return []
    told = []
    table = trace.writers()
    for kind in KINDS:
        phases = sum(one.kind == kind for one in trace.traced)
        if not phases:
            continue
        by = trace.by_component(kind).to_dict("records")
        if not by:
            told.append(f"No single component writes a quarter or more of the {kind} sinks: writing is spread out.")
            continue
        said = [_writer(row, rows_of(table, kind=kind, writer=row["writer"]), phases) for row in by[:2]]
        told.append(
            f"Writers of {kind} sinks, by their share of the stream along the primary's direction: {listed(said)}."
        )
    erasers = trace.erasers()
    if len(erasers):
        counts = erasers.eraser.value_counts()
        names = [f"{name} ({count} phases)" for name, count in list(counts.items())[:3]]
        told.append(f"{listed(names)} take part of it away again.")
    neurons = m["neurons"]
    if neurons is not None and len(neurons.writers):
        by = neurons.writers.groupby("writer").agg(
            count=("neurons_for_90", "median"), of=("neurons", "first"), phases=("neurons_for_90", "size")
        )
        name = by.phases.idxmax()
        told.append(
            f"In {name}, {by.loc[name, 'count']:.0f} of {int(by.loc[name, 'of'])} neurons (median over "
            f"{int(by.loc[name, 'phases'])} phases) carry 90 % of what it writes."
        )
    return told


def _writer(row: dict[str, Any], places: list[dict[str, Any]], phases: int) -> str:
    """One writer: in how many phases, its share, whether replacing what it writes proves it."""
    tested = [r for r in places if r["proven"] is not None]
    proven = sum(r["proven"] is True for r in tested)
    proof = f"proven by replacement in {proven} of {len(tested)} tested" if tested else "not tested by replacement"
    share = f"{number(row['share'], 2)}{between(row['low'], row['high'], 2)}"
    return f"{row['writer']} ({int(row['phases'])} of {counted(phases, 'phase')}, mean share {share}, {proof})"


def key_or_value(m: Material) -> list[str]:
    """What they do: mass part and value part, and the four claims."""
    parts = m["decomposition"]
    if parts is None or "all" not in parts.effects:
        return []
    row = parts.effects["all"].to_dataframe().to_dict("records")[0]
    unit = "nats per token" if row["metric"] == "loss" else "(1 - cosine)"
    what = "the loss" if row["metric"] == "loss" else "the distance from the model's own embedding"
    sentences = [
        _part(words, what, row, name, unit)
        for name, words in (("mass_part", "The attention that they take"), ("value_part", "what they write"))
    ]
    told = [f"{'; '.join(sentences)}."]
    if parts.claims is not None:
        for row in parts.claims.to_dataframe().to_dict("records"):
            told.append(_verdict(row))
    return told


def _part(who: str, what: str, row: dict[str, Any], name: str, unit: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if math.isnan(value):
        return f"{who}: not measured"
    where = side(low, high)
    if where is None:
        return f"{who} comes to {signed(value)} {unit} of {what} in this sample (no interval)"
    if where == 0:
        return f"{who} has no effect on {what} that can be told from zero ({signed(value)} {unit}{between(low, high)})"
    span = between(low, high) if where > 0 else between(-high, -low)
    return f"{who} {'raises' if where > 0 else 'lowers'} {what} by {number(abs(value))} {unit}{span}"


def _verdict(row: dict[str, Any]) -> str:
    tested = f"{row['test']}: {signed(row['effect'])}{between(row['low'], row['high'])}"
    decided = f"{row['verdict']} ({tested})"
    words = {
        "nothing to explain": "open, since removing the sinks has no effect that can be told from zero",
        "not tested": "not tested",
    }
    return f"{VERDICTS[row['claim']]}: {words.get(row['verdict'], decided)}."


def breaks(m: Material) -> list[str]:
    """What breaks without them, beside controls."""
    return _effect_sentences(m, modes=tuple(MODES))


def _effect_sentences(m: Material, modes: tuple[str, ...]) -> list[str]:
    experiment = m["experiment"]
    if experiment is None:
        return []
    table = experiment.to_dataframe()
    told = []
    for mode in modes:
        for kind in KINDS:
            label = f"{kind} sinks, {mode}"
            own = rows_of(table, label=label, control="")
            if not own:
                continue
            row = own[0]
            effect = change("the loss", row["d_loss"], row["d_loss_low"], row["d_loss_high"], "nats per token")
            beside = []
            for control in m.sizes.controls:
                other = rows_of(table, label=label, control=control)
                if other:
                    r = other[0]
                    beside.append(against(CONTROLS[control], r["beyond"], r["beyond_low"], r["beyond_high"], "nats"))
            start = MODES[mode].format(kind=kind)
            told.append(f"{start}, {effect}{'; that is ' if beside else ''}{', and '.join(beside)}.")
    return told


def mixing(m: Material) -> list[str]:
    """How mixing changes at the last layer, beside damage of the same loss."""
    found = m["mixing"]
    if found is None:
        return []
    table = found.to_dataframe(layers=[-1])
    labels = [label for label in found.conditions if label.startswith("without")]
    if not labels:
        return ["No sink stands in the tokens whose Jacobians were measured, so there is nothing to compare."]
    told = []
    for label in labels:
        row = rows_of(table, condition=label, index="mix")[0]
        words = times(
            "the part of a token's representation that depends on other ordinary tokens (mix)",
            row["log_ratio"], row["log_ratio_low"], row["log_ratio_high"],
        )  # fmt: skip
        noise = rows_of(table, condition=f"noise, same loss as {label}", index="mix")
        if noise:
            r = noise[0]
            words += "; under noise that costs as much loss, " + times(
                "it", r["log_ratio"], r["log_ratio_low"], r["log_ratio_high"]
            )
        else:
            words += (
                "; there is no control of the same loss (the edit costs too little, noise does not reach its cost, or "
                "the model has no loss)"
            )
        told.append(f"{label[0].upper()}{label[1:]}, {words}.")
    return told
