"""``manifest.json``: what the numbers depend on, how long each stage took, which files there are."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sinklens.bridge.capabilities import record
from sinklens.core.storage import write_text
from sinklens.report.page import Told
from sinklens.report.stage_store import Entry
from sinklens.show.page import manifest


def write_manifest(
    told: Told, facts: dict[str, Any], entries: dict[str, Entry], tables: list[str], seconds: float, folder: Path
) -> None:
    """Write the manifest, whole or not at all."""
    m = told.material
    result = {"finding": told.finding, "left_out": m.refused, "notes": [note for note in (told.note, told.why) if note]}
    content = manifest({"name": told.name, "capabilities": asdict(record(m.model))}, m.tokens, result, told.command)
    content |= {
        "seed": m.seed,
        "depends_on": {name: facts[name] for name in ("weights_sha256", "labels_sha256", "sizes", "code")},
        "key": next(iter(entries.values())).key,
        "stages": {
            name: {"seconds": entry.seconds, "cpu_seconds": entry.cpu_seconds, "left_out": entry.refused}
            for name, entry in entries.items()
        },
        "seconds_of_this_run": round(seconds, 1),
        "files": {
            "tables": tables,
            "figures": told.files,
            "attention": [page.file for page in told.pages],
            "stages": sorted(path.name for path in (folder / "stages").glob("*.safetensors")),
        },
    }
    write_text(folder / "manifest.json", json.dumps(content, indent=1))
