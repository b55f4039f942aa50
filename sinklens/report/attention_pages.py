"""``attention/``: circuitsvis views of the first sequence, pages of their own that open offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import sinklens as sl
from sinklens.bridge.capabilities import record
from sinklens.report.stage_store import Entry, Shelf
from sinklens.report.stages import Material

TEXT_TOKENS = 120  # of the coloured text
MAP_TOKENS = 40  # of the attention maps
MARK = "attention"


@dataclass(frozen=True)
class AttentionPage:
    """One page: its file name, what it shows, the call that makes it."""

    file: str
    words: str
    code: str


def write_attention(m: Material, shelf: Shelf, folder: Path) -> tuple[list[AttentionPage], str]:
    """Write the pages, unless they are there; returns them, and why there are none."""
    planned, why = _planned(m)
    done = shelf.entry(MARK)
    if done is None or not all((folder / page.file).is_file() for page in planned):
        shelf.clear(MARK)
        for page in planned:
            if page.file == "tokens.html":
                m["sinks"].cut([0], TEXT_TOKENS).token_view().save(folder / page.file)
            else:
                text = m.tokens[0].first(_shown(m))
                sl.heads.attention_view(m.model, text, layer=_layer(page)).save(folder / page.file)
        shelf.put(MARK, Entry(shelf.key, 0.0, 0.0))
    for file in folder.glob("layer-*.html"):  # of another report in this folder
        if file.name not in {page.file for page in planned}:
            file.unlink()
    return planned, why


def _layer(page: AttentionPage) -> int:
    return int(page.file.removeprefix("layer-").removesuffix(".html"))


def _shown(m: Material) -> int:
    return min(MAP_TOKENS, int(m.tokens.lengths[0]))


def _planned(m: Material) -> tuple[list[AttentionPage], str]:
    count = min(TEXT_TOKENS, int(m.tokens.lengths[0]))
    pages = [
        AttentionPage(
            "tokens.html",
            f"the first {count} tokens of the first sequence, coloured by mass at a layer of your choice",
            f"sinks.cut([0], {TEXT_TOKENS}).token_view()",
        )
    ]
    facts = record(m.model)
    if isinstance(m.model, sl.models.PlainModel):
        return pages, "Attention maps by head need a TransformerLens bridge, which this model has not."
    if not facts.causal and int(m.tokens.lengths[0]) > MAP_TOKENS:
        return pages, (
            f"Attention maps by head are drawn up to {MAP_TOKENS} tokens, and in an encoder a text that is cut is "
            "another text."
        )
    for layer in _layers(m):
        pages.append(
            AttentionPage(
                f"layer-{layer}.html",
                f"all heads of layer {layer} on the first {_shown(m)} tokens",
                f"sl.heads.attention_view(model, tokens[0].first({_shown(m)}), layer={layer})",
            )
        )
    return pages, ""


def _layers(m: Material) -> list[int]:
    """Where the first primary sink and the first secondary one are strongest; without sinks, the middle layer."""
    chosen = []
    for kind in ("primary", "secondary", "undetermined"):
        first = next(iter(m["sinks"].where(kind=kind)), None)
        if first is not None and any(mass == mass for mass in first.masses):
            known = [(mass, layer) for layer, mass in enumerate(first.masses) if mass == mass]
            chosen.append(max(known)[1])
    return sorted(set(chosen)) or [record(m.model).n_layers // 2]
