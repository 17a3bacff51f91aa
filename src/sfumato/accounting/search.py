"""The largest whole number that a monotone condition admits, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable

STRIDE = 1.4  # no move is longer, in logarithms: a first slope may be far off, and far points are slow to evaluate


def largest(
    excess: Callable[[int], float], guess: int, low: int, high: int, *, grain: float | None, close: int = 1
) -> int:
    """Largest k in [low, high] with ``excess(k)`` <= 0 (it does not fall with k), or low - 1 if there is none.

    The result has been evaluated; ``result + close`` or an earlier number, unless beyond ``high``, was found to exceed.
    Secants are drawn over log k, or over ``grain`` * k, where ``excess`` is nearly straight.
    """
    good, bad = low - 1, high + 1
    k, slope, near, before = min(max(guess, low), high), 1.0, 0, (math.nan, math.nan)
    evaluations = 0
    while bad - good > close:
        found = excess(k)
        evaluations += 1
        good, bad = (k, bad) if found <= 0.0 else (good, k)
        if bad - good <= close:
            break
        place = math.log(k) if grain is None else grain * k
        if math.isfinite(found) and place != before[0]:
            change = (found - before[1]) / (place - before[0])
            slope = change if change > 1e-9 else slope
            before = place, found
        move = -found / slope if math.isfinite(found) else math.copysign(STRIDE, -found)
        move = min(max(move, -STRIDE), STRIDE)
        aim = math.floor(k * math.exp(move) if grain is None else k + move / grain)
        # At the root step over it, by more each time that this does not reach the other side.
        jump = max(1, close // 2) << near
        if abs(aim - k) <= jump:
            aim = k + (jump if found <= 0.0 else -jump)
            near += 1
        if not good < aim < bad or evaluations > 40:
            aim = _between(good, bad, low, high)
        k = aim
    return good


def _between(good: int, bad: int, low: int, high: int) -> int:
    """Strictly between; the ends of the range are tried themselves before what lies next to them."""
    if good < low < bad:
        return low
    if bad > high > good:
        return high
    return (good + bad) // 2
