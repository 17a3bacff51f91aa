"""Privacy losses of one Poisson-subsampled Gaussian release, put on a grid from above and from below.

Remove direction: P = (1-q) N(0, s^2) + q N(1, s^2) against Q = N(0, s^2); the add direction is (Q, P). Both are held as
*cells* between neighbouring grid losses i*h, (i+1)*h, each with its mass split onto its two ends.

Upper bound: the split keeps the mass of both measures, hence is a mean-preserving spread of the likelihood ratio and
dominates the true pair ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380).
Lower bound: hockey-stick curves are convex, so a convex polygon with knots on the grid that lies *below* the true
curve is the curve of a dominated pair. We lower each knot of the upper polygon by the largest possible gap in its two
cells and take the greatest convex minorant.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression
from scipy.special import ndtri_exp

Array = npt.NDArray[np.float64]

MAX_CELLS = 1 << 22
GAUSS_LEGENDRE = tuple(zip(*np.polynomial.legendre.leggauss(4), strict=True))
MAX_LOSS = 600.0  # exp() of a range of losses must stay finite where ratios are formed


class Release(NamedTuple):
    """Mechanism as the core sees it: noise std over sensitivity, and Poisson rate (1.0: plain Gaussian)."""

    sigma: float
    rate: float


class Cells(NamedTuple):
    """Log-masses, in the denominator measure, that cell i gives to its ends at losses (start+i)h and (start+i+1)h."""

    start: int
    low: Array
    high: Array


class Masses(NamedTuple):
    """Log-mass of the numerator measure at losses (start + i) * h."""

    start: int
    log: Array

    def losses(self, step: float) -> Array:
        """The grid losses the masses sit at."""
        return np.asarray((self.start + np.arange(self.log.size)) * step)

    def log_moment(self, tilt: float, step: float) -> float:
        """log of sum(mass * exp(tilt * loss))."""
        exponent = self.log + tilt * self.losses(step)
        top = float(exponent.max())
        return top + math.log(float(np.exp(exponent - top).sum())) if top > -math.inf else -math.inf


def tail_quantile(log_mass: float) -> float:
    """z with P[N(0,1) > z] = exp(log_mass), rounded up so that the tail is at most that."""
    return math.ceil(-2.0 * float(ndtri_exp(log_mass))) / 2.0


def loss(z: Array, release: Release) -> Array:
    """log P/Q (remove direction) at x = sigma * z; increasing in z."""
    sigma, rate = release
    shift = z / sigma - 0.5 / sigma**2
    if rate == 1.0:
        return shift
    return np.logaddexp(math.log1p(-rate), math.log(rate) + shift)


def _inverse(grid: Array, release: Release) -> Array:
    """z at which the loss equals ``grid`` (backward stable); nan below the infimum log(1 - rate)."""
    sigma, rate = release
    if rate == 1.0:
        shift = grid
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            shift = grid + np.log(-np.expm1(math.log1p(-rate) - grid)) - math.log(rate)
    return np.asarray(sigma * shift + 0.5 / sigma)


def support(release: Release, cut: float) -> tuple[float, float]:
    """Smallest and largest loss that is kept: outside it both measures have at most 2 * P[N > cut]."""
    z = np.array([-cut, 1.0 / release.sigma + cut])
    low, high = loss(z, release)
    return float(low), float(high)


@lru_cache(maxsize=256)
def remove_cells(release: Release, step: float, cut: float) -> Cells:
    """Cells of the remove direction on the grid ``step``; 4-point Gauss-Legendre on pieces that keep it exact to 1e-11.

    All integrands are positive, so every mass is accurate relative to itself, however small.
    """
    bottom, top = support(release, cut)
    start, stop = math.floor(bottom / step), math.ceil(top / step)
    stop = max(stop, start + 1)
    z_low, z_high = -cut, 1.0 / release.sigma + cut
    inner = _inverse(np.asarray(np.arange(start + 1, stop) * step, dtype=np.float64), release)
    edges = np.concatenate(([z_low], np.clip(inner, z_low, z_high), [z_high]))
    width = np.diff(edges)
    pieces = np.maximum(np.ceil(width * (2.0 * (z_high + 6.0))), 1.0).astype(np.int64)
    first = np.concatenate(([0], np.cumsum(pieces)[:-1]))
    cell = np.repeat(np.arange(width.size), pieces)
    piece = (width / pieces)[cell]
    left = edges[cell] + (np.arange(cell.size) - first[cell]) * piece
    # exponents are taken relative to the cell's point nearest zero: no underflow, whatever sigma is
    base = -0.5 * np.clip(0.0, edges[:-1], edges[1:]) ** 2
    low, high = np.zeros(cell.size), np.zeros(cell.size)
    for node, weight in GAUSS_LEGENDRE:
        z = left + (0.5 * (1.0 + node)) * piece
        density = (0.5 * weight) * np.exp(-0.5 * z * z - base[cell])
        above = np.clip(loss(z, release) - (start + cell) * step, 0.0, step)
        fraction = np.expm1(above) / math.expm1(step)
        high += density * fraction
        low += density * (1.0 - fraction)
    with np.errstate(divide="ignore"):
        scale = base + np.log(width / pieces) - 0.5 * math.log(2.0 * math.pi)
        return Cells(start, scale + np.log(np.add.reduceat(low, first)), scale + np.log(np.add.reduceat(high, first)))


def reverse(cells: Cells, step: float) -> Cells:
    """The same pair with numerator and denominator exchanged (the add direction)."""
    nodes = (cells.start + np.arange(cells.low.size + 1)) * step
    return Cells(-(cells.start + cells.low.size), (cells.high + nodes[1:])[::-1], (cells.low + nodes[:-1])[::-1])


def upper_masses(cells: Cells, step: float) -> Masses:
    """Dominating pair: each end of a cell receives its share."""
    nodes = (cells.start + np.arange(cells.low.size + 1)) * step
    pad = np.array([-np.inf])
    return Masses(cells.start, np.logaddexp(np.append(cells.low, pad), np.append(pad, cells.high)) + nodes)


def lower_masses(cells: Cells, step: float) -> tuple[Masses, float]:
    """Dominated pair, and the total-variation excess ("slack") that a caller must subtract per step.

    In a cell with shares a, b the true curve lies below its chord by at most (ratio gap) * ab/(a+b), whatever the
    mass does inside. Lowering knot i by mu_i >= both gaps, in units of its ratio, moves mass between neighbours only.
    """
    nodes = (cells.start + np.arange(cells.low.size + 1)) * step
    low, high = np.exp(cells.low), np.exp(cells.high)
    total = low + high
    gap = np.divide(low * high, total, out=np.zeros_like(total), where=total > 0)
    mu = np.maximum(np.append(gap * math.expm1(step), 0.0), np.append(0.0, gap * -math.expm1(-step)))
    # Up to the first loss the curve is the line 1 - ratio, the lowest there is: follow it while mu would undercut it.
    mass = np.append(low, 0.0) + np.append(0.0, high)
    growth = np.exp(nodes - nodes[0])
    above_line = -math.expm1(-step) * np.append(0.0, np.cumsum(np.cumsum(mass)[:-1] * growth[1:])) / growth
    follow = 1 + int(np.flatnonzero(np.append(True, above_line[1:] < mu[1:]))[-1])
    mu[: follow + 1] = above_line[: follow + 1]
    moved = (mu[1:] * math.exp(step) - mu[:-1]) / math.expm1(step)  # from the cell's low end to its high end
    ratio = np.concatenate(([0.0], np.exp(nodes)))  # a knot at ratio 0 takes what the minorant pushes below the grid
    mass = np.concatenate(([0.0], np.append(low - moved, 0.0) + np.append(0.0, high + moved)))
    # Greatest convex minorant: slopes of the polygon, made non-decreasing.
    slope = -np.cumsum(mass[::-1])[::-1][1:]
    fitted = isotonic_regression(slope, weights=np.maximum(np.diff(ratio), 1e-290)).x
    keep = np.concatenate(([True], fitted[1:] > fitted[:-1], [True]))
    knots = np.flatnonzero(keep)
    block = np.cumsum(keep) - 1
    inside = np.flatnonzero(~keep)
    left, right = knots[block[inside]], knots[block[inside] + 1]
    share = (ratio[inside] - ratio[left]) / (ratio[right] - ratio[left])
    result = np.where(keep, mass, 0.0)
    np.add.at(result, right, mass[inside] * share)
    np.add.at(result, left, mass[inside] * (1.0 - share))
    negative = np.minimum(result[1:], 0.0)
    with np.errstate(divide="ignore"):
        log = np.log(np.maximum(result[1:], 0.0)) + nodes
    slack = float(mu[-1] * ratio[-1] - negative @ ratio[1:])
    return Masses(cells.start, log), slack


class Quadrature(NamedTuple):
    """Coarse trapezoid of every release's loss; it only steers grid, tilt and window, it certifies nothing."""

    counts: Array  # (events,)
    log_mass: Array  # (events, points), of the numerator
    loss: Array  # (events, points)

    def cumulants(self, tilt: float) -> tuple[float, float, float]:
        """Summed log moment generating function of the loss at ``tilt`` and its first two derivatives."""
        exponent = self.log_mass + tilt * self.loss
        top = exponent.max(axis=1)
        weight = np.exp(exponent - top[:, None])
        norm = weight.sum(axis=1)
        mean = (weight * self.loss).sum(axis=1) / norm
        variance = (weight * (self.loss - mean[:, None]) ** 2).sum(axis=1) / norm
        return float(self.counts @ (top + np.log(norm))), float(self.counts @ mean), float(self.counts @ variance)


def quadrature(releases: dict[Release, int], cut: float, *, add: bool) -> Quadrature:
    """Quadrature of all releases for one direction."""
    points = 512 if len(releases) < 64 else 192
    log_mass, losses = np.empty((len(releases), points)), np.empty((len(releases), points))
    for row, release in enumerate(releases):
        z, spacing = np.linspace(-cut, 1.0 / release.sigma + cut, points, retstep=True)
        values = loss(z, release)
        log_mass[row] = math.log(float(spacing)) - 0.5 * math.log(2.0 * math.pi) - 0.5 * z * z
        losses[row] = values
        if add:
            losses[row] *= -1.0
        else:
            log_mass[row] += values
    return Quadrature(np.array(list(releases.values()), dtype=np.float64), log_mass, losses)
