"""Every published result that ``reproduce`` knows, by name."""

from __future__ import annotations

from collections.abc import Sequence

from sinklens.core.errors import BadInputError
from sinklens.reproductions import barbero, gu, massive, ran_milo, wong, xiao
from sinklens.reproductions.claims import Entry

CATALOGUE: dict[str, Entry] = {
    entry.name: entry for module in (gu, barbero, wong, xiao, massive, ran_milo) for entry in module.ENTRIES
}


def chosen(names: Sequence[str] | str | None) -> tuple[Entry, ...]:
    """The entries of these names, all without any.

    Raises:
        BadInputError: a name that is none.
    """
    wanted = [names] if isinstance(names, str) else list(CATALOGUE) if names is None else list(names)
    unknown = [name for name in wanted if name not in CATALOGUE]
    if unknown or not wanted:
        raise BadInputError(
            f"no entry {', '.join(map(repr, unknown)) or 'was given'}; there are {', '.join(CATALOGUE)}"
        )
    return tuple(CATALOGUE[name] for name in dict.fromkeys(wanted))
