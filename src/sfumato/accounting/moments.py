"""Moments of the likelihood ratio of one release, E_Q[(P/Q)^order]: by quadrature, relative to what exceeds 1.

With u = P/Q - 1, E_Q[(P/Q)^a] - 1 = E_Q[(1 + u)^a - 1 - a u]: the integrand is never negative, so nothing cancels
however small the moment's excess over 1 is. On the line the trapezoid rule converges geometrically, because the
integrands are analytic in a strip around it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

Array = npt.NDArray[np.float64]

MARGIN = 1e-9  # relative; quadrature and rounding stay below a tenth of it
COARSE = 6.0  # spacing, in noise standard deviations, of the scan for the places that matter
MOST_NODES = 30_000
REACH = 12.0
BELOW = 45.0 + COARSE**2 / 8.0  # log of what may be left out; h + z^2/2 is convex, so between nodes h gains COARSE^2/8
LEGENDRE = np.polynomial.legendre.leggauss(16)


class Shifts(NamedTuple):
    """Weights (they sum to 1) of the places where the sum may lie, over the sensitivity."""

    at: tuple[float, ...]
    weight: tuple[float, ...]


HERE = Shifts((0.0,), (1.0,))


def drawn(rate: float, records: int = 1, direction: float = 1.0) -> Shifts:
    """Shift by how many of ``records`` records, each drawn with ``rate``, take part."""
    count = np.arange(records + 1)
    log = gammaln(records + 1) - gammaln(count + 1) - gammaln(records - count + 1)
    if rate < 1.0:
        log = log + count * math.log(rate) + (records - count) * math.log1p(-rate)
    else:
        log = np.where(count == records, 0.0, -np.inf)
    weight = np.exp(log)
    kept = weight > 0.0
    return Shifts(tuple((direction * count[kept]).tolist()), tuple(weight[kept].tolist()))


def _excess(log_ratios: list[Array], weights: tuple[float, ...]) -> Array:
    """sum_j weight_j (ratio_j - 1), with ratios capped before they overflow."""
    total = np.zeros_like(log_ratios[0])
    for log_ratio, weight in zip(log_ratios, weights, strict=True):
        total += weight * np.expm1(np.minimum(log_ratio, 300.0))
    return total


def _log_mixture(log_ratios: list[Array], weights: tuple[float, ...]) -> Array:
    total = log_ratios[0] + math.log(weights[0])
    for log_ratio, weight in zip(log_ratios[1:], weights[1:], strict=True):
        total = np.logaddexp(total, log_ratio + math.log(weight))
    return total


def _log_phi(u: Array, log_ratio: Array, order: float) -> Array:
    """log((1 + u)^order - 1 - order * u), ``log_ratio`` being log(1 + u)."""
    value = np.where(np.abs(u) < 0.5, np.log1p(np.clip(u, -0.5, 0.5)), log_ratio)
    small = np.abs(u) * max(order, 2.0) < 3e-3
    t = np.where(small, u, 0.0)
    series = 1.0 + (order - 2.0) * t / 3.0 * (1.0 + (order - 3.0) * t / 4.0 * (1.0 + (order - 4.0) * t / 5.0))
    rest = order - 1.0
    up = np.where(value > 0.0, value, 1.0)
    grown = np.minimum(rest * up, 60.0)
    with np.errstate(divide="ignore"):
        near = math.log(0.5 * order * rest) + 2.0 * np.log(np.abs(t)) + np.log(series)
        above = up + np.log(np.maximum(np.expm1(grown) + rest * np.expm1(-up), 0.0)) + (rest * up - grown)
        down = np.log(np.maximum(np.expm1(order * np.minimum(value, 0.0)) - order * np.clip(u, -1.0, 0.0), 0.0))
    return np.where(small, near, np.where(value > 0.0, above, down))


def _law(log_p: list[Array], log_q: list[Array], p: Shifts, q: Shifts) -> tuple[Array, Array, Array]:
    """(log Q, u, log P/Q), all relative to the density at shift 0."""
    f, g = _excess(log_p, p.weight), _excess(log_q, q.weight)
    mixture_p, mixture_q = _log_mixture(log_p, p.weight), _log_mixture(log_q, q.weight)
    log_q_density = np.where(np.abs(g) < 0.5, np.log1p(np.clip(g, -0.5, 0.5)), mixture_q)
    log_ratio = mixture_p - mixture_q
    # Only near P = Q does u have to be exact, and there no ratio has overflowed.
    exact = (np.maximum.reduce([*log_p, *log_q]) < 300.0) & (g > -1.0 + 1e-8)
    u = np.where(exact, (f - g) / np.where(exact, 1.0 + g, 1.0), np.expm1(np.minimum(log_ratio, 300.0)))
    return log_q_density, u, log_ratio


def _summed(exponent: Array, order: float) -> float:
    """Rényi divergence from the logs of the (weighted) integrand of the moment's excess over 1."""
    top = float(exponent.max())
    if top == -math.inf:
        return 0.0
    log_excess = top + math.log(float(np.exp(exponent - top).sum())) + MARGIN
    return float(np.logaddexp(0.0, log_excess)) * (1.0 + MARGIN) / (order - 1.0)


