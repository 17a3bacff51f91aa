"""Certified bounds of one direction of a composition: plan a window, compose in it, read the curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.fft import next_fast_len
from scipy.special import log_ndtr

from .losses import MAX_CELLS, MAX_LOSS, Masses, cells, lower_masses, reverse, upper_masses
from .pairs import Pair, blur, landmarks, largest_loss, support
from .steering import Quadrature, cut_of, log_delta, quadrature, saddle, tilt_at
from .tilted import (
    STEP_ERROR,
    UNIT,
    Curve,
    Spectrum,
    Window,
    compose,
    composed,
    curve,
    log_delta_at,
    nothing,
    solve,
    spectrum,
)

Parts = Mapping[Pair, int]
Key = tuple[tuple[Pair, int], ...]

# Discretisation may add this fraction to epsilon: predicted excess = steps * (1 + tilt) * h^2 / 12.
TOLERANCE = 1.5e-4
DELTA_TOLERANCE = 3e-4  # and this one to delta, where delta itself is asked for
MAX_WINDOW = 1 << 22
TAIL = 25.0  # log of the mass left outside the transform's window, relative to its bulk
LEFT = 10.0  # log by which what lies left of the expected answer may be magnified before the window is moved there
SMALL = 64  # counts up to this have a plan each
KEPT = 1 << 18  # longest transform that is kept for the next query


class Plan(NamedTuple):
    """How one direction is computed: tail cut, grid step, window, expected answer and how far off it may be."""

    add: bool
    upper: bool
    cut: float
    step: float
    window: Window
    point: float
    miss: float


def rounded_up(parts: Parts) -> Key:
    """Counts on a grid of ratio 2^(1/8): a run that goes on step by step changes its plans only now and then."""
    return tuple((pair, block(times)[1]) for pair, times in parts.items())


def block(times: int) -> tuple[int, int]:
    """The (last count before, last count of) the block of counts that share a plan."""
    if times <= SMALL:
        return times - 1, times
    power = math.ceil(8.0 * math.log2(times) - 1e-9)
    while math.floor(2.0 ** (power / 8.0)) < times:
        power += 1
    last = math.floor(2.0 ** (power / 8.0))
    return max(SMALL, min(math.floor(2.0 ** ((power - 1) / 8.0)), times - 1)), last


def shift(parts: Parts, cut: float) -> float:
    """What rounding of grid losses and of the loss function may add to the total loss."""
    total = 0.0
    for pair, times in parts.items():
        total += times * 8.0 * UNIT * (4.0 + max(map(abs, _range(pair, cut))) + blur(pair))
    return total


def log_tails(steps: int, cut: float) -> float:
    """log of the mass that the cut tails of all steps may hold; it is charged to delta."""
    return math.log(2.0 * steps) + float(log_ndtr(-cut))


def epsilon_bound(parts: Parts, delta: float, *, add: bool, upper: bool = True, refine: float = 1.0) -> float:
    """Certified epsilon of one direction: inf (upper) or 0 (lower) if it cannot be established; ``refine`` the grid."""
    key = rounded_up(parts)
    law, cut, (point, tilt) = _steered(key, delta, add)
    best = math.inf if upper else 0.0
    for _ in range(6):
        plan = _plan(key, cut, delta, add, upper, refine, point, tilt)
        found = _epsilon(parts, delta, plan)
        if found is not None:
            best = min(best, found) if upper else max(best, found)
            fine = found >= 0.7 * point  # else the grid was chosen for an epsilon that is not so small
            if fine and abs(found - point) <= plan.miss and tilt * (point - found) <= LEFT:
                break
        point = point + plan.miss if found is None else found
        tilt = tilt_at(law, point)
    return best


def log_delta_bound(parts: Parts, epsilon: float, *, add: bool, upper: bool = True) -> float:
    """Certified log of delta(epsilon) of one direction, accurate relative to delta."""
    if sum(times * largest_loss(pair, add=add) for pair, times in parts.items()) <= epsilon:
        return -math.inf
    key, steps = rounded_up(parts), sum(parts.values())
    guess = -30.0
    for _ in range(8):
        cut = cut_of(steps, math.exp(guess))
        law = _law(key, cut, add)
        tilt = tilt_at(law, epsilon)
        point, value = log_delta(law, tilt)
        value = min(value - max(0.0, epsilon - point) * tilt, -1e-3)
        if value >= guess or guess <= -640.0:
            break
        guess = max(value - 3.0, -640.0)
    ranges = [(times, *_range(pair, cut)) for pair, times in parts.items()]
    if upper and sum(times * (-low if add else high) for times, low, high in ranges) + shift(parts, cut) <= epsilon:
        return log_tails(steps, cut)
    tilt = min(tilt, 6.0 * MAX_CELLS / max(high - low for _, low, high in ranges))  # exp(tilt * step) stays finite
    plan = _plan(key, cut, 0.0, add, upper, 1.0, epsilon, tilt)
    found = _log_delta(parts, epsilon, plan)
    if not upper:
        return found if found is not None else -math.inf
    if found is None:
        return 0.0
    tails = log_tails(steps, cut)
    return min(0.0, max(found, tails) + math.log1p(math.exp(-abs(found - tails))))


def chernoff(parts: Parts, delta: float, *, add: bool, point: float) -> bool:
    """Whether a cheap certificate shows that this direction needs at most epsilon = ``point``."""
    key = rounded_up(parts)
    _, cut, (near, tilt) = _steered(key, delta, add)
    tilt = min(tilt, 1e4)
    step = math.sqrt(2000.0 * TOLERANCE * (near or point) / (sum(times for _, times in key) * (1.0 + tilt)))
    step = max(step, 16.0 * max(high - low for low, high in (_range(pair, cut) for pair, _ in key)) / MAX_CELLS)
    exponent = -tilt * point + tilt * math.log(tilt) - (1.0 + tilt) * math.log1p(tilt)
    for pair, times in parts.items():
        exponent += times * _log_moment(pair, step, cut, add, tilt)
    exponent += sum(parts.values()) * STEP_ERROR + tilt * shift(parts, cut)
    return bool(exponent <= _charged(delta, sum(parts.values()), cut))


def _charged(delta: float, steps: int, cut: float) -> float:
    """log of delta less what the cut tails may hold."""
    return math.log(delta) + math.log1p(-math.exp(log_tails(steps, cut) - math.log(delta)))


@lru_cache(maxsize=4096)
def _range(pair: Pair, cut: float) -> tuple[float, float]:
    return support(pair, cut)


@lru_cache(maxsize=2048)
def _log_moment(pair: Pair, step: float, cut: float, add: bool, tilt: float) -> float:
    found = cells.__wrapped__(pair, step, cut)
    return upper_masses(reverse(found, step) if add else found, step).log_moment(tilt, step)


@lru_cache(maxsize=16)
def _law(key: Key, cut: float, add: bool) -> Quadrature:
    return quadrature(dict(key), cut, add=add)


@lru_cache(maxsize=16)
def _steered(key: Key, delta: float, add: bool) -> tuple[Quadrature, float, tuple[float, float]]:
    cut = cut_of(sum(times for _, times in key), delta)
    law = _law(key, cut, add)
    return law, cut, saddle(law, delta)


@lru_cache(maxsize=64)
def _plan(key: Key, cut: float, delta: float, add: bool, upper: bool, refine: float, point: float, tilt: float) -> Plan:
    """Window for the answer near ``point``; ``delta`` 0.0 asks for accuracy in delta instead of in epsilon."""
    law, steps = _law(key, cut, add), sum(times for _, times in key)
    value, _, variance = law.cumulants(tilt)
    spread = max(math.sqrt(variance), 1e-12)
    tails = [
        min(
            ((law.cumulants(tilt + side * t)[0] - value + TAIL) / t, t)
            for t in (10.0 / spread * 2.0**-halving for halving in range(10))
        )
        for side in (1.0, -1.0)
    ]
    ranges = [_range(pair, cut) for pair, _ in key]
    bottom, top = min(-tails[1][0], max(point - 2.0 / tilt, 0.0)), max(tails[0][0], point + 1.0 / tilt)
    excess = TOLERANCE * max(point, 0.002 * spread) if delta else DELTA_TOLERANCE / max(tilt, 1.0)
    step = math.sqrt(12.0 * excess / (steps * (1.0 + tilt))) / refine
    most = MAX_CELLS if delta else MAX_CELLS >> 4
    step = max(step, max(high - low for low, high in ranges) / most, 1.1 * (top - bottom) / MAX_WINDOW)
    if 4.0 * (top - bottom) < MAX_WINDOW * step:
        step = _aligned(step, {mark for pair, _ in key for mark in landmarks(pair)})
    start = math.floor(bottom / step) - 2
    size = next_fast_len(math.ceil(top / step) + 3 - start, real=True)
    window = Window(tilt, tails[0][1], tails[1][1], start, size)
    return Plan(add, upper, cut, step, window, point, 3.0 * (spread + 1.0 / tilt))


def _aligned(step: float, marks: set[float]) -> float:
    """A step, finer by 3 at most, of which all marks are nearly multiples: splitting an atom costs most."""
    marks = {mark for mark in marks if mark > step}
    if not marks:
        return step
    whole = max(marks)
    least = math.ceil(whole / step)
    steps = whole / np.arange(least, min(3 * least, least + 65536) + 1)
    off = np.zeros(steps.size)
    for mark in marks:
        ratio = mark / steps
        off += np.abs(ratio - np.rint(ratio)) * steps
    return float(steps[int(np.argmin(off / step + 1e-9 * np.arange(steps.size)))])


def _masses(pair: Pair, plan: Plan) -> tuple[Masses, float]:
    found = cells(pair, plan.step, plan.cut)
    if plan.add:
        found = reverse(found, plan.step)
    return (upper_masses(found, plan.step), 0.0) if plan.upper else lower_masses(found, plan.step)


def _fresh(pair: Pair, plan: Plan) -> tuple[Spectrum, float]:
    masses, missing = _masses(pair, plan)
    return spectrum(masses, plan.step, plan.window), missing


_kept = lru_cache(maxsize=32)(_fresh)


def _curve(parts: Parts, plan: Plan) -> tuple[Curve | None, float]:
    """delta as a function of epsilon, and (from below) what discretisation took from delta."""
    missing = 0.0
    product = nothing(plan.window)
    one_step = _kept if len(parts) <= 16 and plan.window.size <= KEPT else _fresh
    for pair, times in parts.items():
        one, slack = one_step(pair, plan)
        missing += times * slack
        product = compose(product, [(one, times)], plan.window)
    law = composed(product, plan.step, plan.window)
    return curve(law, plan.step, plan.window, plan.point, upper=plan.upper), missing


def _hopeless(parts: Parts, plan: Plan) -> bool:
    """Ratios beyond floating point: no lower bound is claimed for such little noise."""
    return any(max(high, high - low) > MAX_LOSS for low, high in (_range(pair, plan.cut) for pair in parts))


def _epsilon(parts: Parts, delta: float, plan: Plan) -> float | None:
    if not plan.upper and _hopeless(parts, plan):
        return 0.0
    found, missing = _curve(parts, plan)
    if found is None:
        return None
    target = _charged(delta, sum(parts.values()), plan.cut) if plan.upper else math.log(delta + missing)
    value = solve(found, plan.step, target, upper=plan.upper)
    if value is None:
        return None
    return max(0.0, value + shift(parts, plan.cut) if plan.upper else value - shift(parts, plan.cut))


def _log_delta(parts: Parts, epsilon: float, plan: Plan) -> float | None:
    if not plan.upper and _hopeless(parts, plan):
        return None
    found, missing = _curve(parts, plan)
    moved = shift(parts, plan.cut)
    value = log_delta_at(found, plan.step, epsilon - moved if plan.upper else epsilon + moved) if found else None
    if plan.upper or value is None:
        return value
    less = math.exp(value) - missing
    return math.log(less) if less > 0.0 else None
