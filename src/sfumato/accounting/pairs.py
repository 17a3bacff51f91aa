"""The pairs of output laws that releases reduce to: a closed set, each given as losses with their masses.

Every pair (P, Q) has a likelihood ratio that grows along one coordinate z, a density of Q along z, and possibly atoms.
P is the law with the record (or with the first of the two), Q the one without; the other direction exchanges them.
Sources: Poisson sampling, Zhu, Dong & Wang 2022 (arXiv 2106.08567); replaced records, Lebeda et al. 2024 (2405.20769);
several records of one unit, Choquette-Choo et al. 2024 (2310.15526); discrete Gaussian, Canonne, Kamath & Steinke 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FINEST = 1e6  # noise beyond this is taken as this: an upper bound
LARGEST_LATTICE = 1e6  # noise std, in grid units, up to which every point of a discrete Gaussian is looked at


class Release(NamedTuple):
    """Gaussian noise, Poisson-sampled: noise std over sensitivity, and rate (1.0: plain Gaussian)."""

    sigma: float
    rate: float


@dataclass(frozen=True)
class Mixture:
    """Gaussian noise; each of ``records`` records takes part on its own with probability ``rate``.

    ``replaced``: Q holds another record in its place, which pulls the other way, instead of none.
    """

    sigma: float
    rate: float
    records: int
    replaced: bool


@dataclass(frozen=True)
class Truncated:
    """Gaussian noise with a rate that is itself drawn and revealed: (probability, rate) pairs."""

    sigma: float
    parts: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Laplace:
    """Scalar Laplace noise of scale ``sigma`` times the sensitivity, Poisson-sampled with ``rate``."""

    sigma: float
    rate: float


@dataclass(frozen=True)
class Discrete:
    """Discrete Gaussian on the integers, a shift of ``shift``, Poisson-sampled; ``sigma`` in grid units."""

    sigma: float
    rate: float
    shift: int
    replaced: bool


Pair = Release | Mixture | Truncated | Laplace | Discrete


def coarser(pair: Pair) -> Pair:
    """The same pair with no more noise than the grid can hold."""
    if pair.sigma <= FINEST:
        return pair
    return pair._replace(sigma=FINEST) if isinstance(pair, Release) else replace(pair, sigma=FINEST)


def presence(pair: Pair) -> float:
    """Bound on the total variation between P and Q: how likely the two laws are told apart at all."""
    match pair:
        case Mixture():
            return min(1.0, pair.rate * pair.records)
        case Truncated():
            return sum(weight * rate for weight, rate in pair.parts)
    return pair.rate


def gaussian_reach(pair: Pair) -> float | None:
    """Shift over noise std of the plain Gaussian that dominates ``pair`` (sampling never hurts), if there is one."""
    match pair:
        case Mixture():
            return (2.0 if pair.replaced else 1.0) * pair.records / pair.sigma
        case Release() | Truncated():
            return 1.0 / pair.sigma
    return None


def symmetric(pair: Pair) -> bool:
    """Whether both directions have the same law of the loss."""
    match pair:
        case Mixture():
            return pair.replaced
        case Truncated():
            return False
        case Discrete(replaced=True):
            return True
    return pair.rate == 1.0


def largest_loss(pair: Pair, *, add: bool) -> float:
    """Supremum of the loss in one direction, rounded up; inf for Gaussian tails."""
    match pair:
        case Laplace():
            shift = 1.0 / pair.sigma
            if shift > 500.0:
                return shift
            # log(1 - q + q e^x), exact to its last bits however near 0 it is.
            found = -math.log1p(pair.rate * math.expm1(-shift)) if add else math.log1p(pair.rate * math.expm1(shift))
            return found * (1.0 + 1e-12)
        case Mixture(replaced=True) | Discrete(replaced=True):
            return math.inf
        case Mixture():
            rate, records = pair.rate, pair.records
        case Truncated():
            rate, records = max(rate for _, rate in pair.parts), 1
        case _:
            rate, records = pair.rate, 1
    return -records * math.log1p(-rate) * (1.0 + 1e-12) if add and rate < 1.0 else math.inf


def landmarks(pair: Pair) -> tuple[float, ...]:
    """Losses that hold much mass at a point, and that a grid had better contain."""
    match pair:
        case Laplace():
            return tuple({abs(float(value)) for value in atoms(pair, 0.0).loss})
        case Discrete(rate=1.0):
            return (pair.shift / (2.0 * pair.sigma**2),)  # all losses are multiples of it
    return ()


def blur(pair: Pair) -> float:
    """Magnitude that the rounding of one loss is relative to, beside the loss itself."""
    match pair:
        case Mixture():
            return pair.records * abs(math.log(pair.rate)) + pair.records / pair.sigma
        case Truncated():
            # the rates are sums of binomial probabilities, good to 1e-12: 5e4 roundings
            return max(5e4 / max(1.0 - rate, 1e-9) + abs(math.log(rate)) for _, rate in pair.parts if rate > 0.0)
        case Discrete():
            return abs(math.log(pair.rate)) + pair.shift / pair.sigma
    return abs(math.log(pair.rate))


class Line(NamedTuple):
    """A continuous part: coordinate range, and how finely the density of Q varies along it (pieces per unit)."""

    low: float
    high: float
    modes: tuple[float, ...]
    resolution: float


class Atoms(NamedTuple):
    """Point masses: losses (non-decreasing) and log-masses under Q."""

    loss: Array
    log_mass: Array


def line(pair: Release | Mixture | Laplace, cut: float) -> Line:
    """Range of the coordinate that is kept: outside it both laws have at most 2 * P[N(0,1) > cut]."""
    match pair:
        case Laplace():
            return Line(-1.0 / pair.sigma, 1.0 / pair.sigma, (-1.0 / pair.sigma,), 8.0)
        case Mixture():
            reach = pair.records / pair.sigma
            low = -reach - cut if pair.replaced else -cut
            # a mixture over j = 0..records of normals: its log-density is within a cell nearest to one of their means
            modes = tuple(-j / pair.sigma for j in range(pair.records + 1)) if pair.replaced else (0.0,)
            return Line(low, reach + cut, modes, 2.0 * (reach + cut + 6.0))
    top = 1.0 / pair.sigma + cut
    return Line(-cut, top, (0.0,), 2.0 * (top + 6.0))


def log_density(z: Array, pair: Release | Mixture | Laplace) -> Array:
    """Log-density of Q along the coordinate, up to the constant :func:`log_constant`."""
    match pair:
        case Laplace():
            return -0.5 * z
        case Mixture(replaced=True):
            return np.asarray(-0.5 * z * z + _binomial_shift(-z, pair)[0])
    return np.asarray(-0.5 * z * z)


def log_constant(pair: Release | Mixture | Laplace) -> float:
    """See :func:`log_density`."""
    return -0.5 / pair.sigma - math.log(4.0) if isinstance(pair, Laplace) else -0.5 * math.log(2.0 * math.pi)


def loss(z: Array, pair: Release | Mixture | Laplace) -> Array:
    """log P/Q at coordinate z; increasing."""
    match pair:
        case Laplace():
            return _sampled(z, pair.rate)
        case Mixture():
            return loss_and_slope(z, pair)[0]
    return _sampled(z / pair.sigma - 0.5 / pair.sigma**2, pair.rate)


def loss_and_slope(z: Array, pair: Mixture) -> tuple[Array, Array]:
    """Loss of a mixture and its derivative."""
    value, mean = _binomial_shift(z, pair)
    if pair.replaced:
        other, back = _binomial_shift(-z, pair)
        value, mean = value - other, mean + back
    return value, mean / pair.sigma


@lru_cache(maxsize=8)
def atoms(pair: Laplace | Discrete, cut: float) -> Atoms:
    """Point masses of a pair."""
    if isinstance(pair, Laplace):
        ends = np.array([-1.0, 1.0]) / pair.sigma
        return Atoms(_sampled(ends, pair.rate), np.array([0.0, -1.0 / pair.sigma]) - math.log(2.0))
    sigma, shift = pair.sigma, pair.shift
    reach = math.ceil(cut * sigma) + 1  # P[X >= m] <= P[N(0, sigma^2) >= m - 1]
    x = np.arange(-reach - (shift if pair.replaced else 0), reach + shift + 1, dtype=np.float64)
    if sigma > 3.0:
        log_total = math.log(sigma) + 0.5 * math.log(2.0 * math.pi)  # Poisson summation: off by 2 exp(-2 pi^2 sigma^2)
    else:
        log_total = math.log(math.fsum(math.exp(-0.5 * (k / sigma) ** 2) for k in range(-150, 151)))
    up, down = (np.asarray((2.0 * side * x - shift) * (shift / (2.0 * sigma * sigma))) for side in (1.0, -1.0))
    base = -0.5 * (x / sigma) ** 2 - log_total
    if not pair.replaced:
        return Atoms(_sampled(up, pair.rate), base)
    other = _sampled(down, pair.rate)
    return Atoms(np.maximum.accumulate(_sampled(up, pair.rate) - other), base + other)


def support(pair: Pair, cut: float) -> tuple[float, float]:
    """Smallest and largest loss that is kept."""
    match pair:
        case Truncated():
            ranges = [support(Release(pair.sigma, rate), cut) for _, rate in pair.parts if rate > 0.0]
            return min([0.0, *(low for low, _ in ranges)]), max([0.0, *(high for _, high in ranges)])
        case Discrete():
            found = atoms(pair, cut).loss
            return float(found[0]), float(found[-1])
    ends = line(pair, cut)
    low, high = loss(np.array([ends.low, ends.high]), pair)
    return float(low), float(high)


def points(pair: Pair, cut: float, number: int) -> tuple[Array, Array, Array]:
    """About ``number`` (log-mass under P, log-mass under Q, loss): a coarse picture that only steers."""
    match pair:
        case Truncated():
            shares = [(w, r) for w, r in pair.parts if w > 0.0]
            rows = [points(Release(pair.sigma, r), cut, number // len(shares)) for _, r in shares if r > 0.0]
            weights = [math.log(w) for w, r in shares if r > 0.0]
            nothing = [math.log(w) for w, r in shares if r == 0.0]
            q = np.concatenate([row[1] + w for row, w in zip(rows, weights, strict=True)] + [np.array(nothing)])
            values = np.concatenate([row[2] for row in rows] + [np.zeros(len(nothing))])
            return q + values, q, values
        case Discrete():
            found = atoms(pair, cut)
            stride = max(1, found.loss.size // number)
            q = found.log_mass[::stride] + math.log(stride)
            values = found.loss[::stride]
            return q + values, q, values
    ends = line(pair, cut)
    z, spacing = np.linspace(ends.low, ends.high, number, retstep=True)
    q = log_density(z, pair) + (log_constant(pair) + math.log(float(spacing)))
    values = loss(z, pair)
    if isinstance(pair, Laplace):
        found = atoms(pair, cut)
        q, values = np.concatenate((q, found.log_mass)), np.concatenate((values, found.loss))
    return q + values, q, values


def _sampled(shift: Array, rate: float) -> Array:
    """Loss after Poisson sampling of a pair whose loss is ``shift``."""
    return np.asarray(shift) if rate == 1.0 else np.logaddexp(math.log1p(-rate), math.log(rate) + shift)


def _binomial_shift(z: Array, pair: Mixture) -> tuple[Array, Array]:
    """log sum_j Binom(j) exp(j z/sigma - j^2/(2 sigma^2)), and the mean of j under these weights."""
    k, s = pair.records, pair.sigma
    if k == 1 and pair.rate < 1.0:
        shift = z / s - 0.5 / s**2
        value = _sampled(shift, pair.rate)
        return value, np.exp(math.log(pair.rate) + shift - value)
    z = np.asarray(z)
    logs = [_log_binomial(j, k, pair.rate) - 0.5 * (j / s) ** 2 for j in range(k + 1)]
    top = np.full(z.shape, logs[0])
    for j in range(1, k + 1):
        np.maximum(top, logs[j] + (j / s) * z, out=top)
    total, mean = np.zeros(z.shape), np.zeros(z.shape)
    for j in range(k + 1):
        weight = np.exp(logs[j] + (j / s) * z - top)
        total += weight
        mean += j * weight
    return top + np.log(total), mean / total


def _log_binomial(j: int, k: int, rate: float) -> float:
    if rate == 1.0:
        return 0.0 if j == k else -math.inf
    return math.log(math.comb(k, j)) + (j * math.log(rate) if j else 0.0) + (k - j) * math.log1p(-rate)
