"""Certified epsilon of any mix of Gaussian and Poisson-subsampled Gaussian releases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from scipy.fft import next_fast_len
from scipy.optimize import brentq
from scipy.special import log_ndtr

from ..errors import ConfigurationError
from .budget import count, nonnegative, probability, rate
from .events import Event
from .gaussian import gaussian_epsilon
from .losses import (
    MAX_CELLS,
    MAX_LOSS,
    Masses,
    Quadrature,
    Release,
    lower_masses,
    quadrature,
    remove_cells,
    reverse,
    support,
    tail_quantile,
    upper_masses,
)
from .tilted import STEP_ERROR, UNIT, Window, convolve, solve

# Discretisation may add this fraction to epsilon: predicted excess = steps * (1 + tilt) * h^2 / 12.
TOLERANCE = 2e-4
GAP = 1e-3  # a bracket this narrow, relative to epsilon, needs no finer grid
MAX_WINDOW = 1 << 22
COARSEST, FINEST = 5e-3, 1e6  # noise multipliers that the grid can hold
TAIL = 25.0  # log of the mass left outside the transform's window, relative to its bulk


class Epsilon(float):
    """A certified upper bound that works as a float; ``lower`` is computed when first asked for."""

    delta: float
    _lower: float | Callable[[], float]

    def __new__(cls, upper: float, *, delta: float, lower: float | Callable[[], float]) -> Epsilon:
        self = super().__new__(cls, upper)
        self.delta = delta
        self._lower = lower
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[float], dict[str, object]]:
        return (float(self),), {"delta": self.delta, "lower": self._lower}

    @property
    def upper(self) -> float:
        """The true epsilon is at most this."""
        return float(self)

    @property
    def lower(self) -> float:
        """The true epsilon is at least this."""
        if not isinstance(self._lower, float):
            self._lower = min(self._lower(), self.upper)
        return self._lower


def epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> Epsilon:
    """Epsilon of ``steps`` Poisson-subsampled Gaussian releases, add/remove adjacency, worst of both directions.

    ``noise_multiplier`` is noise std over clipping norm (0 gives inf). Raises ConfigurationError on bad arguments.
    """
    release = Release(nonnegative("noise_multiplier", noise_multiplier), rate("sample_rate", sample_rate))
    return certify({release: count("steps", steps)}, probability("delta", delta))


def compose(events: Mapping[Event, int], *, delta: float) -> Epsilon:
    """Epsilon of all ``events`` ({event: how often}) together; nothing released costs 0.

    Add-remove and zero-out events may meet: a Poisson sample cannot tell an absent record from a zeroed one, so the
    result then holds for zero-out. Events of different privacy units may not.
    """
    return certify(releases(events), probability("delta", delta))


def releases(events: Mapping[Event, int]) -> dict[Release, int]:
    """What ``events`` cost, checked: one privacy unit, and every covered release has its payer."""
    if len(units := sorted({event.unit for event in events})) > 1:
        raise ConfigurationError(
            f"events protect different units ({', '.join(units)}), so no single epsilon describes them.",
            found=units,
            fix="compose each unit on its own.",
        )
    payers = {(e.noise_multiplier, e.adjacency) for e, n in events.items() if e.mechanism == "gaussian" and n}
    result: dict[Release, int] = {}
    for event, times in events.items():
        times = count("count of an event", times)
        if event.mechanism == "covered":
            if times and (event.noise_multiplier, event.adjacency) not in payers:
                raise ConfigurationError(
                    f"{times} covered release(s) at noise multiplier {event.noise_multiplier} without the epoch's "
                    "'gaussian' event that pays for them.",
                    found=event,
                    fix="charge the epoch before its later batches.",
                )
            continue
        release = Release(event.noise_multiplier, event.sample_rate)
        result[release] = result.get(release, 0) + times
    return result


def certify(parts: Mapping[Release, int], delta: float) -> Epsilon:
    """Upper bound now, lower bound on demand, for validated releases."""
    parts = {release: times for release, times in parts.items() if times}
    if not parts:
        return Epsilon(0.0, delta=delta, lower=0.0)
    if any(release.sigma == 0.0 for release in parts):
        return Epsilon(math.inf, delta=delta, lower=math.inf)
    if sum(times * release.rate for release, times in parts.items()) <= delta * (1.0 - 1e-9):
        return Epsilon(0.0, delta=delta, lower=0.0)  # the record takes part with probability at most delta
    # Below COARSEST no grid tells more than the unsampled bound; above FINEST less noise is assumed: an upper bound.
    parts = _merged(parts)
    exact = {release: times for release, times in parts.items() if release.rate == 1.0}
    mu = _mu(exact)
    # Poisson sampling never hurts, so treating every release as unsampled is an upper bound too.
    unsampled = gaussian_epsilon(_mu(parts), delta, upper=True)
    if min(release.sigma for release in parts) < COARSEST:
        return Epsilon(unsampled, delta=delta, lower=0.0)
    if len(exact) == len(parts):
        return Epsilon(unsampled, delta=delta, lower=gaussian_epsilon(mu, delta, upper=False))
    merged = {release: times for release, times in parts.items() if release.rate < 1.0}
    if exact:
        merged[Release(1.0 / mu, 1.0)] = 1
    upper = _bound(merged, delta, add=False)
    if not _adding_is_cheaper(merged, delta, upper):
        upper = max(upper, _bound(merged, delta, add=True))
    upper = min(upper, unsampled)
    return Epsilon(upper, delta=delta, lower=partial(_lower, merged, delta, upper))


def _merged(parts: Mapping[Release, int]) -> dict[Release, int]:
    result: dict[Release, int] = {}
    for release, times in parts.items():
        release = Release(min(release.sigma, FINEST), release.rate)
        result[release] = result.get(release, 0) + times
    return result


def _adding_is_cheaper(parts: dict[Release, int], delta: float, point: float) -> bool:
    """Whether a cheap certificate shows that the add direction needs at most epsilon = ``point``."""
    sampled = all(release.rate < 1.0 for release in parts)
    if sampled and -sum(times * math.log1p(-release.rate) for release, times in parts.items()) <= point:
        return True  # adding a record moves no loss by more than -log(1 - rate)
    if not 0.0 < point < math.inf:
        return False
    steps = sum(parts.values())
    cut = cut_of(steps, delta)
    tilt = min(tilt_at(quadrature(parts, cut, add=True), point), 1e4)
    step = math.sqrt(2000.0 * TOLERANCE * point / (steps * (1.0 + tilt)))
    ranges = [support(release, cut) for release in parts]
    step = _round_step(max(step, 16.0 * max(high - low for low, high in ranges) / MAX_CELLS))
    exponent = -tilt * point + tilt * math.log(tilt) - (1.0 + tilt) * math.log1p(tilt)
    for release, times in parts.items():
        masses = upper_masses(reverse(remove_cells(release, step, cut), step), step)
        exponent += times * masses.log_moment(tilt, step)
    exponent += steps * STEP_ERROR + tilt * _shift(parts, cut)
    return bool(exponent <= _charged(delta, steps, cut))


def _round_step(step: float) -> float:
    """Few distinct grids, so that cells can be reused."""
    return float(2.0 ** (math.floor(2.0 * math.log2(step)) / 2.0))


def _charged(delta: float, steps: int, cut: float) -> float:
    """log of delta less what the cut tails may hold."""
    return math.log(delta - 2.0 * steps * math.exp(float(log_ndtr(-cut))))


def _shift(parts: dict[Release, int], cut: float) -> float:
    """What rounding of grid losses and of the loss function may add to the total loss."""
    total = 0.0
    for release, times in parts.items():
        span = max(map(abs, support(release, cut))) + abs(math.log(release.rate))
        total += times * 8.0 * UNIT * (4.0 + span)
    return total


def _mu(parts: Mapping[Release, int]) -> float:
    return math.hypot(*(math.sqrt(times) / release.sigma for release, times in parts.items()))


def _lower(parts: dict[Release, int], delta: float, upper: float) -> float:
    """Best of grids that are refined until the bracket is tight enough; one direction is enough from below."""
    best = 0.0
    for refine in (1.0, 2.0, 4.0, 8.0):
        best = max(best, _bound(parts, delta, add=False, upper=False, refine=refine))
        if best >= upper * (1.0 - GAP):
            break
    return best


def cut_of(steps: int, delta: float) -> float:
    """Where single-step tails are cut: all steps together then leave 1e-7 delta, which is charged to delta."""
    return tail_quantile(math.log(delta) - math.log(steps) - 17.0)


def saddle(law: Quadrature, delta: float) -> tuple[float, float]:
    """(epsilon, tilt) by the saddle-point approximation of delta (Alghamdi et al. 2022); steers, never certifies."""

    def excess(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        value, mean, variance = law.cumulants(tilt)
        point = mean - 1.0 / tilt - 1.0 / (1.0 + tilt)
        curvature = variance + 1.0 / tilt**2 + 1.0 / (1.0 + tilt) ** 2
        log_delta = value - tilt * point - log_tilt - math.log1p(tilt) - 0.5 * math.log(2.0 * math.pi * curvature)
        return log_delta - math.log(delta)

    low, high = 0.0, 4.0
    while low > -30.0 and excess(low) < 0.0:
        low, high = low - 4.0, low
    while high < 30.0 and excess(high) > 0.0:
        low, high = high, high + 4.0
    root = float(brentq(excess, low, high, xtol=1e-6)) if excess(low) > 0.0 > excess(high) else low
    tilt = math.exp(root)
    point = law.cumulants(tilt)[1] - 1.0 / tilt - 1.0 / (1.0 + tilt)
    return (point, tilt) if point > 0.0 else (0.0, tilt_at(law, 0.0))


def tilt_at(law: Quadrature, point: float) -> float:
    """Tilt that centres the composed loss on epsilon = ``point``."""

    def gap(log_tilt: float) -> float:
        tilt = math.exp(log_tilt)
        return law.cumulants(tilt)[1] - 1.0 / tilt - 1.0 / (1.0 + tilt) - point

    low, high = -30.0, 30.0
    if gap(high) < 0.0:
        return math.exp(high)
    return math.exp(float(brentq(gap, low, high, xtol=1e-6)))


def _bound(parts: dict[Release, int], delta: float, *, add: bool, upper: bool = True, refine: float = 1.0) -> float:
    """Certified epsilon of one direction: inf (upper) or 0 (lower) if it cannot be established."""
    steps = sum(parts.values())
    cut = cut_of(steps, delta)
    law = quadrature(parts, cut, add=add)
    point, tilt = saddle(law, delta)
    for _ in range(6):
        found = _evaluate(parts, delta, law, cut, point, tilt, add=add, upper=upper, refine=refine)
        spread = math.sqrt(law.cumulants(tilt)[2])
        if found is not None and abs(found - point) <= spread + 1.0 / tilt:
            return found
        point = point + spread + 1.0 / tilt if found is None else found
        tilt = tilt_at(law, point)
    return found if found is not None else (math.inf if upper else 0.0)


def _evaluate(
    parts: dict[Release, int], delta: float, law: Quadrature, cut: float, point: float, tilt: float,
    *, add: bool, upper: bool, refine: float,
) -> float | None:  # fmt: skip
    steps = sum(parts.values())
    value, _, variance = law.cumulants(tilt)
    spread = math.sqrt(variance)
    tails = [
        min(
            ((law.cumulants(tilt + side * t)[0] - value + TAIL) / t, t)
            for t in (10.0 / spread * 2.0**-halving for halving in range(10))
        )
        for side in (1.0, -1.0)
    ]
    ranges = [support(release, cut) for release in parts]
    if not upper and max(max(high, high - low) for low, high in ranges) > MAX_LOSS:
        return 0.0  # ratios beyond floating point: no lower bound is claimed for such little noise
    bottom, top = min(-tails[1][0], max(point - 2.0 / tilt, 0.0)), max(tails[0][0], point + 1.0 / tilt)
    step = math.sqrt(12.0 * TOLERANCE * max(point, 0.01 * spread) / (steps * (1.0 + tilt))) / refine
    step = max(step, max(high - low for low, high in ranges) / MAX_CELLS, 1.1 * (top - bottom) / MAX_WINDOW)
    step = _round_step(step)
    start = math.floor(bottom / step) - 2
    size = next_fast_len(math.ceil(top / step) + 3 - start, real=True)
    window = Window(tilt, tails[0][1], tails[1][1], start, size)
    missing = 0.0

    def discretised(release: Release) -> Masses:
        nonlocal missing
        cells = remove_cells(release, step, cut)
        if add:
            cells = reverse(cells, step)
        if upper:
            return upper_masses(cells, step)
        masses, slack = lower_masses(cells, step)
        missing += slack * parts[release]
        return masses

    composed = convolve(((discretised(release), times) for release, times in parts.items()), step, window)
    log_delta = _charged(delta, steps, cut) if upper else math.log(delta + missing)
    found = solve(composed, step, window, point, log_delta, upper=upper)
    if found is None:
        return None
    return max(0.0, found + _shift(parts, cut) if upper else found - _shift(parts, cut))
