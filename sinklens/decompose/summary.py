"""What a decomposition says, in words: numbers with their intervals, and verdicts only where these carry them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sinklens.decompose.margin import MEANS

if TYPE_CHECKING:
    from sinklens.decompose.result import SinkDecomposition

TERMS = {
    "distance": "the mean query against the mean key, by distance alone",
    "key_side": "the sink's own key against the mean query",
    "query_distance": "what sets each query apart, against the mean key",
    "query_specific": "what sets each query apart, against what sets the sink's key apart",
}
CLAIMS = {
    "mass effect": "taking mass matters by itself (renormalize against zero)",
    "key bias": "a context-free key with a neutral value does as well",
    "constant offset": "one constant logit per head does as well",
    "parameter bias": "b_Q and b_K make the gap",
}


def summary(found: SinkDecomposition) -> str:
    """The whole result in a few lines."""
    documents = len({s.document for s in found.subjects})
    lines = [
        f"SinkDecomposition of {len(found.subjects)} sink(s) in {documents} document(s), {len(found.layers)} layers, "
        f"{found.values.shape[2]} heads each"
    ]
    for kind in found.kinds:
        lines += _kind(found, kind)
    lines += _effects(found)
    lines += [f"  note: {note}" for note in found.notes]
    return "\n".join(lines)


def _kind(found: SinkDecomposition, kind: str) -> list[str]:
    rows = {row["number"]: row for row in found.means(kind).to_dict("records")}
    if "margin" not in rows:
        alive = any(layer in s.layers for s in found.subjects if s.kind == kind for layer in found.layers)
        why = (
            "no query is far enough from any of them" if alive else "none is alive in the layers that were taken apart"
        )
        return [f"  {kind}: {why}, so there is nothing to say"]
    lines = [
        f"  {kind}: margin {_value(rows['margin'])} nats = gap {_value(rows['gap'])} - log of the rest "
        f"{rows['log_rest']['mean']:.2f} - peakedness {rows['peakedness']['mean']:.2f}"
        + (f" - learned logit {rows['learned']['mean']:.2f}" if rows["learned"]["mean"] else "")
    ]
    largest = max(MEANS, key=lambda name: abs(rows[name]["mean"]))
    row = rows[largest]
    doubt = " (not told from 0)" if row["low"] <= 0 <= row["high"] else ""
    few = " (too few documents for an interval)" if row["low"] != row["low"] else ""
    lines.append(f"    of the gap, {_value(row)} is {TERMS[largest]}{doubt}{few}")
    heads = found.heads(kind)
    shares = heads.bias_share.dropna()
    if len(shares):
        lines.append(
            f"    bias share (1: the mean query explains how sigma varies over queries; 0: no better than a constant): "
            f"median {shares.median():.2f} over {len(shares)} heads, above 0.5 in {int((shares > 0.5).sum())}"
        )
    if "written" in rows:
        lines.append(
            f"    it writes {rows['written']['mean']:.3g} per head and query, everything else "
            f"{rows['written_rest']['mean']:.3g}; its value is {rows['value_ratio']['mean']:.2f} times the usual length"
        )
        classes = heads["class"].value_counts()
        named = ", ".join(f"{count} {name}" for name, count in classes.items() if name != "none")
        lines.append(f"    heads with a sink event: {named or 'none'} of {len(heads)}")
    return lines


def _effects(found: SinkDecomposition) -> list[str]:
    lines = []
    square = found.effects.get("all")
    if square is not None:
        for row in square.to_dataframe().to_dict("records"):
            lines.append(
                f"  2x2, all heads, {row['metric']}: mass part {_part(row, 'mass_part')}, value part "
                f"{_part(row, 'value_part')}, interaction {_part(row, 'interaction')}; together {_part(row, 'total')}"
            )
    if found.claims is not None:
        for row in found.claims.to_dataframe().to_dict("records"):
            lines.append(
                f"  {row['claim']} ({CLAIMS[row['claim']]}): {row['verdict']}; {row['test']} "
                f"{_value({**row, 'mean': row['effect']})} of {row['removal']:+.3f}"
            )
    return lines


def _part(row: dict[str, Any], name: str) -> str:
    return _value({"mean": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]})


def _value(row: dict[str, Any]) -> str:
    if math.isnan(row["mean"]):
        return "-"
    between = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if row["low"] == row["low"] else ""
    return f"{row['mean']:+.3f}{between}"
