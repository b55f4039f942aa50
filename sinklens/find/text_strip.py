"""A sequence as a strip of coloured tokens, for pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinklens.find.scores import SinkScores


STRIP_TOKENS = 160


def text_strip(scores: SinkScores, sequence: int, most: int = STRIP_TOKENS) -> list[dict[str, Any]]:
    """The first tokens of one sequence with the shade of each: its mean beta, None where beta is undefined."""
    alpha = scores.alpha[sequence].double().mean((0, 1))
    beta = scores.beta[sequence].double().nanmean((0, 1))
    strip = []
    for p, label in enumerate(scores.tokens.labels[sequence][:most]):
        strength = None if beta[p].isnan() else min(1.0, 2.5 * float(beta[p]))
        strip.append(
            {
                "text": label.replace("\n", "\u21b5") or "\u00b7",
                "breaks": "\n" in label,
                "hover": f"position {p}, alpha {float(alpha[p]):.3f}, beta {float(beta[p]):.3f}",
                "shade": strength,
            }
        )
    return strip
