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


def gaussian_log_delta(epsilon: float, mu: float, *, upper: bool) -> float:
    """log of delta(epsilon) at sensitivity over noise std ``mu``, moved out by more than the formula's rounding."""
    if not math.isfinite(mu) or mu > 1e6:
        return 0.0 if upper else -math.inf
    far = epsilon / mu
    rounding = 1e-12 * (1.0 + 1.0 / mu + mu * mu) + 2e-15 * far * far * (1.0 + far / mu)
    if not upper:
        return log_delta(epsilon, mu) - rounding
    value, whole = log_delta(epsilon, mu) + rounding, float(log_ndtr(0.5 * mu - far))
    return min(0.0, value if rounding < 1.0 and value > -math.inf else whole + 1e-12 + 2e-15 * far * far)
