"""Run the notebooks and keep what they show, so that it reads on a code host and offline: ``make notebooks``.

Figures get a static image beside their data (the data only where it is small), views that are a page of their own
become a picture of it. Nothing of the machine stays: no times, no warnings, no empty outputs of finished bars. A
notebook that fails, or that would keep a path or a warning, is not written.

    python notebooks/execute.py [NOTEBOOK ...] [--smoke]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

from sinklens.core.storage import write_text

FOLDER = Path(__file__).parent
FIGURE = "application/vnd.plotly.v1+json"
WIDTH, HEIGHT = 1000, 450  # of figures that have none of their own
MOST_DATA = 60_000  # characters of a figure's data, or of a view's page, that are kept beside the image
PATHS = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|Users|usr|opt|var|builds?|mnt)/|[A-Z]:\\\\")


def execute(path: Path) -> None:
    """Run one notebook from top to bottom and write it with its outputs, cleaned."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",)} | {"language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [kept(output) for output in cell.outputs if not empty(output)]
    faults = faults_of(notebook)
    if faults:
        raise SystemExit(f"{path.name} is not written: {'; '.join(faults)}")
    write_text(path, nbformat.writes(notebook) + "\n")


def faults_of(notebook: Any) -> list[str]:
    """What no kept output may hold: errors, streams, nothing at all, a path of the machine."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    found = [f"{output.output_type} in an output" for output in outputs if output.output_type in ("error", "stream")]
    found += ["no outputs"] * (not outputs) + ["a cell that was not run"] * any(c.execution_count is None for c in code)
    found += [f"a path: {match.group()}" for match in map(PATHS.search, map(json.dumps, outputs)) if match]
    return found


def empty(output: Any) -> bool:
    """Whether an output is what a finished progress bar leaves."""
    return "data" in output and not any(output.data.values())


def kept(output: Any) -> Any:
    """The output as it is kept."""
    data = output.get("data", {})
    if FIGURE in data:
        figure = go.Figure(data=data[FIGURE]["data"], layout=data[FIGURE]["layout"])
        size = {"width": figure.layout.width or WIDTH, "height": figure.layout.height or HEIGHT}
        data["image/png"] = base64.b64encode(figure.to_image("png", **size)).decode()
        if len(json.dumps(data[FIGURE])) > MOST_DATA:
            del data[FIGURE]
    elif len(data.get("text/html", "")) > MOST_DATA:
        output.data = {"image/png": base64.b64encode(picture(data["text/html"])).decode(), "text/plain": "a view"}
    return output


def picture(html: str) -> bytes:
    """What a page shows, in a browser without a network."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, names)), None), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 200}, offline=True)
        page.set_content(f"<!doctype html><meta charset='utf-8'><body>{html}</body>")
        page.wait_for_timeout(1000)  # the view draws itself after loading
        shown = page.screenshot(full_page=True)
        browser.close()
    return shown


def smoke() -> None:
    """Run a notebook of one cell, without a figure: those need a browser."""
    cell = nbformat.v4.new_code_cell("import sinklens\nsinklens.__name__")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
        execute(path)
        assert "sinklens" in nbformat.read(path, as_version=4).cells[0].outputs[0].data["text/plain"]


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--smoke", action="store_true", help="one small notebook, nothing kept")
    options = parser.parse_args()
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    if options.smoke:
        smoke()
        return
    for path in options.notebooks:
        execute(path)


if __name__ == "__main__":
    main()
