"""Noise for a target epsilon, and how many more steps a budget allows: both end on the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from scipy.optimize import brentq

from ..errors import ConfigurationError
from .budget import count, positive, probability, rate
from .events import Event
from .losses import Release, quadrature
from .pld import certify, cut_of, releases, saddle

MIN_NOISE, MAX_NOISE = 1e-2, 1e8
MAX_STEPS = 10**9
CLOSE = 1e-5  # calibration stops this close below the target, relative to epsilon


def noise_multiplier(*, target_epsilon: float, target_delta: float, sample_rate: float, steps: int) -> float:
    """Smallest noise multiplier found whose certified epsilon is at most ``target_epsilon`` (never above it).

    Returns 0.0 for no steps and at least 0.01 otherwise. Raises ConfigurationError on bad arguments.
    """
    target = positive("target_epsilon", target_epsilon)
    delta = probability("target_delta", target_delta)
    q, times = rate("sample_rate", sample_rate), count("steps", steps)
    if times == 0:
        return 0.0

    def certified(sigma: float) -> float:
        return float(certify({Release(sigma, q): times}, delta))

    def steered(log_sigma: float) -> float:
        return math.log(max(_estimate({Release(math.exp(log_sigma), q): times}, delta), 1e-300) / target)

    low = high = 0.0
    while steered(high) > 0.0 and high < math.log(MAX_NOISE):
        low, high = high, high + 1.0
    while steered(low) <= 0.0 and low > math.log(MIN_NOISE):
        low, high = max(low - 1.0, math.log(MIN_NOISE)), low
    sigma = math.exp(float(brentq(steered, low, high, xtol=1e-5)) if steered(low) > 0.0 > steered(high) else low)
    return _descend(certified, sigma, target)


def _descend(certified: Callable[[float], float], sigma: float, target: float) -> float:
    """Secant in log-log from a good start until just below the target; the value returned has been certified."""
    above = MIN_NOISE
    safe = math.inf
    value = certified(sigma)
    slope = -1.0
    for _ in range(40):
        if value <= target:
            safe = min(safe, sigma)
            if value >= target * (1.0 - CLOSE) or sigma <= MIN_NOISE:
                break
        else:
            above = max(above, sigma)
        if safe <= above * (1.0 + 1e-6):
            break
        goal = target * (1.0 - 0.3 * CLOSE)
        ratio = value / goal if value > 0.0 else 0.5
        proposal = sigma * ratio ** (-1.0 / slope) if math.isfinite(value) else sigma * 2.0
        if not above < proposal < safe:
            proposal = math.sqrt(above * safe) if math.isfinite(safe) else 2.0 * sigma
        previous, before = sigma, value
        sigma, value = proposal, certified(proposal)
        if sigma != previous and 0.0 < value < math.inf and 0.0 < before < math.inf and value != before:
            slope = min(math.log(value / before) / math.log(sigma / previous), -0.3)
    if not math.isfinite(safe):
        raise ConfigurationError(
            f"no noise multiplier up to {MAX_NOISE:g} reaches epsilon {target!r}.",
            found=target,
            where="target_epsilon",
            fix="raise the target, lower sample_rate or take fewer steps.",
        )
    return safe


def max_steps(spent: Mapping[Event, int], event: Event, *, epsilon: float, delta: float) -> int:
    """How many more ``event`` fit beside ``spent`` so that the certified epsilon stays <= ``epsilon``.

    0 if none does; at most 10**9, which is also the answer for an event that costs nothing.
    """
    epsilon, delta = positive("epsilon", epsilon), probability("delta", delta)
    base = releases(spent)
    extra = releases({event: 1}) if event.mechanism != "covered" else {}
    if not extra:
        releases({**spent, event: spent.get(event, 0) + 1})
        return MAX_STEPS if certify(base, delta) <= epsilon else 0
    (release,) = extra
    releases({**spent, event: spent.get(event, 0) + 1})

    def total(n: int) -> dict[Release, int]:
        return {**base, release: base.get(release, 0) + n}

    def fits(n: int) -> bool:
        return n <= 0 or certify(total(n), delta) <= epsilon

    if release.sigma == 0.0 or not fits(1):
        return 0
    # Steer with the cheap estimate, then certify around it.
    low, high = 1, 2
    while high < MAX_STEPS and _estimate(total(high), delta) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _estimate(total(middle), delta) <= epsilon else (low, middle)
    guess, stride = min(low, MAX_STEPS), max(1, low // 4096)
    if fits(guess):
        low, high = guess, guess + stride
        while high < MAX_STEPS and fits(high):
            stride *= 2
            low, high = high, high + stride
        high = min(high, MAX_STEPS + 1)
    else:
        low, high = guess - stride, guess
        while not fits(low):
            stride *= 2
            low, high = max(low - stride, 1), low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _estimate(parts: dict[Release, int], delta: float) -> float:
    """Uncertified epsilon by the saddle point, worst of both directions."""
    parts = {release: times for release, times in parts.items() if times}
    if any(release.sigma == 0.0 for release in parts):
        return math.inf
    if all(release.rate == 1.0 for release in parts):
        return float(certify(parts, delta))
    cut = cut_of(sum(parts.values()), delta)
    return max(saddle(quadrature(parts, cut, add=add), delta)[0] for add in (False, True))
