"""``index.html`` and ``report.md`` from the parts of a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from sinklens.find.text_strip import text_strip
from sinklens.report.attention_pages import AttentionPage
from sinklens.report.content import Plot, Section, Sheet
from sinklens.report.figure_json import for_page, safe_json, split_title
from sinklens.report.methods import formulas, limits, preamble
from sinklens.report.stages import Material
from sinklens.report.tables import SHOWN_ROWS, cells, escaped, markdown

STRIP_TOKENS = 120


@dataclass(frozen=True, eq=False)
class Told:
    """Everything that the two pages say.

    Attributes:
        material: the results.
        finding: the first paragraph, sentence by sentence.
        sections: the story.
        name: what ``load_model`` takes.
        pages, note: the circuitsvis pages, and why some are missing.
        files, why: the exported figures, or why there are none.
        command: as typed.
    """

    material: Material
    finding: list[str]
    sections: list[Section]
    name: str
    pages: list[AttentionPage]
    note: str
    files: list[str]
    why: str
    command: list[str]

    @property
    def title(self) -> str:
        """The report's title."""
        return f"Attention sinks of {Path(self.name).name or self.name}"

    @property
    def source(self) -> str:
        """The text, in words."""
        tokens = self.material.tokens
        return str(tokens.info.get("source", "ids"))


def html_page(told: Told, folder: Path) -> str:
    """The page: plotly's script stands in it once, figures as thin JSON, everything else escaped by the template."""
    m = told.material
    drawings = {plot.name: for_page(plot.figure) for section in told.sections for plot in section.plots}
    template: Any = next((p.figure.layout.template for s in told.sections for p in s.plots), None)
    facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    environment = Environment(
        loader=PackageLoader("sinklens.show"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        told=told,
        strip=text_strip(m["scores"], 0, STRIP_TOKENS),
        strip_cut=int(m.tokens.lengths[0]) > STRIP_TOKENS,
        plotly=get_plotlyjs(),
        template=safe_json(template.to_plotly_json() if template is not None else {}),
        drawings=safe_json(drawings),
        title_of=lambda plot: split_title(plot.figure),
        cells=lambda sheet: cells(sheet.frame),
        shown_rows=SHOWN_ROWS,
        formulas=formulas(),
        limits=limits(m),
        preamble=preamble(told.name),
        manifest=facts,
        manifest_text=json.dumps(facts, indent=1),
        image=lambda plot, ending: f"figures/{plot.name}.{ending}" if f"{plot.name}.{ending}" in told.files else "",
    )


def markdown_page(told: Told) -> str:
    """The same in Markdown: figures as links to the exported files."""
    m = told.material
    lines = [f"# {escaped(told.title)}", "", escaped(" ".join(told.finding)), ""]
    lines += [
        f"Text: {escaped(told.source)}, {len(m.tokens)} sequence(s) of up to {int(m.tokens.lengths.max())} tokens.",
        "",
    ]
    for section in told.sections:
        lines += [f"## {section.title}", ""]
        lines += [f"- {escaped(sentence)}" for sentence in (*section.sentences, *section.missing)]
        for plot in section.plots:
            lines += ["", *_figure(told, plot)]
        for sheet in section.sheets:
            lines += ["", *_table(sheet)]
        lines.append("")
    lines += ["## Attention of single heads", ""]
    lines += [f"- [{escaped(page.words)}](attention/{page.file})" for page in told.pages]
    lines += [f"- {escaped(told.note)}"] if told.note else []
    lines += ["", "## Methods", ""]
    lines += [
        f"- **{row['name']}**: {escaped(row['formula'])}" + (f" ({row['source']})" if row["source"] else "")
        for row in formulas()
    ]
    lines += ["", "## Limits", "", *(f"- {escaped(limit)}" for limit in limits(m))]
    lines += ["", "## How to repeat it", "", "```python", preamble(told.name)]
    lines += [section.code for section in told.sections if section.code]
    lines += ["```", ""]
    if told.why:
        lines += [escaped(told.why), ""]
    return "\n".join(lines)


def _figure(told: Told, plot: Plot) -> list[str]:
    title, small = split_title(plot.figure)
    lines = [f"**{escaped(title)}.** {escaped(small)}", ""]
    if f"{plot.name}.png" in told.files:
        lines += [f"![{escaped(title)}](figures/{plot.name}.png)", ""]
    return [*lines, f"{escaped(plot.caption)} Made by `{plot.code}`."]


def _table(sheet: Sheet) -> list[str]:
    rest = f" The first {SHOWN_ROWS} of {len(sheet.frame)} rows." if len(sheet.frame) > SHOWN_ROWS else ""
    return [
        f"{escaped(sheet.caption)}{rest} All: [tables/{sheet.name}.csv](tables/{sheet.name}.csv)",
        "",
        markdown(sheet.frame),
    ]
