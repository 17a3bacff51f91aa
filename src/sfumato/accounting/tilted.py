"""Composition of discretised privacy losses by an exponentially tilted FFT, with every error term added.

Weighting each loss l by exp(tilt*l) before the transform moves the bulk of the composed law onto the epsilon in
question, so the FFT's absolute error becomes an error relative to delta, also for delta = 1e-15.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.fft import irfft, rfft

from .losses import Masses
from .pairs import Array

UNIT = 2.0**-53
# What one step's masses may be off by, relatively: quadrature (1e-11), exponentials and logarithms of magnitude < 1e4.
STEP_ERROR = 4e-11
FADED = 1e-25  # a frequency at which the product is smaller than this counts as error


class Window(NamedTuple):
    """Steering of one transform: tilt, tilts that bound the two tails, first grid index and length of the window."""

    tilt: float
    right: float
    left: float
    start: int
    size: int


class Spectrum(NamedTuple):
    """Transform of one step's tilted masses, a bound on its magnitude, and log moments at the window's three tilts."""

    transform: npt.NDArray[np.complex128]
    bound: Array
    norm: float
    right: float
    left: float


class Product(NamedTuple):
    """Composition in frequency: bins that have not faded, values, bound, relative error; log moments and step count."""

    bins: npt.NDArray[np.int64]
    value: npt.NDArray[np.complex128]
    bound: Array
    error: Array
    log_scale: float
    right: float
    left: float
    steps: int


class Composed(NamedTuple):
    """Tilted law on the window: mass per index, the l2 norm of its error, the mass beyond either side, log scale."""

    mass: Array
    error: float
    right_tail: float
    left_tail: float
    log_scale: float
    steps: int


def _rounding(window: Window) -> float:
    """Error of an FFT of length N: log2 N levels of multiply-adds, hence 8 u log2(N) relative to the input's norm: l2
    for the vector (Higham 2002, theorem 24.2), l1 for each output."""
    return 8.0 * UNIT * (math.log2(window.size) + 1.0) + 4.0 * UNIT


def spectrum(masses: Masses, step: float, window: Window) -> Spectrum:
    """One step under ``window``."""
    norm = masses.log_moment(window.tilt, step)
    tilted = np.exp(masses.log + window.tilt * masses.losses(step) - norm)
    ring = np.bincount((masses.start + np.arange(tilted.size)) % window.size, weights=tilted, minlength=window.size)
    transform = rfft(ring)
    right = masses.log_moment(window.tilt + window.right, step) - norm
    left = masses.log_moment(window.tilt - window.left, step) - norm
    return Spectrum(transform, np.abs(transform) + _rounding(window), norm, right, left)


def nothing(window: Window) -> Product:
    """The composition of no steps."""
    bins = window.size // 2 + 1
    one = np.ones(bins)
    return Product(np.arange(bins), one.astype(np.complex128), one, np.zeros(bins), 0.0, 0.0, 0.0, 0)


def compose(product: Product, parts: Iterable[tuple[Spectrum, int]], window: Window) -> Product:
    """``product`` with ``parts`` (one step's spectrum, count) composed onto it.

    |prod f_i^n_i - prod g_i^n_i| <= sum_i n_i e / b_i * prod b_i^n_i for b_i >= |f_i| + e, |f_i - g_i| <= e.
    """
    bins, value, bound, error, log_scale, right, left, steps = product
    unit = _rounding(window)
    for one, count in parts:
        factor = one.bound[bins]
        if count > 1:
            keep = np.flatnonzero(factor > math.exp(math.log(FADED) / count))
            bins, value, bound, error, factor = bins[keep], value[keep], bound[keep], error[keep], factor[keep]
            value = value * _power(one.transform[bins], count)
            bound = bound * factor**count
        else:
            value = value * one.transform[bins]
            bound = bound * factor
        error = error + count * unit / factor
        keep = np.flatnonzero(bound > FADED)
        if keep.size < 0.8 * bins.size:
            bins, value, bound, error = bins[keep], value[keep], bound[keep], error[keep]
        log_scale += count * one.norm
        right += count * one.right
        left += count * one.left
        steps += count
    return Product(bins, value, bound, error, log_scale, right, left, steps)


def _power(base: npt.NDArray[np.complex128], exponent: int) -> npt.NDArray[np.complex128]:
    """base ** exponent by squaring: at most 2*log2(exponent) roundings in a row, no phase unwrapping."""
    result = None
    while True:
        if exponent & 1:
            result = base if result is None else result * base
        exponent >>= 1
        if not exponent:
            return base if result is None else result
        base = base * base


def composed(product: Product, step: float, window: Window) -> Composed:
    """Back from frequencies to losses. Tails: Chernoff, on the discretised law itself."""
    size = window.size
    weight = np.where((product.bins == 0) | (2 * product.bins == size), 1.0, 2.0) / size
    error = 1.01 * math.sqrt(float(weight @ (product.bound * product.error) ** 2)) + 1.01 * FADED
    error += _rounding(window) * math.sqrt(float(weight @ np.abs(product.value) ** 2))
    full = np.zeros(size // 2 + 1, dtype=np.complex128)
    full[product.bins] = product.value
    mass = np.roll(irfft(full, size), -(window.start % size))
    beyond = (window.start + size) * step
    return Composed(
        mass,
        error,
        math.exp(min(0.0, product.right - window.right * beyond)),
        math.exp(min(0.0, product.left + window.left * window.start * step)),
        product.log_scale,
        product.steps,
    )


class Curve(NamedTuple):
    """delta at the grid losses from index ``first`` on, times exp(``log_unit``)."""

    first: int
    value: Array
    log_unit: float


def curve(law: Composed, step: float, window: Window, centre: float, *, upper: bool) -> Curve | None:
    """delta as a function of epsilon, from above (``upper``) or below; None where the window does not reach.

    With V_s = M_s exp(-tilt (s-c)), A_j = sum_{k>=j} V_k:  D_j = sum_{k>j} V_k (1 - exp(s_j-s_k)) equals
    (1-e^-h) sum_{k>j} A_k e^{-(k-j-1)h}: positive terms only, no cancellation.
    """
    tilt = window.tilt
    sign = 1.0 if upper else -1.0
    reach = min(50.0 / tilt, 300.0)  # exp(50) is what rounding may be magnified by at the far end
    first = max(window.start, math.floor(max(centre - reach, -step) / step))
    if first >= window.start + window.size - 2:
        return None
    index = np.arange(first, window.start + window.size)
    offset = index * step - centre
    weight = np.exp(-tilt * offset)
    mass = law.mass[first - window.start :]
    decay = np.exp(-step * np.arange(index.size))
    usable = min(index.size - 1, max(2, int(600.0 / step)))

    def excess(mass: Array) -> Array:
        above = np.cumsum((mass * weight)[::-1])[::-1]
        suffix = np.cumsum((above * decay)[::-1])[::-1]
        return np.asarray(-math.expm1(-step) * suffix[1 : usable + 1] / decay[1 : usable + 1])

    # The weights exp(-t u)(1 - exp(-u)), u = h, 2h, ..: at most ``peak``; l2 norm at most ``norm`` (integral + top).
    peak = math.exp(tilt * math.log(tilt) - (1.0 + tilt) * math.log1p(tilt))
    norm = math.sqrt(1.0 / (2.0 * tilt * (2.0 * tilt + 1.0) * (tilt + 1.0) * step) + peak * peak)
    rounding = 4.0 * index.size * UNIT
    if upper:
        value = excess(np.maximum(mass, 0.0)) * (1.0 + rounding) + law.error * norm * weight[:usable]
        value += law.right_tail * math.exp(-tilt * float((index[-1] + 1) * step - centre))
    else:
        # mass from outside wraps into the window
        value = excess(mass) - rounding * excess(np.abs(mass))
        value -= (law.error * norm + (law.left_tail + law.right_tail) * peak) * weight[:usable]
    slack = law.steps * STEP_ERROR + 1e-12
    return Curve(first, value, tilt * centre - law.log_scale - sign * slack)


def solve(found: Curve, step: float, log_delta: float, *, upper: bool) -> float | None:
    """Epsilon at which delta(epsilon) = exp(log_delta); None when out of reach.

    Between grid points delta is linear in exp(epsilon), so the last interpolation is exact.
    """
    exponent = log_delta + found.log_unit
    if exponent > 700.0:
        return None
    target = math.exp(exponent)
    below = found.value <= target
    # the first place that suffices; from below, where errors may swamp the curve on the left, the last that does not
    place = int(np.argmax(below)) if upper else below.size - int(np.argmin(below[::-1]))
    if not below.any() or place == below.size:
        return None
    if place == 0 or below.all():
        return found.first * step if found.first <= 0 else None
    high, low = float(found.value[place - 1]), float(found.value[place])
    return float((found.first + place - 1) * step) + math.log1p((high - target) / (high - low) * math.expm1(step))


def log_delta_at(found: Curve, step: float, epsilon: float) -> float | None:
    """log of delta(epsilon); None when out of reach."""
    place = math.floor(epsilon / step) - found.first
    if not 0 <= place < found.value.size - 1:
        return None
    low, high = float(found.value[place]), float(found.value[place + 1])
    share = math.expm1(epsilon - (found.first + place) * step) / math.expm1(step)
    value = low + (high - low) * min(max(share, 0.0), 1.0)
    return math.log(value) - found.log_unit if value > 0.0 else -math.inf