def gaussian_divergence(p: Shifts, q: Shifts, sigma: float, order: float) -> float:
    """Rényi divergence of N(p, sigma^2) from N(q, sigma^2) for mixtures; never too small, inf where out of reach."""
    # Where the integrand peaks, z is order * (mean shift under P) - (order - 1) * (mean shift under Q), over sigma.
    low = -REACH + min(0.0, min(p.at), min(q.at), order * min(p.at) - (order - 1.0) * max(q.at)) / sigma
    high = REACH + max(0.0, max(p.at), max(q.at), order * max(p.at) - (order - 1.0) * min(q.at)) / sigma
    if (high - low) / COARSE > MOST_NODES:
        return math.inf

    def logged(z: Array) -> Array:
        log_p = [a / sigma * z - 0.5 * (a / sigma) ** 2 for a in p.at]
        log_q = [a / sigma * z - 0.5 * (a / sigma) ** 2 for a in q.at]
        density, u, log_ratio = _law(log_p, log_q, p, q)
        return -0.5 * z * z - 0.5 * math.log(2.0 * math.pi) + density + _log_phi(u, log_ratio, order)

    nodes = np.linspace(low, high, max(2, math.ceil((high - low) / COARSE)) + 1)
    height = logged(nodes)
    peak = np.maximum(height[1:], height[:-1])
    reach = REACH + max(map(abs, (*p.at, *q.at))) / sigma
    middle = (nodes[:-1] < reach) & (nodes[1:] > -reach)
    kept = np.flatnonzero(middle | (peak > height.max() - BELOW))
    step = min(0.4, 0.3 * sigma) / (4.0 if q.at != (0.0,) else 1.0)
    width = float(nodes[1] - nodes[0])
    points = math.ceil(width / step)
    if kept.size * points > 100 * MOST_NODES:
        return math.inf
    step = width / points
    z = (nodes[kept][:, None] + step * np.arange(points)).ravel()
    return _summed(logged(z) + math.log(step), order)


