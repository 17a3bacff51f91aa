"""Integer noise by inverse CDF in integer arithmetic: discrete Gaussian, discrete Laplace, Poisson, Skellam.

Guarantee of every sampler here: the law of one draw is within total variation 2⁻¹⁰⁰ of the named law, tails included,
so n draws add at most n·2⁻¹⁰⁰·(1 + exp(ε)) to any δ. No floating-point number is computed or compared on the way.

A table holds the weights of all integers k that matter, relative to the mode, as 160-bit integers: the recurrence from
k to k + 1 rounds down once, so a weight is off by less than 2|k|, and the table ends where a weight is 0. With N
entries at most 4N²·2⁻¹⁶⁰ of the mass is missing (N <= 2²⁰: 2⁻¹¹⁸). Cumulated, it becomes thresholds of 128 bits, each
off by less than 2⁻¹²⁸. A draw compares the first 64 of its bits with all thresholds at once, and takes 64 more only if
they equal those of some threshold.

Laws: Canonne, Kamath & Steinke 2020 (discrete Gaussian and Laplace); Agarwal, Kairouz & Liu 2021 (Skellam).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError

RandomBytes = Callable[[int], NDArray[np.uint8]]
Rational = int | float | Fraction

WIDEST = 1 << 20  # entries of a table
MOST_PARTS = 256  # Skellam draws that are summed where one table would be too wide
_WEIGHT = 160
_RATIO = 256
_THRESHOLD = 128
_WORD = 64
_BATCH = 1 << 18  # draws per pass: bounds the memory beyond the result
# Half a table, in standard deviations: sqrt(2 · 160 · ln 2) = 14.9, and what rounding adds to it for narrow laws.
_REACH = 15
_LAPLACE_REACH = 112  # 160 · ln 2 = 110.9
_PART = Fraction(WIDEST // (2 * _REACH) - 2) ** 2  # mean of the widest Poisson table


def discrete_gaussian(n: int, sigma2: Rational, random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Draw ``n`` integers with P(x) proportional to exp(-x² / (2 ``sigma2``)); 0 gives zeros.

    Its variance is at most ``sigma2``. A sum of such draws is *not* discrete Gaussian. Raises ``ConfigurationError``
    for a negative or non-finite ``sigma2``, or one above 1.2e9 (a standard deviation of 35 000).
    """
    parameter = _rational("sigma2", sigma2)
    _refuse_wide("sigma2", parameter, _PART)
    return _draw(_discrete_gaussian, parameter, n, random_bytes)


