"""Two-sided checks with a stated error probability; each is itself tested on broken sources."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats
from torch import Tensor

ALPHA = 1e-9
TOLERANCE = 0.007
ENOUGH = math.ceil((stats.norm.isf(ALPHA / 2) / TOLERANCE) ** 2 / 2)  # draws for which a 0.7 % error shows


def check_std(values: Tensor, std: float) -> None:
    """Σx²/std² against χ²(n), two-sided at ALPHA; from ENOUGH draws on this is tighter than TOLERANCE."""
    n = values.numel()
    total = float(values.double().square().sum()) / std**2
    low, high = stats.chi2.ppf(ALPHA / 2, n), stats.chi2.isf(ALPHA / 2, n)
    assert low <= total <= high, f"std is {math.sqrt(total / n):.5f} of what was declared, over {n} draws"
    if n >= ENOUGH:
        assert abs(math.sqrt(total / n) - 1) <= TOLERANCE


def check_normal(values: Tensor, std: float) -> None:
    """Kolmogorov–Smirnov distance to N(0, std²), and a mean of zero."""
    x = values.double().numpy().ravel() / std
    assert stats.kstest(x[:200_000], "norm").pvalue >= ALPHA
    assert abs(x.mean()) * math.sqrt(x.size) <= stats.norm.isf(ALPHA / 2)


def check_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Pearson correlation of two equally long samples, two-sided at ALPHA."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    r = float(np.corrcoef(x, y)[0, 1])
    assert abs(r) * math.sqrt(x.size) <= stats.norm.isf(ALPHA / 2), f"correlation {r:.5f} over {x.size} draws"


def check_rate(hits: int, trials: int, rate: float) -> None:
    """An exact binomial test, two-sided at ALPHA."""
    assert stats.binomtest(hits, trials, rate).pvalue >= ALPHA, f"{hits / trials:.5f} is not {rate:.5f}"
