"""Measure docs/findings/interventions.md: what breaks when sinks are ablated, beside controls.

    python findings/interventions.py run MODEL STORE     # hours; every finished sequence is kept in the folder STORE
    python findings/interventions.py write STORE         # tables from all finished experiments
    python findings/interventions.py --smoke

Every document of python-docs with at least 256 tokens, the first 512 of each. At most 128 predictions per document are
scored, the same in every run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tools import TINY, command_line, put, shrink

import sinklens as sl

DECODERS = ("smollm2-135m", "gemma3-270m")
ALL_CONTROLS: tuple[Any, ...] = ("random", "recent", "same_id", "matched")
TEXTS: dict[str, Any] = {"seq_len": 512, "min_len": 256}
SCORED = 128
SMALL = 0.03
RECENT = (64, 256)
SMOKE = {"DECODERS": (TINY,), "TEXTS": {"n_seqs": 2, "seq_len": 72, "min_len": 72}, "SCORED": 4, "RECENT": (16, 32)}


def bands(n_layers: int) -> dict[str, range]:
    """Thirds of the layers."""
    third = n_layers // 3
    return {"early": range(third), "middle": range(third, 2 * third), "late": range(2 * third, n_layers)}


def every_mode(model: Any, sinks: sl.SinkMap) -> dict[str, Any]:
    """Each mode over all sinks, in the layers of their lives; and renormalising position 0 in every layer."""
    same: dict[str, Any] = {"allow_identity": True}
    return {
        "renormalize": sl.ablate_sinks(model, sinks),
        "zero": sl.ablate_sinks(model, sinks, "zero"),
        "value_only": sl.ablate_sinks(model, sinks, "value_only"),
        "scale(0.5)": sl.ablate_sinks(model, sinks, "scale", g=0.5),
        "mean_value": sl.ablate_sinks(model, sinks, "mean_value", **same),
        "fixed_key": sl.ablate_sinks(model, sinks, "fixed_key", **same),
        "fixed_key, neutral value": sl.ablate_sinks(model, sinks, "fixed_key", value="neutral"),
        "fixed_key, mean value": sl.ablate_sinks(model, sinks, "fixed_key", value="mean", **same),
        "fixed_logit": sl.ablate_sinks(model, sinks, "fixed_logit"),
        "fixed_logit, neutral value": sl.ablate_sinks(model, sinks, "fixed_logit", value="neutral"),
        "null": sl.ablate_sinks(model, sinks, "null"),
        "uniform": sl.ablate_sinks(model, sinks, "uniform"),
        "position 0, every layer: renormalize": sl.ablate_sinks(model, [0]),
        "position 0, every layer: zero": sl.ablate_sinks(model, [0], "zero"),
    }


def by_kind(model: Any, sinks: sl.SinkMap) -> dict[str, Any]:
    """Renormalize and zero by kind, and by where freed mass may go (zero frees none)."""
    kinds = {"all": sinks, "primary": sinks.primary, "secondary": sinks.secondary}
    found = {
        f"{kind}: {mode}": sl.ablate_sinks(model, chosen, mode)
        for kind, chosen in kinds.items()
        for mode in ("renormalize", "zero")
    }
    for kind, chosen in kinds.items():
        found[f"{kind}: renormalize, to ordinary"] = sl.ablate_sinks(model, chosen, to="ordinary")
    return found


def by_band(model: Any, sinks: sl.SinkMap) -> dict[str, Any]:
    """Renormalize and zero by thirds of the layers."""
    return {
        f"{name} layers {band[0]}-{band[-1]}: {mode}": sl.ablate_sinks(model, sinks, mode, layers=band)
        for name, band in bands(sinks.n_layers).items()
        for mode in ("renormalize", "zero")
    }


def massive(model: Any, sinks: sl.SinkMap) -> dict[str, Any]:
    """Zero against mean of the massive dimensions, and the other edits of the sink's residual."""
    return {
        mode: sl.ablate_residual(model, sinks.primary, mode, allow_identity=True)
        for mode in ("massive_zero", "massive_mean", "project", "rescale")
    }


def streaming(model: Any, _: sl.SinkMap) -> dict[str, Any]:
    """StreamingLLM's attention pattern as a mask: no sinks, and the first 1, 2, 4 tokens."""
    return {
        f"{k}+{recent}": sl.restrict_attention(model, sinks=k, recent=recent) for recent in RECENT for k in (0, 1, 2, 4)
    }


EXPERIMENTS: dict[str, tuple[Callable[[Any, sl.SinkMap], dict[str, Any]], tuple[Any, ...], str]] = {
    "modes": (every_mode, (), "Every mode, all sinks, in the layers of their lives"),
    "streaming": (streaming, (), "StreamingLLM's attention pattern as a mask (positions as in the text)"),
    "massive": (massive, ("random", "matched"), "The primary sink's residual stream, in every layer of its life"),
    "kinds": (by_kind, ALL_CONTROLS, "By kind of sink, and by where freed mass may go"),
    "bands": (by_band, ALL_CONTROLS, "By thirds of the layers"),
}


