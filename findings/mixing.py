"""Measure docs/findings/mixing.md: what sinks do to mixing.

    python findings/mixing.py run MODEL STORE     # about two hours; every finished piece is kept in the folder
    python findings/mixing.py write STORE         # tables from all finished pieces
    python findings/mixing.py --smoke

Prefixes of 16 documents of python-docs that hold a secondary sink early; sinks as found in 512 tokens of each.
"""

from __future__ import annotations

import math
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tools import TINY, between, command_line, put, shrink, table
from transformer_lens.model_bridge import TransformerBridge

import sinklens as sl
from sinklens.find.sinks import from_scores
from sinklens.models.load import untrained_twin
from sinklens.trace.verdicts import quantity

MODELS = ("smollm2-135m", "gemma3-270m")
PIECES = ("conditions", "twin", "swaps", "collapse", "lengths", "bound")
TEXTS: dict[str, Any] = {"seq_len": 512, "min_len": 256}
DOCUMENTS, LENGTH, PROBES = 16, 32, 4
DOSES = (0.5, 2.0)
LENGTHS = {64: (6, 16), 128: (6, 16), 256: (4, 16), 512: (3, 16), 1024: (2, 4)}  # sampled columns, documents
FIRST = "first token masked in every layer"
SWAPS, SWAP_LENGTH = 112, 64
COLLAPSE = {"smollm2-135m": (32, 256), "gemma3-270m": (16, 128)}  # documents, tokens: 262,144 logits each are slow
BOUND = (3, 24)  # documents, tokens
SMOKE = {
    "MODELS": (TINY,), "TEXTS": {"n_seqs": 2, "seq_len": 72, "min_len": 72}, "DOCUMENTS": 2, "LENGTH": 12, "PROBES": 2,
    "LENGTHS": {12: (2, 2)}, "SWAPS": 2, "SWAP_LENGTH": 12, "COLLAPSE": {TINY: (2, 24)}, "BOUND": (1, 8),
}  # fmt: skip


def prefixes(model: TransformerBridge, store: Path, length: int, documents: int = DOCUMENTS) -> sl.SinkMap:
    """Sinks in the first tokens of documents with a secondary sink among them (where too few have one: any)."""
    path = store / f"{model.cfg.model_name}-scores.safetensors"
    if not path.is_file():
        tokens = sl.load_tokens(model, "python-docs", **TEXTS)
        sl.sink_scores(model, tokens).save(path)
    sinks = from_scores(sl.SinkScores.load(path))
    tokens = sinks.tokens
    early = {s.sequence: s.position for s in reversed(sinks.secondary.sinks)}
    holding = [b for b in sorted(early, key=lambda b: early[b]) if early[b] < length - 4]
    rest = [b for b in range(len(tokens)) if b not in holding]
    return sinks.cut(sorted([*holding, *rest][:documents]), length)


def edits(model: TransformerBridge, sinks: sl.SinkMap) -> dict[str, Any]:
    """Primary and secondary sinks apart, the first token everywhere, doses, and damage that is no sink."""
    found: dict[str, Any] = {"without the primary": sl.ablate_sinks(model, sinks.primary)}
    if len(sinks.secondary):
        found["without secondary sinks"] = sl.ablate_sinks(model, sinks.secondary)
        found["without any sink"] = sl.ablate_sinks(model, sinks)
    found[FIRST] = sl.ablate_sinks(model, [0])
    found |= controls(model, sinks.tokens, found, {"without the primary": ("noise",), FIRST: ("noise",)})
    for dose in DOSES:
        found[f"primary x {dose:g}"] = sl.ablate_sinks(model, sinks.primary, "scale", g=dose)
    return found


