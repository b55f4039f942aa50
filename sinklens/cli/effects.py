"""An experiment on the terminal: effects and side effects."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sinklens.cli.options import plain, stdout


def show_effects(experiment: Any) -> None:
    """Effects and side effects on the terminal."""
    table = Table("intervention", "control", "sequences", "d loss", "KL", "same top", box=None, pad_edge=False)
    rows = experiment.to_dataframe().to_dict("records")
    for row in rows[1:]:
        name = "" if row["control"] else plain(row["label"])
        effect = f"{row['d_loss']:+.4f}" + bounds(row, "d_loss")
        table.add_row(
            name,
            row["control"],
            str(row["sequences"]),
            effect,
            f"{row['kl']:.4f}" + bounds(row, "kl"),
            f"{row['top1']:.3f}",
        )
    stdout.print(
        f"base loss {rows[0]['loss']:.4f} nats per token on {rows[0]['sequences']} sequence(s)", highlight=False
    )
    stdout.print(table)
    for row in experiment.side_effects().to_dict("records"):
        if row["label"] != "base" and not row["control"]:
            went = ", ".join(
                f"{row[key]:.3f} to {words}"
                for key, words in (
                    ("to_other_sinks", "other sinks"),
                    ("to_ordinary", "ordinary tokens"),
                    ("to_nothing", "nothing"),
                )
            )
            stdout.print(
                f"{plain(row['label'])}: of {row['freed']:.3f} attention freed per query, {went}; "
                f"{row['new_sinks']:.1f} new sinks per sequence",
                highlight=False,
            )
    for note in experiment.notes:
        stdout.print(f"note: {plain(note)}", highlight=False)


def bounds(row: dict[str, Any], key: str) -> str:
    """An interval, where there is one."""
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return plain(f" [{low:+.4f}, {high:+.4f}]") if low == low else ""
