"""What sinklens says while it works: notes and progress, on standard error, never on standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sinklens.show.notebook import notebook_bar

stderr = Console(stderr=True)


Advance = Callable[[], None]  # call it once for each finished step


@contextmanager
def progress_bar(description: str, total: int, show: bool | None = None) -> Iterator[Advance]:
    """A progress bar in terminals and notebooks; silent elsewhere unless ``show`` is True.

    The bar disappears when the work ends, also by Ctrl-C or an error.
    """
    visible = (stderr.is_terminal or stderr.is_jupyter) if show is None else show
    if visible and stderr.is_jupyter:
        with notebook_bar(description, total) as advance:
            yield advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not visible) as bar:
        task = bar.add_task(description, total=total)

        yield lambda: bar.update(task, advance=1)