def controls(
    model: TransformerBridge, tokens: sl.Tokens, found: dict[str, Any], wanted: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Damage of the same loss that is no sink, where an edit costs any."""
    words = {"noise": "noise", "mlp": "smaller MLPs"}
    made = {}
    for label, kinds in wanted.items():
        for kind in kinds:
            try:
                made[f"{words[kind]}, same loss as {label}"] = sl.experiment.matched_damage(
                    model, tokens, found[label], kind=kind
                ).hooks
            except sl.BadInputError as error:
                warnings.warn(str(error), sl.SinklensWarning, stacklevel=1)
    return made


def run(name: str, store: Path, wanted: list[str]) -> None:
    """One model's pieces; a piece that is there already is left alone."""
    torch.set_num_threads(1)
    model = sl.load_model(name)

    def due(piece: str, end: str = "safetensors") -> Path | None:
        path = store / f"{name}-{piece}.{end}"
        return path if (not wanted or piece.partition("@")[0] in wanted) and not path.is_file() else None

    if path := due("conditions"):
        sinks = prefixes(model, store, LENGTH)
        made = edits(model, sinks)
        lines = []
        for label, hooks in {"base": [], **made}.items():
            loss = float(sl.token_loss(model, sinks.tokens, hooks=hooks).nanmean())
            lines.append({"condition": label, "loss": loss})
        frame = pd.DataFrame(lines)
        frame.to_csv(store / f"{name}-losses.csv", index=False)
        found = {}
        for n, (label, hooks) in enumerate({"base": [], **made}.items()):  # the seed pairs the probes
            part = store / f"{name}-conditions@{n}.safetensors"
            if not part.is_file():
                sl.measure_mixing(model, sinks.tokens, sinks=sinks, hooks=hooks, probes=PROBES).save(part)
            found[label] = sl.mixing.Mixing.load(part)
        sl.mixing.MixingComparison(found).save(path)
    if path := due("twin"):
        sinks = prefixes(model, store, LENGTH)
        twin = untrained_twin(model)
        same = [sorted(set(sinks.positions(b))) for b in range(len(sinks.tokens))]
        sl.measure_mixing(twin, sinks.tokens, sinks=same, probes=PROBES).save(path)
    if path := due("swaps"):
        sinks = prefixes(model, store, SWAP_LENGTH)
        made = {"without the primary": sl.ablate_sinks(model, sinks.primary)}
        made[FIRST] = sl.ablate_sinks(model, [0])
        made |= controls(model, sinks.tokens, made, {"without the primary": ("noise",), FIRST: ("noise",)})
        sl.mixing.perturbation_spread(model, sinks.tokens, made, sinks=sinks, n_swaps=SWAPS).save(path)
    if path := due("collapse"):
        documents, length = COLLAPSE[name]
        sinks = prefixes(model, store, length, documents)
        made = {"without the primary": sl.ablate_sinks(model, sinks.primary)}
        if len(sinks.secondary):
            made["without secondary sinks"] = sl.ablate_sinks(model, sinks.secondary)
        made[FIRST] = sl.ablate_sinks(model, [0])
        damaged = {"without the primary": ("noise",), FIRST: ("noise",)}
        costs = [float(sl.token_loss(model, sinks.tokens, hooks=made[label]).nanmean()) for label in damaged]
        if abs(costs[0] - costs[1]) < 1e-3:  # one and the same edit, where the first token is the only sink
            del damaged[FIRST]
        made |= controls(model, sinks.tokens, made, damaged)
        sl.mixing.measure_collapse(model, sinks.tokens, made, sinks=sinks).save(path)
    if path := due("bound", "parquet"):
        documents, length = BOUND
        sinks = prefixes(model, store, length, documents)
        sl.mixing.path_sums(model, sinks.tokens, sinks=sinks).save(path)
    for length, (most, documents) in LENGTHS.items():
        if path := due(f"lengths@{length}"):
            tokens = sl.load_tokens(model, "python-docs", seq_len=length, min_len=length, n_seqs=documents)
            made = {FIRST: sl.ablate_sinks(model, [0])}
            sl.compare_mixing(model, tokens, made, sinks=[0], probes=2, most=most).save(path)


def write(store: Path, docs: Path) -> None:
    """Write the tables of all finished pieces to docs/findings/mixing.md."""
    parts = [
        "# Sinks and mixing",
        f"Written by `python findings/mixing.py` on {date.today()}, sinklens {sl.__version__}. The first {LENGTH} "
        f"tokens of {DOCUMENTS} documents of `python-docs`, {PROBES} probes, unless said otherwise; intervals: 95 % "
        "over documents (they contain the probes' error). S: the sinks found in 512 tokens of each document, the same "
        "in every condition. Ratios are paired: the mean of log(edited / base) over documents, as a factor. *Noise* "
        "in the stream is no sink and costs the same loss on the same tokens as the edit that it is matched to. The "
        "models are 4-bit GGUF weights, dequantised.",
    ]
    for name in MODELS:
        if any(store.glob(f"{name}-*")):
            parts += model_parts(name, store)
    put("mixing", parts, docs)


def factor(row: dict[str, Any], name: str = "log_ratio") -> str:
    """A mean log ratio with its interval, as a factor."""
    mean, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if mean != mean:
        return "-"
    return f"x {math.exp(mean):.3g}" + (f" [{math.exp(low):.3g}, {math.exp(high):.3g}]" if low == low else "")


def model_parts(name: str, store: Path) -> list[str]:
    """One model's tables."""
    parts = [f"## {name}: mixing"]
    for piece, words in (
        ("conditions", condition_words), ("swaps", swap_words), ("collapse", collapse_words), ("bound", bound_words),
    ):  # fmt: skip
        path = next(store.glob(f"{name}-{piece}.[sp]*"), None)
        if path is not None:
            parts += words(path)
    lengths = {n: store / f"{name}-lengths@{n}.safetensors" for n in LENGTHS}
    if any(path.is_file() for path in lengths.values()):
        parts += length_words({n: path for n, path in lengths.items() if path.is_file()})
    return parts


def depths(n_layers: int) -> list[int]:
    """Layers that stand for the whole depth."""
    return sorted({round(k * (n_layers - 1) / 5) for k in range(6)})


def condition_words(path: Path) -> list[str]:
    """The three indices under every condition, beside the untrained twin and the loss."""
    found = sl.mixing.MixingComparison.load(path)
    frame = pd.read_csv(str(path).replace("conditions.safetensors", "losses.csv"))
    losses = dict(zip(frame.condition.tolist(), frame.loss.tolist(), strict=True))
    layers = depths(found["base"].mix.shape[1])
    rows = found.to_dataframe(layers).to_dict("records")
    by = {(r["condition"], r["layer"], r["index"]): r for r in rows}
    twin_path = Path(str(path).replace("conditions", "twin"))
    twin = sl.mixing.Mixing.load(twin_path).to_dataframe().to_dict("records") if twin_path.is_file() else []
    parts = [f"Measured: {found['base'].info['definition']}."]
    for index in ("mix", "via_sink", "spread"):
        lines = []
        for label in found.conditions:
            row: dict[str, Any] = {"condition": label, "loss": f"{losses[label]:.3f}"}
            for layer in layers:
                entry = by[label, layer, index]
                plain = label == "base" or entry["log_ratio"] != entry["log_ratio"]
                row[f"layer {layer}"] = between(entry) if plain else factor(entry)
            lines.append(row)
        if twin:
            row = {"condition": "untrained twin", "loss": "-"}
            for entry in twin:
                if entry["index"] == index and entry["layer"] in layers:
                    row[f"layer {entry['layer']}"] = between(entry)
            lines.append(row)
        parts.append(f"`{index}` (base: the value; edited: the factor on it):\n\n{table(pd.DataFrame(lines))}")
    parts.append(verdict(found, losses))
    parts.append(account(found))
    near = found.distances().to_dict("records")
    spans = sorted({(r["distance"], r["to"]) for r in near})
    cells = {(r["condition"], r["distance"]): r["mean"] for r in near}
    lines = [
        {"condition": label} | {f"{a} to {b} tokens": f"{cells[label, a]:.3g}" for a, b in spans}
        for label in found.conditions
    ]
    parts.append(f"Mean `|J_ij|_F^2` at the last layer by distance:\n\n{table(pd.DataFrame(lines))}")
    return parts


def runs(layers: list[int]) -> str:
    """Layers as ranges."""
    if not layers:
        return "none"
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))