def discrete_laplace(n: int, scale: Rational, random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Draw ``n`` integers with P(x) proportional to exp(-\\|x\\| / ``scale``); 0 gives zeros.

    Raises ``ConfigurationError`` for a negative or non-finite ``scale``, or one above 4 600.
    """
    parameter = _rational("scale", scale)
    _refuse_wide("scale", parameter, Fraction(WIDEST // (2 * _LAPLACE_REACH) - 2))
    return _draw(_discrete_laplace, parameter, n, random_bytes)


def poisson(n: int, mean: Rational, random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Draw ``n`` Poisson integers; a mean of 0 gives zeros.

    Raises ``ConfigurationError`` for a negative or non-finite ``mean``, or one above 1.2e9.
    """
    parameter = _rational("mean", mean)
    _refuse_wide("mean", parameter, _PART)
    return _draw(_poisson, parameter, n, random_bytes)


def skellam(n: int, variance: Rational, random_bytes: RandomBytes) -> NDArray[np.int64]:
    """Draw ``n`` differences of two independent Poisson integers of mean ``variance`` / 2; 0 gives zeros.

    Closed under sums: draws of variance v₁ … vₖ add up to a Skellam draw of variance v₁ + … + vₖ, exactly. That is also
    how variances above 2.4e9 are drawn, at k times the cost. Raises ``ConfigurationError`` for a negative or non-finite
    ``variance``, or one above 6e11 (a standard deviation of 790 000).
    """
    mean = _rational("variance", variance) / 2
    _refuse_wide("variance", mean, MOST_PARTS * _PART)
    parts = max(1, math.ceil(mean / _PART))
    out = np.zeros(n, np.int64)
    for _ in range(parts):
        out += _draw(_poisson, mean / parts, n, random_bytes)
        out -= _draw(_poisson, mean / parts, n, random_bytes)
    return out


def _rational(name: str, value: Rational) -> Fraction:
    fits = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
    if not fits or (isinstance(value, float) and not math.isfinite(value)) or value < 0:
        raise ConfigurationError(
            f"{name} must be a finite rational number >= 0, got {value!r}.", found=value, where=name
        )
    return Fraction(value)


def _refuse_wide(name: str, value: Fraction, limit: Fraction) -> None:
    if value > limit:
        raise ConfigurationError(
            f"{name}={float(value):g} is above {float(limit):g}: the table of the law would be too large.",
            found=value,
            where=name,
            fix="use a coarser grid, so that the noise spans fewer integers.",
        )


class _Table:
    """Thresholds of a law on first, first + 1, …: the draw is ``first`` + the number of thresholds <= 128 bits."""

    def __init__(self, first: int, weights: list[int]) -> None:
        total = sum(weights)
        thresholds = [(below << _THRESHOLD) // total for below in accumulate(weights[:-1])]
        word = (1 << _WORD) - 1
        self.first = first
        self.heads = np.array([t >> _WORD for t in thresholds], np.uint64)
        self.tails = np.array([t & word for t in thresholds], np.uint64)

    def look_up(self, heads: NDArray[np.uint64], random_bytes: RandomBytes) -> NDArray[np.int64]:
        """The draws whose first 64 bits are ``heads``."""
        found = np.searchsorted(self.heads, heads, side="left").astype(np.int64, copy=False)
        if len(self.heads):
            undecided = self.heads[np.minimum(found, len(self.heads) - 1)] == heads
            for i in np.flatnonzero(undecided):
                tail = random_bytes(8).view(np.uint64)[0]
                end = int(np.searchsorted(self.heads, heads[i], side="right"))
                found[i] += int(np.searchsorted(self.tails[found[i] : end], tail, side="right"))
        return found + self.first


def _draw(table: Callable[[Fraction], _Table], parameter: Fraction, n: int, source: RandomBytes) -> NDArray[np.int64]:
    out = np.zeros(n, np.int64)
    if parameter == 0:
        return out
    law = table(parameter)
    for start in range(0, n, _BATCH):
        part = out[start : start + _BATCH]
        part[:] = law.look_up(source(8 * len(part)).view(np.uint64), source)
    return out


@lru_cache(maxsize=8)
def _poisson(mean: Fraction) -> _Table:
    mode, top, bottom = mean.numerator // mean.denominator, mean.numerator, mean.denominator

    def up() -> Iterator[int]:
        weight, k = 1 << _WEIGHT, mode
        while weight:
            yield weight
            k += 1
            weight = weight * top // (bottom * k)

    def down() -> Iterator[int]:
        weight, k = 1 << _WEIGHT, mode
        while k and (weight := weight * k * bottom // top):
            yield weight
            k -= 1

    below = list(down())
    return _Table(mode - len(below), [*reversed(below), *up()])


@lru_cache(maxsize=8)
def _discrete_gaussian(sigma2: Fraction) -> _Table:
    # w(k + 1) / w(k) = exp(-(2k + 1) / (2 sigma2)), which itself falls by exp(-1 / sigma2) from one k to the next.
    return _symmetric(_exponential(1 / (2 * sigma2)), _exponential(1 / sigma2))


@lru_cache(maxsize=8)
def _discrete_laplace(scale: Fraction) -> _Table:
    return _symmetric(_exponential(1 / scale), 1 << _RATIO)


def _symmetric(ratio: int, fall: int) -> _Table:
    """The law on … -1, 0, 1, … whose weights go down by ``ratio``, ``ratio`` · ``fall``, … (in units of 2⁻²⁵⁶)."""
    side, weight = [], 1 << _WEIGHT
    while weight := weight * ratio >> _RATIO:
        side.append(weight)
        ratio = ratio * fall >> _RATIO
    return _Table(-len(side), [*reversed(side), 1 << _WEIGHT, *side])


def _exponential(x: Fraction) -> int:
    """exp(-``x``) in units of 2⁻²⁵⁶, off by less than two of them; ``Decimal.exp`` rounds correctly."""
    if x > 200:
        return 0
    with localcontext() as context:
        context.prec = 120
        value = (-(Decimal(x.numerator) / Decimal(x.denominator))).exp() * Decimal(1 << _RATIO)
        return int(value.to_integral_value(ROUND_FLOOR))
