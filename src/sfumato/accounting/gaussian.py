"""Composition of plain Gaussian releases: exact closed form (Balle & Wang 2018, theorem 8)."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import log_ndtr


def log_delta(epsilon: float, mu: float) -> float:
    """log of delta(epsilon) for N(mu, 1) against N(0, 1)."""
    first = float(log_ndtr(0.5 * mu - epsilon / mu))
    second = epsilon + float(log_ndtr(-0.5 * mu - epsilon / mu))
    return first + math.log(-math.expm1(second - first)) if second < first else -math.inf


def gaussian_epsilon(mu: float, delta: float, *, upper: bool) -> float:
    """Epsilon of sensitivity over noise std ``mu``, moved outwards by more than the rounding of the formula."""
    if mu == 0.0:
        return 0.0
    if not math.isfinite(mu) or mu > 1e6:
        return math.inf if upper else 0.0
    rounding = 1e-12 * (1.0 + 1.0 / mu + mu * mu)
    target = math.log(delta) + (-rounding if upper else rounding)
    if log_delta(0.0, mu) <= target:
        return 0.0
    high = mu * (mu + 1.0)
    while log_delta(high, mu) > target:
        high *= 2.0
    root = float(brentq(lambda e: log_delta(e, mu) - target, 0.0, high, xtol=1e-15 * high, rtol=1e-14))
    return root * (1.0 + 1e-12) if upper else root * (1.0 - 1e-12)
