"""``Reproductions``: published against measured, as a table, a page of Markdown, a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from sinklens.core.errors import BadInputError
from sinklens.core.storage import FORMAT, write_text
from sinklens.core.validation import public_methods
from sinklens.reproductions.catalogue import CATALOGUE
from sinklens.reproductions.claims import DIFFERS, NOT_COMPARABLE, REPRODUCED, Entry
from sinklens.show.notebook import ShownInJupyter

KIND = "Reproductions"


@public_methods
@dataclass(frozen=True, eq=False)
class Reproductions(ShownInJupyter):
    """What :func:`sinklens.reproduce` found.

    Attributes:
        rows: one per claim and model: ``entry, model, claim, published, grade, quantity, measured, low, high,
            documents, rule, verdict, reason``.
        others: what else was measured: ``entry, model, quantity, measured, low, high, documents``.
        notes: originals that were not at hand, models that did not load.
        entries: the entries that ran.
        info: text, seed, versions, CPU seconds per entry and model.
    """

    rows: tuple[dict[str, Any], ...]
    others: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = self.counts()
        lines = [f"Reproductions: {', '.join(f'{n} {word}' for word, n in counts.items())}"]
        for row in self.rows:
            span = "" if row["low"] != row["low"] else f" [{row['low']:.3g}, {row['high']:.3g}]"
            shown = "-" if row["measured"] != row["measured"] else f"{row['measured']:.3g}{span}"
            because = f" because {row['reason']}" if row["reason"] else ""
            lines.append(
                f"  {row['entry']} on {row['model']}: {row['claim']}: {shown} ({row['rule']}): "
                f"{row['verdict']}{because}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        return {
            word: sum(row["verdict"] == word for row in self.rows) for word in (REPRODUCED, DIFFERS, NOT_COMPARABLE)
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per claim and model."""
        return pd.DataFrame(list(self.rows))

    def _repr_html_(self) -> str:
        table = self.to_dataframe()
        if not len(table):
            return "<p>nothing ran</p>"
        shown = table[["entry", "model", "claim", "published", "measured", "low", "high", "verdict", "reason"]]
        html = shown.to_html(index=False, border=0, na_rep="", float_format=lambda value: f"{value:.3g}")
        return f"<p>{escape(', '.join(f'{n} {word}' for word, n in self.counts().items()))}</p>{html}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one JSON file, whole or not at all."""
        content = {
            "format": FORMAT,
            "kind": KIND,
            "entries": [entry.name for entry in self.entries],
            "rows": [_known(row) for row in self.rows],
            "others": [_known(row) for row in self.others],
            "notes": self.notes,
            "info": self.info,
        }
        write_text(path, json.dumps(content, indent=1))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reproductions:
        """Read what :meth:`save` wrote.

        Raises:
            BadInputError: no such file, or another one.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInputError(f"{os.fspath(path)!r} is no readable JSON file ({error})") from error
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise BadInputError(f"{os.fspath(path)!r} holds no {KIND}")
        if content.get("format", 0) > FORMAT:
            raise BadInputError(f"{os.fspath(path)!r} was written by a newer sinklens; upgrade to read it")
        known = tuple(CATALOGUE[name] for name in content["entries"] if name in CATALOGUE)
        rows, others = (tuple(_unknown(row) for row in content[name]) for name in ("rows", "others"))
        return cls(rows, others, tuple(content["notes"]), known, content["info"])

    def to_markdown(self, title: str = "Published results, measured again") -> str:
        """The whole run as a page of Markdown."""
        return _markdown(self, title)


def brief(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows to show: all claims of an entry that one reason rules out on a model are one row."""
    shown: list[dict[str, Any]] = []
    for row in rows:
        same = ("entry", "model", "verdict", "reason")
        alike = [r for r in rows if all(r[name] == row[name] for name in same) and r["measured"] != r["measured"]]
        if len(alike) < 2 or not any(row is r for r in alike):
            shown.append(row)
        elif row is alike[0]:
            numbers = {"claim": f"{len(alike)} claims", "quantity": "none measured", "rule": ""}
            shown.append(row | numbers | {"published": "", "grade": "".join(sorted({r["grade"] for r in alike}))})
    return shown


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: null."""
    return {name: None if value != value else value for name, value in row.items()}


def _unknown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in row.items()}


def _markdown(found: Reproductions, title: str) -> str:
    info = found.info
    counts = ", ".join(f"{n} {word}" for word, n in found.counts().items())
    lines = [
        f"# {title}",
        "",
        f"Written by `{info.get('command', 'sinklens reproduce')}` on {info['written'][:10]}, sinklens "
        f"{info['sinklens']}. Text: {info['source']}, seed {info['seed']}. "
        f"{sum(info['cpu_seconds'].values()):.0f} CPU seconds.",
        "",
        f"**{len(found.rows)} claims judged on {len({r['model'] for r in found.rows})} model(s): {counts}.**",
        "",
        "A claim of direction or order is *reproduced* where the whole 95 % interval over documents (bootstrap-t, 16 "
        "or more) lies on the claimed side of the bound, and *differs* where it lies on the other. A printed number is "
        "compared only with the model that it was printed for: reproduced where the whole interval lies within the "
        "tolerance. Everything else is *not comparable*, with the reason. What concerns one given text has no interval "
        "and is judged as it is. The rules are code (`sinklens/reproductions/claims.py`). The embedded decoders are "
        "4-bit GGUF weights, dequantised, and far smaller than the papers' models.",
        "",
        "Grades of the published figures: A official code or result files, B the paper's text, C third-party notes "
        "about the paper, D its abstract.",
    ]
    if found.notes:
        lines += ["", *(f"- {_cell(note)}" for note in found.notes)]
    for entry in found.entries:
        lines += [
            "",
            f"## {entry.title}",
            "",
            f"`{entry.name}`. {entry.source}.",
            "",
            f"*Protocol.* {entry.protocol}",
            "",
        ]
        lines += ["*Our deviations.*", "", *(f"- {deviation}" for deviation in entry.deviations)]
        lines += [
            "",
            "| model | claim | published | grade | measured | rule | verdict |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in brief(_of(found.rows, entry)):
            because = f" because {row['reason']}" if row["reason"] else ""
            cells = [row["model"], f"{row['claim']}: {row['quantity']}", row["published"], row["grade"], _value(row)]
            cells += [row["rule"], f"**{row['verdict']}**{because}"]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        more = _of(found.others, entry)
        if more:
            lines += ["", "Also measured:", "", "| model | quantity | measured |", "|---|---|---|"]
            lines += [f"| {_cell(r['model'])} | {_cell(r['quantity'])} | {_value(r)} |" for r in more]
    return "\n".join([*lines, ""])


def _of(rows: Sequence[dict[str, Any]], entry: Entry) -> list[dict[str, Any]]:
    return [row for row in rows if row["entry"] == entry.name]


def _cell(text: str) -> str:
    return str(text).replace("|", r"\|").replace("\n", " ")


def _value(row: dict[str, Any]) -> str:
    if row["measured"] != row["measured"]:
        return "-"
    span = "" if row["low"] != row["low"] else f" [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['measured']:.4g}{span}" + (f", {row['documents']} documents" if span else "")
