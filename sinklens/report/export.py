"""``figures/``: every figure as SVG and PNG for papers, where kaleido and a Chrome are installed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from sinklens.core.errors import BadInputError
from sinklens.core.storage import atomic_path, write_text
from sinklens.report.content import Plot

WIDTH, SCALE = 900, 2
ENDINGS = ("svg", "png")
HOW = (
    "Figures were not written as SVG and PNG: that needs kaleido (pip install 'sinklens[export]') and a Chrome or "
    "Chromium (on Debian and Ubuntu: apt-get install chromium); run the same command again afterwards, and only the "
    "figures are made."
)


def export(plots: list[Plot], folder: Path, memory: Path) -> tuple[list[str], str]:
    """Write SVG and PNG of every figure that is not there already.

    ``memory``: a file that keeps the hash of each drawn figure. Returns the names of the files, and why there are none.
    """
    if not can_draw():
        return [], HOW
    known = _known(memory)
    hashes = {plot.name: hashlib.sha256(str(plot.figure.to_json()).encode()).hexdigest() for plot in plots}
    todo = [
        plot
        for plot in plots
        if known.get(plot.name) != hashes[plot.name]
        or not all((folder / f"{plot.name}.{ending}").is_file() for ending in ENDINGS)
    ]
    try:
        with _one_browser(bool(todo)):
            for plot in todo:
                for ending in ENDINGS:
                    _draw(plot, folder / f"{plot.name}.{ending}")
                known[plot.name] = hashes[plot.name]
                write_text(memory, json.dumps(known))
    except BadInputError:  # the folder cannot be written, which is no matter of kaleido's
        raise
    except (RuntimeError, OSError, ValueError, *_kaleido_errors()) as error:
        return [], f"{HOW} What kaleido said: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    for name in set(known) - set(hashes):  # drawn for another report in this folder
        for ending in ENDINGS:
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    write_text(memory, json.dumps({name: known[name] for name in hashes}))
    return [f"{name}.{ending}" for name in hashes for ending in ENDINGS], ""


def can_draw() -> bool:
    """Whether kaleido is installed and finds a browser."""
    if importlib.util.find_spec("kaleido") is None:
        return False
    from choreographer.browsers import Chromium  # optional

    return bool(os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False))


def _kaleido_errors() -> tuple[type[Exception], ...]:
    """What kaleido raises where a browser cannot draw a figure; it is no RuntimeError."""
    from kaleido.errors import KaleidoError  # optional

    return (KaleidoError,)


@contextlib.contextmanager
def _one_browser(wanted: bool) -> Iterator[None]:
    """Keep one browser for all figures: starting it takes seconds, a figure a fifth of one."""
    if not wanted:
        yield
        return
    import kaleido  # optional

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kaleido says that options given per figure do not reach a running browser
        kaleido.start_sync_server(n=1, silence_warnings=True)
        try:
            yield
        finally:
            kaleido.stop_sync_server(silence_warnings=True)


def _draw(plot: Plot, file: Path) -> None:
    with atomic_path(file) as partial:
        width = plot.figure.layout.width or WIDTH
        partial.write_bytes(plot.figure.to_image(format=file.suffix[1:], width=width, scale=SCALE))


def _known(memory: Path) -> dict[str, str]:
    try:
        return json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