def run(name: str, store: Path, wanted: list[str]) -> None:
    """Run one model's experiments; each goes on where it was interrupted."""
    warnings.simplefilter("ignore", sl.SinklensWarning)
    torch.set_num_threads(1)
    model = sl.load_model(name)
    tokens = sl.load_tokens(model, "python-docs", **TEXTS)
    sinks = sl.find_sinks(model, tokens)
    for key in wanted or ["modes", "streaming", "massive", "bos", "kinds", "bands"]:
        if key == "bos":
            path = store / f"{name}-bos.csv"
            if not path.is_file():
                sl.experiment.bos_variants(model, tokens).to_dataframe(model).to_csv(path, index=False)
            continue
        build, controls, _ = EXPERIMENTS[key]
        folder = store / f"{name}-{key}"
        experiment = sl.run_experiment(
            model, tokens, build(model, sinks), controls=controls, sinks=sinks, most_scored=SCORED, resume=folder
        )
        experiment.save(store / f"{name}-{key}.safetensors")


def number(row: dict[str, Any], key: str) -> str:
    """A value with its interval."""
    value = row.get(key, float("nan"))
    if value != value:
        return "-"
    low, high = row.get(f"{key}_low", float("nan")), row.get(f"{key}_high", float("nan"))
    return f"{value:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low == low else "")


def effects(experiment: sl.experiment.Experiment) -> str:
    """One row per intervention and control."""
    table = experiment.to_dataframe().to_dict("records")
    base = table[0]
    lines = [
        f"{len(experiment.tokens)} documents, base loss {base['loss']:.3f}.",
        "",
        "| intervention | control | documents | change of loss (nats) | KL(base to edited) | same top token | "
        "beyond the control |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table[1:]:
        kl = f"{row['kl']:.3f}" + (
            f" [{row['kl_low']:.3f}, {row['kl_high']:.3f}]" if row["kl_low"] == row["kl_low"] else ""
        )
        lines.append(
            f"| {'' if row['control'] else row['label']} | {row['control']} | {row['sequences']} | "
            f"{number(row, 'd_loss')} | {kl} | {row['top1']:.3f} | {number(row, 'beyond')} |"
        )
    return "\n".join(lines)


def in_words(experiment: sl.experiment.Experiment) -> str:
    """Which interventions hardly change the loss, and which change it less than a control does."""
    table = experiment.to_dataframe().to_dict("records")
    absent, small, weaker = [], [], []
    for row in table[1:]:
        if not row["control"]:
            if row["d_loss_low"] <= 0 <= row["d_loss_high"]:
                absent.append(row["label"])
            elif row["d_loss_low"] == row["d_loss_low"] and abs(row["d_loss"]) < SMALL:  # NaN: too few documents
                small.append(f"{row['label']} ({row['d_loss']:+.3f})")
        elif row["beyond_high"] < 0:
            weaker.append(f"{row['label']} against {row['control']}")
    lines = []
    if absent:
        lines.append(f"No effect on the loss can be told from zero for: {'; '.join(absent)}.")
    if small:
        lines.append(f"The effect is real but below {SMALL} nats for: {'; '.join(small)}.")
    if weaker:
        lines.append(f"The control costs more than the sinks do: {'; '.join(weaker)}.")
    return "\n\n".join(lines)


def side_effects(experiment: sl.experiment.Experiment) -> str:
    """What else changed, for the interventions alone."""
    table = experiment.side_effects()
    table = table[(table.control == "")].drop(columns="control")
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row) + " |")
    return "\n".join(lines)


def write(store: Path, docs: Path) -> None:
    """Write the tables of all finished experiments to docs/findings/interventions.md."""
    parts = [
        "# What breaks without sinks",
        f"Written by `python findings/interventions.py` on {date.today()}, sinklens {sl.__version__}. Every document "
        f"of `python-docs` with at least 256 tokens, the first 512 of each; at most {SCORED} predictions per document "
        "are scored, none at a sink, at an edited token or at a control's token, the same in every run of a table. "
        "Intervals: 95 % bootstrap-t over documents. The models are 4-bit GGUF weights, dequantised. *Beyond the "
        "control* is the paired difference of the loss; a control that exists only in some documents is compared on "
        "those.",
    ]
    for name in DECODERS:
        if not any(store.glob(f"{name}-*.safetensors")) and not (store / f"{name}-bos.csv").is_file():
            continue
        parts.append(f"## {name}: interventions")
        if (store / f"{name}-bos.csv").is_file():
            table = pd.read_csv(store / f"{name}-bos.csv").to_dict("records")
            lines = ["| first token | loss | difference |", "|---|---|---|"]
            for row in table:
                shown = {**row, "difference_low": row["low"], "difference_high": row["high"]}
                lines.append(f"| {row['variant']} | {row['loss']:.3f} | {number(shown, 'difference')} |")
            parts.append("### The first token (the BOS on Gemma)\n\n" + "\n".join(lines))
        for key, (_, _, title) in EXPERIMENTS.items():
            path = store / f"{name}-{key}.safetensors"
            if path.is_file():
                experiment = sl.experiment.Experiment.load(path)
                notes = "".join(f"\n- {note}" for note in experiment.notes)
                parts.append(f"### {title}\n\n{effects(experiment)}{chr(10) + notes if notes else ''}")
                if in_words(experiment):
                    parts.append(in_words(experiment))
                parts.append(f"Side effects (means over layers and documents):\n\n{side_effects(experiment)}")
    put("interventions", parts, docs)


if __name__ == "__main__":
    command_line(__doc__, DECODERS, ["bos", *EXPERIMENTS], run, write, lambda: shrink(globals(), SMOKE))
