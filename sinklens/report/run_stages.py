"""Run the stages in order, each once: what lies finished on the shelf is read, what cannot be done is noted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

from sinklens.bridge.capabilities import capabilities
from sinklens.core.errors import BadInputError, SinklensWarning, UnsupportedModelError
from sinklens.report.stage_store import Entry, Shelf
from sinklens.report.stages import STAGES, Material, Stage
from sinklens.show.progress import stderr

NEEDED = ("scores", "sinks")  # a model and a text without these have no report


def teller(progress: bool | None) -> Callable[[str], None]:
    """Says a line on standard error: in terminals and notebooks, or wherever ``progress`` is True."""
    shown = (stderr.is_terminal or stderr.is_jupyter) if progress is None else progress

    def say(line: str) -> None:
        if shown:
            stderr.print(line, highlight=False, markup=False, soft_wrap=True)

    return say


def run_stages(m: Material, shelf: Shelf, say: Callable[[str], None]) -> dict[str, Entry]:
    """The results into ``m``; returns each stage's entry.

    Raises:
        SinklensError: the model or the text cannot be scanned at all.
    """
    entries: dict[str, Entry] = {}
    for number, stage in enumerate(STAGES, start=1):
        start = f"[{number}/{len(STAGES)}] {stage.doing}"
        entry = _finished(m, shelf, stage)
        if entry is not None:
            shelf.tidy(stage.name)
            say(f"{start}: already done" if not entry.refused else f"{start}: left out")
        else:
            say(f"{start}{_estimate(m, stage, entries)}")
            entry = _do(m, shelf, stage)
            if entry.refused:
                say(f"    left out: {entry.refused}")
        entries[stage.name] = entry
        if entry.refused:
            m.refused[stage.name] = entry.refused
        m.facts[stage.name] = entry.facts
    return entries


def _finished(m: Material, shelf: Shelf, stage: Stage) -> Entry | None:
    """The entry of a finished stage, its result read; None where it must run (again)."""
    entry = shelf.entry(stage.name)
    if entry is None or entry.refused:
        return entry
    try:
        m.results[stage.name] = stage.result.load(shelf.file(stage.name))
    except BadInputError:
        return None  # the file is gone or damaged
    return entry


def _do(m: Material, shelf: Shelf, stage: Stage) -> Entry:
    shelf.clear(stage.name)
    began, cpu = time.perf_counter(), time.process_time()
    m.parts[stage.name] = shelf.parts(stage.name)
    refused, facts = "", {}
    missing = [name for name in stage.needs if name not in m.results]
    if missing:
        doing = {one.name: one.doing for one in STAGES}[missing[0]]
        refused = f'it builds on "{doing}", which was left out'
    else:
        try:
            if stage.name not in NEEDED:
                capabilities(m.model)  # refuses a model without a bridge, with its reason
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SinklensWarning)  # results carry it as a note
                m.results[stage.name], facts = stage.run(m)
        except (BadInputError, UnsupportedModelError) as error:
            if stage.name in NEEDED:
                raise
            refused = str(error)
    if not refused:
        m.results[stage.name].save(shelf.file(stage.name))
    spent = round(time.perf_counter() - began, 2), round(time.process_time() - cpu, 2)
    entry = Entry(shelf.key, *spent, refused=refused, facts=facts)
    shelf.put(stage.name, entry)
    return entry


def _estimate(m: Material, stage: Stage, entries: dict[str, Entry]) -> str:
    """Words for how long a stage will take, from the time that the scan took for one forward of the text."""
    if "scores" not in entries or any(name not in m.results for name in stage.needs):
        return ""
    seconds = entries["scores"].seconds * stage.forwards(m)
    if seconds < 5:
        return ""
    return f" (about {seconds:.0f} s)" if seconds < 90 else f" (about {seconds / 60:.0f} min)"