def laplace_divergence(p: Shifts, q: Shifts, scale: float, order: float) -> float:
    """Rényi divergence of Laplace(p, scale) from Laplace(q, scale) for mixtures; inf where out of reach."""
    knots = sorted({*p.at, *q.at, 0.0})
    x, weight = [knots[0], knots[-1]], [math.log(0.5) - abs(knots[0]) / scale, math.log(0.5) - abs(knots[-1]) / scale]
    log_weight = [np.array(weight)]
    places = [np.array(x)]
    for left, right in pairwise(knots):
        panels = math.ceil((right - left) / scale * (1.0 + order) / 4.0)
        if panels > MOST_NODES:
            return math.inf
        half = 0.5 * (right - left) / panels
        centre = left + half * (2.0 * np.arange(panels) + 1.0)
        at = (centre[:, None] + half * LEGENDRE[0]).ravel()
        places.append(at)
        log_weight.append(np.tile(np.log(half * LEGENDRE[1]), panels) - math.log(2.0 * scale) - np.abs(at) / scale)
    where = np.concatenate(places)
    log_p = [(np.abs(where) - np.abs(where - a)) / scale for a in p.at]
    log_q = [(np.abs(where) - np.abs(where - a)) / scale for a in q.at]
    density, u, log_ratio = _law(log_p, log_q, p, q)
    return _summed(np.concatenate(log_weight) + density + _log_phi(u, log_ratio, order), order)


def counted_divergence(rate: float, log_moment: Array, order: int) -> float:
    """Remove direction of Poisson sampling at an integer order, from bounds log E_Q[(P/Q)^k] for k = 0 … order."""
    k = np.arange(2, order + 1)
    log_binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    absent = (order - k) * math.log1p(-rate) if rate < 1.0 else np.where(k < order, -np.inf, 0.0)
    moment = log_moment[2 : order + 1]
    with np.errstate(divide="ignore"):
        grown = np.where(moment < 1.0, np.log(np.expm1(np.minimum(moment, 1.0))), moment)
    return _summed(np.asarray(log_binomial + k * math.log(rate) + absent + grown), float(order))


def central_log_moments(sigma: float, order: int) -> Array:
    """log E_Q[|P/Q - 1|^k], k = 0 … order, of N(1, sigma^2) and N(0, sigma^2); odd ones bounded by their neighbours."""
    result = np.zeros(order + 2)
    for k in range(2, order + 2, 2):
        points = math.ceil((2.0 * REACH + k / sigma) / min(0.4, 0.3 * sigma)) + 1
        z, step = np.linspace(-REACH, REACH + k / sigma, points, retstep=True)
        log_ratio = z / sigma - 0.5 / sigma**2
        with np.errstate(divide="ignore"):
            apart = np.where(log_ratio > 30.0, log_ratio, np.log(np.abs(np.expm1(np.minimum(log_ratio, 30.0)))))
        exponent = k * apart - 0.5 * z * z
        top = float(exponent.max())
        total = math.log(float(np.exp(exponent - top).sum()) * float(step))
        result[k] = top + total - 0.5 * math.log(2.0 * math.pi) + MARGIN
    result[3 : order + 1 : 2] = 0.5 * (result[2:order:2] + result[4 : order + 2 : 2])  # Cauchy and Schwarz
    result[1] = 0.5 * result[2]
    return result[: order + 1]


def replaced_divergence(rate: float, log_moment: Array, order: int, central: Array | None = None) -> float:
    """One replaced record under sampling with ``rate``, integer order (Wang, Balle & Kasiviswanathan 2019, theorem 9).

    ``log_moment``: bounds on log E_Q[(P/Q)^k], k = 0 … order, for any two of the three laws that a batch with the
    record, with the other record, and with neither can have; ``central``: on log E_Q[|P/Q - 1|^k], which their
    theorem 27 uses. The proof is for draws of fixed size; conditioned on whether the record is drawn it never uses the
    size, so theorem 9 covers Poisson sampling too.
    """
    j = np.arange(2, order + 1)
    log_binomial = gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)
    term = math.log(2.0) + log_moment[2 : order + 1]
    with np.errstate(divide="ignore", over="ignore"):
        term[0] = min(float(term[0]), math.log(4.0) + float(np.log(np.expm1(log_moment[2]))))
    if central is not None:
        term = np.minimum(term, math.log(4.0) + central[2 : order + 1])
    return _summed(np.asarray(log_binomial + j * math.log(rate) + term), float(order))
