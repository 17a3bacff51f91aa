"""Where on the loss axis to look, and how finely: estimates that steer the certified computation, never a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri_exp

from .pairs import Array, Pair, Release, points

LARGEST_TILT = 1e6
MANY = 64  # releases beyond which like ones share a row


class Quadrature(NamedTuple):
    """Coarse trapezoid of every release's loss."""

    counts: Array  # (releases,)
    log_mass: Array  # (releases, points), of the numerator
    loss: Array  # (releases, points)

    def cumulants(self, tilt: float) -> tuple[float, float, float]:
        """Summed log moment generating function of the loss at ``tilt`` and its first two derivatives."""
        exponent = self.log_mass + tilt * self.loss
        top = exponent.max(axis=1)
        weight = np.exp(exponent - top[:, None])
        norm = weight.sum(axis=1)
        mean = (weight * self.loss).sum(axis=1) / norm
        variance = (weight * (self.loss - mean[:, None]) ** 2).sum(axis=1) / norm
        return float(self.counts @ (top + np.log(norm))), float(self.counts @ mean), float(self.counts @ variance)


def quadrature(releases: Mapping[Pair, int], cut: float, *, add: bool) -> Quadrature:
    """Quadrature of all releases for one direction."""
    counts: dict[Pair, int] = {}
    for pair, times in releases.items():
        if len(releases) > MANY and isinstance(pair, Release):
            pair = Release(*(math.exp(round(32.0 * math.log(value)) / 32.0) for value in pair))
        counts[pair] = counts.get(pair, 0) + times
    number = 512 if len(counts) < 64 else 192
    rows = [points(pair, cut, number) for pair in counts]
    size = max(row[2].size for row in rows)
    log_mass, losses = np.full((len(rows), size), -np.inf), np.zeros((len(rows), size))
    for index, (over_p, over_q, values) in enumerate(rows):
        log_mass[index, : values.size] = over_q if add else over_p
        losses[index, : values.size] = -values if add else values
    return Quadrature(np.array(list(counts.values()), dtype=np.float64), log_mass, losses)


def tail_quantile(log_mass: float) -> float:
    """z with P[N(0,1) > z] = exp(log_mass), rounded up so that the tail is at most that."""
    return math.ceil(-2.0 * float(ndtri_exp(log_mass))) / 2.0


def cut_of(steps: float, delta: float) -> float:
    """Where single-step tails are cut: all steps together then leave 1e-7 delta, which is charged to delta."""
    return tail_quantile(math.log(delta) - math.log(steps) - 17.0)


def log_delta(law: Quadrature, tilt: float) -> tuple[float, float]:
    """(point, log delta there) by the saddle-point approximation of delta (Alghamdi et al. 2022)."""
    value, mean, variance = law.cumulants(tilt)
    point = mean - 1.0 / tilt - 1.0 / (1.0 + tilt)
    curvature = variance + 1.0 / tilt**2 + 1.0 / (1.0 + tilt) ** 2
    return point, value - tilt * point - math.log(tilt) - math.log1p(tilt) - 0.5 * math.log(2.0 * math.pi * curvature)


def saddle(law: Quadrature, delta: float) -> tuple[float, float]:
    """(epsilon, tilt) at which delta is about ``delta``."""

    def excess(log_tilt: float) -> float:
        return log_delta(law, math.exp(log_tilt))[1] - math.log(delta)

    low, high, end = 0.0, 4.0, math.log(LARGEST_TILT)
    while low > -30.0 and excess(low) < 0.0:
        low, high = low - 4.0, low
    while high < end and excess(high) > 0.0:
        low, high = high, high + 4.0
    root = float(brentq(excess, low, high, xtol=1e-6)) if excess(low) > 0.0 > excess(high) else low
    tilt = math.exp(root)
    point = log_delta(law, tilt)[0]
    return (point, tilt) if point > 0.0 else (0.0, tilt_at(law, 0.0))


def tilt_at(law: Quadrature, point: float) -> float:
    """Tilt that centres the composed loss on epsilon = ``point``."""

    def gap(log_tilt: float) -> float:
        return log_delta(law, math.exp(log_tilt))[0] - point

    low, high = -30.0, math.log(LARGEST_TILT)
    if gap(high) < 0.0:
        return math.exp(high)
    return math.exp(float(brentq(gap, low, high, xtol=1e-6)))
