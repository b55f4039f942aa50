"""Simulate docs/findings/interval_coverage.md: how often intervals over documents hold the true mean."""

from __future__ import annotations

import argparse
import math
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap, t
from tools import DOCS, HELP, find_tests, put, shrink

find_tests()

from distributions import DISTRIBUTIONS  # noqa: E402

import sinklens  # noqa: E402
from sinklens.core.intervals import interval, rank_correlation  # noqa: E402
from sinklens.mixing.jacobians import chi_square_interval  # noqa: E402

RUNS, RESAMPLES, SIZES = 2000, 999, (16, 24, 50)
PROBES, NORMS, RANK_RUNS = 16, 20_000, 200
SMOKE = {"RUNS": 2, "RESAMPLES": 99, "SIZES": (16,), "NORMS": 100, "RANK_RUNS": 1}


def bca(sample: np.ndarray, seed: int) -> tuple[float, float]:
    """Efron's BCa interval of the mean by scipy; the point where the sample is constant."""
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    found = bootstrap(
        (sample,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)


def means() -> list[str]:
    """One row per distribution and number of documents."""
    rows = []
    for name, (draw, truth) in DISTRIBUTIONS.items():
        for n in SIZES:
            generator = np.random.default_rng([len(name), n])
            hits, widths = np.zeros(3), np.zeros(3)
            constant, widest = 0, 0.0
            for run in range(RUNS):
                sample = draw(generator, n)
                half = float(t.ppf(0.975, n - 1)) * sample.std(ddof=1) / math.sqrt(n)
                ours = interval(torch.from_numpy(sample), range(n), seed=run, resamples=RESAMPLES)
                assert ours is not None
                all3 = np.array([ours, bca(sample, run), (sample.mean() - half, sample.mean() + half)])
                hits += (all3[:, 0] <= truth) & (truth <= all3[:, 1])
                widths += all3[:, 1] - all3[:, 0]
                constant += np.ptp(sample) == 0
                widest = max(widest, (ours[1] - ours[0]) / (2 * half) if half > 0 else 0.0)
            shares = [f"{h / RUNS:.3f}" for h in hits]
            ratios = [f"{w / widths[2]:.2f}" for w in widths[:2]]
            rows.append(
                f"| {name} | {n} | {' | '.join(shares)} | {' | '.join(ratios)} | {widest:.1f} | {constant / RUNS:.3f} |"
            )
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


def ranks() -> list[str]:
    """One row per correlation and number of documents: two pairs of normal numbers per document."""
    rows = []
    for rho in (0.0, 0.6):
        truth = 6 / math.pi * math.asin(rho / 2)  # Spearman's correlation of normal numbers
        for n in SIZES:
            generator = np.random.default_rng([int(10 * rho), n])
            hits = 0
            for run in range(RANK_RUNS):
                x, noise = generator.standard_normal((2, 2 * n))
                y = rho * x + math.sqrt(1 - rho**2) * noise
                _, low, high = rank_correlation(
                    x.tolist(), y.tolist(), [0] * (2 * n), [i // 2 for i in range(2 * n)], seed=run
                )
                hits += low <= truth <= high
            rows.append(f"| {rho} | {n} | {hits / RANK_RUNS:.3f} |")
    return rows


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help=HELP)
    if not parser.parse_args().smoke:
        measure(DOCS)
        return
    shrink(globals(), SMOKE)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


def measure(docs: Path) -> None:
    """Write the page."""
    error = math.sqrt(0.95 * 0.05 / RUNS)
    lines = [
        "# How often intervals hold the truth",
        "",
        f"Written by `python findings/interval_coverage.py` on {date.today()}, sinklens {sinklens.__version__}. {RUNS} "
        f"simulated samples per row, {RESAMPLES} resamples each; a share near 0.95 errs by {error:.3f} (one "
        "standard error).",
        "",
        "Every interval of a mean over documents is bootstrap-t, with at least 16 documents "
        "(`sinklens.core.intervals.interval`: half a document of the sample's variance steadies every resample, and no "
        "side is shorter than Student's). Its nominal coverage is 0.95. Beside it BCa (scipy) and Student's t on the "
        "same samples; widths are means over samples, relative to Student's, *widest* is the largest of ours in any "
        "one sample. *Constant*: samples in which all documents are equal. They give the point, which counts as a "
        "miss: sixteen equal documents do not say how rare another one is.",
        "",
        "| distribution of document means | documents | ours | BCa | Student | width of ours | width of BCa | widest | "
        "constant |",
        "|---|---|---|---|---|---|---|---|---|",
        *means(),
        "",
        f"Intervals of squared Jacobian norms (scaled chi-square, degrees of freedom shrunk by 0.7), {PROBES} probes, "
        f"{NORMS} simulated norms per row:",
        "",
        "| singular values | coverage |",
        "|---|---|",
        *norms(),
        "",
        f"Spearman's correlation (`norm_and_mass`): percentile bootstrap over documents, 999 resamples, {RANK_RUNS} "
        f"simulated samples per row (standard error {math.sqrt(0.95 * 0.05 / RANK_RUNS):.3f}), two pairs of normal "
        "numbers per document:",
        "",
        "| correlation of the normal numbers | documents | coverage |",
        "|---|---|---|",
        *ranks(),
        "",
    ]
    put("interval_coverage", ["\n".join(lines).rstrip()], docs)


if __name__ == "__main__":
    main()
