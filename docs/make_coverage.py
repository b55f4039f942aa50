"""Simulate how often intervals over documents hold the true mean; write docs/interval_coverage.md."""

from __future__ import annotations

import math
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_interval_coverage import DISTRIBUTIONS  # noqa: E402

import sinklens  # noqa: E402
from sinklens.jacobians import chi_square_interval  # noqa: E402
from sinklens.statistics import interval  # noqa: E402

RUNS, RESAMPLES, SIZES = 1000, 999, (16, 24, 50)
PROBES, NORMS = 16, 20_000


def studentized(sample: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """The bootstrap-t interval of the mean: quantiles of ``(mean* - mean) / se*`` in the place of Student's."""
    n = len(sample)
    draws = sample[generator.integers(n, size=(RESAMPLES, n))]
    errors = draws.std(1, ddof=1) / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (draws.mean(1) - sample.mean()) / errors
    low, high = np.quantile(ratios[np.isfinite(ratios)], [0.025, 0.975])
    error = sample.std(ddof=1) / math.sqrt(n)
    return sample.mean() - high * error, sample.mean() - low * error


def means() -> list[str]:
    """One row per distribution and number of documents."""
    rows = []
    for name, (draw, truth) in DISTRIBUTIONS.items():
        for n in SIZES:
            generator = np.random.default_rng([len(name), n])
            hits, widths = np.zeros(3), np.zeros(3)
            for run in range(RUNS):
                sample = draw(generator, n)
                half = float(t.ppf(0.975, n - 1)) * sample.std(ddof=1) / math.sqrt(n)
                bca = interval(torch.from_numpy(sample), range(n), seed=run, resamples=RESAMPLES)
                assert bca is not None
                both = np.array([bca, studentized(sample, generator), (sample.mean() - half, sample.mean() + half)])
                hits += (both[:, 0] <= truth) & (truth <= both[:, 1])
                widths += both[:, 1] - both[:, 0]
            shares = [f"{h / RUNS:.3f}" for h in hits]
            ratios = [f"{w / widths[2]:.2f}" for w in widths[:2]]
            rows.append(f"| {name} | {n} | {' | '.join(shares)} | {' | '.join(ratios)} |")
    return rows


def norms() -> list[str]:
    """One row per number of singular values."""
    rows = []
    for ranks in (1, 3, 10, 30):
        generator = torch.Generator().manual_seed(ranks)
        squared = torch.linspace(1.0, 3.0, ranks, dtype=torch.float64) ** 2
        probes = torch.randn(PROBES, NORMS, ranks, generator=generator, dtype=torch.float64).square() @ squared
        low, high = chi_square_interval(probes)
        inside = ((low <= squared.sum()) & (squared.sum() <= high)).double().mean()
        rows.append(f"| {ranks} | {float(inside):.4f} |")
    return rows


def main() -> None:
    """Write the page."""
    error = math.sqrt(0.95 * 0.05 / RUNS)
    lines = [
        "# How often intervals hold the truth",
        "",
        f"Written by `python docs/make_coverage.py` on {date.today()}, sinklens {sinklens.__version__}. {RUNS} "
        f"simulated samples per row, {RESAMPLES} resamples each; a share near 0.95 errs by {error:.3f}.",
        "",
        "Every interval over documents is BCa of a mean, with at least 16 documents (`sinklens.statistics.interval`). "
        "Its nominal coverage is 0.95. Beside it bootstrap-t and Student's t on the same samples; widths are means "
        "over samples, relative to Student's.",
        "",
        "| distribution of document means | documents | BCa | bootstrap-t | Student | width BCa | width bootstrap-t |",
        "|---|---|---|---|---|---|---|",
        *means(),
        "",
        f"Intervals of squared Jacobian norms (scaled chi-square, degrees of freedom shrunk by 0.7), {PROBES} probes, "
        f"{NORMS} simulated norms per row:",
        "",
        "| singular values | coverage |",
        "|---|---|",
        *norms(),
        "",
    ]
    (Path(__file__).parent / "interval_coverage.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
