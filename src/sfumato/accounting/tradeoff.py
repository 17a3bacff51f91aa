"""What an attacker can do: advantage, detection rate and the trade-off curve, all read off delta(epsilon).

For every epsilon, a test that tells a record's presence apart with false-positive rate a has a true-positive rate of
at most delta + e^epsilon a, and of at most 1 - e^-epsilon (1 - delta - a) (Wasserman & Zhou 2010; Dong, Roth & Su
2022). delta(epsilon) covers both directions, so the bounds hold whichever neighbour is the null hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from scipy.optimize import minimize_scalar
from scipy.special import ndtri

from ..errors import ConfigurationError
from .budget import number, probability
from .charges import needs_renyi
from .events import Event
from .pld import delta
from .renyi import delta_renyi

KNOTS = 24  # of a whole curve; between them it loses at most (their distance)^2 / 8, relatively
SCAN = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
CLOSE = 4e-3  # how well, relatively, the best epsilon is located; the rate then is good to a square of that


def advantage(events: Mapping[Event, int]) -> float:
    """Certified upper bound on the advantage (true- less false-positive rate) of any membership test.

    It equals delta at epsilon 0, the total variation between the outputs on neighbours. 0 if nothing was released.
    Raises ConfigurationError as :func:`compose`.
    """
    return _Curve(events).at(0.0)


def true_positive_rate(events: Mapping[Event, int], *, false_positive_rate: float) -> float:
    """Certified upper bound on the detection rate of any membership test at ``false_positive_rate`` in (0, 1).

    Never below ``false_positive_rate``, which guessing reaches. Raises ConfigurationError as :func:`compose`.
    """
    return _Curve(events).rate(probability("false_positive_rate", false_positive_rate))


def trade_off(events: Mapping[Event, int], false_positive_rates: Iterable[float]) -> list[float]:
    """Certified upper bounds on the detection rate at each of ``false_positive_rates`` (each in [0, 1])."""
    rates = [number("false_positive_rates", value) for value in false_positive_rates]
    if outside := [value for value in rates if not 0.0 <= value <= 1.0]:
        raise ConfigurationError(
            f"false_positive_rates must lie in [0, 1], got {outside[0]!r}.",
            found=outside[0],
            where="false_positive_rates",
        )
    curve = _Curve(events)
    inner = [value if value <= 0.5 else 1.0 - value for value in rates if 0.0 < value < 1.0]
    if inner:
        curve.rate(min(inner))
        last = max(curve.known)
        for k in range(KNOTS):
            curve.at(last * k / KNOTS)
    return [curve.best(value) for value in rates]


class _Curve:
    """delta(epsilon) of ``events``, computed where it is asked for and kept."""

    def __init__(self, events: Mapping[Event, int]) -> None:
        self.events = dict(events)
        self.known: dict[float, float] = {}
        self._delta = delta_renyi if needs_renyi(events) else None

    def at(self, epsilon: float) -> float:
        if epsilon not in self.known:
            found = delta(self.events, epsilon=epsilon) if self._delta is None else self._delta(self.events, epsilon)
            self.known[epsilon] = min(1.0, found)
        return self.known[epsilon]

    def best(self, a: float) -> float:
        """Least bound from what is known so far."""
        bounds = (min(_rising(a, e, d), _falling(a, e, d)) for e, d in self.known.items())
        return min(1.0, max(a, min(bounds, default=1.0)))

    def rate(self, a: float) -> float:
        """Least bound over all epsilons."""
        at_zero = self.at(0.0)
        if at_zero <= 0.0:
            return a
        if at_zero >= 1.0 and self.at(1.0) >= 1.0:
            return 1.0
        # Tangents of slope e^epsilon touch the curve left of where its slope is 1, their mirror images right of it.
        bound = _rising if a <= 0.5 * (1.0 - at_zero) else _falling
        # A Gaussian of this advantage has there the slope exp(z mu - mu^2 / 2).
        mu = 2.0 * float(ndtri(0.5 * (1.0 + min(at_zero, 1.0 - 1e-12))))
        slope = -float(ndtri(a)) if bound is _rising else float(ndtri(a)) + mu
        first = min(max(slope * mu - 0.5 * mu * mu, 0.01 * mu), 700.0)
        while bound is _falling and self.at(first) >= 1.0 - a and first < 700.0:
            first *= 1.5

        def height(epsilon: float) -> float:
            value = bound(a, epsilon, self.at(epsilon))
            return math.log(max(value, 1e-300)) if bound is _rising else -math.log(max(1.0 - value, 1e-300))

        def last() -> float:
            # No epsilon beyond this does better than what is known: the line alone lies above it there.
            known = self.best(a)
            return math.log(known / a) if bound is _rising else math.log((1.0 - a) / max(1.0 - known, 1e-300))

        height(first)
        height(0.0)
        whole = last()
        for share in SCAN:  # small rates of strong releases put the best epsilon far from a Gaussian's
            if share * whole < last():
                height(share * whole)
        heights = sorted((epsilon, height(epsilon)) for epsilon in self.known)
        best = min(range(len(heights)), key=lambda k: heights[k][1])
        low = heights[max(best - 1, 0)][0]
        high = heights[best + 1][0] if best + 1 < len(heights) else max(last(), heights[best][0])
        if high > low:
            minimize_scalar(height, bounds=(low, high), method="bounded", options={"xatol": CLOSE * high})
        return self.best(a)


def _rising(a: float, epsilon: float, delta: float) -> float:
    return delta + math.exp(min(epsilon, 700.0)) * a


def _falling(a: float, epsilon: float, delta: float) -> float:
    return 1.0 - math.exp(-epsilon) * (1.0 - delta - a)
