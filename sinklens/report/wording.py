"""Numbers in words: a direction is claimed only where the interval lies on one side of zero."""

from __future__ import annotations

import math

from sinklens.core.intervals import MIN_DOCUMENTS


def number(value: float, digits: int = 3) -> str:
    """A number as it stands in sentences: so many decimals, or two significant digits where it is small."""
    if math.isnan(value):
        return "not defined"
    return f"{value:.2g}" if 0 < abs(value) < 10 ** (1 - digits) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A number with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def between(low: float, high: float, digits: int = 3) -> str:
    """An interval in brackets, after a space; empty where there is none."""
    return "" if math.isnan(low) or math.isnan(high) else f" [{number(low, digits)}, {number(high, digits)}]"


def side(low: float, high: float, zero: float = 0.0) -> int | None:
    """1 or -1 where the whole interval lies above or below zero, 0 where it holds it, None without an interval."""
    if math.isnan(low) or math.isnan(high):
        return None
    return 1 if low > zero else -1 if high < zero else 0


def change(
    what: str, value: float, low: float, high: float, unit: str, words: tuple[str, str] = ("rises", "falls")
) -> str:
    """``the loss rises by 0.310 nats [0.200, 0.400]``, or what an interval with zero in it, or none, allows to say."""
    if math.isnan(value):
        return f"{what} was not measured here"
    amount, span = f"{number(abs(value))} {unit}".strip(), between(low, high)
    where = side(low, high)
    if where is None and value == 0:
        return f"{what} is the same in this sample (no interval)"
    if where is None:
        return f"{what} is {amount} {'higher' if value > 0 else 'lower'} in this sample (no interval)"
    if where == 0:
        return f"{what} does not change by an amount that can be told from zero ({signed(value)} {unit}{span})"
    up, down = words
    mirrored = span if where > 0 else between(-high, -low)
    return f"{what} {up if where > 0 else down} by {amount}{mirrored}"


def against(control: str, value: float, low: float, high: float, unit: str) -> str:
    """How an effect compares with the same edit elsewhere; ``value``: effect minus control."""
    if math.isnan(value):
        return f"{control} could not be tried in these texts"
    where, span = side(low, high), between(low, high)
    if where is None and value == 0:
        return f"just that of {control} (no interval)"
    if where is None:
        return f"{number(abs(value))} {unit} {'above' if value > 0 else 'below'} {control} (no interval)"
    if where == 0:
        return f"not to be told from {control} (difference {signed(value)} {unit}{span})"
    span = span if where > 0 else between(-high, -low)
    return f"{number(abs(value))} {unit}{span} {'above' if where > 0 else 'below'} {control}"


def times(what: str, log_ratio: float, low: float, high: float) -> str:
    """``mix rises to 1.30 times [1.10, 1.50]``, from a log ratio."""
    if math.isnan(log_ratio):
        return f"{what} cannot be compared (it is zero on one side)"
    factor = math.exp(log_ratio)
    where = side(low, high)
    if where is None:
        return f"{what} is {factor:.2f} times as large in this sample (no interval)"
    span = f" [{math.exp(low):.2f}, {math.exp(high):.2f}]"
    if where == 0:
        return f"{what} does not change by a factor that can be told from 1 ({factor:.2f}{span})"
    return f"{what} {'rises' if where > 0 else 'falls'} to {factor:.2f} times{span}"


def sample_only(documents: int) -> str:
    """What must be said before numbers without intervals; empty where there are enough documents."""
    if documents >= MIN_DOCUMENTS:
        return ""
    return (
        f"With {counted(documents, 'document')} there are no intervals (they need {MIN_DOCUMENTS}): what follows "
        "describes this sample, and may be chance."
    )


def counted(count: int, noun: str) -> str:
    """``1 sink``, ``2 sinks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
