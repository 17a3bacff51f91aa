"""Privacy losses of one release, put on a grid from above and from below.

A pair (P, Q) of :mod:`.pairs` and its reverse are both held as *cells* between neighbouring grid losses i*h, (i+1)*h,
each with its mass split onto its two ends.

Upper bound: the split keeps the mass of both measures, hence is a mean-preserving spread of the likelihood ratio and
dominates the true pair ("connect the dots", Doroshenko et al. 2022, arXiv 2207.04380).
Lower bound: hockey-stick curves are convex, so a convex polygon with knots on the grid that lies *below* the true
curve is the curve of a dominated pair. We lower each knot of the upper polygon by the largest possible gap in its two
cells and take the greatest convex minorant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from .pairs import (
    Array,
    Atoms,
    Discrete,
    Laplace,
    Line,
    Mixture,
    Pair,
    Release,
    Truncated,
    atoms,
    line,
    log_constant,
    log_density,
    loss,
    loss_and_slope,
    support,
)

MAX_CELLS = 1 << 22
GAUSS_LEGENDRE = tuple(zip(*np.polynomial.legendre.leggauss(4), strict=True))
MAX_LOSS = 350.0  # exp() of a range of losses, and of the masses beside it, must stay well within floating point


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


@lru_cache(maxsize=64)
def cells(pair: Pair, step: float, cut: float) -> Cells:
    """Cells of ``pair`` on the grid ``step``; masses are good to 1e-11, relative to themselves, however small."""
    match pair:
        case Truncated():
            parts = [(w, Release(pair.sigma, r)) for w, r in pair.parts if w > 0.0 and r > 0.0]
            rows = [(_line_cells(release, step, cut), math.log(w)) for w, release in parts]
            nothing = math.fsum(w for w, r in pair.parts if r == 0.0)
            still = _atom_cells(Atoms(np.zeros(1), np.array([math.log(nothing) if nothing else -math.inf])), step)
            return _joined([Cells(c.start, c.low + w, c.high + w) for c, w in rows] + [still])
        case Discrete():
            return _atom_cells(atoms(pair, cut), step)
        case Laplace():
            return _joined([_line_cells(pair, step, cut), _atom_cells(atoms(pair, cut), step)])
    return _line_cells(pair, step, cut)


def _joined(rows: list[Cells]) -> Cells:
    start = min(row.start for row in rows)
    size = max(row.start + row.low.size for row in rows) - start
    low, high = np.full(size, -np.inf), np.full(size, -np.inf)
    for row in rows:
        place = slice(row.start - start, row.start - start + row.low.size)
        low[place] = np.logaddexp(low[place], row.low)
        high[place] = np.logaddexp(high[place], row.high)
    return Cells(start, low, high)


def _atom_cells(found: Atoms, step: float) -> Cells:
    index = np.floor(found.loss / step).astype(np.int64)
    first = np.flatnonzero(np.append(True, index[1:] > index[:-1]))
    group = np.repeat(np.arange(first.size), np.diff(np.append(first, index.size)))
    base = np.maximum.reduceat(found.log_mass, first)
    mass = np.exp(found.log_mass - np.maximum(base, -1e300)[group])
    share = np.clip(np.expm1(found.loss - index * step) / math.expm1(step), 0.0, 1.0)
    start = int(index[0])
    low, high = (np.full(int(index[-1]) - start + 1, -np.inf) for _ in range(2))
    with np.errstate(divide="ignore"):
        low[index[first] - start] = base + np.log(np.add.reduceat(mass * (1.0 - share), first))
        high[index[first] - start] = base + np.log(np.add.reduceat(mass * share, first))
    return Cells(start, low, high)


def _line_cells(pair: Release | Mixture | Laplace, step: float, cut: float) -> Cells:
    """4-point Gauss-Legendre on pieces that keep it exact to 1e-11; all integrands are positive."""
    ends = line(pair, cut)
    bottom, top = support(pair, cut)
    start, stop = math.floor(bottom / step), math.ceil(top / step)
    stop = max(stop, start + 1)
    grid = np.asarray(np.arange(start + 1, stop) * step, dtype=np.float64)
    inner = np.clip(_inverse(grid, pair, ends, step), ends.low, ends.high)
    edges = np.concatenate(([ends.low], inner, [ends.high]))
    width = np.maximum(np.diff(edges), 0.0)
    pieces = np.maximum(np.ceil(width * ends.resolution), 1.0).astype(np.int64)
    first = np.concatenate(([0], np.cumsum(pieces)[:-1]))
    cell = np.repeat(np.arange(width.size), pieces)
    piece = (width / pieces)[cell]
    left = edges[cell] + (np.arange(cell.size) - first[cell]) * piece
    # exponents are taken relative to the cell's greatest density: no underflow, whatever sigma is
    base = np.full(width.size, -np.inf)
    for mode in ends.modes:
        np.maximum(base, log_density(np.clip(mode, edges[:-1], edges[1:]), pair), out=base)
    offset = base[cell]
    share = _share(pair, start, step, grid, edges, cell, int(pieces[0]))
    low, high = np.zeros(cell.size), np.zeros(cell.size)
    for node, weight in GAUSS_LEGENDRE:
        z = left + (0.5 * (1.0 + node)) * piece
        density = (0.5 * weight) * np.exp(log_density(z, pair) - offset)
        part = density * np.clip(share(z), 0.0, 1.0)
        high += part
        low += density - part
    with np.errstate(divide="ignore"):
        scale = base + np.log(width / pieces) + log_constant(pair)
        return Cells(start, scale + np.log(np.add.reduceat(low, first)), scale + np.log(np.add.reduceat(high, first)))


def _share(
    pair: Release | Mixture | Laplace, start: int, step: float, grid: Array, edges: Array,
    cell: npt.NDArray[np.int64], below: int,
) -> Callable[[Array], Array]:  # fmt: skip
    """Function of z that gives the share of the mass at z which moves to its cell's upper end."""
    whole = math.expm1(step)

    def general(z: Array, cell: npt.NDArray[np.int64]) -> Array:
        return np.asarray(np.expm1(loss(z, pair) - (start + cell) * step) / whole)

    if not isinstance(pair, Release):
        return lambda z: general(z, cell)
    # From an edge on the grid, exp(loss - edge) - 1 = w (exp((z - z_edge)/sigma) - 1), w = 1 - (1 - rate) exp(-edge).
    sampled = -np.expm1(math.log1p(-pair.rate) - grid) if pair.rate < 1.0 else np.ones(grid.size)
    factor = (sampled / whole)[cell[below:] - 1]
    edge = edges[cell[below:]]

    def share(z: Array) -> Array:
        rest = factor * np.expm1((z[below:] - edge) * (1.0 / pair.sigma))
        return np.concatenate((general(z[:below], cell[:below]), rest))

    return share