def account(found: sl.mixing.MixingComparison) -> str:
    """Whether sinks hold back mixing: where taking the primary away mixes more than base and than equal damage."""
    label, rows = "without the primary", found.to_dataframe().to_dict("records")
    control = next((c for c in found.conditions if c.endswith(f"same loss as {label}")), None)
    lines = [
        "Does the over-mixing account hold (without its primary sink the model mixes more, also than one that was "
        "damaged to the same loss by noise; intervals apart from 0)?",
        "",
    ]
    for index in ("mix", "spread"):
        mine = {r["layer"]: r for r in rows if (r["condition"], r["index"]) == (label, index)}
        more = [n for n, r in mine.items() if r["log_ratio_low"] > 0]
        beyond, short = [], []
        for n in mine:
            if control is not None:
                a, b = (getattr(found[c], index)[:, n].double() for c in (label, control))
                row = quantity("", (a / b).log().tolist(), list(found[label].tokens.documents))
                beyond += [n] if row["low"] > 0 else []
                short += [n] if row["high"] < 0 else []
        holds = [n for n in beyond if n in more]
        lines.append(
            f"- `{index}`: holds in layers {runs(holds)}; more than base, but not surely more than noise of the same "
            f"loss, in {runs([n for n in more if n not in holds])}; noise of the same loss mixes surely more in "
            f"{runs(short)}."
        )
    for dose, sign in ((0.5, 1), (2.0, -1)):
        told = []
        for index in ("mix", "spread"):
            mine = [r for r in rows if (r["condition"], r["index"]) == (f"primary x {dose:g}", index)]
            right = sum((r["log_ratio_low"] > 0) if sign > 0 else (r["log_ratio_high"] < 0) for r in mine)
            wrong = sum((r["log_ratio_high"] < 0) if sign > 0 else (r["log_ratio_low"] > 0) for r in mine)
            told.append(f"{index} in {right} of {len(mine)} layers (the other way in {wrong})")
        words = "half the sink, more mixing" if sign > 0 else "twice the sink, less mixing"
        lines.append(f"- Dose, {words}: {', '.join(told)}.")
    return "\n".join(lines)


