"""Certified epsilon and delta of any mix of releases whose privacy loss has a known law."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from .bounds import block, chernoff, epsilon_bound, log_delta_bound
from .budget import count, nonnegative, probability, rate
from .charges import charges, needs_renyi, releases
from .events import Event
from .gaussian import gaussian_epsilon, gaussian_log_delta
from .pairs import Pair, Release, coarser, gaussian_reach, largest_loss, presence, symmetric

GAP = 1e-3  # a bracket this narrow, relative to epsilon, needs no finer grid
COARSEST = 5e-3  # noise multiplier below which no grid tells more than the unsampled bound
NEAR = 0.01  # a count this little into a block of counts is compared with the block before


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


def epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, adjacency: str = "add-remove"
) -> Epsilon:
    """Epsilon of ``steps`` Poisson-subsampled Gaussian releases, worst of both directions.

    ``noise_multiplier`` is noise std over clipping norm (0 gives inf); ``adjacency`` add-remove, zero-out or
    replace-one. Raises ConfigurationError on bad arguments.
    """
    event = Event(
        "poisson-gaussian",
        nonnegative("noise_multiplier", noise_multiplier),
        rate("sample_rate", sample_rate),
        adjacency,
    )
    return compose({event: count("steps", steps)}, delta=delta)


def compose(events: Mapping[Event, int], *, delta: float) -> Epsilon:
    """Epsilon of all ``events`` ({event: how often}) together; nothing released costs 0.

    Add-remove and zero-out events may meet: a Poisson sample cannot tell an absent record from a zeroed one, so the
    result then holds for zero-out. Events of different privacy units, or of replace-one and another adjacency, may
    not. Events without a known law of the privacy loss, and adaptively chosen ones, are accounted for by Rényi
    divergences, all together (:mod:`.renyi`). Raises ConfigurationError for what cannot be composed.
    """
    delta = probability("delta", delta)
    if needs_renyi(events):
        from .renyi import compose_renyi

        return compose_renyi(charges(events), delta)
    return certify(releases(events), delta)


def delta(events: Mapping[Event, int], *, epsilon: float) -> float:
    """Certified upper bound on delta at ``epsilon`` >= 0, worst of both directions, accurate relative to delta.

    At ``epsilon`` 0 it bounds the total variation, the membership advantage. Raises ConfigurationError as
    :func:`compose`, and for events that have no known law of the privacy loss.
    """
    return math.exp(_log_delta(releases(events), nonnegative("epsilon", epsilon), upper=True))


def delta_lower(events: Mapping[Event, int], *, epsilon: float) -> float:
    """Certified lower bound on the same delta."""
    return math.exp(_log_delta(releases(events), nonnegative("epsilon", epsilon), upper=False))


def certify(parts: Mapping[Pair, int], delta: float) -> Epsilon:
    """Upper bound now, lower bound on demand, for validated releases."""
    if any(times and coarser(pair) != pair for pair, times in parts.items()):
        return Epsilon(_certified(parts, delta), delta=delta, lower=0.0)  # less noise is assumed: an upper bound only
    return _certified(parts, delta)


def _certified(parts: Mapping[Pair, int], delta: float) -> Epsilon:
    parts = _happened(parts)
    if not parts:
        return Epsilon(0.0, delta=delta, lower=0.0)
    if any(pair.sigma == 0.0 for pair in parts):
        return Epsilon(math.inf, delta=delta, lower=math.inf)
    if sum(times * presence(pair) for pair, times in parts.items()) <= delta * (1.0 - 1e-9):
        return Epsilon(0.0, delta=delta, lower=0.0)  # the two laws differ with probability at most delta
    cap = _cap(parts, delta)
    if _plain(parts):
        return Epsilon(cap, delta=delta, lower=gaussian_epsilon(_mu(parts), delta, upper=False))
    parts = _joined(parts)
    if min(pair.sigma for pair in parts) < COARSEST:
        return Epsilon(cap, delta=delta, lower=0.0)
    upper = min(cap, max(_upper(each, delta) for each in _never_less(parts)))
    return Epsilon(upper, delta=delta, lower=partial(_lower, parts, delta, upper))


def _upper(parts: dict[Pair, int], delta: float) -> float:
    bound = epsilon_bound(parts, delta, add=False)
    if all(symmetric(pair) for pair in parts):
        return bound
    cost = sum(times * largest_loss(pair, add=True) for pair, times in parts.items())
    if cost <= bound or (0.0 < bound < math.inf and chernoff(parts, delta, add=True, point=bound)):
        return bound
    return max(bound, epsilon_bound(parts, delta, add=True))


def _never_less(parts: dict[Pair, int]) -> list[dict[Pair, int]]:
    """``parts``, and smaller ones on the other side of a change of grid, which must not be reported to cost more."""
    result = [parts]
    for pair, times in parts.items():
        before = block(times)[0]
        if 0 < times - before <= NEAR * times:
            result.append({**parts, pair: before})
    return result


def _lower(parts: dict[Pair, int], delta: float, upper: float) -> float:
    """Best of grids that are refined until the bracket is tight enough; one direction is enough from below."""
    best = 0.0
    for refine in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
        best = max(best, epsilon_bound(parts, delta, add=False, upper=False, refine=refine))
        if best >= upper * (1.0 - GAP):
            break
    return best


def _log_delta(parts: Mapping[Pair, int], epsilon: float, *, upper: bool) -> float:
    if not upper and any(times and coarser(pair) != pair for pair, times in parts.items()):
        return -math.inf
    parts = _happened(parts)
    if not parts:
        return -math.inf
    if any(pair.sigma == 0.0 for pair in parts):
        return 0.0
    if _plain(parts):
        return gaussian_log_delta(epsilon, _mu(parts), upper=upper)
    known = math.log(min(1.0, sum(times * presence(pair) for pair, times in parts.items()))) if upper else 0.0
    reach = [gaussian_reach(pair) for pair in parts]
    if upper and None not in reach:
        known = min(known, gaussian_log_delta(epsilon, _mu(parts), upper=True))
    if min(pair.sigma for pair in parts) < COARSEST:
        return known if upper else -math.inf
    parts = _joined(parts)
    both = (False,) if all(symmetric(pair) for pair in parts) else (False, True)
    found = max(log_delta_bound(parts, epsilon, add=add, upper=upper) for add in both)
    return min(found, known)


def _happened(parts: Mapping[Pair, int]) -> dict[Pair, int]:
    """Without what never happened, in one order, so that one question has one answer."""
    result: dict[Pair, int] = {}
    for pair, times in parts.items():
        if times:
            pair = coarser(pair)
            result[pair] = result.get(pair, 0) + times
    return dict(sorted(result.items(), key=lambda item: (type(item[0]).__name__, repr(item[0]))))


def _plain(parts: Mapping[Pair, int]) -> bool:
    return all(isinstance(pair, Release) and pair.rate == 1.0 for pair in parts)


def _joined(parts: dict[Pair, int]) -> dict[Pair, int]:
    """Plain Gaussians as one."""
    plain: dict[Pair, int] = {p: times for p, times in parts.items() if isinstance(p, Release) and p.rate == 1.0}
    rest = {pair: times for pair, times in parts.items() if pair not in plain}
    return {**rest, Release(1.0 / _mu(plain), 1.0): 1} if plain else rest


def _mu(parts: Mapping[Pair, int]) -> float:
    """Shift over noise std of all that a plain Gaussian dominates."""
    reach = ((gaussian_reach(pair), times) for pair, times in parts.items())
    return math.hypot(*(math.sqrt(times) * each for each, times in reach if each is not None))


def _cap(parts: Mapping[Pair, int], delta: float) -> float:
    """An upper bound that ignores all sampling: one plain Gaussian, and pure differential privacy for the rest."""
    rest = {pair: times for pair, times in parts.items() if gaussian_reach(pair) is None}
    pure = sum(n * max(largest_loss(pair, add=add) for add in (False, True)) for pair, n in rest.items())
    return gaussian_epsilon(_mu(parts), delta, upper=True) + pure
