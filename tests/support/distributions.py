"""Distributions of what documents have, with their means: for simulations of intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Draw = Callable[[np.random.Generator, int], np.ndarray]
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda g, n: g.normal(size=n), 0.0),
    "uniform": (lambda g, n: g.uniform(size=n), 0.5),
    "exponential": (lambda g, n: g.exponential(size=n), 1.0),
    "lognormal": (lambda g, n: g.lognormal(0.0, 1.0, size=n), float(np.exp(0.5))),
    "zero-inflated": (lambda g, n: np.where(g.uniform(size=n) < 0.5, 0.0, g.exponential(size=n)), 0.5),
    "mostly zero": (lambda g, n: np.where(g.uniform(size=n) < 0.8, 0.0, g.exponential(size=n)), 0.2),
    "heavy tails": (lambda g, n: g.standard_t(3, size=n), 0.0),
    "contaminated": (lambda g, n: g.normal(size=n) * np.where(g.uniform(size=n) < 0.05, 20.0, 1.0), 0.0),
    "rate": (lambda g, n: g.binomial(30, 0.9, size=n) / 30, 0.9),
    "yes or no": (lambda g, n: g.binomial(1, 0.5, size=n) * 1.0, 0.5),
    "rare": (lambda g, n: g.binomial(1, 0.1, size=n) * 1.0, 0.1),
}