def verdict(found: sl.mixing.MixingComparison, losses: dict[str, float]) -> str:
    """In how many layers each index rises or falls, beyond 0 and beyond the damage of the same loss."""
    table_of = found.to_dataframe().to_dict("records")
    lines = ["In how many layers an index is surely (interval) above or below the base's, and the control's:", ""]
    for label in found.conditions:
        if label == "base":
            continue
        told = []
        for index in ("mix", "spread"):
            mine = [r for r in table_of if (r["condition"], r["index"]) == (label, index)]
            up = sum(r["log_ratio_low"] > 0 for r in mine)
            down = sum(r["log_ratio_high"] < 0 for r in mine)
            words = f"{index} above in {up}, below in {down} of {len(mine)}"
            for control in (c for c in found.conditions if c.endswith(f"same loss as {label}")):
                other = found[control]
                beyond, short = 0, 0
                for layer in range(other.mix.shape[1]):
                    a, b = (getattr(m, index)[:, layer].double() for m in (found[label], other))
                    row = quantity("", (a / b).log().tolist(), list(other.tokens.documents))
                    beyond += row["low"] > 0
                    short += row["high"] < 0
                words += f" (against {control}: above in {beyond}, below in {short})"
            told.append(words)
        lines.append(f"- {label} (loss {losses[label] - losses['base']:+.3f}): {'; '.join(told)}.")
    return "\n".join(lines)