def _inverse(grid: Array, pair: Release | Mixture | Laplace, ends: Line, step: float) -> Array:
    """Coordinate at which the loss equals ``grid``; a small error is of second order, for the share is clipped."""
    if isinstance(pair, Mixture):
        return _solved(grid, pair, ends, step)
    if pair.rate == 1.0:
        shift = grid
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            shift = grid + np.log(-np.expm1(math.log1p(-pair.rate) - grid)) - math.log(pair.rate)
    return shift if isinstance(pair, Laplace) else np.asarray(pair.sigma * shift + 0.5 / pair.sigma)


def _solved(grid: Array, pair: Mixture, ends: Line, step: float) -> Array:
    """Newton's method within brackets from a table."""
    table = np.linspace(ends.low, ends.high, 2048)
    values = np.maximum.accumulate(loss(table, pair))
    place = np.clip(np.searchsorted(values, grid) - 1, 0, table.size - 2)
    low, high = table[place], table[place + 1]
    z = np.clip(np.interp(grid, values, table), low, high)
    for _ in range(60):
        value, slope = loss_and_slope(z, pair)
        gap = value - grid
        if not gap.size or float(np.abs(gap).max()) <= 1e-7 * step:
            break
        low, high = np.where(gap < 0.0, z, low), np.where(gap > 0.0, z, high)
        z = z - gap / np.maximum(slope, 1e-300)
        z = np.where((z > low) & (z < high), z, 0.5 * (low + high))
    return z


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
    # Not low * high / total: masses far out are so small that their product underflows, and no gap would be seen.
    gap = low * np.divide(high, total, out=np.zeros_like(total), where=total > 0)
    mu = np.maximum(np.append(gap * math.expm1(step), 0.0), np.append(0.0, gap * -math.expm1(-step)))
    # Nothing is lowered below the line 1 - ratio or below 0: above_line, above_zero are the room, in the units of mu.
    mass = np.append(low, 0.0) + np.append(0.0, high)
    growth, ratios = np.exp(nodes - nodes[0]), np.exp(nodes)
    above_line = -math.expm1(-step) * np.append(0.0, np.cumsum(np.cumsum(mass)[:-1] * growth[1:])) / growth
    over = np.cumsum((mass * ratios)[::-1])[::-1]
    above_zero = np.append(np.cumsum((over / growth)[:0:-1])[::-1] * growth[1:], 0.0) * -math.expm1(-step) / ratios
    room = np.minimum(above_line, above_zero)
    # Where one end of a chord stops there, the other has to go low enough to pass below the cell's mean point.
    inside_cell = (low > 0.0) & (high > 0.0)
    odds = np.divide(high, low, out=np.ones_like(low), where=inside_cell)
    left_end = np.where(inside_cell, high * math.expm1(step) - odds * room[1:] * math.exp(step), 0.0)
    right_end = np.where(inside_cell, (low * math.expm1(step) - room[:-1] / odds) * math.exp(-step), 0.0)
    stopped, before = room <= mu, 0
    while before != (before := int(stopped.sum())):
        mu[:-1] = np.where(stopped[1:], np.maximum(mu[:-1], left_end), mu[:-1])
        mu[1:] = np.where(stopped[:-1], np.maximum(mu[1:], right_end), mu[1:])
        stopped |= room <= mu
    mu = np.where(stopped, room, mu)
    line = (above_zero - above_line) * ratios
    crossing = stopped[1:] & stopped[:-1] & (line[:-1] > 0.0) & (line[1:] < 0.0)
    corner = float(np.minimum(line[:-1], -line[1:])[crossing].sum())  # the cut tails' share, a fraction of 1e-7 delta
    moved = (mu[1:] * math.exp(step) - mu[:-1]) / math.expm1(step)  # from the cell's low end to its high end
    ratio = np.concatenate(([0.0], ratios))  # a knot at ratio 0 takes what the minorant pushes below the grid
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
    slack = corner + float(mu[-1] * ratio[-1] - negative @ ratio[1:])
    return Masses(cells.start, log), slack
