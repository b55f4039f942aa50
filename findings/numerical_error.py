"""Measure docs/findings/numerical_error.md: what float32 costs every public number, on families that keep float64."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tools import DOCS, HELP, find_tests, put

find_tests()

from public_numbers import FAMILIES, TOLERANCE, errors  # noqa: E402


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help=HELP)
    if not parser.parse_args().smoke:
        measure(FAMILIES, DOCS)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(FAMILIES[-2:], Path(folder))


def measure(families: Sequence[str], docs: Path) -> None:
    """Write the page."""
    lines = [
        "# Numerical error of float32",
        "",
        f"Written by `python findings/numerical_error.py` on {date.today()}, sinklens {version('sinklens')}, torch "
        f"{version('torch')}, on the CPU. Tiny random models, run in float32 and in float64 from the same weights: the "
        "largest absolute difference, the largest magnitude of the number, and their quotient. "
        "`tests/robustness/test_float64.py` "
        f"holds every quotient below {TOLERANCE:g}. Results are kept in float32, so nothing can be better than 6e-8. "
        "Hosts that compute norms or softmax in float32 whatever the dtype (Llama, Gemma and others) cannot be checked "
        "so. GPT-2, BERT and GPT-NeoX can, but for NeoX's rotary tables. Random models have larger scores than most "
        "trained ones; a trained model's error depends on its massive activations.",
        "",
    ]
    for family in families:
        lines += [f"## {family}", "", "| number | largest error | largest magnitude | relative |", "|---|---|---|---|"]
        for name, (error, largest, relative) in errors(family).items():
            lines.append(f"| {name} | {error:.1e} | {largest:.3g} | {relative:.1e} |")
        lines.append("")
    put("numerical_error", ["\n".join(lines).rstrip()], docs)


if __name__ == "__main__":
    main()