def swap_words(path: Path) -> list[str]:
    """Figure 2 of Barbero et al. with random swaps."""
    found = sl.mixing.Perturbation.load(path)
    rows = found.to_dataframe().to_dict("records")
    layers = depths(found.relative.shape[2])
    lines = []
    for label in found.labels:
        row: dict[str, Any] = {"condition": label}
        for entry in rows:
            if entry["condition"] == label and entry["layer"] in layers:
                row[f"layer {entry['layer']}"] = between(entry) if label == "base" else factor(entry)
        lines.append(row)
    return [
        f"{len(found.swaps)} random exchanges of one token, {SWAP_LENGTH} tokens per document: relative change of the "
        f"later tokens that are no sink (base: the mean; edited: the paired factor):\n\n{table(pd.DataFrame(lines))}"
    ]


def collapse_words(path: Path) -> list[str]:
    """How alike tokens are."""
    found = sl.mixing.Collapse.load(path)
    rows = found.to_dataframe().to_dict("records")
    layers = depths(found.values.shape[2])
    parts = [
        "How alike tokens become. An edit of the sink makes another token massive, which is not in S and swamps the "
        "raw rows (`no_sink`): compare conditions by the rows of norm 1 (`no_sink_unit`)."
    ]
    for measure in dict.fromkeys(r["measure"] for r in rows):
        lines = []
        for kind in dict.fromkeys(r["rows"] for r in rows):
            for label in found.labels:
                row: dict[str, Any] = {"rows": kind, "condition": label}
                for entry in rows:
                    key = (entry["measure"], entry["rows"], entry["condition"])
                    if key == (measure, kind, label) and entry["layer"] in layers:
                        name = "" if label == "base" else "difference"
                        row[f"layer {entry['layer']}"] = between(entry, name)
                lines.append(row)
        parts.append(
            f"Collapse, {measure} ({len(found.tokens)} documents, {int(found.tokens.lengths.max())} tokens; base: the "
            "value; edited: "
            f"the paired difference):\n\n{table(pd.DataFrame(lines))}"
        )
    return parts


def bound_words(path: Path) -> list[str]:
    """How loose the path-sum bound is."""
    frame = pd.read_parquet(path)
    loose = sl.mixing.PathSums(frame, ()).looseness()
    layers = depths(len(loose))
    shown = loose[[n in layers for n in loose.layer.tolist()]]
    return [
        f"The local path-sum bound (attention frozen, {len(frame)} blocks of {BOUND[0]} documents, {BOUND[1]} tokens): "
        f"{int(loose.broken.sum())} blocks exceed it. Orders of magnitude between the bound and the measured spectral "
        f"norm (median, 5 and 95 %):\n\n{table(shown)}"
    ]


def length_words(paths: dict[int, Path]) -> list[str]:
    """Against context length."""
    lines = []
    for length, path in paths.items():
        found = sl.mixing.MixingComparison.load(path)
        label = list(found.conditions)[1]
        for index in ("mix", "via_sink", "spread"):
            rows = found.to_dataframe([-1]).to_dict("records")
            base, edited = (
                next(r for r in rows if (r["condition"], r["index"]) == (c, index)) for c in ("base", label)
            )
            lines.append(
                {"tokens": length, "documents": len(found[label].tokens), "index": index, "base": between(base)}
                | {"first token masked": between(edited), "factor": factor(edited)}
            )
    words = (
        "Against context length, at the last layer (S: the first token; a sample of columns, 2 probes). Masking the "
        "first token takes the sink away only where no other token inherits it (compare its loss above):"
    )
    return [f"{words}\n\n{table(pd.DataFrame(lines))}"]


if __name__ == "__main__":
    command_line(__doc__, MODELS, PIECES, run, write, lambda: shrink(globals(), SMOKE))
