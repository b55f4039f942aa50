"""The first look at a model: scan for sinks, summarise, and write a page, a table and a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.core.intervals import MIN_DOCUMENTS
from sinklens.core.storage import atomic_path, write_text
from sinklens.core.validation import public
from sinklens.find.score_figures import head_map, layer_profile, position_map
from sinklens.find.scores import SinkScores
from sinklens.find.text_strip import STRIP_TOKENS, text_strip
from sinklens.show.page import manifest, render

TOP_TOKENS = 12


@dataclass(frozen=True)
class ScanSummary:
    """What a scan says in a few numbers."""

    model: str
    source: str
    sequences: int
    documents: int
    longest: int
    position: int
    epsilon: float
    sink_rate: float
    interval: tuple[float, float] | None
    loss: float | None
    layers: pd.DataFrame
    held_by: str
    top_tokens: pd.DataFrame

    def sentence(self) -> str:
        """The finding in one sentence."""
        if self.interval is not None:
            low, high = self.interval
            spread = f" [{low:.3f}, {high:.3f}], 95 % bootstrap-t interval over {self.documents} documents"
        else:
            spread = f" ({self.documents} document(s): no interval below {MIN_DOCUMENTS})"
        return (
            f"Position {self.position} ({self.held_by}) is a sink (alpha > {self.epsilon:g}) in a share of "
            f"{self.sink_rate:.3f} of {self.model}'s heads{spread}."
        )


def summarize(scores: SinkScores, *, position: int = 0, epsilon: float = 0.3, loss: float | None = None) -> ScanSummary:
    """The sink rate with its interval, the layers, and the other tokens with the largest far importance."""
    tokens = scores.tokens
    table = scores.position_table()
    held = table[table.position == position].token.value_counts()
    held_by = repr(held.index[0]) if len(held) == 1 else f"{len(held)} different tokens in {int(held.sum())} sequences"
    return ScanSummary(
        model=scores.info["capabilities"]["model"],
        source=str(tokens.info.get("source", "?")),
        sequences=len(tokens),
        documents=len(set(tokens.documents)),
        longest=int(tokens.lengths.max()),
        position=position,
        epsilon=epsilon,
        sink_rate=scores.sink_rate(position, epsilon),
        interval=scores.sink_rate_interval(position, epsilon),
        loss=loss,
        layers=scores.layer_table(position, epsilon),
        held_by=held_by,
        top_tokens=table[table.position != position].head(TOP_TOKENS),
    )


@public
def write_scan(
    scores: SinkScores,
    out: str | os.PathLike[str],
    *,
    position: int = 0,
    epsilon: float = 0.3,
    loss: float | None = None,
    command: Sequence[str] = (),
) -> dict[str, Path]:
    """Write ``scan.html`` (self-contained, opens offline), ``scores.parquet`` and ``manifest.json`` into a folder.

    Each file is written whole or not at all. Returns the three paths by name.
    """
    folder = Path(out)
    summary = summarize(scores, position=position, epsilon=epsilon, loss=loss)
    result = {
        "position": summary.position,
        "epsilon": summary.epsilon,
        "sink_rate": summary.sink_rate,
        "interval": summary.interval,
        "loss": summary.loss,
    }
    facts = manifest(scores.info, scores.tokens, result, command)
    paths = {name: folder / name for name in ("scan.html", "scores.parquet", "manifest.json")}
    with atomic_path(paths["scores.parquet"]) as partial:
        scores.to_dataframe().to_parquet(partial, index=False)
    write_text(paths["manifest.json"], json.dumps(facts, indent=1))
    write_text(paths["scan.html"], page(scores, summary, facts))
    return paths


def page(scores: SinkScores, summary: ScanSummary, facts: dict[str, Any]) -> str:
    """The scan as one HTML page; plotly's script stands in it once."""
    figures = [
        (
            head_map(scores, summary.position, summary.epsilon),
            "Each cell is one head: the attention that this position gets, averaged over the queries that may see it "
            "and over sequences. Bright rows are layers that park attention.",
        ),
        (
            layer_profile(scores, summary.position, summary.epsilon),
            "Bars: share of heads above the threshold. Line: mean attention. Sinks usually start a few layers in.",
        ),
        (
            position_map(scores, 0),
            "One sequence, all layers, averaged over heads: bright columns are sinks; a column that starts late or "
            "ends early is a secondary sink.",
        ),
    ]
    return render(
        "scan.html",
        figures,
        summary=summary,
        strip=text_strip(scores, 0),
        strip_cut=len(scores.tokens.labels[0]) > STRIP_TOKENS,
        tokens=summary.top_tokens.to_dict("records"),
        manifest=json.dumps(facts, indent=1),
    )
