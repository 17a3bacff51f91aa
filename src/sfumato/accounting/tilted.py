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

from .losses import Array, Masses

UNIT = 2.0**-53
# What one step's masses may be off by, relatively: quadrature (1e-11), exponentials and logarithms of magnitude < 1e4.
STEP_ERROR = 4e-11


class Window(NamedTuple):
    """Steering of one transform: tilt, tilts that bound the two tails, first grid index and length of the window."""

    tilt: float
    right: float
    left: float
    start: int
    size: int


class Composed(NamedTuple):
    """Tilted law on the window: mass per index, its pointwise error, the mass beyond either side, log scale."""

    mass: Array
    error: float
    right_tail: float
    left_tail: float
    log_scale: float
    steps: int


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


def convolve(parts: Iterable[tuple[Masses, int]], step: float, window: Window) -> Composed:
    """Composition of ``parts`` (masses, count) under ``window``.

    Rounding: each output of an FFT of length N is a sum over log2 N levels of multiply-adds, so its error is at most
    8 u log2(N) times the l1 norm of the input (1 here). |prod f_i^n_i - prod g_i^n_i| <= T e prod (|f_i| + e)^(n_i-1).
    Tails: Chernoff, on the discretised law itself.
    """
    size, bins = window.size, window.size // 2 + 1
    levels = math.log2(size) + 1.0
    spectrum = np.ones(bins, dtype=np.complex128)
    envelope = np.ones(bins)
    spectral_error = 8.0 * UNIT * levels + 4.0 * UNIT
    log_scale = right = left = 0.0
    steps = 0
    for masses, count in parts:
        norm = masses.log_moment(window.tilt, step)
        log_scale += count * norm
        right += count * (masses.log_moment(window.tilt + window.right, step) - norm)
        left += count * (masses.log_moment(window.tilt - window.left, step) - norm)
        tilted = np.exp(masses.log + window.tilt * masses.losses(step) - norm)
        ring = np.bincount((masses.start + np.arange(tilted.size)) % size, weights=tilted, minlength=size)
        transform = rfft(ring)
        spectrum *= _power(transform, count)
        if count > 1:
            envelope *= (np.abs(transform) + spectral_error) ** (count - 1)
        steps += count
    weight = np.full(bins, 2.0)
    weight[0] = 1.0
    if size % 2 == 0:
        weight[-1] = 1.0
    error = 1.01 * steps * spectral_error * float(weight @ envelope) / size
    error += spectral_error * float(weight @ np.abs(spectrum)) / size
    mass = np.roll(irfft(spectrum, size), -(window.start % size))
    beyond = (window.start + size) * step
    return Composed(
        mass,
        error,
        math.exp(min(0.0, right - window.right * beyond)),
        math.exp(min(0.0, left + window.left * window.start * step)),
        log_scale,
        steps,
    )


def solve(law: Composed, step: float, window: Window, centre: float, log_delta: float, *, upper: bool) -> float | None:
    """Epsilon at which delta(epsilon) = exp(log_delta), from above (``upper``) or below; None when out of reach.

    With V_s = M_s exp(-tilt (s-c)), A_j = sum_{k>=j} V_k:  D_j = sum_{k>j} V_k (1 - exp(s_j-s_k)) equals
    (1-e^-h) sum_{k>j} A_k e^{-(k-j-1)h}: positive terms only, no cancellation. Between grid points delta is linear in
    exp(epsilon), so the last interpolation is exact.
    """
    tilt = window.tilt
    sign = 1.0 if upper else -1.0
    reach = min(50.0 / tilt, 300.0)  # exp(50) is what rounding may be magnified by at the far end
    first = max(window.start, math.floor(max(centre - reach, -step) / step))
    if first >= window.start + window.size - 2:
        return None
    index = np.arange(first, window.start + window.size)
    offset = index * step - centre
    mass = np.maximum(law.mass[first - window.start :] + sign * law.error, 0.0)
    above = np.cumsum((mass * np.exp(-tilt * offset))[::-1])[::-1]
    decay = np.exp(-step * np.arange(index.size))
    usable = min(index.size - 1, max(2, int(600.0 / step)))
    suffix = np.cumsum((above * decay)[::-1])[::-1]
    curve = -math.expm1(-step) * suffix[1 : usable + 1] / decay[1 : usable + 1]
    rounding = 4.0 * index.size * UNIT
    offset = offset[:usable]
    if upper:
        curve = curve * (1.0 + rounding) + law.right_tail * math.exp(-tilt * float((index[-1] + 1) * step - centre))
    else:
        # mass from outside wraps into the window, where the weight exp(-t u)(1 - exp(-u)) is at most this
        peak = math.exp(tilt * math.log(tilt) - (1.0 + tilt) * math.log1p(tilt))
        curve = curve * (1.0 - rounding) - (law.left_tail + law.right_tail) * peak * np.exp(-tilt * offset)
    slack = law.steps * STEP_ERROR + 1e-12
    exponent = log_delta - law.log_scale + tilt * centre - sign * slack
    if exponent > 700.0:
        return None
    target = math.exp(exponent)
    below = curve <= target
    if not below.any():
        return None
    found = int(np.argmax(below))
    if found == 0:
        return 0.0 if first <= 0 else None
    high, low = float(curve[found - 1]), float(curve[found])
    return float(index[found - 1] * step) + math.log1p((high - target) / (high - low) * math.expm1(step))
